"""What a DeepSpeed JSON amounts to: precision, devices of offload, the optimizer class. Pure readings of the dict."""

from typing import Any

from dstrain.config.load import get_value
from dstrain.config.schema_types import OptimizerClass, canonical_optimizer, optimizer_class


def precision(config: dict[str, Any]) -> str:
    """Type of the parameters: "fp32", "bf16" or "fp16"."""
    if get_value(config, "bf16.enabled") is True:
        return "bf16"
    return "fp16" if get_value(config, "fp16.enabled") is True else "fp32"


def autocast_dtype(config: dict[str, Any]) -> str | None:
    """ "bfloat16" or "float16" where torch.autocast is on."""
    if get_value(config, "torch_autocast.enabled") is not True:
        return None
    word = str(get_value(config, "torch_autocast.dtype", "bfloat16")).removeprefix("torch.")
    return "float16" if word in ("float16", "fp16", "half") else "bfloat16"


def offload_device(config: dict[str, Any], block: str) -> str | None:
    """ "cpu" or "nvme", or None; `block` is "offload_optimizer" or "offload_param"."""
    device = get_value(config, f"zero_optimization.{block}.device")
    return None if device in (None, "none") else device


def class_of(config: dict[str, Any]) -> OptimizerClass | None:
    """The optimizer class that DeepSpeed would build, or None where the JSON names none that is known."""
    name = get_value(config, "optimizer.type")
    canonical = canonical_optimizer(name) if isinstance(name, str) else None
    if canonical is None:
        return None
    params = get_value(config, "optimizer.params")
    on_cpu = offload_device(config, "offload_optimizer") is not None
    return optimizer_class(canonical, params if isinstance(params, dict) else {}, on_cpu)
