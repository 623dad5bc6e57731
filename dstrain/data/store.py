"""Token stores: the tokens of many documents in one memory-mapped file, made once and found again by their content."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dstrain.data.rows import EMPTY
from dstrain.data.segments import JOB_CHARACTERS, RowRules, Segment, Segments, encode_segments
from dstrain.data.sources import Source
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

FORMAT_VERSION = 3  # raise it with every change of what a store or a sample holds
_COUNT_TOKENS = 2**20  # tokens whose labels are counted at once
_LOG_EVERY_S = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens.

    tokens: uint16 or uint32 [num_tokens], memory-mapped; offsets: int64 [num_documents + 1] into tokens;
    hashes: uint64 [num_documents] of each document's text; carries_loss: bool [num_tokens], memory-mapped, or None
    where every token does; facts: what `write_store` counted.
    """

    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    carries_loss: np.ndarray | None
    facts: dict

    @property
    def is_rows(self) -> bool:
        """Whether each document is a row of its own (prompts, chats), and not text to be cut into blocks."""
        return self.facts["kinds"] != ["text"]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def place(self, document: int) -> str:
        """File and line of a row."""
        with open(self.folder / "places.txt", encoding="utf-8") as file:
            return next(islice(file, document, None)).rstrip("\n")

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        facts = json.loads((folder / "facts.json").read_text())
        loss = folder / "carries_loss.bin"
        shape = (facts["num_tokens"],)
        return cls(
            folder=folder,
            tokens=np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r", shape=shape),
            offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
            hashes=np.load(folder / "hashes.npy", mmap_mode="r"),
            carries_loss=np.memmap(loss, dtype=bool, mode="r", shape=shape) if loss.exists() else None,
            facts=facts,
        )


def count_labels(store: TokenStore, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens of each piece that a next-token loss counts: those that carry loss, but for the first, which nothing
    precedes. int64 [n].

    begins: int64 [n], ascending, into the store's tokens; lengths: int64 [n]. Memory: O(n).
    """
    if store.carries_loss is None:
        return np.maximum(lengths - 1, 0)
    counts = np.zeros(len(begins), np.int64)
    first = 0
    while first < len(begins):
        start = int(begins[first])
        last = max(first + 1, int(np.searchsorted(begins, start + _COUNT_TOKENS)))
        stop = int(begins[last - 1] + lengths[last - 1])
        before = np.concatenate([[0], np.cumsum(store.carries_loss[start:stop])])
        ends = begins[first:last] + lengths[first:last] - start
        counts[first:last] = before[ends] - before[np.minimum(begins[first:last] + 1 - start, ends)]
        first = last
    return counts


def store_key(source: Source, encoder: TextEncoder, rules: RowRules) -> str:
    content = f"{FORMAT_VERSION}\n{source.sha256}\n{encoder.sha256}\n{rules}"
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def find_or_write_store(cache_dir: Path, source: Source, encoder: TextEncoder, rules: RowRules) -> Path:
    """Folder of the source's tokens, made now if it is not in the cache. Appears whole or not at all."""
    folder = cache_dir / "tokens" / store_key(source, encoder, rules)
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
        write_store(scratch, source, encoder, rules)
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
        loss = folder / "carries_loss.bin"
        if loss.exists() and loss.stat().st_size != facts["num_tokens"]:
            return False
        return size == facts["num_tokens"] * np.dtype(facts["dtype"]).itemsize and offsets[-1] == facts["num_tokens"]
    except (OSError, ValueError, KeyError):
        return False


class _Writer:
    """Lays the tokens of segments end to end in a file, whether each carries loss in another; notes where documents
    begin. loss: None where every token does; plain text is not written there."""

    def __init__(self, tokens: BinaryIO, loss: BinaryIO | None):
        self._tokens, self._loss = tokens, loss
        self.position = 0
        self.offsets = [0]

    def write(self, segments: list[Segment], encoded: list[tuple[np.ndarray, np.ndarray]]) -> None:
        np.concatenate([ids for ids, _ in encoded]).tofile(self._tokens)
        if self._loss is not None and segments[0].kind != "text":
            np.concatenate([carries for _, carries in encoded]).tofile(self._loss)
        for segment, (ids, _) in zip(segments, encoded, strict=True):
            self.position += len(ids)
            if segment.ends_document:
                self.offsets.append(self.position)


def write_store(folder: Path, source: Source, encoder: TextEncoder, rules: RowRules) -> None:
    """Tokenize the source's documents on all cores into `folder`, in order, in bounded memory."""
    segments = Segments(source, encoder, rules)
    began = logged = time.monotonic()
    loss = folder / "carries_loss.bin"
    with open(folder / "tokens.bin", "wb") as tokens_file, open(loss, "wb") as loss_file:
        writer = _Writer(tokens_file, None if rules.train_on_prompts else loss_file)
        for job, encoded in _encode_in_threads(segments, encoder):
            writer.write(job, encoded)
            if time.monotonic() - logged > _LOG_EVERY_S:
                logged = time.monotonic()
                count = len(segments.hashes)
                logger.info("tokenizing %s: %d documents, %d tokens", source.description, count, writer.position)
        for file in (tokens_file, loss_file):
            file.flush()
            os.fsync(file.fileno())
    if writer.position == 0:
        raise UserError(f"{source.description} holds no text: name files or a column with text in them")
    is_rows = segments.kinds != ["text"]
    if rules.train_on_prompts or not is_rows:
        loss.unlink()
    _save(folder / "offsets.npy", np.asarray(writer.offsets, np.int64))
    _save(folder / "hashes.npy", np.asarray(segments.hashes, np.uint64))
    if is_rows:
        _write_durably(folder / "places.txt", "".join(place.replace("\n", " ") + "\n" for place in segments.places))
    skipped = segments.skipped.kinds
    facts = {
        "source": source.description,
        "dtype": encoder.dtype.name,
        "kinds": segments.kinds,
        "num_bytes": segments.num_bytes,
        "num_documents": len(segments.hashes),
        "num_empty_documents": skipped.get(EMPTY, {"rows": 0})["rows"],
        "num_tokens": writer.position,
        "skipped_rows": skipped,
        "tokenization_s": round(time.monotonic() - began, 3),
    }
    _write_durably(folder / "facts.json", json.dumps(facts, indent=1))


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _encode_in_threads(
    segments: Iterable[Segment], encoder: TextEncoder
) -> Iterator[tuple[list[Segment], list[tuple[np.ndarray, np.ndarray]]]]:
    pending: deque = deque()
    with ThreadPoolExecutor(encoder.num_threads) as pool:
        for job in _jobs(segments):
            pending.append((job, pool.submit(encode_segments, job, encoder)))
            if len(pending) > 2 * encoder.num_threads:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()


def _jobs(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    job: list[Segment] = []
    characters = 0
    for segment in segments:
        job.append(segment)
        characters += len(segment.text) + 1
        if characters >= JOB_CHARACTERS:
            yield job
            job, characters = [], 0
    if job:
        yield job
