"""Linear layer and cross entropy in one, chunk by chunk: [tokens, vocabulary] in fp32 never exists.

The gradients of hidden states, weight and bias are computed in the forward pass, while a chunk's logits are at hand
(the idea of Liger-Kernel's FusedLinearCrossEntropy, https://github.com/linkedin/Liger-Kernel, whose kernels are used on
CUDA where they are installed). torch 2.13's own `linear_cross_entropy` returns a wrong bf16 value and is slower.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_TOKENS = 512  # at least; a chunk's logits are kept in the model's dtype
CHUNK_ELEMENTS = 2**24  # so many logits a chunk may have where the vocabulary is small
# A chunk in 16 bits is filled up with zeros to a multiple of so many tokens. oneDNN compiles and keeps a kernel for
# every shape that it meets: with one for each number of label tokens, memory on a CPU grew for hundreds of steps.
# Products in fp32 are MKL's.
CHUNK_MULTIPLE = 64
# fp32 temporaries of this many elements stay in the cache of a CPU, and below the size from which malloc maps fresh
# pages each time: 8 times faster than whole chunks of 512 x 32,000. A GPU wants few large kernels instead.
BLOCK_ELEMENTS = {"cpu": 2**21}
BLOCK_ELEMENTS_ELSEWHERE = 2**26


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's product: logits = cap * tanh(scale * raw / cap); cap None means no cap."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.cap is None

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


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the head's weight that this tensor-parallel rank holds, from `start` on.

    group: its peers. largest: rows of the largest shard, by which all of them cut chunks alike. whole: of all shards.
    """

    group: Any
    start: int
    largest: int
    whole: int

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def log_softmax(self, logits: Tensor) -> Tensor:
        """logits [n, shard] -> fp32, over the whole vocabulary (Megatron-LM: vocab_parallel_cross_entropy)."""
        peak = logits.amax(1, keepdim=True).float()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group)
        shifted = logits.float() - peak
        return shifted.sub_(self.sum_(shifted.exp().sum(1, keepdim=True)).log_())


def _block_rows(device: torch.device, columns: int) -> int:
    return max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ELSEWHERE) // columns)


def _replace_by_grad_(
    raw: Tensor,
    target: Tensor,
    transform: LogitTransform,
    need_grad: bool,
    label_smoothing: float,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Sum of the token losses, fp32; raw [n, vocabulary] of any float type becomes d sum / d raw if need_grad.

    With a shard, raw has its columns only, and the sum is this shard's part of the whole.
    """
    total = torch.zeros((), dtype=torch.float32, device=raw.device)
    rows = _block_rows(raw.device, raw.shape[1] if shard is None else shard.largest)
    of_target, of_every = 1.0 - label_smoothing, label_smoothing / (raw.shape[1] if shard is None else shard.whole)
    for part, wanted in zip(raw.split(rows), target.split(rows), strict=True):
        if transform.is_identity:
            slope, logits = None, part
        else:
            logits = transform.apply_(part.to(torch.float32, copy=True))
            slope = transform.slope(logits) if need_grad else None
        if shard is None:
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            row, column = torch.arange(len(wanted), device=raw.device), wanted
        else:
            log_p = shard.log_softmax(logits)
            column = wanted - shard.start
            row = ((column >= 0) & (column < part.shape[1])).nonzero().squeeze(1)
            column = column[row]
        total -= of_target * log_p[row, column].sum()
        if label_smoothing:
            total -= of_every * log_p.sum()
        if need_grad:
            grad = log_p.exp_()
            grad[row, column] -= of_target
            if label_smoothing:
                grad -= of_every
            part.copy_(grad if slope is None else grad.mul_(slope))
    return total


def _filled_up(rows: Tensor) -> Tensor:
    """rows [n, width] and, in 16 bits, zeros behind them, to a multiple of CHUNK_MULTIPLE."""
    if rows.dtype == torch.float32:
        return rows
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % CHUNK_MULTIPLE))


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, transform, compute_dtype, need_grad, label_smoothing, shard):
        needs_hidden, needs_weight, needs_bias = (need_grad and needs for needs in ctx.needs_input_grad[:3])
        matrix = weight.to(compute_dtype)
        offset = None if bias is None else bias.to(compute_dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Sums over chunks are kept in fp32: 16 bits would lose the later chunks.
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        block = _block_rows(weight.device, weight.shape[1])
        kept = (target != IGNORE_INDEX).nonzero().squeeze(1)
        columns = weight.shape[0] if shard is None else shard.largest
        for rows in kept.split(max(CHUNK_TOKENS, CHUNK_ELEMENTS // columns)):
            chunk = _filled_up(hidden[rows].to(compute_dtype))
            raw = torch.nn.functional.linear(chunk, matrix, offset)
            total += _replace_by_grad_(raw[: len(rows)], target[rows], transform, need_grad, label_smoothing, shard)
            raw[len(rows) :] = 0.0
            if grad_hidden is not None:
                part = (raw @ matrix)[: len(rows)]
                grad_hidden[rows] = (part if shard is None else shard.sum_(part)).to(grad_hidden.dtype)
            if grad_weight is not None:
                for start in range(0, weight.shape[0], block):
                    grad_weight[start : start + block] += raw[:, start : start + block].t() @ chunk
            if grad_bias is not None:
                grad_bias += raw.sum(0, dtype=torch.float32)
        if shard is not None:
            shard.sum_(total)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        assert ctx.grads is not None, "the fused loss can be differentiated once"
        grads, ctx.grads = ctx.grads, None
        scaled = (None if grad is None else grad.mul_(grad_output) for grad in grads)
        return (
            *(None if grad is None else grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)),
            *(None,) * 6,
        )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, need_grad, label_smoothing):
        kept = (target != IGNORE_INDEX).nonzero().squeeze(1)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        ctx.grad = torch.zeros_like(logits) if need_grad else None
        for rows in kept.split(max(CHUNK_TOKENS, CHUNK_ELEMENTS // logits.shape[1])):
            raw = logits[rows]
            total += _replace_by_grad_(raw, target[rows], LogitTransform(), need_grad, label_smoothing)
            if need_grad:
                ctx.grad[rows] = raw
        return total

    @staticmethod
    def backward(ctx, grad_output):
        assert ctx.grad is not None, "the chunked loss can be differentiated once"
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grad_output), None, None, None


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum over tokens of the cross entropy of softmax(logits); fp32 exists for a chunk of tokens only.

    logits [..., vocabulary] of any float type, target int64 [...] already shifted, -100 where no loss is taken.
    label_smoothing: as of torch's cross_entropy, the part of the target spread evenly over the vocabulary. Returns a
    fp32 scalar.
    """
    need_grad = torch.is_grad_enabled() and logits.requires_grad
    return _CrossEntropy.apply(logits.flatten(0, -2), target.flatten(), need_grad, label_smoothing)


@cache
def _liger() -> Any:
    """Liger-Kernel's class, or None where the extra `gpu` is not installed."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss


def _by_liger(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    transform: LogitTransform,
    label_smoothing: float,
) -> Tensor:
    """The same by Liger-Kernel's Triton kernels; hidden [n, width] and weight in one dtype."""
    loss = _liger()(
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        softcap=transform.cap,
        label_smoothing=label_smoothing,
        accum_dtype=torch.float32,
    )
    if transform.scale != 1.0:  # scale (h W + b) = (scale h) W + scale b
        hidden, bias = hidden * transform.scale, None if bias is None else bias * transform.scale
    return loss(weight, hidden, target, bias).float()


# Compiling its loop over chunks gains nothing over the kernels called there, and breaks at the masked tokens' number.
@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    transform: LogitTransform = LogitTransform(),
    shard: VocabularyShard | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum over tokens of the cross entropy of softmax(transform(hidden @ weight.T + bias)).

    hidden [..., width], weight [vocabulary, width], bias [vocabulary] or None, target int64 [...] already shifted,
    -100 where no loss is taken (such tokens cost nothing). Returns a fp32 scalar; all masked gives 0. Under autocast
    the products are in its dtype. With a shard, weight and bias are this rank's rows; loss and gradient of hidden
    are whole on every rank of the group. label_smoothing: as of torch's cross_entropy. No double backward.
    """
    device = hidden.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    with torch.autocast(device, enabled=False):
        if device == "cuda" and shard is None and _liger() is not None:
            bias = None if bias is None else bias.to(compute_dtype)
            weight = weight.to(compute_dtype)
            return _by_liger(hidden.to(compute_dtype), weight, bias, target, transform, label_smoothing)
        return _FusedLinearCrossEntropy.apply(
            hidden, weight, bias, target, transform, compute_dtype, torch.is_grad_enabled(), label_smoothing, shard
        )
