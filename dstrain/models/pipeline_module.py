"""A model's stages as DeepSpeed's pipe engine drives them, each rank holding only its own.

The micro-batches do not travel: the loader is a pure function of the step, so every stage has them, and only what the
layers hand on goes through the pipe: hidden states, and with a mixture of experts the router logits.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.errors import UserError
from dstrain.models.loss import LossHead, check_loss_head, install_fused_loss, token_loss
from dstrain.models.pipeline import PipelinePlan
from dstrain.models.stage import Stage
from dstrain.parallel import ParallelDims, PipePlacement

_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
           torch.float16, torch.bfloat16, torch.float32, torch.float64)  # fmt: skip


def pack(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """What the pipe carries: one floating tensor as it is; several as one flat one and an int64 header.

    DeepSpeed 0.19.8 runs one backward pass for each floating tensor that it carries (`_exec_backward_pass`), which
    its gradient hooks do not expect; one tensor is one pass. The header holds shapes, dtypes and integer tensors.
    """
    if len(tensors) == 1 and tensors[0].is_floating_point():
        return tensors[0]
    floats = [t for t in tensors if t.is_floating_point()]
    integers = [t for t in tensors if not t.is_floating_point()]
    dtype = floats[0].dtype
    for tensor in floats:
        dtype = torch.promote_types(dtype, tensor.dtype)
    shapes = [len(tensors)]
    for tensor in tensors:
        shapes += [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
    device = floats[0].device
    header = [torch.tensor(shapes, dtype=torch.int64, device=device), *(t.reshape(-1).long() for t in integers)]
    return torch.cat([t.reshape(-1).to(dtype) for t in floats]), torch.cat(header)


def unpack(packed: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The tensors that `pack` got; gradients flow back into the packed one."""
    if isinstance(packed, Tensor):
        return (packed,)
    floats, header = packed
    numbers = header.tolist()
    kinds, at = [], 1
    for _ in range(numbers[0]):
        dtype, ndim = _DTYPES[numbers[at]], numbers[at + 1]
        kinds.append((dtype, numbers[at + 2 : at + 2 + ndim]))
        at += 2 + ndim
    float_at, tensors = 0, []
    for dtype, shape in kinds:
        size = torch.Size(shape).numel()
        if dtype.is_floating_point:
            tensors.append(floats[float_at : float_at + size].reshape(shape).to(dtype))
            float_at += size
        else:
            tensors.append(header[at : at + size].reshape(shape).to(dtype))
            at += size
    return tuple(tensors)


class PipeStage(Stage):
    """A stage that takes its micro-batches from `begin` and, being the last, returns the scaled loss of each.

    forward(inputs): what the stage before sent (ignored by the first) -> what the next one gets, or the loss.
    loss_sum: sum of the token losses since `begin`, float64 0-d (last stage only). whole: the model on meta.
    """

    def __init__(self, model: nn.Module, plan: PipelinePlan, index: int, whole: nn.Module | None = None):
        super().__init__(model, plan, index)
        self.__dict__["whole"] = whole  # not a submodule: its parameters are no parameters of the stage
        self.head: LossHead | None = install_fused_loss(model) if self.is_last else None
        self.begin([], 1.0)

    def begin(self, batches: Sequence[dict[str, Tensor]], scale: Tensor | float) -> None:
        """The next micro-batches, in order. scale: what the sum of token losses is multiplied by for the backward."""
        self._batches, self._scale = deque(batches), scale
        self.loss_sum = torch.zeros((), dtype=torch.float64)

    def forward(self, inputs: Any) -> Any:
        batch = self._batches.popleft()
        carried = () if self.index == 0 else unpack(inputs)
        if self.head is None:
            model_inputs = {name: value for name, value in batch.items() if name != "labels"}
            return pack(self.run(carried, **model_inputs))
        loss, _ = token_loss(partial(self.run, carried), self.head, batch)
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        return loss * self._scale

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """A stage leaves the model's forward in the middle, which a compiled whole cannot. Raises UserError."""
        raise UserError("--compile whole is not possible with pipeline.stages above 1: write --compile layer")

    def check_head(self) -> str | None:
        """`check_loss_head` for the last stage, on made-up hidden states; no collective."""
        if self.head is None:
            return None
        weight = self.head.module.weight

        def run(**inputs: Tensor) -> Any:
            batch, length = inputs["input_ids"].shape
            generator = torch.Generator().manual_seed(0)
            carried = []
            for leaf in self.plan.received(self.index):
                tensor = leaf.zeros(batch, length, weight.device).contiguous()
                if leaf.dtype.is_floating_point:
                    tensor = torch.randn(tensor.shape, generator=generator).to(weight)
                carried.append(tensor)
            return self.run(carried, **inputs)

        return check_loss_head(run, self.head, self.model.config.get_text_config().vocab_size)


class _Gradient:
    """Where a tied parameter's accumulated gradient is: ZeRO-1 with 16-bit weights keeps it in `grad_accum` in fp32.

    DeepSpeed 0.19.8 sums tied gradients by `weight.grad` (`_exec_reduce_tied_grads`), which is None there, and leaves
    the collective out where it is None, though another stage may have one.
    """

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    @property
    def grad(self) -> Tensor:
        accumulated = getattr(self.parameter, "grad_accum", None)
        if accumulated is not None:
            return accumulated
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    @property
    def _hp_grad(self) -> Tensor:
        return self.parameter._hp_grad


class PipeStages(nn.ModuleList):
    """The stages of one rank, in the order in which a sample meets them: one, or with DualPipeV two, of which the
    second is as far from the end as the first is from the beginning. What they share is one parameter."""

    def __init__(self, stages: Sequence[PipeStage], placement: PipePlacement):
        super().__init__(stages)
        self.placement = placement
        self.own = tuple(stages)
        for later in stages[1:]:
            _share(stages[0], later)

    @property
    def plan(self) -> PipelinePlan:
        return self.own[0].plan

    @property
    def whole(self) -> nn.Module:
        """The model on meta."""
        return self.own[0].whole

    @property
    def head(self) -> LossHead | None:
        """Of the last stage; None where another rank has it."""
        return self.own[-1].head

    @property
    def loss_sum(self) -> Tensor:
        """Sum of the token losses since `begin`, float64 0-d; 0 where there is no last stage."""
        return self.own[-1].loss_sum

    def begin(self, batches: Sequence[dict[str, Tensor]], scale: Tensor | float) -> None:
        for stage in self.own:
            stage.begin(batches, scale)

    def check_head(self) -> str | None:
        return self.own[-1].check_head()


def _share(first: PipeStage, later: PipeStage) -> None:
    """Let `later` use the parameters of `first` in place of its own copies of them."""
    ours, theirs = (dict(stage.model.named_parameters()) for stage in (first, later))
    shared = {id(theirs[name]): ours[name] for name in ours.keys() & theirs.keys()}
    for module in later.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in shared:
                module._parameters[name] = shared[id(parameter)]


def build_pipeline_module(stages: PipeStages, dims: ParallelDims, rank: int) -> nn.Module:
    """The stages of this rank as a DeepSpeed PipelineModule over all ranks: 1F1B for one stage a rank, DualPipeV for
    two. A collective: it makes process groups."""
    from deepspeed.pipe import DualPipeVModule, PipelineModule

    class StagedModule(PipelineModule if len(stages) == 1 else DualPipeVModule):  # type: ignore[misc]
        """Built here, as importing DeepSpeed at the top would slow every use of the planner."""

        def get_tied_weights_and_groups(self):
            return self.tied_gradients

    class Foreign(nn.Module):
        """Stands for a stage of another rank."""

    own = {stage.index: stage for stage in stages.own}
    layers = [own.get(k) or Foreign() for k in range(stages.plan.num_stages)]
    with redirect_stdout(None):  # it prints its layers
        module = StagedModule(layers, num_stages=dims.pp_size, partition_method="uniform")
    module.tied_gradients = _join_tied(stages, dims, rank)
    return module


def _join_tied(stages: PipeStages, dims: ParallelDims, rank: int) -> list[tuple[_Gradient, Any]]:
    """Process groups over the ranks that hold copies of a parameter; those after the first count as replicas."""
    own = {name: p for stage in stages.own for name, p in stage.model.named_parameters()}
    replicas = dims.world_size // dims.pp_size
    pp_rank = stages.placement.pp_rank
    holders = {name: tuple(sorted({pp_rank(k) for k in tied})) for name, tied in stages.plan.tied.items()}
    found = []
    groups: dict[tuple[int, ...], Any] = {}
    for pipe_ranks in sorted({at for at in holders.values() if len(at) > 1}):
        for offset in range(replicas):
            ranks = [k * replicas + offset for k in pipe_ranks]
            group = torch.distributed.new_group(ranks)
            if rank in ranks:
                groups[pipe_ranks] = group
    for name, at in holders.items():
        if name in own and own[name].requires_grad and len(at) > 1:
            own[name].ds_pipe_replicated = dims.pp_rank(rank) != at[0]  # counted once in the gradient's norm
            found.append((_Gradient(own[name]), groups[at]))
    return found
