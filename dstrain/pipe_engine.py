"""The pipeline behind the engine's seam: DeepSpeed's 1F1B or DualPipeV schedule over stages of a Hugging Face model.

Every rank of a pipeline gets the same micro-batches from its loader, so only hidden states travel.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep
from torch import nn
from torch.nn.functional import pad

from dstrain.config import ResolvedConfig
from dstrain.engine import Batch, StepResult, count_tokens, to_device
from dstrain.models.pipeline_module import PipeStages
from dstrain.phases import phase


class PipeEngine:
    """Pipeline stages, with data parallelism over whole pipelines and ZeRO-0 or 1."""

    def __init__(self, engine: Any, stages: PipeStages, resolved: ResolvedConfig):
        self.deepspeed = engine
        self.stages = stages
        self.resolved = resolved
        self.device = engine.device
        # The engine looks its instructions up here: its own table stays as it is.
        engine._INSTRUCTION_MAP = {kind: _marked(kind, run) for kind, run in engine._INSTRUCTION_MAP.items()}
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, stages.check_head())
        place = resolved.placement
        with_head = resolved.parallel.world_size // place.pp_size * place.pp_rank(place.num_stages - 1)
        self.plain_loss_reason: str | None = found[with_head]
        self._shapes: tuple | None = None
        self._plain_norm: torch.Tensor | None = None
        if resolved.zero_stage == 0 and resolved.precision == "fp32":
            # This optimizer keeps no norm, its gradients are gone after the step, and it steps whatever they are.
            engine.optimizer.step = partial(self._plain_step, engine.optimizer.step)

    @property
    def model(self) -> nn.Module:
        return self.stages.whole

    def train_batch(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over the micro-batches of this rank's pipeline; see `ZeroEngine.train_batch`."""
        assert len(batches) == self.resolved.gradient_accumulation_steps
        engine, dims = self.deepspeed, self.resolved.parallel
        batches = self._fit_shapes([to_device(batch, self.device) for batch in batches], training=True)
        tokens, processed = self._sum(torch.stack([count_tokens(batch) for batch in batches]).sum(0)) / dims.pp_size
        learning_rate = engine.get_lr()[0]
        # As in ZeroEngine: DeepSpeed averages over micro-batches and over the ranks that share gradients.
        self.stages.begin(batches, (len(batches) * dims.dp_size / tokens.clamp(min=1)).float())
        engine.train_batch(_nothing(self.device))
        (loss_sum,) = self._sum(self._own_loss())
        return StepResult(
            loss=loss_sum / tokens.clamp(min=1),
            grad_norm=engine.get_global_grad_norm() if self._plain_norm is None else self._plain_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            tokens_processed=processed,
            rank_loss=self._own_loss()[0],
            skipped=not engine.was_step_applied(),
        )

    def eval_batch(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of token losses and number of label tokens over the global batch, both 0-d float64. A collective."""
        batches = self._fit_shapes([to_device(batch, self.device) for batch in batches], training=False)
        tokens = torch.stack([count_tokens(batch) for batch in batches]).sum(0)[:1] / self.resolved.parallel.pp_size
        self.stages.begin(batches, 1.0)
        self.deepspeed.eval_batch(_nothing(self.device), bcast_loss=False, num_micro_batches=len(batches))
        loss_sum, tokens = self._sum(torch.cat([self._own_loss(), tokens]))
        return loss_sum, tokens

    def _own_loss(self) -> torch.Tensor:
        """This rank's sum of token losses, a new float64 [1]: only the last stage has one."""
        return self.stages.loss_sum.to(self.device).reshape(1).clone()

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a 1-d float64 tensor over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def _fit_shapes(self, batches: list[Batch], *, training: bool) -> list[Batch]:
        """DeepSpeed tells the next stage its shapes once and keeps the buffers: tell them anew when they change.

        DualPipeV has one shape for all micro-batches: they are padded to the longest.
        """
        if self.resolved.dualpipev:
            batches = pad_alike(batches)
        shapes = {tuple(batch["input_ids"].shape) for batch in batches}
        self.deepspeed.dynamic_shape = len(shapes) > 1
        if (training, shapes) != self._shapes:
            self.deepspeed.reset_activation_shape()
        self._shapes = (training, shapes)
        return batches

    def _plain_step(self, step: Callable[..., Any], *args: Any) -> None:
        """The optimizer's step, left out on every rank where a gradient of any is not finite.

        DeepSpeed counts a step that its optimizer calls an `overflow` as skipped and keeps the schedule where it is
        (`_take_model_step`), as its ZeRO optimizers do by themselves. Waits for the device.
        """
        self._plain_norm = self._gradient_norm()
        optimizer: Any = self.deepspeed.optimizer
        optimizer.overflow = not bool(torch.isfinite(self._plain_norm))
        if not optimizer.overflow:
            step(*args)

    @torch.no_grad()
    def _gradient_norm(self) -> torch.Tensor:
        """L2 norm of the averaged gradients over all stages, a tied parameter counted once. A collective."""
        parameters = [p for p in self.stages.parameters() if p.grad is not None and not p.ds_pipe_replicated]
        norm = torch.nn.utils.get_total_norm([p.grad.float() for p in parameters])
        squared = norm.double().square().reshape(1)
        (total,) = self._sum(squared) / self.resolved.parallel.dp_size
        return total.sqrt()


_PHASE_OF = {ForwardPass: "forward", BackwardPass: "backward", OptimizerStep: "optimizer"}


def _marked(kind: type, run: Callable[..., None]) -> Callable[..., None]:
    """An instruction of the schedule inside its phase; what is not computing waits for other stages or ranks."""

    @wraps(run)
    def marked(engine: Any, **arguments: Any) -> None:
        with phase(_PHASE_OF.get(kind, "communication")):
            run(engine, **arguments)

    return marked


def pad_alike(batches: list[Batch]) -> list[Batch]:
    """Micro-batches of one length: shorter ones get columns on the right that carry no loss and are not attended to."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"labels": -100}
    padded = []
    for batch in batches:
        missing = longest - batch["input_ids"].shape[1]
        if missing and "position_ids" not in batch:  # packed padding is a run of documents of one token: position 0
            batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        padded.append({name: pad(tensor, (0, missing), value=fill.get(name, 0)) for name, tensor in batch.items()})
    return padded


def _nothing(device: torch.device) -> Any:
    """DeepSpeed's first and last stages ask for data; ours have it."""
    return repeat((torch.zeros(1, device=device), torch.zeros(1, device=device)))
