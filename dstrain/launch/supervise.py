"""Restarts: start a run, and start it again when it ends in a way that starting again can mend.

The supervisor runs beside a launcher and never trains. It trusts what the run itself wrote: `summary` in metrics.jsonl,
since torchrun and accelerate return 1 for every failure, and `deepspeed` 0 when its node launcher dies by a signal.
Locks that dead builds of DeepSpeed's ops left are removed by every start itself (`dstrain.launch.ops`).
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.errors import ExitCode, UserError
from dstrain.launch import processes
from dstrain.launch.fleet import Fleet, OneHost
from dstrain.monitor.metrics import METRICS_FILE, append_missing_summary, read_metrics
from dstrain.resilience.exits import LAUNCHER_DIED, STOP_SIGNALS
from dstrain.resilience.recorder import read_ring
from dstrain.run_lock import RunLock

FINAL = (ExitCode.FINISHED, ExitCode.USER_ERROR, ExitCode.STOPPED, ExitCode.NON_FINITE, ExitCode.VERIFY_FAILED)
START_UP_S = 5.0  # ranks that have not begun to train have nothing to save
NO_HOST_S = 600.0  # so long no host may answer
_ASK_AGAIN_S = 10.0
_POLL_S = 0.2
_MAX_BACKOFF_S = 300.0


def say(text: str) -> None:
    """A line of the supervisor's own on the terminal."""
    print(f"dstrain launch: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Outcome:
    """How one start ended. exit_code: the run's own, whatever its launcher returned. steps: made by this start.

    began: it got as far as writing into the run folder. killed: its launcher died by a signal.
    """

    exit_code: int
    reason: str
    steps: int
    began: bool
    killed: bool

    @property
    def is_final(self) -> bool:
        """Whether starting again cannot help, or is not wanted."""
        lost_launcher = self.exit_code == ExitCode.STOPPED and self.reason.endswith(LAUNCHER_DIED)
        return self.exit_code in FINAL and not lost_launcher


class Supervisor:
    """Starts what `place` musters, whose run folder is `folder`, and restarts it at most `max_restarts` times."""

    def __init__(self, place: OneHost | Fleet, folder: Path, *, max_restarts: int, backoff_s: float = 5.0):
        self.place = place
        self.folder = folder
        self.max_restarts = max_restarts
        self.backoff_s = backoff_s
        self.lock = RunLock(folder)
        self._signals: list[int] = []
        self._fruitless = 0  # starts in a row that made no step
        self._old_rings: set[str] = set()  # headers of the black boxes that were there before the present start

    def run(self) -> int:
        """The exit code of the run: of its last start, or 128 + n after a second signal."""
        processes.adopt_orphans()
        handlers = {number: signal.signal(number, lambda n, _: self._signals.append(n)) for number in STOP_SIGNALS}
        try:
            return self._run()
        finally:
            processes.end_descendants(0.0)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        code = int(ExitCode.USER_ERROR)
        for restart in range(self.max_restarts + 1):
            command = self._muster()
            if command is None:
                return code
            if not command:
                return int(ExitCode.STOPPED)
            began = time.monotonic()
            outcome = self._start_once(command)
            code = outcome.exit_code
            self._note(restart, outcome)
            if len(self._signals) > 1:
                return 128 + self._signals[-1]
            if outcome.is_final or self._signals:
                return outcome.exit_code
            if why_not := self._why_not_again(outcome, restart):
                say(f"exit code {outcome.exit_code} ({outcome.reason}): {why_not}")
                return outcome.exit_code
            short = time.monotonic() - began < _MAX_BACKOFF_S
            wait_s = min(_MAX_BACKOFF_S, self.backoff_s * 2**restart) if short else self.backoff_s
            say(
                f"exit code {outcome.exit_code} ({outcome.reason}) after {outcome.steps} steps: "
                f"restart {restart + 1} of {self.max_restarts} in {wait_s:.0f} s"
            )
            if self._stop_asked_within(wait_s):
                return int(ExitCode.STOPPED)
        raise AssertionError("the last restart returns")

    def _muster(self) -> list[str] | None:
        """The command of the next start; empty: a stop was asked for; None: no host has answered for NO_HOST_S."""
        deadline = time.monotonic() + NO_HOST_S
        while (command := self.place.muster()) is None:
            if time.monotonic() > deadline:
                say(f"no host of the hostfile has answered for {NO_HOST_S / 60:.0f} minutes: gave up")
                return None
            if self._stop_asked_within(_ASK_AGAIN_S):
                return []
        return command

    def _why_not_again(self, outcome: Outcome, restart: int) -> str | None:
        self._fruitless = 0 if outcome.steps else self._fruitless + 1
        from_outside = outcome.killed or outcome.exit_code == ExitCode.HUNG or self.place.has_lost_hosts
        if not outcome.began and not from_outside:
            return "it ended before it began to write, so another start would end the same way"
        if self._fruitless > 1:
            return "two starts in a row made no step"
        if restart == self.max_restarts:
            return "no restart is left" if restart else "--max_restarts is 0"
        return None

    def _start_once(self, command: Sequence[str]) -> Outcome:
        self.lock.wait_until_free()
        before = self._metrics_state()
        self._old_rings = {json.dumps(header) for header, _ in self._all_rings()}
        try:
            child = subprocess.Popen(command, env=self.place.environment, start_new_session=True)
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started ({error.strerror}): name a launcher after --") from None
        asked = False
        while child.poll() is None:
            time.sleep(_POLL_S)
            if self._signals and not asked:
                asked = True
                self._ask_to_stop()
            if len(self._signals) > 1:
                processes.end_descendants(0.0)
            if self.place.is_left_behind():
                say("a host's part of the run has ended, and the others wait for it: ended them")
                processes.end_descendants(0.0)
        grace_s = processes.ORPHANS_SAVE_S if self._rings() and not self._has_summary(before) else START_UP_S
        self.place.clean_up(0.0 if len(self._signals) > 1 else grace_s)
        self._wait_for_ranks_elsewhere(child.returncode)
        return self._outcome(child.returncode, before)

    def _wait_for_ranks_elsewhere(self, returncode: int) -> None:
        """Ranks that are not below this process (Ray's) save and say why they end after their launcher has died."""
        deadline = time.monotonic() + processes.ORPHANS_SAVE_S
        died = true_code(returncode) > 128
        while died and self.lock.is_held and len(self._signals) < 2 and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _ask_to_stop(self) -> None:
        ranks = [header["pid"] for header, _ in self._rings()]
        if ranks:
            say(f"{signal.Signals(self._signals[0]).name}: asked the run to save and stop; once more ends it at once")
        self.place.ask_to_stop(ranks)

    def _rings(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The black boxes that ranks of this start have opened, so that they train. (Clocks of hosts may differ.)"""
        return [(header, steps) for header, steps in self._all_rings() if json.dumps(header) not in self._old_rings]

    def _all_rings(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        rings = [read_ring(path) for path in sorted(self.folder.glob("logs/steps_rank_*.ring"))]
        return [(header, steps) for header, steps in rings if header]

    def _metrics_state(self) -> tuple[int, int, int] | None:
        try:
            stat = (self.folder / METRICS_FILE).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _has_summary(self, before: tuple[int, int, int] | None) -> bool:
        """Whether rank 0 of this start has said how it ended: then nobody saves any more."""
        lines = read_metrics(self.folder) if self._metrics_state() != before else []
        return bool(lines) and lines[-1]["kind"] == "summary"

    def _outcome(self, returncode: int, before: tuple[int, int, int] | None) -> Outcome:
        code = true_code(returncode)
        steps = max((len({step["step"] for step in steps}) for _, steps in self._rings()), default=0)
        refused = code == ExitCode.USER_ERROR and self.lock.is_held  # what was written is another start's
        if refused or self._metrics_state() == before:  # this start wrote nothing: its launcher is the only witness
            code = code or ExitCode.CRASH
            return Outcome(code, _in_words(code), steps, began=bool(self._rings()), killed=code > 128)
        code = code or ExitCode.CRASH  # zero is believed from a summary only
        append_missing_summary(self.folder, code, f"ended without a summary: {_in_words(code)}")
        lines = read_metrics(self.folder)
        summary: dict[str, Any] = lines[-1] if lines else {"exit_code": code, "reason": _in_words(code)}
        return Outcome(summary["exit_code"], summary["reason"], steps, began=True, killed=code > 128)

    def _stop_asked_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._signals:
                return True
            if (self.folder / "stop").exists():
                (self.folder / "stop").unlink()
                return True
            time.sleep(_POLL_S)
        return False

    def _note(self, restart: int, outcome: Outcome) -> None:
        """For `dstrain postmortem`: logs/restarts.jsonl."""
        logs = self.folder / "logs"
        if logs.is_dir():
            line = {"time": round(time.time(), 1), "start": restart, **vars(outcome)}
            with open(logs / "restarts.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def true_code(returncode: int) -> int:
    """A launcher's return code as a shell gives it: 128 + n for signal n, also where `sys.exit(-n)` gave 256 - n."""
    if returncode < 0:
        return 128 - returncode
    return 128 + 256 - returncode if returncode > 256 - 65 else returncode


def _in_words(code: int) -> str:
    if code > 128 and code - 128 in {s.value for s in signal.Signals}:
        name = signal.Signals(code - 128).name
        return f"ended by {name}" + (" (out of memory, or somebody's kill)" if name == "SIGKILL" else "")
    return f"its launcher returned {code}"
