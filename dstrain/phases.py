"""Names for the parts of a step, which a trace (`--profile`) shows and `profile/split.json` adds up."""

from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = ("data", "forward", "backward", "optimizer", "communication")


def phase(name: str) -> AbstractContextManager:
    """A range of the trace around one of `PHASES`; nothing (1 us) while no trace is taken.

    The range ends when the device has ended, so that its time on the host is the time of the work in it.
    """
    assert name in PHASES
    return _traced(name) if torch.autograd._profiler_enabled() else nullcontext()


@contextmanager
def _traced(name: str):
    with torch.profiler.record_function(name):
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
