"""`--profile`: a torch trace of a few steps, for chrome://tracing or Perfetto."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

# Steps 1-3 are slower than the rest (allocations, first collectives); three more show the rhythm.
WAIT_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 3


class NullProfiler(nullcontext):
    def step(self) -> None:
        pass


def build_profiler(folder: Path, enabled: bool) -> Any:
    """A context manager with `step()`; writes `folder/trace.json` after step 6 (or at the end of a shorter run)."""
    if not enabled:
        return NullProfiler()
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    return profile(
        activities=activities,
        schedule=schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )
