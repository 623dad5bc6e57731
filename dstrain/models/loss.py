"""The token-exact loss: a sum over label tokens that the caller divides by their number in the global batch.

The head of any Hugging Face causal LM is asked for the loss instead of the logits, inside its own module call, so that
ZeRO-3's hooks gather its weight as usual and the model's own forward stays as it is.
"""

from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.models.cross_entropy import IGNORE_INDEX, LogitTransform, linear_cross_entropy


def logit_transform(config: Any) -> LogitTransform:
    """What the model of this configuration does to its head's product (Cohere, Granite, Gemma 2 and their kin)."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if cap is None else float(cap))


def shift_labels(labels: Tensor) -> Tensor:
    """labels int64 [batch, length], Hugging Face's convention -> the target of each position; the last has none."""
    target = torch.full_like(labels, IGNORE_INDEX)
    target[:, :-1] = labels[:, 1:]
    return target


@dataclass
class LossHead:
    """The output embedding of one model, which returns the sum of token losses while it is armed with targets.

    `plain_reason` is set where the model's own logits must be used instead (see `check_loss_head`).
    """

    model: nn.Module
    head: nn.Module
    transform: LogitTransform
    plain_reason: str | None = None
    _target: Tensor | None = None
    _losses: list[Tensor] = field(default_factory=list)
    _hooked: bool = False

    def _forward(self, hidden: Tensor) -> Tensor:
        assert hidden.shape[:-1] == self._target.shape, f"the head got {tuple(hidden.shape)} for {tuple(self._target.shape)} labels"
        return linear_cross_entropy(hidden, self.head.weight, getattr(self.head, "bias", None), self._target, self.transform)

    def loss(self, call: Any, target: Tensor) -> tuple[Tensor, Any]:
        """Run `call()`, the model's forward, with the head armed. Returns (sum of token losses, the model's output)."""
        if not self._hooked:
            # Registered late on purpose: after DeepSpeed's hooks, so that ZeRO-3's pre-backward hook, which gathers the
            # weight, is part of the tensor that is kept.
            self.head.register_forward_hook(self._keep)
            self._hooked = True
        self._target, self._losses = target, []
        try:
            output = call()
            assert len(self._losses) == 1, f"the head was called {len(self._losses)} times in one forward"
            return self._losses[0], output
        finally:
            self._target, self._losses = None, []

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._target is not None:
            self._losses.append(output)


def install_fused_loss(model: nn.Module) -> LossHead:
    """Make the output embedding of a Hugging Face causal LM able to return the loss. Call it before DeepSpeed starts."""
    module = model.get_output_embeddings()
    head = LossHead(model, module, logit_transform(model.config))
    plain_forward = module.forward

    def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain_forward(hidden, *args, **kwargs) if head._target is None else head._forward(hidden)

    module.forward = MethodType(forward, module)
    return head


def token_loss(model_or_engine: Any, head: LossHead, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of one micro-batch.

    batch: what the model's forward takes (input_ids int64 [batch, length], ...) with labels int64 [batch, length], -100
    where no loss is taken, not shifted. Returns (sum of token losses fp32 with gradient, number of label tokens int64).
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    target = shift_labels(batch["labels"])
    loss, _ = head.loss(lambda: model_or_engine(**inputs, use_cache=False), target)
    return loss, (target != IGNORE_INDEX).sum()
