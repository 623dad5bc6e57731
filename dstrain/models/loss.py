"""The token-exact loss: a sum over label tokens that the caller divides by their number in the global batch.

The head of any Hugging Face causal LM is asked for the loss instead of the logits, inside its own module call, so that
ZeRO-3's hooks gather its weight as usual and the model's own forward stays as it is. What the model does to the logits
afterwards (scaling, capping) is part of the loss, and `check_loss_head` proves it on the model at hand; where the proof
fails the model's own logits are used.
"""

import inspect
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.errors import UserError
from dstrain.models.cross_entropy import (
    IGNORE_INDEX,
    LogitTransform,
    VocabularyShard,
    cross_entropy,
    linear_cross_entropy,
)
from dstrain.models.tensor import vocabulary_shard

# Gemma, RecurrentGemma, xLSTM
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: Any) -> LogitTransform:
    """What the model of this configuration does to its head's product (Cohere, Granite, Gemma 2 and their kin)."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    caps = (getattr(config, name, None) for name in _CAPS)
    cap = next((value for value in caps if value), None)
    return LogitTransform(scale, None if cap is None else float(cap))


def shift_labels(labels: Tensor) -> Tensor:
    """labels int64 [batch, length], Hugging Face's convention -> the target of each position; the last has none."""
    target = torch.full_like(labels, IGNORE_INDEX)
    target[:, :-1] = labels[:, 1:]
    return target


@dataclass
class LossHead:
    """The output embedding of one model, which returns the sum of token losses while it is armed with targets.

    model: the bare Hugging Face model. reason: None, or why the model's own logits are used (`check_loss_head`).
    shard: the part of the vocabulary in the module's weight, where tensor parallelism divides it.
    label_smoothing: of training; a held-out loss is always the plain one.
    """

    model: nn.Module
    module: nn.Module
    transform: LogitTransform
    reason: str | None = None
    shard: VocabularyShard | None = None
    label_smoothing: float = 0.0
    _target: Tensor | None = None
    _losses: list[Tensor] = field(default_factory=list)
    _probe: "_Probe | None" = None
    _hooked: bool = False

    @property
    def smoothing_now(self) -> float:
        return self.label_smoothing if self.model.training else 0.0

    def fused(self, call: Any, target: Tensor) -> tuple[Tensor, Any]:
        """Run `call()`, the model's forward, with the head armed. Returns (sum of token losses, the model's output).

        target int64 [batch, length], already shifted. What the model makes of the head's answer is meaningless.
        """
        if not self._hooked:
            # Registered late on purpose: after DeepSpeed's hooks, so that ZeRO-3's pre-backward hook, which gathers the
            # weight, is part of the tensor that is kept.
            self.module.register_forward_hook(self._keep)
            self._hooked = True
        self._target = target
        try:
            output = call()
            assert len(self._losses) == 1, f"the head was called {len(self._losses)} times in one forward"
            return self._losses[0].reshape(()), output
        finally:
            self._target, self._losses = None, []

    def _forward(self, plain: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the output embedding's forward: `plain` unless armed or probed."""
        if self._probe is not None:
            return self._probe.answer(self.module, plain(hidden, *args, **kwargs), hidden, self.shard)
        if self._target is None:
            return plain(hidden, *args, **kwargs)
        expected, got = tuple(self._target.shape), tuple(hidden.shape[:-1])
        assert got == expected, f"the head got hidden states of {got} for targets of {expected}"
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        loss = linear_cross_entropy(hidden, weight, bias, self._target, self.transform, self.shard, self.smoothing_now)
        return loss.reshape(1, 1, 1)  # three dimensions, as logits have, for what the model's forward does next

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._target is not None:
            self._losses.append(output)


@dataclass
class _Probe:
    """Answers for the head with logits that reach into every range, so that what is done to them afterwards shows."""

    problem: str | None = None
    answered: Tensor | None = None

    def answer(self, module: nn.Module, raw: Tensor, hidden: Tensor, shard: VocabularyShard | None) -> Tensor:
        product = nn.functional.linear(hidden, module.weight, getattr(module, "bias", None))
        same = raw if shard is None else raw[..., shard.start : shard.start + product.shape[-1]]
        if product.shape != same.shape or not _close(product, same):
            self.problem = f"{type(module).__name__} is not a plain linear layer"
        wave = torch.linspace(-50, 50, raw.numel(), dtype=torch.float32, device=raw.device)
        self.answered = wave.reshape(raw.shape).to(raw.dtype)
        return self.answered


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if b.dtype == torch.float32 else 2e-2
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def install_fused_loss(model: nn.Module) -> LossHead:
    """Make the output embedding of a Hugging Face causal LM able to return the loss.

    Before or after `deepspeed.initialize`, but before the first forward. Run `check_loss_head` before training.
    """
    module = model.get_output_embeddings()
    head = LossHead(model, module, logit_transform(model.config), shard=vocabulary_shard(module))
    if not isinstance(module, nn.Module) or not isinstance(getattr(module, "weight", None), Tensor):
        head.reason = "the model names no output embedding with a weight"
        return head
    plain = module.forward
    module.forward = MethodType(lambda _, *args, **kwargs: head._forward(plain, *args, **kwargs), module)
    return head


@torch.no_grad()
def check_loss_head(model_or_engine: Any, head: LossHead, vocab_size: int) -> str | None:
    """Prove on 8 tokens that the fused loss is the model's own; otherwise switch to the model's logits for good.

    Two short forwards without gradient, a collective under ZeRO-3. Returns None, or the reason of the switch, which the
    caller logs; training is right either way, but without the fusion [tokens, vocabulary] exists in the model's dtype.
    """
    if head.reason is not None:
        return head.reason
    training = head.model.training
    head.model.eval()
    ids = (torch.arange(8, device=_device(model_or_engine, head)) * 7919 + 1).remainder(vocab_size)[None]
    batch = {"input_ids": ids, "labels": ids}
    try:
        head.reason = _difference(model_or_engine, head, batch)
    # Whatever a model's own code raises when it meets a loss in place of logits is a reason not to fuse.
    except Exception as error:  # noqa: BLE001
        head.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        head._probe = None
        head.model.train(training)
    return head.reason


def _difference(model_or_engine: Any, head: LossHead, batch: dict[str, Tensor]) -> str | None:
    probe = head._probe = _Probe()
    logits = _call(model_or_engine, head, batch).logits
    head._probe = None
    if probe.answered is None:
        return "the model does not call its output embedding"
    if probe.problem is not None:
        return probe.problem
    if logits.shape != probe.answered.shape:
        return f"the model turns logits of {tuple(probe.answered.shape)} into {tuple(logits.shape)}"
    if not _close(head.transform.apply_(probe.answered.float()), logits):
        return "the model changes its logits in a way that its configuration does not tell"
    target = shift_labels(batch["labels"])
    plain = cross_entropy(_call(model_or_engine, head, batch).logits, target)
    fused, _ = head.fused(lambda: _call(model_or_engine, head, batch), target)
    if not torch.isclose(fused, plain, rtol=1e-4 if logits.dtype == torch.float32 else 2e-2):
        return f"the fused loss is {fused.item():.6g}, the model's own {plain.item():.6g}"
    return None


def _device(model_or_engine: Any, head: LossHead) -> torch.device:
    return getattr(model_or_engine, "device", None) or next(head.model.parameters()).device


def _call(model_or_engine: Any, head: LossHead, batch: dict[str, Tensor]) -> Any:
    """The model's forward on everything but the labels, without a cache of keys and values."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    if "use_cache" in inspect.signature(head.model.forward).parameters:
        inputs["use_cache"] = False
    return model_or_engine(**inputs)


def _router_loss(head: LossHead, output: Any) -> Tensor | None:
    """coefficient * load-balancing loss of a mixture of experts, where its configuration asks for it."""
    config = head.model.config.get_text_config()
    auxiliary = getattr(output, "aux_loss", None)
    if not getattr(config, "output_router_logits", False) or not isinstance(auxiliary, Tensor):
        return None
    name = next((n for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(config, n)), None)
    if name is None:
        raise UserError(
            f"{config.model_type} has no router_aux_loss_coef, so its router loss cannot be added: "
            "set output_router_logits=false"
        )
    return getattr(config, name) * auxiliary


def token_loss(model_or_engine: Any, head: LossHead, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of one micro-batch.

    batch: what the model's forward takes (input_ids int64 [batch, length], ...) with labels int64 [batch, length], -100
    where no loss is taken, not shifted; or shift_labels, already shifted (where the sequence is split over ranks).
    Returns (sum of token losses fp32 with gradient, number of label tokens int64). Where the configuration sets
    output_router_logits, coefficient * load-balancing loss is added as if every label token had it: a micro-batch's
    router loss counts by its share of the global label tokens.
    """
    target = batch["shift_labels"] if "shift_labels" in batch else shift_labels(batch["labels"])
    if head.reason is None:
        loss, output = head.fused(lambda: _call(model_or_engine, head, batch), target)
    else:
        output = _call(model_or_engine, head, batch)
        loss = cross_entropy(output.logits, target, head.smoothing_now)
    num_label_tokens = (target != IGNORE_INDEX).sum()
    router_loss = _router_loss(head, output)
    if router_loss is not None:
        loss = loss + router_loss.float() * num_label_tokens
    return loss, num_label_tokens
