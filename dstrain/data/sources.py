"""Where documents come from: the built-in corpus, local files, the hub.

A source yields documents: `(text,)`, or `(prompt, completion)` where only the completion carries loss.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

Document = tuple[str] | tuple[str, str]


class Source(Protocol):
    """`sha256` is of the content alone: the same bytes under another name are the same data."""

    description: str

    @property
    def sha256(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...


# Tests, programs with example data, and what differs between builds of one and the same Python.
_NOT_CORPUS = {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class BuiltinCorpus:
    """The Python standard library's own sources, one document a file: about 600 files, 11 MB, on every machine."""

    def __init__(self, max_documents: int | None = None):
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.max_documents = max_documents
        self.description = f"built-in corpus: sources of Python {sysconfig.get_python_version()}'s standard library"

    @cached_property
    def _files(self) -> list[tuple[str, bytes]]:
        names = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*.py"))
        files = []
        for name in names:
            parts = name.split("/")
            if _NOT_CORPUS.isdisjoint(parts) and not any(part.startswith(_GENERATED) for part in parts):
                files.append((name, (self.root / name).read_bytes()))
        return files[: self.max_documents]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(b"builtin")
        for name, content in self._files:
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        for name, content in self._files:
            try:
                yield (content.decode("utf-8"),)
            except UnicodeDecodeError:  # a handful of files declare another encoding
                yield (content.decode("latin-1"),)
