"""The plain run that every other must equal: one process, the model's own logits, a torch optimizer, no DeepSpeed.

`PlainEngine` has the same seam as the engines (`dstrain/engine.py`), so it can stand in their place.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dstrain.adapter import is_adapter, peft_name
from dstrain.arguments import Arguments
from dstrain.config import ResolvedConfig
from dstrain.config.reading import class_of
from dstrain.data import build_data, build_loader, build_tokenizer
from dstrain.data.tokenization import pad_token_id
from dstrain.engine import Batch, StepResult, count_tokens, parameter_groups
from dstrain.errors import UserError
from dstrain.models.build import build_model
from dstrain.models.config import load_model_config, max_positions


class PlainEngine:
    """Trains what of `model` is to be trained (in fp32, or bf16 with fp32 masters) over the whole global batch in this
    process."""

    def __init__(self, model: nn.Module, resolved: ResolvedConfig, label_smoothing: float = 0.0):
        self.model, self.resolved, self.label_smoothing = model, resolved, label_smoothing
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = _build_optimizer(model, self.masters, resolved)
        self.scheduler = _build_scheduler(self.optimizer, resolved)

    def train_batch(self, batches: Sequence[Batch]) -> StepResult:
        """One step over micro-batches that together are the global batch."""
        self.model.train()
        tokens, processed = torch.stack([count_tokens(batch) for batch in batches]).sum(0)
        gradients = [torch.zeros_like(master) for master in self.masters]
        loss_sum = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = self._loss(batch)
            (loss / tokens.clamp(min=1)).backward()
            loss_sum += loss.detach()
            for total, p in zip(gradients, self.parameters, strict=True):
                if p.grad is not None:
                    total += p.grad.float()
                    p.grad = None
        norm = torch.nn.utils.get_total_norm(gradients)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.resolved.gradient_clipping:
            factor = self.resolved.gradient_clipping / (norm + 1e-6)
            gradients = [g * factor.clamp(max=1.0) for g in gradients]
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.copy_(master)
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(loss_sum / tokens.clamp(min=1), norm, learning_rate, tokens, processed)

    @torch.no_grad()
    def eval_batch(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        self.model.eval()
        loss_sum = sum(self._loss(batch).double() for batch in batches)
        return loss_sum, torch.stack([count_tokens(batch)[0] for batch in batches]).sum()

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Sum of token losses, from the model's own logits in fp32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output = self.model(**inputs, use_cache=False)
        logits = output.logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
            reduction="sum",
            label_smoothing=self.label_smoothing if self.model.training else 0.0,
        )
        if getattr(output, "aux_loss", None) is not None and getattr(self.model.config, "output_router_logits", False):
            loss = loss + self.model.router_aux_loss_coef * output.aux_loss * count_tokens(batch)[0]
        return loss


def _build_optimizer(model: nn.Module, masters: list[torch.Tensor], resolved: ResolvedConfig) -> torch.optim.Optimizer:
    """The torch optimizer of the same name over the fp32 masters, with the engine's weight decay groups."""
    kind, params = _torch_optimizer(resolved)
    weight_decay = params.pop("weight_decay", 0.0)
    of = dict(zip((p for p in model.parameters() if p.requires_grad), masters, strict=True))
    groups = [{**group, "params": [of[p] for p in group["params"]]} for group in parameter_groups(model, weight_decay)]
    return getattr(torch.optim, kind)(groups, **params)


def _torch_optimizer(resolved: ResolvedConfig) -> tuple[str, dict[str, Any]]:
    """Name of the class in torch.optim and its parameters. Raises UserError where torch has none that does the same."""
    cls, params = class_of(resolved.deepspeed), dict(resolved.deepspeed["optimizer"].get("params", {}))
    assert cls is not None, "a resolved configuration names its optimizer"
    package, _, kind = cls.name.rpartition(".")
    for name in ("torch_adam", "fused", "set_grad_none", "fp32_optimizer_states"):
        params.pop(name, None)
    if "Adam" in kind and resolved.optimizer_type.lower() in ("adam", "adamw"):
        decoupled = params.pop("adam_w_mode", True) or resolved.optimizer_type.lower() == "adamw"
        kind = "AdamW" if decoupled else "Adam"
    elif not package:
        kind = {"DeepSpeedCPUAdagrad": "Adagrad"}.get(kind, "")
    if not kind or params.pop("bias_correction", True) is False:
        what = f"optimizer.type {resolved.optimizer_type}" if not kind else "optimizer.params.bias_correction false"
        raise UserError(f"{what} has no counterpart in torch to compare with: verify AdamW, Adam or SGD in its place")
    return kind, params


def _build_scheduler(optimizer: torch.optim.Optimizer, resolved: ResolvedConfig) -> Any:
    """DeepSpeed's own schedule: a function of the step alone."""
    from deepspeed.runtime import lr_schedules

    if resolved.scheduler_type is None:
        return None
    schedule = getattr(lr_schedules, resolved.scheduler_type)
    return schedule(optimizer, **resolved.deepspeed["scheduler"].get("params", {}))


@dataclasses.dataclass(frozen=True)
class PlainRun:
    """lines: loss, grad_norm, learning_rate and tokens of each step. before, after: name in an export -> fp32 weight of
    what is trained."""

    lines: list[dict[str, float]]
    before: dict[str, Any]
    after: dict[str, Any]


def run_plain(args: Arguments, resolved: ResolvedConfig, steps: int) -> PlainRun:
    """The first steps of the run that `args` asks for, from its beginning, with every packed document alone."""
    config = load_model_config(args.model)
    tokenizer = build_tokenizer(args.model.tokenizer_name, args.model.trust_remote_code, args.model.chat_template)
    data = build_data(
        args.data,
        tokenizer,
        seed=args.run.seed,
        block_size=args.data.block_size or min(1024, max_positions(config) or 1024),
        is_main_per_host=True,
        barrier=lambda: None,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}[resolved.precision]
    plain_model = dataclasses.replace(args.model, gradient_checkpointing=False)
    model = build_model(plain_model, config, seed=args.run.seed, dtype=dtype)
    engine = PlainEngine(model, resolved, args.run.label_smoothing_factor)
    before, lines = _named(model, engine.masters), []
    with build_loader(
        data.train,
        seed=args.run.seed,
        global_batch=resolved.global_batch,
        micro_batch=resolved.micro_batch,
        dp_rank=0,
        dp_size=1,
        pad_token_id=pad_token_id(tokenizer),
    ) as loader:
        for _ in range(steps):
            result = engine.train_batch([_unpacked(batch) for batch in next(loader)])
            names = ("loss", "grad_norm", "learning_rate", "tokens")
            lines.append({name: float(getattr(result, name)) for name in names})
    return PlainRun(lines, before, _named(model, engine.masters))


def _named(model: Any, masters: list[Any]) -> dict[str, Any]:
    """Name in an export -> a copy of its fp32 master."""
    names = [peft_name(name) if is_adapter(name) else name for name, p in model.named_parameters() if p.requires_grad]
    return {name: m.detach().clone() for name, m in zip(names, masters, strict=True)}


def _unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """A packed micro-batch as one padded row per document; any other as it is."""
    if "position_ids" not in batch:
        return batch
    ids, labels = [], []
    for row in range(len(batch["input_ids"])):
        starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        for a, b in itertools.pairwise(starts):
            if b - a > 1:  # a real document has at least two tokens: the rest is padding
                ids.append(batch["input_ids"][row, a:b])
                labels.append(batch["labels"][row, a:b])
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
    }
