"""The black box: the last steps of every rank, in a file that survives any end of the process.

`logs/steps_rank_N.ring` is a memory-mapped ring of fixed slots, one JSON object each, padded with spaces: a write is a
copy into the page cache, which the kernel keeps after SIGKILL, and costs some microseconds a step. The first slot
describes the process.
"""

import json
import math
import mmap
import os
import time
from pathlib import Path
from typing import Any

SLOT_BYTES, NUM_SLOTS = 512, 257  # one header and 256 steps: 128 KiB


def ring_file(logs: Path, rank: int) -> Path:
    return logs / f"steps_rank_{rank}.ring"


class Recorder:
    """Writes the ring of one rank. A new process begins it anew; the ring of the one before stays as `*.ring.1`."""

    def __init__(self, logs: Path, rank: int, **facts: Any):
        path = ring_file(logs, rank)
        if path.exists():
            os.replace(path, path.with_suffix(".ring.1"))
        with open(path, "w+b") as file:
            file.write(b" " * (SLOT_BYTES * NUM_SLOTS))
            file.flush()
            self._map = mmap.mmap(file.fileno(), SLOT_BYTES * NUM_SLOTS)
        self._written = 0
        self.last: dict[str, Any] = {}
        self._put(0, {"pid": os.getpid(), "rank": rank, "time": round(time.time(), 3), **facts})

    def write(self, **step: Any) -> None:
        """One step: plain JSON values; a value that is not finite is written as a text."""
        self._written += 1
        self.last = {}
        self.amend(n=self._written, time=round(time.time(), 3), **step, rss_mib=resident_mib())

    def amend(self, **values: Any) -> None:
        """Add to the last step: on an accelerator its loss is known later, and is then that of the step before."""
        self.last |= values
        self._put(1 + (self._written - 1) % (NUM_SLOTS - 1), self.last)

    def _put(self, slot: int, values: dict[str, Any]) -> None:
        text = json.dumps({k: _plain(v) for k, v in values.items()}, separators=(",", ":")).encode()[: SLOT_BYTES - 1]
        start = slot * SLOT_BYTES
        self._map[start : start + SLOT_BYTES] = text.ljust(SLOT_BYTES - 1) + b"\n"

    def describe(self) -> str:
        return json.dumps({k: _plain(v) for k, v in self.last.items()}) if self.last else "none yet"

    def close(self) -> None:
        self._map.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 9) if math.isfinite(value) else str(value)
    return value


def resident_mib() -> int:
    """Resident set of this process, MiB; some microseconds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE >> 20


def read_ring(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the process, its last steps in order) of a ring file; what a kill left half written is left out."""
    header: dict[str, Any] = {}
    steps = []
    data = path.read_bytes()
    for number, start in enumerate(range(0, len(data), SLOT_BYTES)):
        text = data[start : start + SLOT_BYTES].strip()
        try:
            value = json.loads(text) if text else None
        except ValueError:
            continue
        if number == 0:
            header = value or {}
        elif value is not None:
            steps.append(value)
    return header, sorted(steps, key=lambda step: step["n"])
