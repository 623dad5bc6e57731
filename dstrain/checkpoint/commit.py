"""The two phases of a save: every rank's file in a temporary folder, then one rename that makes it a checkpoint.

The ranks meet on the disk (a `.done` file each), never in a collective: this runs in a thread while training goes on.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dstrain.checkpoint.blocks import Written
from dstrain.checkpoint.files import sync_folder, write_bytes, write_rank
from dstrain.checkpoint.manifest import write_latest, write_manifest
from dstrain.checkpoint.state import Snapshot

MODEL_FILES = "model"  # the folder inside a checkpoint for config, tokenizer, ...: what an export needs besides weights


@dataclass(frozen=True)
class SaveStats:
    """A committed checkpoint: its size, how long training stood still, and how long until it was whole on disk."""

    bytes: int
    stall_s: float
    total_s: float
    step: int = 0


@dataclass
class Save:
    """One checkpoint on its way to the disk. `write` may run in a thread: it uses files, never a collective."""

    target: Path
    temporary: Path
    snapshot: Snapshot
    contents: dict[str, Any]
    model_files: dict[str, bytes]
    rank: int
    world_size: int
    retain: Callable[[Path], None]
    started: float
    waited_s: Callable[[], float] = float  # for the copy to host memory, after `save` had returned
    stall_s: float = 0.0
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    problem: str | None = None  # the disk's, to be told to the user
    is_full: bool = False
    crash: Exception | None = None  # ours
    stats: SaveStats | None = None
    thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            self._write()
            self.written.set()
            if self.rank == 0:
                self._commit()
        except OSError as error:
            self.problem, self.is_full = not_written(self.target, error), is_full(error)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to: `CheckpointManager.wait` does
            self.crash = error
        finally:
            self.written.set()

    def _done(self, rank: int) -> Path:
        return self.temporary / f"rank_{rank:05d}.done"

    def _write(self) -> None:
        shot = self.snapshot
        if shot.copying is not None:
            shot.copying.join()
        written = write_rank(self.temporary, self.rank, shot.entries, shot.facts, shot.images)
        part = self._done(self.rank).with_suffix(".part")
        write_bytes(part, json.dumps({name: asdict(file) for name, file in written.items()}).encode())
        os.replace(part, self._done(self.rank))

    def _commit(self) -> None:
        files = {}
        for rank in range(self.world_size):
            while not self._done(rank).exists():
                if self.abandoned.wait(0.02):
                    return
            found = json.loads(self._done(rank).read_text())
            files.update({name: Written(**facts) for name, facts in found.items()})
            self._done(rank).unlink()
        if self.model_files:
            (self.temporary / MODEL_FILES).mkdir()
        for name, data in self.model_files.items():
            files[f"{MODEL_FILES}/{name}"] = write_bytes(self.temporary / MODEL_FILES / name, data)
        contents = {**self.contents, "files": {name: asdict(file) for name, file in files.items()}}
        manifest = write_manifest(self.temporary, contents)
        replaced = self.target.with_name(f".{self.target.name}.old")
        if self.target.exists():
            os.replace(self.target, replaced)
        os.replace(self.temporary, self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        write_latest(self.target)
        total_s = time.perf_counter() - self.started  # whole on the disk: what is deleted now is of others
        self.retain(self.target)
        self.stats = SaveStats(manifest.bytes, self.stall_s + self.waited_s(), total_s, manifest.step)


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def not_written(target: Path, error: OSError) -> str:
    return f"{target} could not be written ({error.strerror or error}); the checkpoints before it are kept"
