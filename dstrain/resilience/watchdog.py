"""The watchdog: a run that makes no progress ends by itself, with 76, and leaves behind what every rank was doing.

It is a thread, so it acts while the main thread is stuck in a collective or in C code. Behind it stands a kernel timer
that needs no interpreter lock (`ExitTimer`), wound up by the thread, for C code that never gives the lock back.
"""

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from dstrain.errors import ExitCode
from dstrain.resilience.exits import ExitTimer, exit_now

# Without --hang_timeout: this many median steps, and never less than the floor. What is not a step has no median.
MEDIAN_STEPS = 20.0
FLOOR_S = {
    "start": 1800.0,  # the process group, ops that are built, the engine, the first step with its compilation
    "loading": 7200.0,  # data, model, checkpoint: one rank may tokenise for long while the others wait (START_TIMEOUT)
    "loading_alone": 86400.0,  # one process waits for nobody
    "step": 50.0,  # with the end of all ranks, a hang is over within a minute
    "evaluation": 50.0,
    "sample": 1800.0,
    "save": 1800.0,
    "end": 1800.0,
}
_FLOOR_HOLDS = ("start", "loading", "loading_alone", "end")  # whatever --hang_timeout says, which is of steps
COMPILE_S = 1800.0  # the first evaluation of a compiled model
PAUSE_S = 300.0  # instead of the floors of step and evaluation
_MARGIN_S = 10.0  # what the thread gets before the kernel's timer
_MIN_GROUP_TIMEOUT_S = 60.0


class Watchdog:
    """Watches from the first beat on.

    timeout_s: seconds without a beat, or None for a multiple of the median step. pauses: a step may take minutes
    now and then, since a model is compiled again, or a trace written.
    last_words: writes event and summary. tell: says to the other ranks why this one ends.
    """

    def __init__(
        self,
        rank: int,
        *,
        timeout_s: float | None = None,
        pauses: bool = False,
        last_words: Callable[[ExitCode, str, str], None] = lambda code, name, text: None,
        tell: Callable[[int, str], None] = lambda code, text: None,
    ):
        self.rank = rank
        self.file: Path | None = None
        self.timeout_s = timeout_s
        self._pauses = self._first_evaluation = pauses
        self._describe: Callable[[], str] = str
        self._last_words = last_words
        self._tell = tell
        self._steps: deque[float] = deque(maxlen=50)
        self._activity, self._step, self._since = "start", 0, time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = threading.Lock()

    def attach(self, logs: Path, describe: Callable[[], str]) -> None:
        """There is a run folder: stacks go there, and no longer to stderr. describe: what the last batch was."""
        self.file, self._describe = logs / f"hang_rank_{self.rank}.txt", describe

    def beat(self, activity: str, step: int) -> None:
        """Progress: `activity` (a key of FLOOR_S) is what comes next, after `step` steps."""
        now = time.monotonic()
        if self._activity == "step" == activity and self._thread is not None:
            self._steps.append(now - self._since)
        if self._activity == "evaluation" == activity:
            self._first_evaluation = False
        self._activity, self._step, self._since = activity, step, now
        if self._thread is None:
            self._last_resort = ExitTimer(ExitCode.HUNG)
            self._wind_up(self.limit_s)
            self._thread = threading.Thread(target=self._watch, name="dstrain-watchdog", daemon=True)
            self._thread.start()

    @property
    def limit_s(self) -> float:
        """Seconds that the present activity may take."""
        if self._activity == "evaluation" and self._first_evaluation:
            return max(COMPILE_S, self.timeout_s or 0.0)
        if self._activity in _FLOOR_HOLDS:
            return max(FLOOR_S[self._activity], self.timeout_s or 0.0)
        if self.timeout_s is not None:
            return self.timeout_s
        steps, floor = list(self._steps), max(FLOOR_S[self._activity], PAUSE_S if self._pauses else 0.0)
        return max(floor, MEDIAN_STEPS * statistics.median(steps) if steps else 0.0)

    @property
    def group_timeout_s(self) -> float:
        """For the process groups: later than the watchdog, which knows more, and before anybody's patience ends."""
        return max(FLOOR_S["save"] if self.timeout_s is None else self.timeout_s, _MIN_GROUP_TIMEOUT_S) + 30.0

    def _wind_up(self, limit: float) -> None:
        """What acts without the interpreter lock, later than the thread would: stacks to the log, then the end."""
        faulthandler.dump_traceback_later(limit + _MARGIN_S, file=sys.stderr)
        self._last_resort.push(limit + 2 * _MARGIN_S)

    def _watch(self) -> None:
        while True:
            limit = self.limit_s
            self._wind_up(limit)
            if self._stop.wait(min(1.0, limit / 10)):
                break
            if (seconds := time.monotonic() - self._since) > limit:
                self.bark(f"no progress for {seconds:.0f} s in {self._activity} {self._place()}")
        self._last_resort.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _place(self) -> str:
        if self._activity in ("start", "loading", "loading_alone"):
            return "before the first step"
        return f"{self._step + 1}" if self._activity == "step" else f"after step {self._step}"

    def bark(self, text: str, *, told: bool = False) -> None:
        """Write down what this rank is doing and end it with 76. told: another rank said so first."""
        if not self._ended.acquire(blocking=False):
            return
        if not told:
            self._tell(ExitCode.HUNG, text)

        def last_words() -> None:
            self.write_stacks(text)
            where = f"in {self.file.parent}/hang_rank_*.txt" if self.file else "on their stderr"
            self._last_words(ExitCode.HUNG, "hang", f"{text}; stacks of all ranks are {where}")

        exit_now(ExitCode.HUNG, last_words)

    def write_stacks(self, text: str) -> None:
        """Python stacks of all threads of this rank, the last step and the last batch, to `logs/hang_rank_N.txt`."""
        seconds = time.monotonic() - self._since
        with open(2 if self.file is None else self.file, "a", closefd=self.file is not None) as out:
            out.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}: {text}\n")
            out.write(f"this rank: {self._activity} {self._place()}, for {seconds:.1f} s\n")
            out.write(f"last completed step {self._step}: {self._describe()}\n\n")
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)

    def close(self) -> None:
        """A second call does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
