"""Where documents come from: the built-in corpus, local files, the hub."""

import difflib
import glob
import hashlib
import json
import os
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dstrain.arguments import DataArguments
from dstrain.data.columns import ColumnFlags, choose_shape
from dstrain.data.files import arrow_kind, file_kind, read_file
from dstrain.data.rows import BadRow, Row, check_document, read_row
from dstrain.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


class Source(Protocol):
    """Rows in a fixed order, those that cannot be used among them.

    sha256: of the content and of how it is read, not of names or places: the same bytes elsewhere are the same data.
    split_seeded: whether the held-out documents are drawn anew for each seed.
    """

    description: str
    split_seeded: bool

    @property
    def sha256(self) -> str: ...

    def documents(self) -> Iterator[Row | BadRow]: ...


def build_sources(dargs: DataArguments, cache_dir: Path) -> tuple[Source, Source | None]:
    """(training, validation or None) as the flags say. Raises UserError with every problem found."""
    problems: list[str] = []
    columns = ColumnFlags.of(dargs)
    train: Source | None = None
    validation: Source | None = None
    try:
        if dargs.dataset_name:
            train, validation = _hub_sources(dargs, cache_dir)
        elif dargs.train_file:
            files = find_files(dargs.train_file, "--train_file")
            train = FileSource(files, columns, dargs.max_train_samples, cache_dir)
        elif needing := columns.needing_columns:
            raise UserError(f"{needing[0]} is for data of your own: name them with --train_file or --dataset_name")
        else:
            train = BuiltinCorpus(dargs.max_train_samples)
    except UserError as error:
        problems += error.problems
    try:
        if dargs.validation_file:
            files = find_files(dargs.validation_file, "--validation_file")
            validation = FileSource(files, columns, None, cache_dir)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    assert train is not None
    return train, validation


# Tests, programs with example data, and what differs between builds of one and the same Python.
_NOT_CORPUS = {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class BuiltinCorpus:
    """The Python standard library's own sources, one document a file: about 600 files, 11 MB, on every machine.

    Its held-out documents are the same for every seed, so that figures of different runs can be compared.
    """

    split_seeded = False

    def __init__(self, max_documents: int | None = None):
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.max_documents = max_documents
        self.description = f"built-in corpus: standard library sources of Python {sysconfig.get_python_version()}"

    @cached_property
    def _files(self) -> list[Path]:
        files = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [n for n in subfolders if n not in _NOT_CORPUS and not n.startswith(_GENERATED)]
            files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(_GENERATED)]
        return sorted(files, key=lambda file: file.relative_to(self.root).parts)[: self.max_documents]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(b"builtin")
        for file in self._files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(self.root).as_posix()}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def documents(self) -> Iterator[Row | BadRow]:
        for file in self._files:
            with tokenize.open(file) as text:  # in the encoding that the file declares
                yield check_document(str(file), (text.read(),))


def find_files(patterns: list[str], flag: str) -> list[Path]:
    """Files, folders and globs -> files, in the order given and sorted inside each. Raises UserError.

    A folder stands for its files of a known suffix, at any depth; files of other suffixes need a glob or their name.
    """
    files: list[Path] = []
    problems = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and file_kind(p)[0] and not _hidden(p, path)]
            if not found:
                problems.append(f"{flag} {pattern} is a folder without .txt, .jsonl, .json, .csv or .parquet files")
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not found:
                problems.append(f"{flag} {pattern} matches no file{_similar_name(path)}")
        files += found
    repeated = sorted({str(p) for p in files if files.count(p) > 1}) if len(set(files)) < len(files) else []
    problems += [f"{flag} names {p} twice: it would be read twice" for p in repeated[:5]]
    if problems:
        raise UserError(problems)
    return files


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _similar_name(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f": did you mean {path.parent / close[0]}?" if close else ": check the path"


class FileSource:
    """Local files, one after another. See `files.py` for what is a document in each format."""

    split_seeded = True

    def __init__(self, files: list[Path], columns: ColumnFlags, max_documents: int | None, cache_dir: Path):
        self.files, self.columns, self.max_documents = files, columns, max_documents
        self._cache_dir = cache_dir
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        self.description = f"{files[0]}{more}"

    @cached_property
    def sha256(self) -> str:
        contents = [(file_kind(file), file_sha256(file, self._cache_dir)) for file in self.files]
        return hash_json(["files", contents, astuple(self.columns), self.max_documents])

    def documents(self) -> Iterator[Row | BadRow]:
        rows = (row for file in self.files for row in read_file(file, self.columns))
        return islice(rows, self.max_documents)


def file_sha256(path: Path, cache_dir: Path) -> str:
    """Hash of the file's bytes. Raises UserError when it cannot be read."""

    def compute() -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        return digest.hexdigest()

    try:
        return _remembered("file", [path], compute, cache_dir)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _remembered(what: str, files: list[Path], compute: Callable[[], str], cache_dir: Path) -> str:
    """The hash that `compute` makes of files, noted under their paths, sizes and times: a later start is quick."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    stamp = [what, *((name, status.st_size, status.st_mtime_ns) for name, status in stats)]
    memo = cache_dir / "hashes" / f"{hash_json(stamp)[:32]}.txt"
    if files and memo.exists():
        return memo.read_text()
    value = compute()
    # A file younger than two seconds may change again within the resolution of its time.
    if files and all(time.time() - status.st_mtime > 2 for _, status in stats):
        write_text(memo, value)
    return value


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def hash_json(value: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _hub_sources(dargs: DataArguments, cache_dir: Path) -> tuple[Source, Source | None]:
    name, config, columns = dargs.dataset_name, dargs.dataset_config_name, ColumnFlags.of(dargs)
    assert name is not None
    splits = load_hub(name, config)
    train = HubSource(name, splits["train"], "train", columns, dargs.max_train_samples, cache_dir)
    if "validation" not in splits:
        return train, None
    return train, HubSource(name, splits["validation"], "validation", columns, None, cache_dir)


def load_hub(name: str, config: str | None, *, streaming: bool = False) -> Any:
    """A dataset's splits by name, `train` among them; `IterableDataset`s when streaming. Raises UserError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name, config, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        raise UserError(
            f"--dataset_name {name}{f' ({config})' if config else ''} cannot be loaded ({reason}): "
            "name a hub dataset or a local folder in hub layout"
        ) from None
    if "train" not in splits:
        raise UserError(f"--dataset_name {name} has no split train: its splits are {', '.join(splits)}")
    return splits


class HubSource:
    """One split of a dataset of the hub, or of a local folder in hub layout, through the `datasets` library."""

    split_seeded = True

    def __init__(
        self,
        name: str,
        rows: "Dataset",
        split: str,
        columns: ColumnFlags,
        max_documents: int | None,
        cache_dir: Path,
    ):
        self._where, self._columns = f"{name} ({split})", columns
        kinds = {field.name: arrow_kind(field.type) for field in rows.features.arrow_schema}
        self._shape = choose_shape(f"--dataset_name {self._where}", kinds, columns)
        self._rows = rows.select_columns(list(self._shape.columns))
        self._max_documents, self._cache_dir = max_documents, cache_dir
        self.description = f"dataset {self._where}"

    @cached_property
    def sha256(self) -> str:
        files = [Path(file["filename"]) for file in self._rows.cache_files]
        content = _remembered(f"rows {self._shape.columns}", files, self._hash_rows, self._cache_dir)
        return hash_json(["hub", content, self._shape.columns, astuple(self._columns), self._max_documents])

    def _hash_rows(self) -> str:
        digest = hashlib.sha256()
        for batch in self._rows.iter(batch_size=1000):
            cells = [batch[column] for column in self._shape.columns]
            digest.update(json.dumps(cells, default=str).encode())  # messages may hold dates
        return digest.hexdigest()

    def documents(self) -> Iterator[Row | BadRow]:
        rows = islice(enumerate(self._rows, 1), self._max_documents)
        return (read_row(f"{self._where} row {number}", row, self._shape) for number, row in rows)
