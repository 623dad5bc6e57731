"""What tensor parallelism (DeepSpeed's AutoTP) makes of a model: which parameters are shards, and their norm."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dstrain.adapter import NAME
from dstrain.config import ResolvedConfig
from dstrain.errors import UserError
from dstrain.models.adapters import lora_layers
from dstrain.models.cross_entropy import VocabularyShard


def vocabulary_shard(module: Any) -> VocabularyShard | None:
    """The part of the vocabulary whose rows an output embedding holds; None where it holds all."""
    from deepspeed.module_inject.layers import LinearLayer

    if not isinstance(module, LinearLayer) or module.mp_group is None:
        return None
    sizes, index = module._partition_sizes, module.tp_index
    return VocabularyShard(module.mp_group, sum(sizes[:index]), max(sizes), sum(sizes))


def gradient_norm(parameters: Iterable[nn.Parameter], group: Any) -> Tensor:
    """L2 norm of all gradients, fp32 0-d; shards are summed over the tensor-parallel `group` (None: there is none)."""
    parameters = [p for p in parameters if p.grad is not None]
    # [whole parameters, shards]
    squared = torch.zeros(2, device=parameters[0].device)
    for p in parameters:
        squared[int(getattr(p, "tensor_model_parallel", False))] += p.grad.float().square().sum()
    if group is not None:
        dist.all_reduce(squared[1], group=group)
    return squared.sum().sqrt()


def partition_config(config: Any, resolved: ResolvedConfig) -> dict[str, Any] | None:
    """`tensor_parallel.partition_config` for a model whose own plan AutoTP refuses because of its experts, and for one
    with adapters, which no plan knows; else None.

    What the user wrote there, or as preset_model, is left alone. The plan is transformers'
    (`base_model_tp_plan` of the configuration, `_tp_plan` of the class). A layer's experts are one fused parameter,
    which AutoTP cannot divide: they stay whole on every rank, and the rest is divided.
    Raises UserError for a model that has no plan, or one that cannot be followed.
    """
    tp_size, given = resolved.parallel.tp_size, resolved.deepspeed.get("tensor_parallel", {})
    if tp_size == 1 or given.get("partition_config") or given.get("preset_model"):
        return None
    from deepspeed.module_inject.tp_plan_converter import SUPPORTED_STYLES, TPPlanConverter

    plan = _plan(config)
    kept = {pattern: style for pattern, style in plan.items() if "experts" not in pattern.split(".")}
    unknown = sorted(set(kept.values()) - SUPPORTED_STYLES)
    if not any("layers" in pattern for pattern in kept) or unknown:
        reason = (
            f"asks for {', '.join(unknown)}, which AutoTP does not know" if unknown else "is missing in transformers"
        )
        raise UserError(
            f"tensor_parallel.autotp_size {tp_size}: the tensor-parallel plan of {config.model_type} {reason}: "
            "use sequence_parallel_size, pipeline.stages or ZeRO, or write tensor_parallel.partition_config"
        )
    adapted = resolved.facts.adapters
    if kept == plan and not adapted:
        return None
    specs = [
        {
            "patterns": _with_adapters(spec) if adapted else spec.patterns,
            "partition_type": spec.partition_type.value,
            "gather_output": spec.gather_output,
            "grad_allreduce": spec.grad_allreduce,
        }
        for spec in TPPlanConverter.convert(kept)
    ]
    return {"use_default_specs": False, "layer_specs": specs}


def _with_adapters(spec: Any) -> list[str]:
    """A layer's patterns, and what is divided where it has adapters: its base, and of the two matrices the one that has
    the divided features. AutoTP's layers then sum what that one leaves partial: B in a column layer the gradient behind
    A, A in a row layer the output before B. The other matrix is whole on every rank, with a whole gradient."""
    parts = {"column": ["base_layer", f"lora_B.{NAME}"], "row": ["base_layer", f"lora_A.{NAME}"], "skip": []}
    end, found = r"\.weight$", list(spec.patterns)
    if spec.grad_allreduce:  # of whole layers inside of what is divided; AutoTP's hook fails on frozen ones
        parts, found = {"skip": [f"lora_A.{NAME}", f"lora_B.{NAME}"]}, []
    for part in parts[spec.partition_type.value]:
        found += [pattern.removesuffix(end) + rf"\.{re.escape(part)}{end}" for pattern in spec.patterns]
    return found


def open_adapters(model: nn.Module) -> None:
    """Let AutoTP look into layers with adapters, before `deepspeed.initialize`.

    It takes what has a `weight` for a linear layer. A layer of peft has that of its base, so that AutoTP would put the
    base, divided, in its place, without adapters and without a word. Raises UserError for dropout, which draws
    other numbers on each rank once layers are divided unevenly, and for bases that are no plain linear layers.
    """
    for name, layer in lora_layers(model):
        if (kind := type(layer.get_base_layer())) is not nn.Linear:
            raise UserError(f"tensor_parallel.autotp_size above 1 cannot divide {name}, a {kind.__name__}: use ZeRO")
        if any(isinstance(module, nn.Dropout) for module in layer.lora_dropout.values()):
            raise UserError(f"tensor_parallel.autotp_size above 1: {name} has lora_dropout: leave --lora_dropout out")
        layer.__class__ = type(type(layer).__name__, (type(layer),), {"weight": property(_no_weight)})


def _no_weight(layer: Any) -> Tensor:
    raise AttributeError("weight")


def _plan(config: Any) -> dict[str, str]:
    """transformers' tensor-parallel plan of a causal language model: name pattern -> style."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return {**(getattr(text, "base_model_tp_plan", None) or {}), **(getattr(model, "_tp_plan", None) or {})}
