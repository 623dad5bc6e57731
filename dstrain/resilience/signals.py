"""The agreed stop: all ranks end after the same step, whatever made one of them want to."""

import time
from pathlib import Path

from dstrain import distributed


class AgreedStop:
    """A `stop` file in the run folder or `max_time` seconds; an OR over the ranks."""

    def __init__(self, folder: Path, max_time: float | None):
        self.stop_file = folder / "stop"
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.reasons = ("the stop file", "--max_time is over")

    def agreed(self) -> str | None:
        """Why to stop now, the same on every rank; None to go on. A collective."""
        wishes = [self.stop_file.exists(), self.deadline is not None and time.monotonic() > self.deadline]
        agreed = distributed.max_over_ranks([float(wish) for wish in wishes])
        return next((reason for reason, wish in zip(self.reasons, agreed, strict=True) if wish), None)
