"""The one seam between the train loop and DeepSpeed: `Engine.train_batch(batches) -> StepResult`.

Both engines consume the micro-batches of one optimizer step, take exactly one step, and return the same numbers on
every rank. This is the only file that calls `deepspeed.initialize`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from dstrain.config import ResolvedConfig, read_effective
from dstrain.data.loader import num_tokens
from dstrain.errors import UserError
from dstrain.models.experts import gather_expert_blocks_whole
from dstrain.models.loss import LossHead, check_loss_head, install_fused_loss, token_loss
from dstrain.models.sequence import WholeSequences, build_sequence_parallel
from dstrain.models.tensor import gradient_norm, open_adapters
from dstrain.phases import phase

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on every rank. Tensors are 0-d and stay on the device: reading one synchronises."""

    loss: torch.Tensor  # mean over the label tokens of the global batch, before the update
    grad_norm: torch.Tensor | float  # L2 over all parameters, before clipping
    learning_rate: float  # the one this step used
    tokens: torch.Tensor  # label tokens of the global batch
    tokens_processed: torch.Tensor  # input tokens of the global batch, without padding
    skipped: bool = False  # the gradients were not finite (fp16: the loss scaler overflowed): no step was taken
    rank_loss: torch.Tensor | float = 0.0  # sum of token losses of this rank's own samples: not equal on every rank


class Engine(Protocol):
    """What the train loop knows of parallelism."""

    deepspeed: Any

    @property
    def model(self) -> nn.Module:
        """The whole Hugging Face model: for its sizes. Under a pipeline it is on the meta device."""
        ...

    @property
    def plain_loss_reason(self) -> str | None:
        """Why the loss is not fused into the head, the same on every rank; None where it is."""
        ...

    def train_batch(self, batches: Sequence[Batch]) -> StepResult: ...

    def eval_batch(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of token losses and number of label tokens over the global batch, both 0-d float64."""
        ...


class ZeroEngine:
    """ZeRO 0-3, with tensor and sequence parallelism: every rank runs the whole depth of the model."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, head: LossHead, resolved: ResolvedConfig, sequence: WholeSequences
    ):
        self.deepspeed = engine
        self.head = head
        self.resolved = resolved
        self.sequence = sequence
        self.device = engine.device

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def plain_loss_reason(self) -> str | None:
        return self.head.reason

    def train_batch(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over `gradient_accumulation_steps` micro-batches of this rank.

        batches: dicts of int64 [micro_batch, sequence] tensors: input_ids, labels (-100 carries no loss), and where
        needed attention_mask, position_ids. A collective: every rank calls it with its own part of the global batch.
        """
        assert len(batches) == self.resolved.gradient_accumulation_steps
        engine = self.deepspeed
        engine.train()
        batches = [to_device(batch, self.device) for batch in batches]
        dims = self.resolved.parallel
        counts = torch.stack([count_tokens(batch) for batch in batches]).sum(0)
        tokens, processed = _sum(counts, copies=dims.tp_size * dims.sp_size)
        # DeepSpeed averages over the micro-batches and over ranks; the loss is a sum over label tokens divided by their
        # global number, wherever they stand.
        scale = len(batches) * dims.gradient_ranks(self.resolved.zero_stage) / tokens.clamp(min=1)
        learning_rate = engine.get_lr()[0]
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        grad_norm, skipped = None, False
        for i, batch in enumerate(batches):
            with phase("forward"):
                loss, _ = token_loss(engine, self.head, self.sequence.part(batch))
            with phase("backward"):
                engine.backward(loss * scale.to(loss.dtype))
            loss_sum += loss.detach()
            if i == len(batches) - 1 and self.resolved.zero_stage == 0:
                grad_norm = self._plain_grad_norm()
                skipped = self.resolved.precision == "fp32" and not bool(torch.isfinite(grad_norm))
            if skipped:
                self._leave_out_step()
            else:
                with phase("optimizer"):
                    engine.step()
        rank_loss, loss_sum = loss_sum, _sum(loss_sum.clone(), copies=dims.tp_size)
        if grad_norm is None:
            grad_norm = engine.get_global_grad_norm()
        return StepResult(
            loss=loss_sum / tokens.clamp(min=1),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            tokens_processed=processed,
            rank_loss=rank_loss,
            skipped=skipped or not engine.was_step_applied(),
        )

    @torch.no_grad()
    def eval_batch(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        self.deepspeed.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            batch = to_device(batch, self.device)
            loss, _ = token_loss(self.deepspeed, self.head, self.sequence.part(batch))
            loss_sum += loss
            tokens += count_tokens(batch)[0]
        dims = self.resolved.parallel
        return _sum(loss_sum, copies=dims.tp_size), _sum(tokens, copies=dims.tp_size * dims.sp_size)

    def _leave_out_step(self) -> None:
        """What DeepSpeed's ZeRO optimizers do by themselves when gradients are not finite (`_take_model_step`)."""
        engine = self.deepspeed
        engine.optimizer.zero_grad()
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1

    def _plain_grad_norm(self) -> torch.Tensor:
        """ZeRO-0 keeps whole, already averaged gradients on every rank, and its optimizers keep no norm."""
        group = groups.get_tensor_model_parallel_group() if self.resolved.parallel.tp_size > 1 else None
        norm = gradient_norm(self.deepspeed.module.parameters(), group)
        return norm / (self.deepspeed.loss_scale() or 1.0) if self.resolved.precision == "fp16" else norm


def _sum(values: torch.Tensor, *, copies: int) -> torch.Tensor:
    """Sum over all ranks, of which so many hold the same values."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values / copies


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def count_tokens(batch: Batch) -> torch.Tensor:
    """[label tokens, input tokens without padding] of a micro-batch, float64 [2]."""
    labels = (batch["labels"][:, 1:] != -100).sum()
    return torch.stack([labels, num_tokens(batch)]).double()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, as Hugging Face's Trainer makes them: norms, biases and 1-D parameters are not decayed."""

    def ndim(p: nn.Parameter) -> int:
        return len(p.ds_shape) if hasattr(p, "ds_shape") else p.ndim

    decayed = [p for p in model.parameters() if p.requires_grad and ndim(p) >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and ndim(p) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_engine(
    model: nn.Module, resolved: ResolvedConfig, *, compile: str | None = None, label_smoothing: float = 0.0
) -> Engine:
    """Put `model` (`PipeStages` under a pipeline) under DeepSpeed as `resolved` asks, and compare what DeepSpeed made
    of it with what was asked.

    Raises UserError when a setting was ignored.
    """
    stages = model
    if resolved.parallel.pp_size > 1:
        from dstrain.models.pipeline_module import build_pipeline_module

        model = build_pipeline_module(stages, resolved.parallel, dist.get_rank())
    sequence = build_sequence_parallel(model, resolved.parallel)
    if resolved.zero_stage == 3:
        gather_expert_blocks_whole(model)
    if resolved.parallel.tp_size > 1:
        open_adapters(model)
    weight_decay = resolved.deepspeed["optimizer"].get("params", {}).get("weight_decay", 0.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, weight_decay),
        config=resolved.deepspeed,
        mpu=sequence.mpu,
        dist_init_required=False,
    )
    problems = resolved.compare_effective(read_effective(engine))
    if problems:
        raise UserError(problems)
    if resolved.parallel.pp_size > 1:
        from dstrain.pipe_engine import PipeEngine

        result: Engine = PipeEngine(engine, stages, resolved)
        head = stages.head
    else:
        head = install_fused_loss(model)
        check_loss_head(engine, head, model.config.get_text_config().vocab_size)
        sequence.repair(engine)
        sequence.check(engine, head)
        result = ZeroEngine(engine, head, resolved, sequence)
    if head is not None:
        head.label_smoothing = label_smoothing
    if compile == "layer":
        for part in stages if resolved.parallel.pp_size > 1 else [model]:
            for layer in decoder_layers(part):
                layer.compile()
    elif compile == "whole":
        engine.compile()
    return result


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules: a decoder's layers."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
