"""Batch arithmetic: global batch = micro-batch x accumulation x data-parallel size. Pure."""

from dataclasses import dataclass

from dstrain.errors import UserError

GLOBAL, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Batch:
    """Samples per step and how they are cut; `origins` names where each of the three comes from."""

    global_batch: int
    micro_batch: int
    gradient_accumulation_steps: int
    origins: dict[str, str]


def solve_batch(
    global_batch: int | None,
    micro_batch: int | None,
    accumulation: int | None,
    *,
    dp_size: int,
    stored_global_batch: int | None = None,
    max_micro_batch: int | None = None,
) -> Batch:
    """Solve for what is missing. The global batch is the invariant of a run, so a stored one (of a resumed run) wins.

    Raises UserError, with the nearest values, where the numbers do not divide.
    """
    if stored_global_batch is not None:
        if global_batch is not None and global_batch != stored_global_batch:
            raise UserError(
                f"{GLOBAL} is {global_batch}, but this run was started with {stored_global_batch}: "
                f"write {stored_global_batch}, or start another run with another --output_dir"
            )
        origin = "derived: the global batch this run was started with"
        if micro_batch is not None or accumulation is None:
            return _split(stored_global_batch, micro_batch, None, dp_size, max_micro_batch, origin)
        return _split(stored_global_batch, None, accumulation, dp_size, max_micro_batch, origin)
    if global_batch is not None:
        return _split(global_batch, micro_batch, accumulation, dp_size, max_micro_batch, "user")
    if micro_batch is None:
        raise UserError(
            f"no batch size is given: write {GLOBAL} (samples per optimizer step over all ranks) or {MICRO}"
            " (dstrain has no flag for it)"
        )
    steps = 1 if accumulation is None else accumulation
    origins = {GLOBAL: f"derived: {MICRO} x {ACCUMULATION} x {dp_size} data-parallel ranks"}
    if accumulation is None:
        origins[ACCUMULATION] = "derived: 1, since only the micro-batch is given"
    return Batch(micro_batch * steps * dp_size, micro_batch, steps, origins)


def _split(total: int, micro: int | None, steps: int | None, dp_size: int, max_micro: int | None, origin: str) -> Batch:
    origins = {} if origin == "user" else {GLOBAL: origin}
    ranks = f"{dp_size} data-parallel rank{'s' if dp_size > 1 else ''}"
    if micro is not None and steps is not None:
        if micro * steps * dp_size != total:
            raise UserError(
                f"{GLOBAL} {total} is not {MICRO} {micro} x {ACCUMULATION} {steps} x {ranks} = "
                f"{micro * steps * dp_size}: leave out {ACCUMULATION}, and it is solved"
            )
        return Batch(total, micro, steps, origins)
    unit = dp_size * (micro or steps or 1)
    if total % unit:
        parts = [f"{MICRO} {micro}"] if micro else [f"{ACCUMULATION} {steps}"] if steps else []
        raise UserError(
            f"{GLOBAL} {total} cannot be split over {' x '.join([*parts, ranks])}: write {_nearest(total, unit)}"
            + (f", or {_other_values(total, dp_size, micro)}" if micro and total % dp_size == 0 else "")
        )
    per_rank = total // dp_size
    if micro is not None:
        origins[ACCUMULATION] = f"derived: {GLOBAL} / ({MICRO} x {ranks})"
        return Batch(total, micro, per_rank // micro, origins)
    if steps is not None:
        origins[MICRO] = f"derived: {GLOBAL} / ({ACCUMULATION} x {ranks})"
        return Batch(total, per_rank // steps, steps, origins)
    limit = min(per_rank, max_micro or per_rank)
    micro = next(size for size in range(limit, 0, -1) if per_rank % size == 0)
    reason = "that fits the memory plan" if micro < per_rank else "there is"
    origins[MICRO] = f"derived: the largest that divides the {per_rank} samples of a rank and {reason}"
    if micro == per_rank:
        origins[MICRO] = f"derived: {GLOBAL} / {ranks}"
    origins[ACCUMULATION] = f"derived: {GLOBAL} / ({MICRO} x {ranks})"
    return Batch(total, micro, per_rank // micro, origins)


def _nearest(total: int, unit: int) -> str:
    below = total // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _other_values(total: int, dp_size: int, micro: int) -> str:
    per_rank = total // dp_size
    sizes = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    closest = sorted(sizes, key=lambda size: abs(size - micro))[:2]
    return f"{MICRO} " + " or ".join(map(str, sorted(closest)))
