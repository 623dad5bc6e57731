"""Token stores: the tokens of many documents in one memory-mapped file, made once and found again by their content."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dstrain.data.sources import Source
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

FORMAT_VERSION = 2  # raise it with every change of what a store or a sample holds
_JOB_CHARACTERS = 2**18  # text per job: large enough to hide the cost of a job, small enough to bound memory
_LOG_EVERY_S = 10.0
logger = logging.getLogger(__name__)


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
        if _is_whole(folder):
            return folder
        logger.warning("%s is damaged: it is made again", folder)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob("*.tmp-*"):
        if time.time() - leftover.stat().st_mtime > 86_400:  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
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


def _is_whole(folder: Path) -> bool:
    try:
        facts = json.loads((folder / "facts.json").read_text())
        size = (folder / "tokens.bin").stat().st_size
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        return size == facts["num_tokens"] * np.dtype(facts["dtype"]).itemsize and offsets[-1] == facts["num_tokens"]
    except (OSError, ValueError, KeyError):
        return False


@dataclass
class _Segment:
    """A piece of a document's text on its way to tokens."""

    text: str
    starts_document: bool
    ends_document: bool
    starts_completion: bool = False


class _Writer:
    """Lays the tokens of segments end to end in a file and notes where documents and completions begin."""

    def __init__(self, file: BinaryIO, encoder: TextEncoder):
        self._file = file
        self._prefix, self._suffix = encoder.affixes
        self._completion_suffix = encoder.completion_suffix
        self._start = 0
        self.position = 0
        self.offsets = [0]
        self.completions: list[int] = []

    def write(self, segments: list[_Segment], arrays: list[np.ndarray]) -> None:
        out = []
        for segment, ids in zip(segments, arrays, strict=True):
            if segment.starts_document:
                self._start = self.position
                out.append(self._prefix)
                self.position += len(self._prefix)
            if segment.starts_completion:
                self.completions.append(self.position - self._start)
            out.append(ids)
            self.position += len(ids)
            if segment.ends_document:
                suffix = self._completion_suffix if segment.starts_completion else self._suffix
                out.append(suffix)
                self.position += len(suffix)
                self.offsets.append(self.position)
        np.concatenate(out).tofile(self._file)


def write_store(folder: Path, source: Source, encoder: TextEncoder) -> None:
    """Tokenize the source's documents on all cores into `folder`, in order, in bounded memory."""
    facts = {"source": source.description, "dtype": encoder.dtype.name, "num_bytes": 0, "num_empty_documents": 0}
    hashes: list[int] = []
    began = logged = time.monotonic()
    with open(folder / "tokens.bin", "wb") as file:
        writer = _Writer(file, encoder)
        for segments, arrays in _encode_in_threads(_segments(source, encoder, hashes, facts), encoder):
            writer.write(segments, arrays)
            if time.monotonic() - logged > _LOG_EVERY_S:
                logged = time.monotonic()
                logger.info("tokenizing %s: %d documents, %d tokens", source.description, len(hashes), writer.position)
        file.flush()
        os.fsync(file.fileno())
    if writer.position == 0:
        raise UserError(f"{source.description} holds no text: name files or a column with text in them")
    _save(folder / "offsets.npy", np.asarray(writer.offsets, np.int64))
    _save(folder / "hashes.npy", np.asarray(hashes, np.uint64))
    if writer.completions:
        _save(folder / "completions.npy", np.asarray(writer.completions, np.int64))
    facts |= {"num_documents": len(hashes), "num_tokens": writer.position}
    facts["tokenization_s"] = round(time.monotonic() - began, 3)
    with open(folder / "facts.json", "w") as text:
        json.dump(facts, text, indent=1)
        text.flush()
        os.fsync(text.fileno())


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _segments(source: Source, encoder: TextEncoder, hashes: list[int], facts: dict) -> Iterator[_Segment]:
    """Documents as segments; notes each document's hash, and counts bytes and empty documents."""
    width = 0
    for document in source.documents():
        width = width or len(document)
        if len(document) != width:
            raise UserError(f"{source.description} mixes plain text with prompt and completion: train on one kind")
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
            pieces = encoder.split(document[0], _JOB_CHARACTERS)
            for i, piece in enumerate(pieces, 1):
                yield _Segment(piece, i == 1, i == len(pieces))


def _encode_in_threads(
    segments: Iterator[_Segment], encoder: TextEncoder
) -> Iterator[tuple[list[_Segment], list[np.ndarray]]]:
    pending: deque = deque()
    with ThreadPoolExecutor(encoder.num_threads) as pool:
        for job in _jobs(segments):
            pending.append((job, pool.submit(encoder.encode, [segment.text for segment in job])))
            if len(pending) > 2 * encoder.num_threads:
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
