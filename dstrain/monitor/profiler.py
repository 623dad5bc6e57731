"""`--profile`: a torch trace of a few steps of rank zero (for chrome://tracing or Perfetto), and where their time went.

`profile/split.json`: mean seconds a step in each of `PHASES`, and in `other`; they add up to `step_time_s`. While a
collective is under way the time is `communication`, also inside another phase and also where computing goes on.
"""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dstrain.monitor.comms import CommsTable
from dstrain.phases import PHASES

# Steps 1-3 are slower than the rest (allocations, first collectives); three more show the rhythm.
WAIT_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 3

# How a trace names them: torch's process groups, NCCL's kernels, DeepSpeed's all-reduce through shared memory.
COLLECTIVE = re.compile(r"c10d::|(gloo|nccl|mpi|ucc|xccl|hccl):|nccl(Dev)?Kernel|deepspeed::inference_all_reduce")

Interval = tuple[float, float]


class Profilers(ExitStack):
    """What watches the steps of a run: all of them, or none. `step()` after each optimizer step."""

    def __init__(self, parts: Sequence[Any] = ()):
        super().__init__()
        self._parts = parts

    def __enter__(self) -> "Profilers":
        for part in self._parts:
            self.enter_context(part)
        return self

    def step(self) -> None:
        for part in self._parts:
            part.step()


def build_profiler(run_folder: Path, deepspeed_config: dict[str, Any], *, trace: bool, is_main: bool) -> Profilers:
    """The trace of `--profile`, and the table of collectives where the DeepSpeed JSON enables `comms_logger`."""
    parts = []
    if trace and is_main:
        parts.append(_build_trace(run_folder / "profile"))
    if is_main and deepspeed_config.get("comms_logger", {}).get("enabled"):
        from deepspeed.comm import comm

        parts.append(CommsTable(run_folder / "comms.json", comm.comms_logger))
    return Profilers(parts)


def _build_trace(folder: Path) -> Any:
    """A context manager with `step()`; writes into `folder` after step 6 (or at the end of a shorter run)."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        events = ((e.name, (e.time_range.start / 1e6, e.time_range.end / 1e6)) for e in profiler.events())
        (folder / "split.json").write_text(json.dumps(split_time(events), indent=2) + "\n")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    return profile(
        activities=activities,
        schedule=schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )


def split_time(events: Iterable[tuple[str, Interval]]) -> dict[str, Any]:
    """(name, (start, end) in s) of a trace's events -> mean seconds a step in each phase, and of the step."""
    steps: list[Interval] = []
    spans: dict[str, list[Interval]] = {name: [] for name in PHASES}
    for name, span in events:
        if name.startswith("ProfilerStep"):
            steps.append(span)
        elif name in spans:
            spans[name].append(span)
        elif COLLECTIVE.match(name):
            spans["communication"].append(span)
    # On a device a trace shows each range twice, on the host and on the device.
    steps = union(steps)
    whole, num_steps = steps, max(1, len(steps))
    communication = union(spans["communication"])
    seconds = {"communication": length(intersection(communication, whole))}
    for name in PHASES:
        if name != "communication":
            own = intersection(union(spans[name]), whole)
            seconds[name] = length(own) - length(intersection(own, communication))
    total = length(whole)
    seconds = {name: seconds[name] / num_steps for name in PHASES}
    seconds["other"] = total / num_steps - sum(seconds.values())
    return {"rank": 0, "steps": len(steps), "step_time_s": total / num_steps, "seconds": seconds}


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[Interval] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Time in both; a and b as `union` gives them."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Iterable[Interval]) -> float:
    return sum(end - start for start, end in spans)
