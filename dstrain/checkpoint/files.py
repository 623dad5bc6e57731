"""The safetensors files of a rank, one for each kind and type of state: ranges of named parameters.

A key is `kind|name|start|cut`: kind is `weight` (the fp32 master, or a frozen parameter in its own type), `buffer`, or
the optimizer's own name of a state with one value per weight (`exp_avg`, ...); start is the flat index of the first
element in the parameter, or in the tensor-parallel cut of it that `cut` names. The metadata of the file of fp32
weights holds, as JSON, what is not a tensor: shapes, step counters, random states.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.blocks import BLOCK, BUFFER, HashedFile, Image, Written, aligned, through_a_buffer

THREADS = 4  # files at a time: each is one stream of sha256, which is slower than a good disk
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
    data: Callable[[], torch.Tensor] | None = None  # contiguous; called once, in order; None: in the file's image

    @property
    def nbytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


def header(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """The head of a safetensors file: length, then JSON padded to a multiple of BLOCK bytes."""
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        table[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    assert len(table) == len(entries) + 1, "two pieces of the same name"
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % BLOCK)
    return struct.pack("<Q", len(text)) + text


def _checked(entries: Sequence[Entry]) -> Iterable[torch.Tensor]:
    for entry in entries:
        assert entry.data is not None, f"{entry.key} has its bytes in an image"
        data = entry.data()
        assert data.dtype == entry.dtype and data.numel() * data.element_size() == entry.nbytes, entry.key
        yield data


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: dict[str, str], image: Image | None = None
) -> Written:
    """Write and fsync one file: its bytes are in `image`, or come a tensor at a time. Raises OSError."""
    head = header(entries, metadata)
    first = aligned(len(head)).copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
    assert image is None or image.bytes == sum(entry.nbytes for entry in entries), path
    file = HashedFile(path)
    try:
        file.write(first)
        for block in through_a_buffer(_checked(entries)) if image is None else image.blocks():
            file.write(block)
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
        while chunk := file.read(BUFFER):
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


def rank_file(rank: int, kind: str = "weight", dtype: torch.dtype = torch.float32) -> str:
    """One file for each kind and type: files of one type keep every tensor aligned."""
    of_type = "" if dtype == torch.float32 else f"-{DTYPES[dtype].lower()}"
    return f"rank_{rank:05d}.{kind}{of_type}.safetensors"


def rank_files(folder: Path) -> list[Path]:
    """The files of all ranks, those of one rank together."""
    return sorted(folder.glob("rank_*.safetensors"))


def write_rank(
    folder: Path, rank: int, entries: Sequence[Entry], facts: dict[str, Any], images: Mapping[str, Image] | None = None
) -> dict[str, Written]:
    """Write one file for each kind and type of entry, and `facts` with the fp32 weights; name -> what was written.

    images: name -> where the bytes of that file are, its entries in their order. Raises OSError.
    """
    by_file: dict[str, list[Entry]] = {rank_file(rank): []}
    for entry in entries:
        by_file.setdefault(rank_file(rank, Key.parse(entry.key).kind, entry.dtype), []).append(entry)

    def write(name: str) -> Written:
        metadata = {"format": "pt"}
        if name == rank_file(rank):
            metadata["dstrain"] = json.dumps(facts)
        return write_safetensors(folder / name, by_file[name], metadata, (images or {}).get(name))

    with ThreadPoolExecutor(THREADS) as writers:
        return dict(zip(by_file, writers.map(write, by_file), strict=True))
