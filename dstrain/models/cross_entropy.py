"""Linear layer and cross entropy in one, chunk by chunk: [tokens, vocabulary] in fp32 never exists.

The gradients of hidden states, weight and bias are computed in the forward pass, while a chunk's logits are at hand
(the idea of Liger-Kernel's FusedLinearCrossEntropy, https://github.com/linkedin/Liger-Kernel). torch 2.13's own
`linear_cross_entropy` returns a wrong bf16 value and is slower.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's product: logits = cap * tanh(scale * raw / cap); cap None means no cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, raw: Tensor) -> Tensor:
        """raw fp32 [n, vocabulary] -> logits, in place."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.cap is not None:
            raw.div_(self.cap).tanh_().mul_(self.cap)
        return raw

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d raw, from the finished logits."""
        if self.cap is None:
            return self.scale
        return (1.0 - (logits / self.cap).square_()).mul_(self.scale)


def _chunk_loss_and_grad(raw: Tensor, target: Tensor, transform: LogitTransform, need_grad: bool):
    """raw [n, vocabulary] of any float type, target int64 [n] -> (sum of losses fp32, d sum / d raw like raw or None)."""
    logits = transform.apply_(raw.to(torch.float32, copy=True))
    at_target = logits.gather(1, target[:, None])
    slope = transform.slope(logits) if need_grad and transform.cap is not None else transform.scale
    log_z = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = (log_z - at_target).sum()
    if not need_grad:
        return loss, None
    probabilities = logits.sub_(log_z).exp_()
    rows = torch.arange(target.numel(), device=target.device)
    probabilities[rows, target] -= 1.0
    if isinstance(slope, Tensor) or slope != 1.0:
        probabilities.mul_(slope)
    return loss, probabilities.to(raw.dtype)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, transform, compute_dtype, need_grad):
        needs_hidden, needs_weight, needs_bias = (need_grad and needs for needs in ctx.needs_input_grad[:3])
        kept = (target != IGNORE_INDEX).nonzero().squeeze(1)
        matrix = weight.to(compute_dtype)
        offset = None if bias is None else bias.to(compute_dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Sums over chunks are kept in fp32: 16 bits would lose the later chunks.
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for rows in kept.split(CHUNK_TOKENS):
            chunk = hidden[rows].to(compute_dtype)
            raw = torch.nn.functional.linear(chunk, matrix, offset)
            loss, grad = _chunk_loss_and_grad(raw, target[rows], transform, need_grad)
            total += loss
            if needs_hidden:
                grad_hidden[rows] = (grad @ matrix).to(grad_hidden.dtype)
            if needs_weight:
                grad_weight += grad.t() @ chunk
            if needs_bias:
                grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grads = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return *grads, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: LogitTransform = LogitTransform()
) -> Tensor:
    """Sum over tokens of the cross entropy of softmax(transform(hidden @ weight.T + bias)).

    hidden [..., width], weight [vocabulary, width], bias [vocabulary] or None, target int64 [...] already shifted,
    -100 where no loss is taken (such tokens cost nothing). Returns a fp32 scalar; all masked gives 0. Under autocast
    the products are in its dtype. Double backward is not supported.
    """
    device = hidden.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _FusedLinearCrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            target.reshape(-1),
            transform,
            compute_dtype,
            torch.is_grad_enabled(),
        )
