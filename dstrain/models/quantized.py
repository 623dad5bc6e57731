"""A frozen base in 4 bits, for adapters beside it (QLoRA, https://arxiv.org/abs/2305.14314), by bitsandbytes.

As in the paper: NormalFloat4 in blocks of 64 weights, whose scales are quantized once more, to 8 bits in blocks of 256.
The linear layers are quantized, as in Hugging Face's `load_in_4bit`: not the head, nor what is no linear layer
(embeddings, norms, experts that are one tensor).
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dstrain.errors import UserError
from dstrain.models.units import Unit, return_freed_memory, units

_HOW: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
BYTES_PER_WEIGHT = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def to_quantize(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> layer of all that `--load_in_4bit` quantizes."""
    head = model.get_output_embeddings()
    layers = model.named_modules()
    return {name: layer for name, layer in layers if type(layer) in (nn.Linear, Conv1D) and layer is not head}


def check_quantizable(model: PreTrainedModel) -> None:
    """Raises UserError for a model that would not become much smaller. model: whole, on any device."""
    in_4bit = sum(layer.weight.numel() for layer in to_quantize(model).values())
    experts = sum(p.numel() for p in model.parameters() if p.ndim > 2)
    if experts > in_4bit:
        raise UserError(
            f"--load_in_4bit quantizes linear layers, and most weights of {type(model).__name__} are those of experts "
            "that are one tensor: leave it out; zero_optimization.stage 3 divides them over the ranks"
        )


def size_of(parameter: nn.Parameter) -> int | None:
    """Number of weights that a parameter in 4 bits holds; None for another one."""
    state = getattr(parameter, "quant_state", None)
    return None if state is None else math.prod(state.shape)


class Quantizer:
    """Quantizes one unit of a model after the other, as soon as it has its weights."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device):
        """dtype: of the weights, and of what is computed with them. device: where the quantized weights are to be."""
        self.model, self.dtype, self.device = model, dtype, device
        self.names = set(to_quantize(model))
        model.is_loaded_in_4bit = True  # peft puts its own layer for these around them

    def __call__(self, unit: Unit) -> Unit:
        """Put quantized layers in the place of the unit's linear ones; returns the unit with these."""
        modules = []
        for name, module in unit.modules:
            # A pipeline stage has plain tensors in place of the weights of other stages.
            if name in self.names and "weight" in module._parameters:
                module = quantized(module, self.dtype, self.device)
                self.model.set_submodule(name, module)
            modules.append((name, module))
        return_freed_memory()  # of the whole weights and, on a CPU, five times as much that quantizing them took
        return Unit(unit.name, modules, unit.ancestors)


def quantize_whole(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    quantize = Quantizer(model, dtype, device)
    for unit in units(model):
        quantize(unit)


def quantized(layer: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer of bitsandbytes on `device` that computes in `dtype` what a linear one did, but for the rounding."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = _weight(layer)
    with torch.device("meta"):
        result = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, **_HOW)
    result.weight = Params4bit(weight, requires_grad=False, module=result, **_HOW).to(device)
    result.bias = layer.bias
    # Without gradients it would go over, for good, to a kernel that computes in bf16 and has no backward pass.
    result.support_avx512bf16_for_cpu = False
    return result


@torch.no_grad()
def round_to_4bit(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights of a model on the CPU to those that its quantized layers compute with, in `dtype`.

    Raises UserError where bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        raise UserError(
            "adapters of a model in 4 bits need the package bitsandbytes to be merged: pip install bitsandbytes"
        ) from None
    for layer in to_quantize(model).values():
        rounded = dequantize_4bit(*quantize_4bit(_weight(layer).to(dtype), **_HOW))
        _weight(layer).copy_(rounded)


def _weight(layer: Any) -> torch.Tensor:
    """A view of it, [outputs, inputs]."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
