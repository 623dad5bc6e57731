"""`comms_logger` of the DeepSpeed JSON: what rank zero's collectives moved in a step, as `comms.json` of the run.

DeepSpeed itself only prints its table when somebody asks. Counted are the collectives that go through `deepspeed.comm`:
of ZeRO, the pipeline, AutoTP and Ulysses, and not the few numbers that dstrain itself agrees on.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any


class CommsTable:
    """`step()` after each optimizer step; as a context manager it writes at the end. The first step is left out: it
    also makes groups and first buffers.

    comms.json: `steps`; `per_step`: op -> `count`, `bytes` and `sizes` (bytes of one message -> count), of the tensor
    that goes into the op: the own shard of an all-gather, the whole of a reduce-scatter; also where the group is one
    rank and nothing moves. DeepSpeed's times are left out: its timer is not reset between two calls (0.19.8,
    `comm.py`, `elapsed(reset=False)`).
    """

    def __init__(self, path: Path, logger: Any):
        self._path, self._logger = path, logger
        self._first: Counter | None = None
        self._last: Counter = Counter()
        self._steps = 0

    def step(self) -> None:
        self._last = self._totals()
        if self._first is None:
            self._first = self._last
        else:
            self._steps += 1

    def _totals(self) -> Counter:
        """(op, bytes of a message) -> messages since the start; `get_raw_data` gives {op: {bytes: [count, ...]}}."""
        raw = self._logger.get_raw_data()
        return Counter({(op, size): row[0] for op, sizes in raw.items() for size, row in sizes.items()})

    def __enter__(self) -> "CommsTable":
        return self

    def __exit__(self, *_: object) -> None:
        if self._first is not None and self._steps:
            self.write()

    def write(self) -> None:
        assert self._first is not None
        per_step: dict[str, dict[str, Any]] = {}
        for (op, size), count in sorted((self._last - self._first).items()):
            row = per_step.setdefault(op, {"count": 0.0, "bytes": 0.0, "sizes": {}})
            row["sizes"][str(size)] = count / self._steps
            row["count"] += count / self._steps
            row["bytes"] += size * count / self._steps
        table = {"rank": 0, "steps": self._steps, "per_step": per_step}
        self._path.write_text(json.dumps(table, indent=2) + "\n")
