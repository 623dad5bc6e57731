"""With how many ranks a run can go on: its degrees and its global batch divide by few of the numbers."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dstrain.arguments import parse_arguments
from dstrain.config import RunFacts, load_config, resolve_config
from dstrain.errors import UserError
from dstrain.run_folder import RunFolder


def holds(config: str, world_size: int, overrides: Sequence[str], global_batch: int | None) -> bool:
    """Whether a DeepSpeed JSON can be used with so many ranks. global_batch: of the run, once it has begun."""
    facts = RunFacts(config_only=True)
    try:
        resolve_config(
            load_config(config),
            world_size=world_size,
            overrides=overrides,
            facts=facts,
            stored_global_batch=global_batch,
        )
    except UserError:
        return False
    return True


def stored_global_batch(folder: Path) -> int | None:
    """Samples a step of the run in `folder`; None before it has begun."""
    return RunFolder(folder).read().get("identity", {}).get("global_batch")


def usable_worlds(flags: Sequence[str], folder: Path, worlds: Iterable[int]) -> Iterator[int]:
    """Those numbers of ranks that the run of these flags can use; all, where the flags are another script's."""
    try:
        run = parse_arguments(list(flags)).run
    except UserError:
        yield from worlds
        return
    config, batch = run.deepspeed_config, stored_global_batch(folder)
    yield from (number for number in worlds if config is None or holds(config, number, run.set, batch))
