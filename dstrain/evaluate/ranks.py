"""Work divided over the ranks of a start, with results that do not depend on their number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dstrain import distributed
from dstrain.monitor.logs import screen
from dstrain.parallel import Launch


@contextmanager
def joined() -> Iterator[Launch]:
    """The ranks of this start, over gloo whatever the device: it is results that travel."""
    launch = Launch.from_environment()
    if launch.world_size > 1:
        dist.init_process_group("gloo", timeout=distributed.START_TIMEOUT)
    yield launch
    distributed.leave()


def over_ranks(batches: Sequence[list[int]], work: Callable[[list[int]], Sequence[Any]], launch: Launch) -> list[Any]:
    """`work(batch)`, a result for each row number of the batch; all results in the order of the rows, on every rank.

    A batch is computed whole by one rank, and what is in it depends on no rank: so neither does a bit of its results.
    """
    mine: dict[int, Any] = {}
    for batch in _shown(batches[launch.rank :: launch.world_size], launch):
        mine.update(zip(batch, work(batch), strict=True))
    found: dict[int, Any] = {}
    for part in distributed.gather_objects(mine):
        found.update(part)
    return [found[row] for row in sorted(found)]


def _shown(batches: Sequence[list[int]], launch: Launch) -> Any:
    """With a bar, where somebody looks."""
    if not launch.is_main or not screen().isatty():
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, description="evaluating", console=Console(file=screen()), transient=True)
