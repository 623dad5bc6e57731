"""Keys that DeepSpeed no longer has, or spells in two ways: what to do about each, and how to rewrite a file."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dstrain.config.load import get_value, remove_value, set_value


@dataclass(frozen=True)
class Removed:
    """`advice` completes "KEY ...". `successor` and `convert` say what `migrate` writes instead, if anything."""

    advice: str
    successor: str | None = None
    convert: Callable[[Any], Any] = copy.deepcopy


def _device(value: Any) -> Any:
    return {"device": "cpu"} if value is True else None


def _autocast(value: Any) -> Any:
    enabled = isinstance(value, dict) and value.get("enabled") is True
    return {"enabled": True, "dtype": "bfloat16"} if enabled else None


_GONE = "was removed in DeepSpeed 0.19: leave it out"
REMOVED: dict[str, Removed] = {
    "amp": Removed(
        'was removed in DeepSpeed 0.19 (Apex): write "bf16": {"enabled": true}, or "torch_autocast" for mixed'
        " precision by operation",
        "torch_autocast",
        _autocast,
    ),
    "elasticity": Removed(f"{_GONE}, and give train_batch_size: dstrain solves the accumulation at any world size"),
    "nebula": Removed(_GONE),
    "compression_training": Removed(_GONE),
    "quantize_training": Removed(f"{_GONE} (Mixture of Quantization)"),
    "sparse_gradients": Removed(f"{_GONE}; embeddings made with sparse=True need no key"),
    "eigenvalue": Removed(f"{_GONE} (Mixture of Quantization)"),
    "sparse_attention": Removed(f"{_GONE}; choose the kernel with --attn_implementation"),
    "graph_harvesting": Removed(_GONE),
    "curriculum_learning": Removed(f"{_GONE}; dstrain has no curriculum"),
    "progressive_layer_drop": Removed(_GONE),
    "allgather_size": Removed(
        "belongs to a form of zero_optimization that is gone: write zero_optimization.allgather_bucket_size",
        "zero_optimization.allgather_bucket_size",
    ),
    "bfloat16": Removed("is an old name: write bf16", "bf16"),
    "zero_optimization.mics_shard_size": Removed(
        f"{_GONE} (MiCS); zero_hpz_partition_size is the nearest that is left"
    ),
    "zero_optimization.mics_hierarchical_params_gather": Removed(f"{_GONE} (MiCS)"),
    "zero_optimization.zeropp_loco_param": Removed(f"{_GONE} (LoCo)"),
    "zero_optimization.cpu_offload": Removed(
        'is an old name: write "offload_optimizer": {"device": "cpu"}', "zero_optimization.offload_optimizer", _device
    ),
    "zero_optimization.cpu_offload_param": Removed(
        'is an old name: write "offload_param": {"device": "cpu"}', "zero_optimization.offload_param", _device
    ),
    "zero_optimization.cpu_offload_use_pin_memory": Removed(
        "is an old name that is ignored: write pin_memory inside offload_optimizer and offload_param"
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": Removed(
        "is an old name: write stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ),
    "zero_optimization.legacy_stage1": Removed("is no longer supported by DeepSpeed: leave it out"),
    "zero_optimization.elastic_checkpoint": Removed(
        "is no longer supported by DeepSpeed: leave it out; dstrain's checkpoints load at any world size"
    ),
    "tensor_parallel.tensor_parallel": Removed("is a second spelling: write tp", "tensor_parallel.tp"),
    "tensor_parallel.replace_with_kernel_inject": Removed(
        "is a second spelling: write kernel_inject", "tensor_parallel.kernel_inject"
    ),
    "optimizer.params.max_grad_norm": Removed(
        "is refused by DeepSpeed: write gradient_clipping at the top", "gradient_clipping"
    ),
}
# pydantic takes the field's own name as well as the documented one.
REMOVED.update(
    {
        f"zero_optimization.{name}": Removed(
            f"is a second spelling: write stage3_{name}", f"zero_optimization.stage3_{name}"
        )
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        )
    }
)
_ONE_BIT = {"onebitadam": "Adam", "zerooneadam": "Adam", "onebitlamb": "Lamb"}
_ONE_BIT_PARAMS = (
    "freeze_step",
    "cuda_aware",
    "comm_backend_name",
    "var_freeze_step",
    "var_update_scaler",
    "local_step_scaler",
    "local_step_clipper",
    "coeff_beta",
    "factor_max",
    "factor_min",
    "factor_threshold",
    "max_coeff",
    "min_coeff",
    "onebit",
)


def migrate(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the configuration for DeepSpeed 0.19, one line per change)."""
    config, changes = copy.deepcopy(config), []
    absent = object()
    if isinstance(config.get("zero_optimization"), bool):
        stage = int(config["zero_optimization"])
        config["zero_optimization"] = {"stage": stage}
        changes.append(f'zero_optimization: true or false was replaced by {{"stage": {stage}}}')
    for key, removed in REMOVED.items():
        value = get_value(config, key, absent)
        if value is absent:
            continue
        remove_value(config, key)
        new = removed.convert(value) if removed.successor else None
        if removed.successor and new is not None and get_value(config, removed.successor) is None:
            set_value(config, removed.successor, new)
            changes.append(f"{key} was replaced by {removed.successor}")
        else:
            changes.append(f"{key} was dropped: it {removed.advice}")
    name = get_value(config, "optimizer.type")
    if isinstance(name, str) and name.lower() in _ONE_BIT:
        config["optimizer"]["type"] = _ONE_BIT[name.lower()]
        changes.append(f"optimizer.type {name} was replaced by {_ONE_BIT[name.lower()]}: 1-bit optimizers were removed")
        params = get_value(config, "optimizer.params", {})
        for param in [param for param in _ONE_BIT_PARAMS if isinstance(params, dict) and param in params]:
            del params[param]
            changes.append(f"optimizer.params.{param} was dropped: it belonged to {name}")
    return config, changes
