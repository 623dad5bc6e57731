"""Save, find and load checkpoints of a run: `checkpoints/step_00000100` holds the state after 100 steps."""

import json
import os
import random
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstrain import distributed
from dstrain.errors import UserError

_NAME = re.compile(r"step_(\d{8})$")


@dataclass(frozen=True)
class TrainState:
    """What a run must know besides the engine's weights, moments and schedule to go on as if uninterrupted."""

    step: int = 0  # completed optimizer steps
    samples_consumed: int = 0

    def advance(self, samples: int, *, skipped: bool) -> "TrainState":
        """After one global batch. One that the fp16 scaler skipped used its samples but is no step."""
        return TrainState(self.step + (not skipped), self.samples_consumed + samples)


@dataclass(frozen=True)
class SaveStats:
    bytes: int
    stall_s: float
    total_s: float


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.match(p.name) and (p / "manifest.json").is_file())


def choose_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means. Raises UserError when a named one is not there."""
    if resume == "none":
        return None
    if resume == "auto":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if (path / "manifest.json").is_file():
        return path
    inside = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inside:
        return inside[-1]
    raise UserError(f"--resume_from_checkpoint {resume} holds no complete checkpoint: name a step_* folder or a run folder")


class CheckpointManager:
    """Writes into a temporary folder first and renames it when every rank is done, so a checkpoint is whole or absent."""

    def __init__(self, folder: Path, engine: Any, *, save_steps: int, save_total_limit: int | None):
        self.folder = folder
        self.engine = engine
        self.save_steps = save_steps
        self.save_total_limit = save_total_limit
        self.saved_step: int | None = None
        self.main = distributed.Launch.from_environment().is_main

    def is_due(self, step: int) -> bool:
        return self.save_steps > 0 and step % self.save_steps == 0

    def save(self, state: TrainState, extra: dict[str, Any]) -> SaveStats | None:
        """Write a checkpoint after `state.step` steps; None when that step is already saved. A collective.

        extra: plain JSON that `load` gives back.
        """
        if self.saved_step == state.step:
            return None
        start = time.perf_counter()
        target = self.folder / f"step_{state.step:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        self.engine.save_checkpoint(str(temporary), tag="engine", client_state={**asdict(state), "extra": extra}, save_latest=False)
        torch.save(_random_states(), temporary / f"random_{distributed.Launch.from_environment().rank:05d}.pt")
        distributed.barrier()
        if self.main:
            files = {str(p.relative_to(temporary)): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
            (temporary / "manifest.json").write_text(json.dumps({**asdict(state), "files": files}, indent=1))
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            _write_latest(self.folder, target.name)
            self._retain()
        distributed.barrier()
        self.saved_step = state.step
        total = time.perf_counter() - start
        size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) if self.main else 0
        return SaveStats(size, total, total)

    def load(self, path: Path) -> tuple[TrainState, dict[str, Any]]:
        """Restore engine, schedule and random states from a committed checkpoint; returns what was saved. A collective."""
        loaded, client = self.engine.load_checkpoint(str(path), tag="engine")
        if loaded is None:
            raise UserError(f"{path} cannot be loaded: it holds no engine state for this layout")
        own = path / f"random_{distributed.Launch.from_environment().rank:05d}.pt"
        if own.exists():
            _restore_random_states(torch.load(own, weights_only=False))
        state = TrainState(client["step"], client["samples_consumed"])
        self.saved_step = state.step
        return state, client["extra"]

    def _retain(self) -> None:
        if self.save_total_limit:
            for old in list_checkpoints(self.folder)[: -self.save_total_limit]:
                shutil.rmtree(old)


def _write_latest(folder: Path, name: str) -> None:
    temporary = folder / ".latest.tmp"
    temporary.write_text(name + "\n")
    temporary.replace(folder / "latest")


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
