"""The agreed stop: all ranks end after the same step, whatever made one of them want to.

A wish is a signal to any rank, the `stop` file in the run folder, the end of `--max_time`, or a launcher that died: a
run without its launcher would train on as an orphan, with nobody to end its other ranks. The kernel could end such a
rank for us (PR_SET_PDEATHSIG), but only when its own parent dies: under `deepspeed` that is the node launcher, not the
runner that the user started. So each rank looks at all launchers above it, and saves before it ends.
"""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstrain import distributed
from dstrain.resilience.exits import LAUNCHER_DIED, STOP_SIGNALS, exit_now, ignore_stop_signals

# `scancel` and a terminal's Ctrl-C reach ranks and launchers, and launchers pass on what they get: that is one wish.
FORWARDING_S = 0.3
REASONS = ("the stop file", "--max_time is over", LAUNCHER_DIED, *(f"signal {s.name}" for s in STOP_SIGNALS))
_LAUNCHER_NAMES = ("deepspeed", "torchrun", "accelerate", "accelerate-launch", "dstrain")
_LAUNCHER_MODULES = (
    "deepspeed.launcher",
    "torch.distributed",
    "accelerate.commands",
    "dstrain.cli",
    "dstrain.launch.clusters.ray_rank",
)
_SLURM = "slurmstepd: "  # "slurmstepd: [JOB.STEP]": so it names itself
_PATIENCE_S = 2.0


class StopSignals:
    """Remembers the first stop signal; the second ends the process with 128 + its number, also while the main thread is
    stuck in C code: the interpreter's C handler writes to a socket, and a thread reads it."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._first_at = 0.0
        self._own = threading.current_thread() is threading.main_thread()  # only it may install handlers
        if not self._own:
            return
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {s: signal.signal(s, lambda *_: None) for s in STOP_SIGNALS}
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="dstrain-signals", daemon=True).start()

    def _read(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number in STOP_SIGNALS:
                    self._take(signal.Signals(number))
        self._reader.close()

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_at = number, now
        elif now - self._first_at > FORWARDING_S:
            exit_now(128 + number, patience_s=_PATIENCE_S)

    def ignore(self) -> None:
        """The run has ended by agreement: a launcher that sees another rank's 75 first must not make this one a 143."""
        if self._own:
            signal.set_wakeup_fd(self._fd_before)
            ignore_stop_signals()

    def close(self) -> None:
        """Give the handlers back. A second call does nothing."""
        if not self._own:
            return
        self._own = False
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()


def launchers_above() -> list[tuple[int, str]]:
    """(pid, start time) of the launchers among this process's parents, nearest first."""
    found = []
    pid = os.getppid()
    while pid > 1 and _is_launcher(pid):
        parent, started = _stat(pid)
        if parent < 0:
            break
        found.append((pid, started))
        pid = parent
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    named = any(os.path.basename(word) in _LAUNCHER_NAMES for word in words[:2]) or words[0].startswith(_SLURM)
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return named or module.startswith(_LAUNCHER_MODULES)


def _stat(pid: int) -> tuple[int, str]:
    """(parent, start time); (-1, "") of a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return -1, ""
    return (-1, "") if fields[0] == "Z" else (int(fields[1]), fields[19])


class AgreedStop:
    """An OR over the ranks, once a step.

    It costs no wait: a rank's wish travels through a gloo group of its own while the next step runs, and is known to
    all one step later; no device is asked. deadline: in seconds of CLOCK_BOOTTIME. reason: why the run stops, or None.
    """

    def __init__(self, folder: Path, deadline: float | None = None):
        self.stop_file = folder / "stop"
        self.deadline = deadline
        self.reason: str | None = None
        self.signals = StopSignals()
        self._main = not dist.is_initialized() or dist.get_rank() == 0
        self._group = distributed.new_host_group()
        self._launchers = launchers_above()
        self._looked_at = 0.0
        self._orphan = False
        self._pending: tuple[torch.Tensor, Any] | None = None

    def agreed(self) -> str | None:
        """Why to stop now, the same on every rank; None to go on. A collective."""
        if self.reason is None:
            wishes = self._exchange([float(wish) for wish in self._wishes()])
            self.reason = next((reason for reason, wish in zip(REASONS, wishes, strict=True) if wish), None)
            if self.reason is not None and self._main:
                self.stop_file.unlink(missing_ok=True)  # honoured: the next start goes on
        return self.reason

    def _wishes(self) -> list[bool]:
        late = self.deadline is not None and time.clock_gettime(time.CLOCK_BOOTTIME) > self.deadline
        signalled = [self.signals.first is number for number in STOP_SIGNALS]
        return [self._main and self.stop_file.exists(), late, self._is_orphan(), *signalled]

    def _is_orphan(self) -> bool:
        now = time.monotonic()
        if self.signals.first is not None or now - self._looked_at > 1.0:
            self._looked_at = now
            self._orphan = any(_stat(pid)[1] != started for pid, started in self._launchers)
        return self._orphan

    def _exchange(self, wishes: list[float]) -> list[float]:
        """The maximum over the ranks of what they gave to the call before this one; of one rank, of this call."""
        if self._group is None:
            return wishes
        before = self._pending
        tensor = torch.tensor(wishes)
        self._pending = tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return [0.0] * len(wishes)
        before[1].wait()
        return before[0].tolist()

    def close(self) -> None:
        """Give the signals back. The `stop` file of a run that is over has nothing left to stop."""
        self.signals.close()
        if self._main:
            self.stop_file.unlink(missing_ok=True)
