"""Rules about number types: bf16, fp16, torch.autocast, and the type in which gradients add up."""

from collections.abc import Iterator

from dstrain.config.case import Case, Repair, Rule

_SHORT = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}


def one_precision(case: Case) -> Iterator[str]:
    on = [name for name in ("bf16", "fp16", "torch_autocast") if case.get(f"{name}.enabled") is True]
    if "bf16" in on and "fp16" in on:
        yield "bf16 and fp16 are both enabled: keep one"
    elif len(on) > 1:
        yield f"{on[0]} and torch_autocast are both enabled, where autocast has nothing left to cast: keep one"


def device_has_precision(case: Case) -> Iterator[str]:
    if case.precision == "fp16" and case.facts.device_supports_fp16 is False:
        yield f"fp16 is not supported by this {_device(case)}: write bf16, or leave fp16 out for fp32"
    if case.precision == "bf16" and case.facts.device_supports_bf16 is False:
        yield f"bf16 is not supported by this {_device(case)}: write fp16, or leave bf16 out for fp32"


def _device(case: Case) -> str:
    return "CPU" if case.facts.device == "cpu" else "device"


def autocast_names_its_type(case: Case) -> Iterator[Repair]:
    if case.autocast and case.get("torch_autocast.dtype") is None:
        reason = "derived: without it torch takes bfloat16 on a CPU and float16 on a GPU"
        yield Repair("torch_autocast.dtype", "bfloat16", reason)


def autocast_float16(case: Case) -> Iterator[str]:
    if case.autocast == "float16":
        effect = (
            "leaves the loss scale in the gradient norm, so that clipping is wrong"
            if case.stage
            else "has no loss scaling, so that small gradients become zero"
        )
        yield f'torch_autocast float16 at stage {case.stage} {effect}: write "dtype": "bfloat16", or fp16 instead'


def accumulation_type_at_stage_0(case: Case) -> Iterator[str]:
    asked = case.get("data_types.grad_accum_dtype")
    unlike = asked is not None and _SHORT.get(asked, asked) != case.precision
    if case.stage == 0 and case.precision == "fp32" and unlike:
        yield (
            f"data_types.grad_accum_dtype {asked} is refused by DeepSpeed at stage 0: write stage 1, or leave it out"
        )


def stage_for_sixteen_bits(case: Case) -> Iterator[Repair]:
    """Stage 0's optimizers step once with zero gradients when they are made, and add up gradients in 16 bits."""
    if case.stage or case.precision == "fp32" or case.pipeline or case.get("zero_optimization.offload_optimizer"):
        return
    cls = case.optimizer_class
    if cls and (cls.elementwise or case.optimizer == "Muon"):
        reason = "derived: stage 0 gives wrong numbers in 16 bits (an empty step before the first); stage 1 is right"
        yield Repair("zero_optimization.stage", 1, reason)


def sixteen_bits_at_stage_0(case: Case) -> Iterator[str]:
    """What `stage_for_sixteen_bits` could not repair."""
    if case.stage == 0 and case.precision != "fp32":
        yield (
            f"{case.precision} at ZeRO stage 0 gives wrong numbers (DeepSpeed takes an empty optimizer step before the "
            "first, and adds up gradients in 16 bits): write zero_optimization.stage 1, or leave 16 bits out"
        )


def parameter_type(case: Case) -> Iterator[str]:
    asked = case.get("data_types.param_dtype")
    if asked is not None and _SHORT.get(asked, asked) != case.precision:
        yield (
            f"data_types.param_dtype {asked} contradicts the precision {case.precision}: leave it out, or enable "
            f"{_SHORT.get(asked, asked)}"
        )


def kept_modules(case: Case) -> Iterator[str]:
    kept = case.get("data_types.keep_in_fp32_modules")
    if kept is None or kept == "auto":
        return
    if not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        yield 'data_types.keep_in_fp32_modules is neither "auto" nor a list of names: write one of the two'


def master_weights(case: Case) -> Iterator[str]:
    for name in ("bf16", "fp16"):
        key = f"{name}.{name}_master_weights_and_grads"
        if not case.get(key):
            continue
        states_too = name == "bf16" and case.get("bf16.bf16_optimizer_states")
        on_cpu = case.offload_optimizer and case.optimizer in ("Adam", "AdamW")
        if case.stage == 0:
            yield f"{key} is refused by DeepSpeed at stage 0: write stage 1, 2 or 3"
        elif not on_cpu and not (states_too and not case.offload_optimizer):
            more = ", or bf16_optimizer_states true" if name == "bf16" else ""
            yield f"{key} needs Adam or AdamW offloaded to cpu{more}: add one, or leave it out"
    accumulates = case.get("data_types.grad_accum_dtype")
    if (
        case.get("bf16.bf16_master_weights_and_grads")
        and case.stage == 1
        and _SHORT.get(accumulates, accumulates) == "fp32"
    ):
        yield (
            "bf16.bf16_master_weights_and_grads is ignored at stage 1 with data_types.grad_accum_dtype fp32: "
            "leave one of them out"
        )
    if case.get("bf16.bf16_optimizer_states") and not case.get("bf16.bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads: add it, or leave both out"


def immediate_update(case: Case) -> Iterator[str]:
    if case.get("bf16.immediate_grad_update") and not (case.precision == "bf16" and case.stage == 1):
        yield "bf16.immediate_grad_update is read with bf16 at stage 1 only: leave it out"
    elif case.get("bf16.immediate_grad_update") and case.offload_optimizer:
        yield "bf16.immediate_grad_update is ignored with offload_optimizer: leave it out"


# Answered first, since other rules depend on the stage.
EARLY: tuple[Rule, ...] = (stage_for_sixteen_bits,)
RULES: tuple[Rule, ...] = (
    one_precision,
    device_has_precision,
    autocast_names_its_type,
    autocast_float16,
    accumulation_type_at_stage_0,
    sixteen_bits_at_stage_0,
    parameter_type,
    kept_modules,
    master_weights,
    immediate_update,
)
