"""What tensor parallelism (DeepSpeed's AutoTP) makes of a model: which parameters are shards, and their norm."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dstrain.config import ResolvedConfig
from dstrain.errors import UserError
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
    """`tensor_parallel.partition_config` for a model whose own plan AutoTP refuses because of its experts; else None.

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
    if kept == plan:
        return None
    specs = [
        {
            "patterns": spec.patterns,
            "partition_type": spec.partition_type.value,
            "gather_output": spec.gather_output,
            "grad_allreduce": spec.grad_allreduce,
        }
        for spec in TPPlanConverter.convert(kept)
    ]
    return {"use_default_specs": False, "layer_specs": specs}


def _plan(config: Any) -> dict[str, str]:
    """transformers' tensor-parallel plan of a causal language model: name pattern -> style."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return {**(getattr(text, "base_model_tp_plan", None) or {}), **(getattr(model, "_tp_plan", None) or {})}
