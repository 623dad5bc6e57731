"""What a DeepSpeed engine really does, read back after `deepspeed.initialize`. Imports neither torch nor deepspeed."""

import math
from typing import Any

from dstrain.config.load import get_value


def read_effective(engine: Any) -> dict[str, Any]:
    """Dotted key -> effective value of a `DeepSpeedEngine`, for `ResolvedConfig.compare_effective`."""
    model_dtype, accumulation_dtype = (_dtype_name(dtype) for dtype in engine.get_data_types())
    values: dict[str, Any] = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_optimization.stage": int(engine.zero_optimization_stage()),
        "bf16.enabled": model_dtype == "bf16",
        "fp16.enabled": model_dtype == "fp16",
        "torch_autocast.enabled": engine.torch_autocast_enabled(),
        "data_types.grad_accum_dtype": accumulation_dtype,
        "tensor_parallel.autotp_size": engine.autotp_size() or 1,
        "zero_optimization.offload_optimizer.device": _device(engine.zero_offload_optimizer()),
        "zero_optimization.offload_param.device": _device(engine.zero_offload_param()),
    }
    # What the optimizer does, not only what the engine was told.
    if hasattr(engine.optimizer, "clip_grad"):
        values["gradient_clipping"] = engine.optimizer.clip_grad
    if engine.scheduler_name() != "OneCycle":  # which moves the betas
        group = engine.basic_optimizer.param_groups[0]
        values |= {f"optimizer.params.{key}": group[key] for key in ("betas", "eps", "momentum") if key in group}
    if engine.optimizer_name():
        values["optimizer.type"] = engine.optimizer_name()
    if engine.scheduler_name():
        values["scheduler.type"] = engine.scheduler_name()
    return values


def _device(offload: Any) -> str:
    return "none" if offload is None else getattr(offload.device, "value", offload.device)


def _dtype_name(dtype: Any) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(dtype)]


# What the absence of a key means, where that is not null.
_ABSENT = {
    "bf16.enabled": False,
    "fp16.enabled": False,
    "torch_autocast.enabled": False,
    "tensor_parallel.autotp_size": 1,
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_param.device": "none",
}


def compare(asked: dict[str, Any], effective: dict[str, Any]) -> list[str]:
    """One line per effective value that differs from what the JSON says; what it leaves open is not compared."""
    differences = []
    for key, got in effective.items():
        wanted = get_value(asked, key, _ABSENT.get(key))
        if wanted is not None and not _same(wanted, got):
            differences.append(f"{key}: the configuration says {wanted!r}, but DeepSpeed runs with {got!r}")
    return differences


def _same(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, str) and isinstance(got, str):
        return wanted.lower() == got.lower()
    if isinstance(wanted, list) and isinstance(got, list | tuple):
        return len(wanted) == len(got) and all(map(_same, wanted, got))
    if isinstance(wanted, float) and isinstance(got, int | float):
        return math.isclose(wanted, got)
    return wanted == got
