"""Bytes on their way to the disk: in memory that the disk can take them from, and hashed while they are written.

Files are written past the page cache (O_DIRECT): on few cores the copy into it costs as much as sha256 does. That takes
addresses, lengths and positions that are multiples of BLOCK.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dstrain.parallel import Launch

BLOCK = 4096
BUFFER = 8 << 20
SEGMENT = (32 << 20) - BLOCK  # of an image; with the room to align it a power of two, which CUDA's allocator rounds to
_MAX_COPIERS = 4


@dataclass(frozen=True)
class Written:
    bytes: int
    sha256: str


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] of a contiguous tensor, the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def aligned(num_bytes: int, *, pinned: bool = False) -> torch.Tensor:
    """Fresh uint8 [num_bytes] at an address that is a multiple of BLOCK."""
    if pinned:
        memory = torch.empty(num_bytes + BLOCK, dtype=torch.uint8, pin_memory=True)
    else:
        pages = mmap.mmap(-1, num_bytes + BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BLOCK :][:num_bytes]


@dataclass
class Image:
    """What one file will hold behind its header, in host memory that is kept from one snapshot to the next."""

    pinned: bool
    segments: list[torch.Tensor] = field(default_factory=list)
    bytes: int = 0

    def take(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """The next `num_bytes` of it, in order, as pieces that lie in one segment each."""
        while num_bytes:
            number, offset = divmod(self.bytes, SEGMENT)
            if number == len(self.segments):
                self.segments.append(aligned(SEGMENT, pinned=self.pinned))
            size = min(SEGMENT - offset, num_bytes)
            self.bytes += size
            num_bytes -= size
            yield self.segments[number][offset : offset + size]

    def blocks(self) -> Iterator[torch.Tensor]:
        for number, segment in enumerate(self.segments):
            if (left := self.bytes - number * SEGMENT) > 0:
                yield segment[:left]


def through_a_buffer(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of tensors, one behind the other; a block is only valid until the next one is asked for."""
    buffer, filled = aligned(BUFFER), 0
    for tensor in tensors:
        data = bytes_of(tensor)
        while data.numel():
            size = min(BUFFER - filled, data.numel())
            buffer[filled : filled + size].copy_(data[:size])
            filled, data = filled + size, data[size:]
            if filled == BUFFER:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def copy_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (target, source) pairs of flat tensors, over the cores that this rank may use. From a GPU it may return
    before the copies are done."""
    threads = _num_copiers(pairs)
    if threads == 1:
        _copy(pairs)
        return
    groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(threads)]
    total, seen = sum(target.numel() for target, _ in pairs), 0
    for target, source in pairs:
        groups[seen * threads // total].append((target, source))
        seen += target.numel()
    helpers = [threading.Thread(target=_copy, args=(group,)) for group in groups[1:]]
    for helper in helpers:
        helper.start()
    _copy(groups[0])
    for helper in helpers:
        helper.join()


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _num_copiers(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """One where PyTorch divides a copy over its own threads, where the copies are a device's work, or are small."""
    small = sum(target.numel() for target, _ in pairs) < 2 * BUFFER
    if small or torch.get_num_threads() > 1 or any(source.is_cuda for _, source in pairs):
        return 1
    cores = len(os.sched_getaffinity(0)) // Launch.from_environment().local_world_size
    return max(1, min(_MAX_COPIERS, cores))


class HashedFile:
    """A file whose sha256 is computed by a second thread while this one writes; closing it makes it durable.

    Every block but the last has an address and a length that are multiples of BLOCK. Raises OSError.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self.direct = True
        try:
            self.fd = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system has no direct writes
                raise
            self.direct = False
            self.fd = os.open(path, flags, 0o666)
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.hasher = ThreadPoolExecutor(1)

    def write(self, block: torch.Tensor) -> None:
        """block: uint8, on the host; it may change when this returns."""
        view = memoryview(block.numpy())
        hashed = self.hasher.submit(self.digest.update, view)
        try:
            whole = len(view) // BLOCK * BLOCK if self.direct else len(view)
            self._write(view[:whole])
            if whole < len(view):  # the end of the file
                self._through_the_page_cache()
                self._write(view[whole:])
        finally:
            hashed.result()
        self.bytes += len(view)

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:  # wants larger blocks, or takes none after all
                    raise
                self._through_the_page_cache()

    def _through_the_page_cache(self) -> None:
        self.direct = False
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def close(self) -> Written:
        self.hasher.shutdown()
        os.fsync(self.fd)
        os.close(self.fd)
        return Written(self.bytes, self.digest.hexdigest())

    def abandon(self) -> None:
        self.hasher.shutdown()
        os.close(self.fd)
