"""What a rank holds of the trained state, in terms that no layout owns: named parameters and ranges of their elements.

`open_shards` walks the buffers of whichever optimizer DeepSpeed 0.19 built (plain at ZeRO 0, BF16_Optimizer, ZeRO 1
and 2, ZeRO 3 with or without NVMe) and says of each which elements of which parameter lie where. Saving copies them
out, loading copies them in; everything else in this package is the same for all of them. This is the only file that
knows DeepSpeed's optimizers from the inside.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dstrain.adapter import is_adapter
from dstrain.checkpoint.cuts import Cut, find_cut

_STAGE = re.compile(r"^\d+\.model\.")  # dstrain/models/pipeline_module.py: stage k is layer k, the model is inside it


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a parameter (of this rank's cut of it) from flat index `start`, at `offset` of a buffer."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Shard:
    """One buffer of master weights and the optimizer's state of it.

    weights: float tensor of any shape, fp32 unless DeepSpeed was told otherwise. state: the optimizer's own dict for
    it; a tensor of the same shape holds one value per weight. replicated: every data-parallel rank holds the same.
    """

    weights: torch.Tensor
    state: dict[str, Any]
    fragments: tuple[Fragment, ...]
    replicated: bool


@dataclass(frozen=True)
class Place:
    """Where this rank stands among those that hold copies of the same thing."""

    replica: int  # among the data-parallel (and sequence-parallel) ranks
    num_replicas: int
    tp_rank: int


@dataclass(frozen=True)
class Named:
    """A module's parameters under the names that every layout shares, those of the unsplit Hugging Face model."""

    parameters: dict[str, nn.Parameter]
    cuts: dict[str, Cut]  # only of those that tensor parallelism splits

    @classmethod
    def of(cls, module: nn.Module, tp_rank: int) -> "Named":
        parameters = {common_name(name): p for name, p in module.named_parameters()}
        cuts = {name: cut for name, p in parameters.items() if (cut := find_cut(name, p, tp_rank)) is not None}
        return cls(parameters, cuts)

    @property
    def stored(self) -> list[str]:
        """What a checkpoint holds: with adapters only these, as the base is loaded from where it came from."""
        adapters = [name for name in self.parameters if is_adapter(name)]
        return adapters or list(self.parameters)

    def names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.parameters.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter, whatever this rank holds of it."""
        return self.cuts[name].full_shape if name in self.cuts else local_shape(self.parameters[name])


def common_name(name: str) -> str:
    """`name` without what torch.compile and a pipeline put around the model's own."""
    return _STAGE.sub("", name.replace("_orig_mod.", ""))


def local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def partition_size(parameter: nn.Parameter | None) -> int:
    """Number of ranks over which ZeRO-3 divided it; 1 where it did not. None: a buffer."""
    group = getattr(parameter, "ds_process_group", None)
    return 1 if group is None else torch.distributed.get_world_size(group)


def place(engine: Any) -> Place:
    import torch.distributed as dist
    from deepspeed.utils import groups

    if not dist.is_initialized():
        return Place(0, 1, 0)
    group = engine.seq_data_parallel_group
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    tp_size = engine.autotp_size() if hasattr(engine, "autotp_size") else 1
    return Place(rank, size, groups.get_tensor_model_parallel_rank() if tp_size > 1 else 0)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that updates the weights, inside DeepSpeed's wrapper if there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


# Their `step` changes masters and moments by the `step` of the optimizer inside, in this process, and nowhere else.
_PLAIN_WRAPPERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")


def changes_in_step_only(engine: Any) -> bool:
    """Whether masters and moments are the same until the inner optimizer's `step` is called.

    Not with Muon, whose momenta BF16_Optimizer changes before (0.19.8, `_prepare_muon_updates`), nor where another
    process or thread takes the steps (SuperOffload, ZenFlow), nor on NVMe.
    """
    inner, wrapper = inner_optimizer(engine), type(engine.optimizer).__name__
    if not isinstance(inner, torch.optim.Optimizer) or getattr(engine.optimizer, "swap_optimizer", False):
        return False
    plain = engine.optimizer is inner or wrapper in _PLAIN_WRAPPERS
    return plain and type(inner).__name__ not in ("MuonWithAuxAdam", "ZenFlowCPUAdam")


def open_shards(engine: Any, names: dict[int, str], *, changing: bool) -> Iterator[Shard]:
    """Every buffer of this rank, one after another. The tensors are only valid until the next one is asked for.

    names: id of a module's parameter -> name. changing: the caller writes into the buffers; the 16-bit weights of the
    model are then rounded from them. A collective when `changing`.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _zero3(optimizer, names, changing)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        flats = optimizer.single_partition_of_fp32_groups
        return _partitioned(optimizer, flats, optimizer.bit16_groups, names, changing)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        flats = optimizer.fp32_groups_flat_partition
        return _partitioned(optimizer, flats, optimizer.bf16_groups, names, changing)
    assert not hasattr(optimizer, "fp16_groups"), "16 bits at ZeRO 0 are refused by dstrain/config/rules_precision.py"
    return _plain(optimizer, names)


def _plain(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[Shard]:
    """ZeRO 0: the optimizer updates the model's own parameters."""
    for group in optimizer.param_groups:
        states = [optimizer.state[parameter] for parameter in group["params"]]
        if "step" in group:  # DeepSpeed's fused optimizers count a group's steps in its last parameter only
            steps = [state["step"] for state in states if "step" in state]
            for state in states:
                state.update({"step": max(steps)} if "step" in state else {})
        for parameter, state in zip(group["params"], states, strict=True):
            yield Shard(parameter.detach(), state, _in_a_row([parameter], names), replicated=True)


def _in_a_row(parameters: list[nn.Parameter], names: dict[int, str]) -> tuple[Fragment, ...]:
    """Whole parameters, one behind the other."""
    fragments, offset = [], 0
    for parameter in parameters:
        fragments.append(Fragment(names[id(parameter)], 0, offset, parameter.numel()))
        offset += parameter.numel()
    return tuple(fragments)


def _partitioned(optimizer: Any, flats: list, groups: list, names: dict[int, str], changing: bool) -> Iterator[Shard]:
    """ZeRO 1 and 2, and BF16_Optimizer: a range of the concatenated parameters of each group."""
    for flat, group in zip(flats, groups, strict=True):
        fragments = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(Fragment(names[id(parameter)], low.start, high.start, low.numel))
        yield Shard(flat.detach(), optimizer.optimizer.state[flat], tuple(fragments), replicated=False)
    if changing:
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed's views of new state are made at the next step
        optimizer.update_lp_params()


def _zero3(optimizer: Any, names: dict[int, str], changing: bool) -> Iterator[Shard]:
    """A range of every parameter, padded at the last rank; on NVMe one sub-group at a time is in memory."""
    if changing:
        optimizer.checkpoint_event_prologue()  # small parameters are kept whole between steps: give them back
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(i)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        fragments, offset = [], 0
        for parameter in optimizer.fp16_groups[i]:
            size = parameter.partition_numel()
            start = size * optimizer._get_param_partition_rank(parameter)
            numel = min(size, parameter.ds_numel - start)
            if numel > 0:
                fragments.append(Fragment(names[id(parameter)], start, offset, numel))
            offset += size
        yield Shard(flat.detach(), optimizer.optimizer.state[flat], tuple(fragments), replicated=False)
        if changing:
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if swapped and changing:
            optimizer._optimizer_states_and_gradient_swap_out(i)
        elif swapped:
            optimizer._release_swap_buffers(i)
    if changing:
        optimizer.checkpoint_event_epilogue()


@dataclass(frozen=True)
class Rest:
    """What no optimizer holds: this rank's part of a frozen parameter, or a buffer that the model keeps.

    Neither is stored of a base with adapters: both are loaded from where it came from.
    """

    kind: str  # "weight" or "buffer"
    fragment: Fragment
    tensor: torch.Tensor  # its elements, flat; writing into it changes the model
    shape: tuple[int, ...]
    replicated: bool


def rest_of(module: nn.Module, named: Named) -> Iterator[Rest]:
    if len(named.stored) < len(named.parameters):
        return
    for name, parameter in named.parameters.items():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            size = parameter.partition_numel()
            start = size * parameter.ds_process_group.rank() if hasattr(parameter.ds_process_group, "rank") else 0
            numel = max(0, min(size, parameter.ds_numel - start))
            data = parameter.ds_tensor.data.view(-1)[:numel]
            yield Rest("weight", Fragment(name, start, 0, numel), data, named.shape(name), replicated=False)
        else:
            data = parameter.data.view(-1)
            yield Rest("weight", Fragment(name, 0, 0, data.numel()), data, named.shape(name), replicated=True)
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                name = common_name(f"{prefix}.{key}".lstrip("."))
                data = buffer.view(-1)
                yield Rest("buffer", Fragment(name, 0, 0, data.numel()), data, tuple(buffer.shape), replicated=True)
