"""The prediction at the start of a run, made by a process of its own while the ranks get ready.

A forked process has everything imported, and what it allocates is not the run's. It is given little time: a run never
waits longer for its forecast than `patience_s`, and starts without one rather than late.
"""

import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 1.5
PATIENCE_S_PER_BILLION = 1.0  # of parameters: a large model takes longer to build by far more than that


@dataclass
class Forecast:
    """A prediction under way. `result` may be called once."""

    pid: int = 0
    pipe: int = -1
    billions: float = 0.0

    def result(self) -> dict[str, Any] | None:
        """The prediction; None where there is none, or none yet. Raises nothing."""
        if not self.pid:
            return None
        deadline = time.monotonic() + PATIENCE_S + PATIENCE_S_PER_BILLION * self.billions
        chunks: list[bytes] = []
        while (left := deadline - time.monotonic()) > 0 and select.select([self.pipe], [], [], left)[0]:
            chunk = os.read(self.pipe, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
        self.close()
        try:
            return json.loads(b"".join(chunks))
        except ValueError:  # too late, or ended by an error of the model's own code on tensors without data
            return None

    def close(self) -> None:
        """End the process, if it is still there."""
        if self.pid:
            os.close(self.pipe)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def start(predict: Callable[[], dict[str, Any]], billions: float = 0.0) -> Forecast:
    """Begin `predict()` in a forked process, which must not use an accelerator. It returns plain JSON."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Forecast(pid, reading, billions)
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.write(writing, json.dumps(predict()).encode())
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's (files, groups, threads) is to be closed here
