"""Rules about ZeRO: which stage reads which key, offload, and optimizers whose updates do not survive partitioning."""

from collections.abc import Iterator
from typing import Any

from dstrain.config.case import Case, Repair, Rule
from dstrain.config.schema_keys import ZERO

# The stages that read a key (what `_configure_zero_optimizer` and zero.Init pass on). Keys not named: 1, 2 and 3.
_STAGE_3 = (
    "offload_param",
    "sub_group_size",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory",
    "leaf_module",
    *(key for key in ZERO.keys if key.startswith("stage3_")),
)
_STAGES_1_2 = (
    "allgather_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
)
_NVME_ONLY = {
    "offload_param": ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
    "offload_optimizer": ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
}


def _default(key: str) -> Any:
    return ZERO.keys[key].default


def key_of_another_stage(case: Case) -> Iterator[str]:
    for key, value in (case.get("zero_optimization") or {}).items():
        if key == "stage" or (value == _default(key) and not isinstance(value, dict)):
            continue
        stages = (3,) if key in _STAGE_3 else (1, 2) if key in _STAGES_1_2 else (1, 2, 3)
        off = isinstance(value, dict) and value.get("device") == "none"
        if case.stage not in stages and key != "offload_optimizer" and not off:
            words = {(3,): "stage 3", (1, 2): "stages 1 and 2", (1, 2, 3): "stages 1, 2 and 3"}[stages]
            yield (
                f"zero_optimization.{key} is read at {words} only and ignored at stage {case.stage}: "
                f"leave it out, or change zero_optimization.stage"
            )


def key_of_no_stage(case: Case) -> Iterator[str]:
    if case.get("zero_optimization.allgather_partitions") is False:
        yield "zero_optimization.allgather_partitions is read by nothing in DeepSpeed 0.19.8: leave it out"


def offload_without_device(case: Case) -> Iterator[str]:
    for block in ("offload_optimizer", "offload_param"):
        values = case.get(f"zero_optimization.{block}")
        if isinstance(values, dict) and "device" not in values:
            yield f'zero_optimization.{block} has no device and does nothing: write "device": "cpu", or leave it out'


def optimizer_offload_needs_zero(case: Case) -> Iterator[str]:
    if case.offload_optimizer and case.stage == 0:
        yield (
            "zero_optimization.offload_optimizer does not offload at stage 0 (it only changes the optimizer's class): "
            "write stage 1, 2 or 3"
        )


def nvme_needs_stage_3(case: Case) -> Iterator[str]:
    if case.offload_optimizer == "nvme" and case.stage in (1, 2):
        yield (
            f"zero_optimization.offload_optimizer.device nvme becomes cpu at stage {case.stage}: "
            'write "device": "cpu", or stage 3'
        )


def nvme_needs_path(case: Case) -> Iterator[str]:
    for block, device in (("offload_optimizer", case.offload_optimizer), ("offload_param", case.offload_param)):
        if device == "nvme" and not case.get(f"zero_optimization.{block}.nvme_path"):
            yield f'zero_optimization.{block} has no nvme_path: write "nvme_path": a folder on a fast local disk'


def nvme_keys_without_nvme(case: Case) -> Iterator[str]:
    for block, keys in _NVME_ONLY.items():
        device = case.get(f"zero_optimization.{block}.device")
        if device not in ("cpu", "none"):
            continue
        for key in keys:
            value = case.get(f"zero_optimization.{block}.{key}")
            if value is not None and value != ZERO.keys[block].keys[key].default:
                yield f"zero_optimization.{block}.{key} is read with device nvme only: leave it out"


def nvme_needs_libaio(case: Case) -> Iterator[str]:
    if "nvme" in (case.offload_optimizer, case.offload_param) and case.facts.has_libaio is False:
        yield "offload to nvme needs the system package libaio-dev, which is not here: install it, or write device cpu"


def aio_without_nvme(case: Case) -> Iterator[str]:
    if case.get("aio") and "nvme" not in (case.offload_optimizer, case.offload_param):
        yield "aio is read with offload to nvme only: leave it out"
    if case.get("aio.use_gds") and case.facts.device == "cpu":
        yield "aio.use_gds needs a CUDA device: leave it out"


def offload_extras(case: Case) -> Iterator[str]:
    block = "zero_optimization.offload_optimizer"
    if case.get(f"{block}.super_offload"):
        yield f"{block}.super_offload is for GH200-like machines and not shown to give the plain numbers: leave it out"
    if case.get(f"{block}.ratio", 1.0) < 1.0:
        if case.stage != 3:
            yield f"{block}.ratio below 1 is refused by DeepSpeed at stage {case.stage}: leave it out, or write stage 3"
        elif case.optimizer_class and case.optimizer_class.name != "DeepSpeedCPUAdam":
            yield f"{block}.ratio below 1 needs Adam or AdamW of DeepSpeed: leave it out"
    if case.get(f"{block}.cpuadam_cores_perc", 0.8) != 0.8:
        yield f"{block}.cpuadam_cores_perc is read with super_offload only: leave it out"
    if case.get("zero_optimization.zenflow") is not None:
        yield "zero_optimization.zenflow delays updates, so its losses are not those of the plain run: leave it out"
    if case.get("zero_force_ds_cpu_optimizer") is False:
        yield "zero_force_ds_cpu_optimizer is for optimizers made outside the JSON: leave it out"


def reduce_scatter_conflicts(case: Case) -> Iterator[str]:
    if case.stage < 2 or case.get("zero_optimization.reduce_scatter", True) is False:
        return
    for key, plain in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if case.get(key, plain) != plain:
            yield f"{key} is refused by DeepSpeed at stage {case.stage} with reduce_scatter: leave it out"


def predivide_with_prescale(case: Case) -> Iterator[str]:
    if case.get("prescale_gradients") and case.get("gradient_predivide_factor", 1.0) != 1.0:
        yield "gradient_predivide_factor is ignored with prescale_gradients: keep one of them"


def odd_bucket(case: Case) -> Iterator[str]:
    size = case.get("zero_optimization.allgather_bucket_size")
    if case.stage in (1, 2) and isinstance(size, int | float) and size % 2:
        yield f"zero_optimization.allgather_bucket_size {size} is odd, which DeepSpeed refuses: write {int(size) + 1}"


def norm_is_reported(case: Case) -> Iterator[str]:
    if case.get("zero_optimization.compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm false leaves no gradient norm to report or to clip by: leave it out"


def secondary_partition(case: Case) -> Iterator[str]:
    size = case.get("zero_optimization.zero_hpz_partition_size") or 1
    if case.stage == 3 and size > 1 and case.dims.dp_size % size:
        yield (
            f"zero_optimization.zero_hpz_partition_size {size} does not divide the {case.dims.dp_size} data-parallel "
            "ranks: write the number of devices of one host"
        )


def quantized_collectives(case: Case) -> Iterator[str]:
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if case.get(f"zero_optimization.{key}") and case.stage == 3:
            if case.facts.device == "cpu":
                yield f"zero_optimization.{key} needs CUDA kernels: leave it out on a CPU"
            if case.autocast and key == "zero_quantized_weights":
                yield f"zero_optimization.{key} is refused by DeepSpeed with torch_autocast: keep one of them"
    if case.get("zero_optimization.zero_quantized_gradients") and not case.get(
        "zero_optimization.reduce_scatter", True
    ):
        yield "zero_optimization.zero_quantized_gradients needs reduce_scatter: leave reduce_scatter out"


def packed_weights(case: Case) -> Iterator[str]:
    """Stage 3 gathers what is packed by its own type, two weights a byte; these ways would take it for numbers."""
    if not case.facts.load_in_4bit or case.stage != 3:
        return
    keys = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "stage3_use_all_reduce_for_fetch_params")
    found = [f"zero_optimization.{key}" for key in keys if case.get(f"zero_optimization.{key}")]
    if (case.get("zero_optimization.zero_hpz_partition_size") or 1) > 1:
        found.append("zero_optimization.zero_hpz_partition_size")
    if case.autocast:
        found.append("torch_autocast")
    if case.get("zero_optimization.offload_param.device") == "nvme":
        found.append("zero_optimization.offload_param.device nvme")
    for what in found:
        yield f"{what} at stage 3 does not go with weights packed in 4 bits: leave it or --load_in_4bit out"


def optimizer_is_named(case: Case) -> Iterator[str]:
    if not case.get("optimizer.type"):
        yield 'there is no optimizer: write "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}'


def layerwise_optimizer(case: Case) -> Iterator[str]:
    cls = case.optimizer_class
    if cls and not cls.elementwise and case.stage > 0:
        yield (
            f"optimizer.type {case.optimizer} looks at whole parameters, which ZeRO cuts into flat pieces, so stage "
            f"{case.stage} gives other numbers: write stage 0, or another optimizer"
        )


def untested_optimizer(case: Case) -> Iterator[Repair]:
    cls = case.optimizer_class
    untested = cls is not None and cls.elementwise and not cls.tested_with_zero
    if untested and case.stage > 0 and case.get("zero_allow_untested_optimizer") is not True:
        reason = f"derived: {case.optimizer} updates element by element, so that ZeRO's pieces do not change it"
        yield Repair("zero_allow_untested_optimizer", True, reason)


def adam_means_adamw(case: Case) -> Iterator[str | Repair]:
    mode = case.get("optimizer.params.adam_w_mode")
    if case.optimizer == "AdamW" and mode is False:
        yield "optimizer.params.adam_w_mode false is ignored for AdamW: write optimizer.type Adam"
    if case.optimizer == "Adam" and mode is None:
        yield Repair("optimizer.params.adam_w_mode", True, "default: DeepSpeed's Adam decays weights as AdamW does")


def amsgrad(case: Case) -> Iterator[str]:
    cls = case.optimizer_class
    if cls and case.get("optimizer.params.amsgrad") and not cls.name.startswith("torch."):
        adam = case.optimizer in ("Adam", "AdamW")
        fix = 'write "torch_adam": true beside it, or leave it out' if adam else "leave it out"
        yield f"optimizer.params.amsgrad is not supported by {cls.name}: {fix}"


def optimizer_on_cpu(case: Case) -> Iterator[str]:
    cls = case.optimizer_class
    if cls and cls.name in ("FusedLion", "FusedLamb") and case.facts.device == "cpu":
        fix = (
            "offload the optimizer to cpu at stage 1, 2 or 3, or write AdamW"
            if cls.name == "FusedLion"
            else "write AdamW"
        )
        yield f"optimizer.type {case.optimizer} has no CPU kernel without offload: {fix}"
    if cls and cls.name == "FusedLamb" and case.offload_optimizer:
        yield "optimizer.type Lamb has no CPU kernel for offload_optimizer: leave the offload out, or write AdamW"


def adagrad_loses_its_groups(case: Case) -> Iterator[str]:
    cls = case.optimizer_class
    if cls and cls.name == "torch.optim.Adagrad" and case.stage > 0:
        yield (
            "optimizer.type Adagrad without offload is built anew by ZeRO, without its parameter groups and out of the "
            "schedule's reach: offload the optimizer to cpu, or write stage 0"
        )


def muon_numbers(case: Case) -> Iterator[str]:
    """Measured: only these give the numbers of one process, clip the gradient and can be resumed elsewhere."""
    if case.optimizer != "Muon":
        return
    works = case.stage == 0 or (case.stage == 1 and case.precision == "bf16" and not case.offload_optimizer)
    if case.precision == "fp16":
        yield "optimizer.type Muon is not shown to be right with fp16: write bf16, or leave fp16 out"
    elif not works:
        yield (
            f"optimizer.type Muon with {case.precision} {_where(case)} measures and clips its update instead of the "
            "gradient, and its momenta are bound to the layout: write stage 0, or bf16 at stage 1 without offload"
        )
    if case.stage == 1 and case.precision == "bf16" and case.dims.model_parallel_size > 1:
        yield "optimizer.type Muon with bf16 at stage 1 is refused by DeepSpeed with model parallelism: write AdamW"


def _where(case: Case) -> str:
    return f"at stage {case.stage}" + (" with offload_optimizer" if case.offload_optimizer else "")


RULES: tuple[Rule, ...] = (
    key_of_another_stage,
    key_of_no_stage,
    offload_without_device,
    optimizer_offload_needs_zero,
    nvme_needs_stage_3,
    nvme_needs_path,
    nvme_keys_without_nvme,
    nvme_needs_libaio,
    aio_without_nvme,
    offload_extras,
    reduce_scatter_conflicts,
    predivide_with_prescale,
    odd_bucket,
    norm_is_reported,
    secondary_partition,
    quantized_collectives,
    packed_weights,
    optimizer_is_named,
    layerwise_optimizer,
    untested_optimizer,
    adam_means_adamw,
    amsgrad,
    optimizer_on_cpu,
    adagrad_loses_its_groups,
    muon_numbers,
)
