"""Tensor parallelism's part of a parameter, and the way back to the whole one."""

from dataclasses import dataclass
from typing import Any

import torch

from dstrain.errors import UserError


@dataclass(frozen=True)
class Cut:
    """The elements `ranges` (begin, end) along `dim` of a tensor of `full_shape`, one range behind the other."""

    full_shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.full_shape)
        shape[self.dim] = sum(end - begin for begin, end in self.ranges)
        return tuple(shape)

    @property
    def label(self) -> str:
        """For a key in a file: `dim:begin-end,begin-end`."""
        return f"{self.dim}:" + ",".join(f"{begin}-{end}" for begin, end in self.ranges)

    @classmethod
    def from_label(cls, label: str, full_shape: tuple[int, ...]) -> "Cut":
        dim, ranges = label.split(":")
        pairs = tuple((int(b), int(e)) for b, e in (r.split("-") for r in ranges.split(",")))
        return cls(full_shape, int(dim), pairs)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This cut of `whole`, contiguous."""
        return torch.cat([whole.narrow(self.dim, b, e - b) for b, e in self.ranges], self.dim).contiguous()

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write `part` where it belongs in `whole`."""
        offset = 0
        for begin, end in self.ranges:
            whole.narrow(self.dim, begin, end - begin).copy_(part.narrow(self.dim, offset, end - begin))
            offset += end - begin


def find_cut(name: str, parameter: Any, tp_rank: int) -> Cut | None:
    """How DeepSpeed's AutoTP cut this parameter for rank `tp_rank`; None where every rank holds all of it.

    Read from what AutoTP leaves on each parameter for its own conversion (module_inject/layers.py of 0.19). Raises
    UserError for a layout that it does not describe.
    """
    meta = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    if meta is None or meta["replicated"]:
        return None
    shape, dim = meta["logical_shape"] or meta["original_shape"], meta["partition_dim"]
    blocks = meta["sub_param_shard_widths"] or ([meta["partition_sizes"]] if meta["partition_sizes"] else [])
    if meta["conversion"]["unsupported_reason"] or not shape or dim is None or not blocks:
        raise UserError(f"tensor parallelism cuts {name} in a way that no checkpoint can describe: use ZeRO instead")
    ranges, base = [], 0
    for widths in blocks:
        begin = base + sum(widths[:tp_rank])
        ranges.append((begin, begin + widths[tp_rank]))
        base += sum(widths)
    return Cut(tuple(shape), dim, tuple(ranges))
