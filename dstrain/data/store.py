"""Token stores: the tokens of many documents in one memory-mapped file, made once and found again by their content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dstrain.data.sources import Document, Source
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

FORMAT_VERSION = 1
_JOB_CHARACTERS = 2**18  # text per job: large enough to hide the cost of a job, small enough to bound memory


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens.

    tokens: uint16 or uint32 [num_tokens], memory-mapped; offsets: int64 [num_documents + 1] into tokens;
    hashes: uint64 [num_documents] of each document's text; completions: int64 [num_documents], the position inside
    the document where its completion begins, or None for plain text; facts: what `write_store` counted.
    """

    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    completions: np.ndarray | None
    facts: dict

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        facts = json.loads((folder / "facts.json").read_text())
        completions = folder / "completions.npy"
        return cls(
            folder=folder,
            tokens=np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r", shape=(facts["num_tokens"],)),
            offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
            hashes=np.load(folder / "hashes.npy", mmap_mode="r"),
            completions=np.load(completions, mmap_mode="r") if completions.exists() else None,
            facts=facts,
        )


def store_key(source: Source, encoder: TextEncoder) -> str:
    content = f"{FORMAT_VERSION}\n{source.sha256}\n{encoder.sha256}"
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def find_or_write_store(cache_dir: Path, source: Source, encoder: TextEncoder) -> Path:
    """Folder of the source's tokens, made now if it is not in the cache. Appears whole or not at all."""
    folder = cache_dir / "tokens" / store_key(source, encoder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        write_store(scratch, source, encoder)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another run made the same store meanwhile
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@dataclass
class _Segment:
    """A piece of a document's text on its way to tokens."""

    text: str
    starts_document: bool
    ends_document: bool
    starts_completion: bool = False


def write_store(folder: Path, source: Source, encoder: TextEncoder) -> None:
    """Tokenize the source's documents on all cores into `folder`, in order, in bounded memory."""
    facts = {"source": source.description, "dtype": encoder.dtype.name, "num_bytes": 0, "num_empty_documents": 0}
    hashes: list[int] = []
    offsets, completions = [0], []
    prefix, suffix = encoder.affixes
    segments = _segments(source.documents(), hashes, facts)
    position = start = 0
    with open(folder / "tokens.bin", "wb") as file:
        for job, arrays in _encode_in_threads(segments, encoder):
            out = []
            for segment, ids in zip(job, arrays, strict=True):
                if segment.starts_document:
                    start = position
                    out.append(prefix)
                    position += len(prefix)
                if segment.starts_completion:
                    completions.append(position - start)
                out.append(ids)
                position += len(ids)
                if segment.ends_document:
                    out.append(suffix)
                    position += len(suffix)
                    offsets.append(position)
            np.concatenate(out).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    if position == 0:
        raise UserError(f"{source.description} holds no text: name files or a column with text in them")
    np.save(folder / "offsets.npy", np.asarray(offsets, np.int64))
    np.save(folder / "hashes.npy", np.asarray(hashes, np.uint64))
    if completions:
        np.save(folder / "completions.npy", np.asarray(completions, np.int64))
    facts |= {"num_documents": len(hashes), "num_tokens": position}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def _segments(documents: Iterator[Document], hashes: list[int], facts: dict) -> Iterator[_Segment]:
    """Documents as segments; notes each document's hash, and counts bytes and empty documents."""
    for document in documents:
        if not document[-1].strip():
            facts["num_empty_documents"] += 1
            continue
        content = "\0".join(document).encode()
        hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        facts["num_bytes"] += len(content)
        if len(document) == 2:
            yield _Segment(document[0], True, False)
            yield _Segment(document[1], False, True, starts_completion=True)
        else:
            yield _Segment(document[0], True, True)


def _encode_in_threads(
    segments: Iterator[_Segment], encoder: TextEncoder
) -> Iterator[tuple[list[_Segment], list[np.ndarray]]]:
    workers = len(os.sched_getaffinity(0))
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in _jobs(segments):
            pending.append((job, pool.submit(encoder.encode, [segment.text for segment in job])))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()


def _jobs(segments: Iterator[_Segment]) -> Iterator[list[_Segment]]:
    job: list[_Segment] = []
    characters = 0
    for segment in segments:
        job.append(segment)
        characters += len(segment.text) + 1
        if characters >= _JOB_CHARACTERS:
            yield job
            job, characters = [], 0
    if job:
        yield job
