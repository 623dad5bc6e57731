"""Save, find and load checkpoints of a run: `checkpoints/step_00000100` holds the state after 100 steps.

A checkpoint is whole or not there. Every rank writes its files into a temporary folder, with their hashes; when all are
on the disk, rank 0 writes the manifest, renames the folder and points `latest` at it. Training stands still at most for
the copy to host memory, which must be done before the next optimizer step: the rest happens in a thread, and no
collective runs there. docs/checkpoints.md has the format.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstrain import distributed
from dstrain.adapter import is_base_in_4bit
from dstrain.checkpoint import engine_state
from dstrain.checkpoint.commit import Save, SaveStats, gather, is_full, not_written
from dstrain.checkpoint.layout import changes_in_step_only, inner_optimizer
from dstrain.checkpoint.manifest import (
    find_problems,
    list_checkpoints,
    list_folders,
    read_manifest,
    write_latest,
)
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.checkpoint.state import HostMemory, NoMemory, is_swapped, load_snapshot, take_snapshot
from dstrain.errors import DiskError, DiskFullError, UserError
from dstrain.parallel import Launch


@dataclass(frozen=True)
class TrainState:
    """What a run must know besides the engine's weights, moments and schedule to go on as if uninterrupted."""

    step: int = 0  # completed optimizer steps
    samples_consumed: int = 0

    def advance(self, samples: int, *, skipped: bool) -> "TrainState":
        """After one global batch. One that the fp16 scaler skipped used its samples but is no step."""
        return TrainState(self.step + (not skipped), self.samples_consumed + samples)


@dataclass(frozen=True)
class Restored:
    """What `CheckpointManager.restore` found and loaded. notes: what the user should read about it, one line each."""

    path: Path
    state: TrainState
    extra: dict[str, Any]
    notes: list[str]

    @property
    def events(self) -> list[tuple[str, str]]:
        """What a resumed run has to say first: (name, text) of each event."""
        return [("resume", f"from {self.path}"), *(("resume_note", note) for note in self.notes)]


def choose_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means, by names and sizes; `load` reads the hashes.

    None: begin anew. Raises UserError when a named one is not there, or when there are only damaged ones.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = list_checkpoints(folder)
        if not found and (damaged := list_folders(folder)):
            raise _all_damaged(folder, damaged)
        return found[-1] if found else None
    path = Path(resume)
    if (path / "manifest.json").is_file():
        return path
    inside = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inside:
        return inside[-1]
    raise UserError(f"--resume_from_checkpoint {resume} holds no complete checkpoint: name a step_* or a run folder")


def _all_damaged(folder: Path, damaged: list[Path]) -> UserError:
    return UserError(
        f"{folder} holds {len(damaged)} checkpoint(s) and none is whole (`dstrain checkpoint verify {damaged[-1]}` "
        "says why): add --overwrite_output_dir to begin anew, or name another with --resume_from_checkpoint"
    )


class CheckpointManager:
    """Writes checkpoints of an engine, at most one at a time, and finds and restores them.

    model_files: called once, on rank 0: name -> contents of what an export needs besides weights (config, tokenizer).
    description: more facts for the manifest, plain JSON. total_steps: after so many steps nothing changes any more, so
    that the last checkpoint needs no copy in host memory, and a run with no other needs no room for one.
    """

    def __init__(
        self,
        folder: Path,
        engine: Any,
        *,
        save_steps: int,
        save_total_limit: int | None,
        background: bool = False,
        model_files: Callable[[], dict[str, bytes]] = dict,
        description: dict[str, Any] | None = None,
        total_steps: int | None = None,
    ):
        self.folder = folder
        self.engine = engine
        self.save_steps = save_steps
        self.save_total_limit = save_total_limit
        self.background = background
        self._make_model_files = model_files
        self._model_files: dict[str, bytes] | None = None
        self.description = description or {}
        self.total_steps = total_steps
        self.saved_step: int | None = None
        self.kept_step: int | None = None
        self.launch = Launch.from_environment()
        self.memory = HostMemory(lazily=background and changes_in_step_only(engine))
        if self.memory.lazily:
            inner_optimizer(engine).register_step_pre_hook(lambda *_: self.memory.settle())
        self._in_flight: Save | None = None
        self._finished: list[SaveStats] = []
        self._cleaned = self._reserved = False

    def path_of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def has(self, step: int | None) -> bool:
        return step is not None and self.path_of(step).is_dir()

    def is_due(self, step: int) -> bool:
        return self.save_steps > 0 and step % self.save_steps == 0

    def save(self, state: TrainState, extra: dict[str, Any], kept_step: int | None = None) -> SaveStats | None:
        """Write a checkpoint after `state.step` steps; None when that step is already saved. A collective.

        extra: plain JSON that `load` gives back. kept_step: one that `save_total_limit` leaves alone from now on.
        In the background it returns None, and `finished` tells of the commit.
        Raises DiskError when the disk is full, also when that happened to the save before this one.
        """
        if self.saved_step == state.step:
            return None
        started = time.perf_counter()
        self.wait()
        self.kept_step = kept_step
        target = self.path_of(state.step)
        temporary = self.folder / f".{target.name}.tmp"
        is_last = state.step == self.total_steps and not is_swapped(self.engine)
        snapshot = take_snapshot(self.engine, NoMemory() if is_last else self.memory)
        (num_bytes,) = distributed.sum_over_ranks([float(snapshot.bytes)])
        contents = {**self.description, **asdict(state), "extra": extra, "engine": engine_state.capture(self.engine)}
        contents["layout"] = {"world_size": self.launch.world_size, **layout_of(self.engine)}
        if self.launch.is_main:
            self._agree(*self._open_temporary(temporary, int(num_bytes)))
        else:
            self._agree(None)
        problem = None
        if not temporary.is_dir():
            problem = f"{self.folder} is not the same folder on every host: use a shared file system for --output_dir"
        self._agree(problem)
        save = Save(
            target=target,
            temporary=temporary,
            snapshot=snapshot,
            contents=contents,
            model_files=self._model_files or {},
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            retain=self._retain,
            started=started,
            waited_s=lambda: self.memory.waited_s,
        )
        self._in_flight = save
        self.saved_step = state.step
        save.stall_s = time.perf_counter() - started
        save.thread = threading.Thread(target=save.run, name="checkpoint", daemon=True)
        save.thread.start()
        if self.background:
            return None
        self.wait()
        committed = [stats for stats in self._finished if stats.step == state.step]
        self._finished = [stats for stats in self._finished if stats.step != state.step]
        total_s = time.perf_counter() - started
        return SaveStats(committed[0].bytes if committed else snapshot.bytes, total_s, total_s, state.step)

    def finished(self) -> list[SaveStats]:
        """Checkpoints committed since the last call, on rank 0; the other ranks do not know. Never waits.

        Called after every step; the first call readies the memory for the first snapshot.
        """
        if self.background and not self._reserved:
            self._reserved = True
            if self.save_steps > 0 and (self.total_steps is None or self.save_steps < self.total_steps):
                self.memory.reserve(self.engine)
        save = self._in_flight
        if save is not None and save.stats is not None:
            self._finished.append(save.stats)
            save.stats = None
        done, self._finished = self._finished, []
        return done

    def wait(self) -> None:
        """Until the checkpoint under way is committed. A collective. Raises DiskError when it could not be written."""
        save = self._in_flight
        if save is None:
            return
        self._in_flight = None
        save.written.wait()
        failed = self._failures(save)
        if failed:
            save.abandoned.set()
        assert save.thread is not None
        save.thread.join()
        failed |= self._failures(save)
        if failed:
            self.saved_step = None
            if self.launch.is_main:
                shutil.rmtree(save.temporary, ignore_errors=True)
            if crashes := [crash for _, _, crash in failed if crash]:
                raise RuntimeError(f"{save.target} could not be written: {crashes[0]}") from save.crash
            kind = DiskFullError if all(full for _, full, _ in failed) else DiskError
            raise kind(sorted(problem for problem, _, _ in failed if problem))
        if save.stats is not None:
            self._finished.append(save.stats)

    def _failures(self, save: Save) -> set[tuple[str | None, bool, str | None]]:
        """(the disk's problem, whether it is full, our crash) of every rank that has one. A collective."""
        own = (save.problem, save.is_full, repr(save.crash) if save.crash else None)
        return {found for found in gather(own) if found[0] or found[2]}

    def settle(self, timeout_s: float = 20.0) -> None:
        """Before this rank ends alone, by an error: give the checkpoint under way a moment. No collective."""
        if self._in_flight is not None and self._in_flight.thread is not None:
            self._in_flight.thread.join(timeout_s)

    def close(self) -> None:
        """Wait for the last checkpoint. A collective. Raises DiskError when it could not be written."""
        self.wait()

    def _agree(self, problem: str | None, kind: type[UserError] = UserError) -> None:
        """Raise the same error on every rank when any has a problem. A collective."""
        found = [(p, k) for p, k in gather((problem, kind)) if p]
        if found:
            raise found[0][1](sorted({p for p, _ in found}))

    def _open_temporary(self, temporary: Path, num_bytes: int) -> tuple[str | None, type[UserError]]:
        """Rank 0: room on the disk, and an empty folder. Returns what is in the way, and its kind."""
        try:
            self.clean()
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            needed = num_bytes + num_bytes // 50 + (16 << 20)
            if free < needed:
                return (
                    f"{self.folder} has {free / 2**30:.2f} GiB free and the checkpoint needs {needed / 2**30:.2f} GiB: "
                    "free space or lower --save_total_limit; the checkpoints before it are kept"
                ), DiskFullError
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if self._model_files is None:
                self._model_files = self._make_model_files()
        except OSError as error:
            return not_written(temporary, error), DiskFullError if is_full(error) else DiskError
        return None, DiskError

    def clean(self) -> None:
        """Rank 0, once: remove what an interrupted save left; put back what it had moved aside."""
        if self._cleaned or not self.folder.is_dir():
            return
        self._cleaned = True
        for old in self.folder.glob(".step_*.old"):
            target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if not target.exists():
                os.replace(old, target)
        for left in (*self.folder.glob(".step_*.tmp"), *self.folder.glob(".step_*.old")):
            shutil.rmtree(left, ignore_errors=True)

    def restore(self, resume: str) -> Restored | None:
        """Find what `--resume_from_checkpoint` means, prove it whole, and load it. A collective.

        With `auto` a damaged checkpoint is set aside as `NAME.damaged` and the one before it taken: the notes say so.
        None: there is nothing to go on from. Raises UserError rather than begin anew beside damaged checkpoints.
        """
        notes: list[str] = []
        if self.launch.is_main and resume != "none":
            self.clean()
        distributed.barrier()
        folders = list_folders(self.folder)
        while True:
            path = folders[-1] if resume == "auto" and folders else choose_checkpoint(self.folder, resume)
            if path is None:
                return None
            problems = self._find_problems(path)
            if not problems:
                break
            if resume != "auto":
                raise UserError(problems[:5])
            folders.remove(path)
            notes.append(f"{path} is damaged and set aside: {problems[0]}")
            if not folders:
                raise UserError([*problems[:3], *_all_damaged(self.folder, [path]).problems])
            if self.launch.is_main:
                _set_aside(path)
            distributed.barrier()
        state, extra, differences = self._load(path)
        if self.launch.is_main and path.parent == self.folder:
            write_latest(path)
        return Restored(path, state, extra, notes + differences)

    def load(self, path: Path) -> tuple[TrainState, dict[str, Any]]:
        """Prove a checkpoint whole and load it; returns what was saved. A collective. Raises UserError."""
        problems = self._find_problems(path)
        if problems:
            raise UserError(problems[:5])
        state, extra, _ = self._load(path)
        return state, extra

    def _find_problems(self, path: Path) -> list[str]:
        """Every rank reads its share of the files."""
        own = find_problems(path, self.launch.rank, self.launch.world_size)
        return sorted({problem for problems in gather(own) for problem in problems})

    def _load(self, path: Path) -> tuple[TrainState, dict[str, Any], list[str]]:
        contents, reader = read_manifest(path).contents, CheckpointReader(path)
        _check_optimizer(path, contents["engine"]["optimizer"], self.engine)
        _check_base(path, contents, self.description)
        load_snapshot(self.engine, reader)
        notes = engine_state.restore(self.engine, contents["engine"])
        facts = reader.rank_facts(self.launch.rank)
        if facts is not None and facts["random"] is not None:
            engine_state.restore_random_states(facts["random"])
        state = TrainState(contents["step"], contents["samples_consumed"])
        self.saved_step = state.step if path.parent == self.folder else None
        now = {"world_size": self.launch.world_size, **layout_of(self.engine)}
        changed = [f"{k} {contents['layout'].get(k)} -> {v}" for k, v in now.items() if contents["layout"].get(k) != v]
        if changed:
            notes.append("another layout: " + ", ".join(changed))
        distributed.barrier()
        return state, contents["extra"], notes

    def _retain(self, newest: Path) -> None:
        """Keep the newest `save_total_limit` whole checkpoints, the one just committed and `kept_step` among them."""
        if self.save_total_limit:
            spared = [newest] if self.kept_step is None else [self.path_of(self.kept_step), newest]
            kept = [p for p in list_checkpoints(self.folder) if p not in spared]
            room = max(0, self.save_total_limit - len(set(spared)))
            for old in kept[: len(kept) - room]:
                shutil.rmtree(old)


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)


def _check_optimizer(path: Path, saved: str, engine: Any) -> None:
    own = type(engine_state.inner_optimizer(engine)).__name__
    if engine_state.family(saved) != engine_state.family(own):
        raise UserError(
            f"{path} holds the state of {saved}, the JSON asks for {own}: name that optimizer, or begin a new run from "
            "the weights (`dstrain export`, then --model_name_or_path)"
        )


def _check_base(path: Path, contents: dict[str, Any], description: dict[str, Any]) -> None:
    """A checkpoint of adapters belongs to the very base that they were trained on."""
    identities = [facts.get("identity", {}) for facts in (contents, description)]
    saved, own = (identity.get("base") for identity in identities)
    if saved is None or own is None:
        return
    if saved != own:
        trained_on = contents["arguments"]["model_name_or_path"]
        raise UserError(
            f"{path} holds adapters of {trained_on} (weights {saved[:16]}), and --model_name_or_path names another "
            f"model (weights {own[:16]}): name the one that they were trained on"
        )
    saved_4bit, own_4bit = (is_base_in_4bit(identity) for identity in identities)
    if saved_4bit != own_4bit:
        how, what = ("in 4 bits", "add") if saved_4bit else ("that is not in 4 bits", "leave out")
        raise UserError(f"{path} holds adapters of a model {how}: {what} --load_in_4bit")


def layout_of(engine: Any) -> dict[str, Any]:
    """How an engine is split, for the manifest and for people."""
    optimizer = engine.optimizer
    return {
        "zero_stage": int(engine.zero_optimization_stage()),
        "optimizer_wrapper": type(optimizer).__name__,
        "tp_size": max(1, int(engine.autotp_size())),
        "pp_size": int(getattr(engine, "num_stages", 1)),
        "dtype": str(next(p.dtype for p in engine.module.parameters() if p.requires_grad)).removeprefix("torch."),
    }
