"""The safetensors files of a rank, one for each kind of state: ranges of named parameters, hashed while written.

A key is `kind|name|start|cut`: kind is `weight` (the fp32 master, or a frozen parameter in its own type), `buffer`, or
the optimizer's own name of a state with one value per weight (`exp_avg`, ...); start is the flat index of the first
element in the parameter, or in the tensor-parallel cut of it that `cut` names. The metadata of the file of weights
holds, as JSON, what is not a tensor: shapes, step counters, random states.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHUNK = 8 << 20
FLUSH = 64 << 20
WRITERS = 2  # files at a time: one core hashes about as fast as a good disk writes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Key:
    kind: str
    name: str
    start: int
    cut: str = ""

    def __str__(self) -> str:
        return f"{self.kind}|{self.name}|{self.start}|{self.cut}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        kind, name, start, cut = text.split("|")
        return cls(kind, name, int(start), cut)


@dataclass(frozen=True)
class Entry:
    """What a file holds under a key, and where the bytes come from when it is written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], torch.Tensor]  # contiguous, on the CPU; called once, in order

    @property
    def nbytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    bytes: int
    sha256: str


class HashedFile:
    """A file whose sha256 is computed beside the writing, by a second thread, while a third pushes what is written to
    the disk; closing it makes it durable."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.hasher, self.flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.flush: Future | None = None

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            hashed = self.hasher.submit(self.digest.update, chunk)
            written = 0
            try:
                while written < len(chunk):
                    written += self.file.write(chunk[written:])
            finally:
                hashed.result()
            self.bytes += len(chunk)
            if self.bytes % FLUSH < CHUNK and (self.flush is None or self.flush.done()):
                self.flush = self.flusher.submit(os.fdatasync, self.file.fileno())

    def close(self) -> Written:
        self.hasher.shutdown()
        self.flusher.shutdown()
        os.fsync(self.file.fileno())
        self.file.close()
        return Written(self.bytes, self.digest.hexdigest())

    def abandon(self) -> None:
        self.hasher.shutdown()
        self.flusher.shutdown()
        self.file.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def header(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """The head of a safetensors file: length, then JSON padded to a multiple of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        table[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    assert len(table) == len(entries) + 1, "two pieces of the same name"
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> Written:
    """Write and fsync one file, a tensor at a time. Raises OSError."""
    file = HashedFile(path)
    try:
        file.write(header(entries, metadata))
        for entry in entries:
            data = entry.data()
            assert data.dtype == entry.dtype and data.numel() * data.element_size() == entry.nbytes, entry.key
            file.write(_bytes_of(data))
        return file.close()
    except BaseException:
        file.abandon()
        raise


def write_bytes(path: Path, data: bytes) -> Written:
    """Write and fsync one small file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(data), hashlib.sha256(data).hexdigest())


def hash_file(path: Path) -> Written:
    """Size and sha256 of a file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(key -> {dtype, shape, data_offsets}, metadata) of a safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
    return table, table.pop("__metadata__", {})


def rank_file(rank: int, kind: str = "weight") -> str:
    return f"rank_{rank:05d}.{kind}.safetensors"


def rank_files(folder: Path) -> list[Path]:
    """The files of all ranks, those of one rank together."""
    return sorted(folder.glob("rank_*.safetensors"))


def write_rank(folder: Path, rank: int, entries: Sequence[Entry], facts: dict[str, Any]) -> dict[str, Written]:
    """Write one file for each kind of entry, and `facts` with the weights; name -> what was written. Raises OSError."""
    by_file: dict[str, list[Entry]] = {rank_file(rank): []}
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):  # keeps every tensor aligned
        kind = Key.parse(entry.key).kind
        by_file.setdefault(rank_file(rank, "weight" if kind == "buffer" else kind), []).append(entry)

    def write(name: str) -> Written:
        metadata = {"format": "pt"}
        if name == rank_file(rank):
            metadata["dstrain"] = json.dumps(facts)
        return write_safetensors(folder / name, by_file[name], metadata)

    with ThreadPoolExecutor(WRITERS) as writers:
        return dict(zip(by_file, writers.map(write, by_file), strict=True))
