"""What lets a run survive, behind few calls of the train loop: agreed stop, watchdog, guard, black box, lifeline."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from dstrain import distributed
from dstrain.errors import ExitCode
from dstrain.monitor.cgroup import memory_group
from dstrain.resilience.exits import ExitTimer, exit_now
from dstrain.resilience.guard import Guard
from dstrain.resilience.lifeline import GRACE_S, Lifeline, build_lifeline
from dstrain.resilience.recorder import Recorder
from dstrain.resilience.signals import AgreedStop
from dstrain.resilience.watchdog import Watchdog


class LastWords(Protocol):
    """The monitor, as far as a dying run needs it."""

    def event(self, step: int, name: str, text: str) -> None: ...

    def close(self, exit_code: int, reason: str) -> None: ...


class _NoRunFolder:
    """Before there is a metrics.jsonl, what is to be said goes to the screen."""

    def event(self, step: int, name: str, text: str) -> None:
        print(f"dstrain: {name}: {text}", file=sys.__stderr__, flush=True)

    def close(self, exit_code: int, reason: str) -> None:
        pass


@dataclass(frozen=True)
class BatchNames:
    """What a rank reads at a step.

    sample_ids: position of the step's first sample in the global order -> indices of this rank's samples.
    text: index -> how that sample begins.
    """

    sample_ids: Callable[[int], list[int]]
    text: Callable[[int], str]

    def describe(self, first: int) -> str:
        ids = self.sample_ids(first)
        shown = ", ".join(f"{i} {self.text(i)!r}" for i in ids[:4])
        return f"samples {shown}" + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


class Safety:
    """One object per run and rank, built before anything can hang; `step` is always the number of completed steps.

    hang_timeout_s: seconds without progress, or None for the watchdog's own limits. pauses: as of the watchdog.
    """

    stop: AgreedStop
    guard: Guard
    recorder: Recorder

    def __init__(self, rank: int, hang_timeout_s: float | None, *, pauses: bool):
        self.rank = rank
        self.lifeline = Lifeline()
        self._monitor: LastWords = _NoRunFolder()
        self._begun = self._stepped = False
        self._step, self._first, self._next = 0, 0, 0
        self.watchdog = Watchdog(
            rank,
            timeout_s=hang_timeout_s,
            pauses=pauses,
            last_words=self._last_words,
            tell=lambda code, text: self.lifeline.tell(code, text),
        )
        self.watchdog.beat("start", 0)

    def join(self, address: str) -> None:
        """As soon as there is a process group, before data and model. A collective. address: rank 0 (MASTER_ADDR)."""
        self.lifeline = build_lifeline(address)
        self.lifeline.watch(self._peer_is_lost)
        self._load()

    def listen(self, folder: Path, deadline: float | None) -> None:
        """Before the checkpoint is read: a signal now asks for an agreed stop. A collective.

        deadline: in seconds of CLOCK_BOOTTIME.
        """
        self.stop = AgreedStop(folder, deadline)
        self._load()

    def _load(self) -> None:
        self.watchdog.beat("loading" if dist.is_initialized() and dist.get_world_size() > 1 else "loading_alone", 0)

    def begin(
        self,
        logs: Path,
        *,
        monitor: LastWords,
        names: BatchNames,
        samples_consumed: int,
        global_batch: int,
        scaled: bool,
        skip_nonfinite: int,
        **facts: Any,
    ) -> None:
        """When the run folder is this run's. facts: what the black box should know of the process."""
        self._monitor, self._names, self._global_batch = monitor, names, global_batch
        self._next = samples_consumed
        group = memory_group()
        known = {"memory_group": str(group.folder), "oom_kills": group.oom_kills} if group else {}
        self.recorder = Recorder(logs, self.rank, **facts, **known)
        self.guard = Guard(
            allowed=skip_nonfinite,
            scaled=scaled,
            event=monitor.event,
            record=lambda r: self.recorder.amend(loss_of_step=r.step, loss=r.loss, grad_norm=r.grad_norm),
            batch=lambda: names.describe(self._first),
        )
        self.watchdog.attach(
            logs, lambda: f"{self.recorder.describe()}\nbatch under way: samples {names.sample_ids(self._next)}"
        )
        self.watchdog.beat("start", 0)
        self._begun = True

    def on_step(self, step: int, samples_consumed: int, result: Any, step_time_s: float, data_time_s: float) -> None:
        """After every optimizer step, also one that was left out. Raises NonFiniteError, on all ranks."""
        self._step, self._first, self._next = step, samples_consumed - self._global_batch, samples_consumed
        self.watchdog.beat("step", step)
        if not self._stepped:
            self._stepped = True
            distributed.set_timeouts(self.watchdog.group_timeout_s)
        ids = self._names.sample_ids(self._first)
        self.recorder.write(
            step=step + result.skipped,  # the step that it would have been
            first=self._first,
            ids=ids[:16],
            skipped=result.skipped,
            step_time_s=step_time_s,
            data_time_s=data_time_s,
            lr=result.learning_rate,
        )
        self.guard.check(step, result)

    def before_save(self, step: int) -> None:
        """Nothing that is not finite gets into a checkpoint. Raises NonFiniteError, on all ranks."""
        self.guard.settle()
        self.watchdog.beat("save", step)

    def beat(self, activity: str, step: int) -> None:
        """Progress; `activity`, a key of watchdog.FLOOR_S, is what comes next. The first step belongs to the start."""
        self.watchdog.beat("start" if activity == "step" and not self._stepped else activity, step)

    def during_evaluation(self) -> bool:
        """Between two batches of an evaluation; False: it is to be cut short. A collective."""
        self.watchdog.beat("evaluation", self._step)
        return self.stop.agreed() is None

    def _last_words(self, code: ExitCode, name: str, text: str) -> None:
        self._monitor.event(self._step, name, text)
        self._monitor.close(code, text)

    def _peer_is_lost(self, code: ExitCode, text: str) -> None:
        if code == ExitCode.HUNG:
            self.watchdog.bark(text, told=True)
        exit_now(code, lambda: self._last_words(code, "lost_rank", text))

    def failing(self, code: ExitCode, text: str) -> str:
        """This rank ends by an error: tell the others, and be gone in time whatever stands in the way.

        Returns the reason for the summary: the first rank that ended knows it better than those that lost it.
        """
        if code == ExitCode.NON_FINITE:  # agreed: all ranks end alike, and may take the time that a save needs
            return text
        if code == ExitCode.CRASH:
            self.lifeline.hear(1.0)
        first = self.lifeline.lost
        self.lifeline.tell(code, text)
        if self.lifeline.has_peers:
            ExitTimer(code).push(2 * GRACE_S)
        return text if first is None else f"{first} (here: {text})"

    def close(self) -> None:
        """This rank is at its end. A second call does nothing."""
        if hasattr(self, "stop"):
            self.stop.close()
        self.watchdog.close()
        if self._begun:
            self.recorder.close()
        self.lifeline.close()
