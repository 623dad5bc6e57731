"""Rules about the rest of a run: blocks that lack their switch or flag, schedules, checkpoints, monitors."""

from collections.abc import Iterator
from importlib.util import find_spec

from dstrain.config.case import Case, Repair, Rule
from dstrain.config.schema_keys import ACTIVATION_CHECKPOINTING, COMPILE

_SWITCHED = (
    "bf16",
    "fp16",
    "torch_autocast",
    "expert_parallel",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
    "hybrid_engine",
    "autotuning",
    "data_efficiency",
)
# Keys that DeepSpeed reads for parts of it that dstrain does not use, or reads nowhere: key -> why.
_WITHOUT_EFFECT = {
    "dataloader_drop_last": "is for DeepSpeed's own data loader, and dstrain has its own",
    "disable_allgather": "is read by nothing in DeepSpeed 0.19.8",
    "optimizer.legacy_fusion": "is read at stage 0 with 16 bits only, which dstrain refuses",
    "vocabulary_size": "only makes DeepSpeed warn; the vocabulary is the model's",
    "weight_quantization": "is for inference",
    "autotuning.enabled": "ends the run after a few steps; it belongs to `deepspeed --autotuning`",
    "hybrid_engine.enabled": "replaces the engine by one for reinforcement learning",
    "data_efficiency.enabled": "is for DeepSpeed's own data loader, and dstrain has its own",
    "checkpoint.writer": "names a writer, and none of DeepSpeed 0.19.8's works",
    "datastates_ckpt": "names a writer that DeepSpeed 0.19.8 cannot load",
    "checkpoint.load_universal": "is dstrain's own business: it resumes at any layout",
}


def block_without_switch(case: Case) -> Iterator[str]:
    for name in _SWITCHED:
        values = case.get(name)
        if isinstance(values, dict) and "enabled" not in values:
            yield f'{name} does nothing without "enabled": write "enabled": true in it, or leave it out'


def key_without_effect(case: Case) -> Iterator[str]:
    for key, reason in _WITHOUT_EFFECT.items():
        value = case.get(key)
        if value is not None and value is not False:
            yield f"{key} {reason}: leave it out"


def engine_owns_the_step(case: Case) -> Iterator[str]:
    if case.get("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation false takes the step away from DeepSpeed: leave it out"
    if str(case.get("gradient_allreduce_op", "mean")).lower() == "sum":
        yield "gradient_allreduce_op sum makes gradients grow with the number of ranks: leave it out"


def checkpointing_block(case: Case) -> Iterator[str]:
    block = case.get("activation_checkpointing")
    if block is None:
        return
    if not case.facts.gradient_checkpointing and not case.facts.config_only:
        yield "activation_checkpointing has no switch: add the flag --gradient_checkpointing, or leave it out"
    for key, value in block.items():
        if value != ACTIVATION_CHECKPOINTING.keys[key].default and not case.pipeline:
            yield (
                f"activation_checkpointing.{key} is not read by a Hugging Face model's own checkpointing: leave it out"
            )


def compile_block(case: Case) -> Iterator[str]:
    block = case.get("compile")
    if block is None:
        return
    if not case.facts.compile and not case.facts.config_only:
        yield "compile has no switch of its own: add the flag --compile, or leave it out"
    if not block.get("deepcompile"):
        for key, value in block.items():
            if value != COMPILE.keys[key].default:
                yield f'compile.{key} is read with "deepcompile": true only: leave it out'
    elif case.facts.device == "cpu":
        yield "compile.deepcompile needs CUDA: leave it out on a CPU"


def samples_on_the_way(case: Case) -> Iterator[str]:
    if case.facts.samples and case.pipeline:
        yield (
            "--sample_steps needs the whole model on each rank, and pipeline.stages divides it: leave it out; "
            "`dstrain generate` writes texts from a checkpoint"
        )


def schedule_params(case: Case) -> Iterator[Repair]:
    if case.get("scheduler.type") and not isinstance(case.get("scheduler.params"), dict):
        yield Repair("scheduler.params", {}, "derived: DeepSpeed fails on a schedule without params")


def one_learning_rate(case: Case) -> Iterator[str | Repair]:
    """Some schedules bring their own peak and leave `optimizer.params.lr` unread."""
    kind, lr = case.get("scheduler.type"), case.get("optimizer.params.lr")
    peaks = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
    if kind not in peaks or lr is None:
        return
    key = f"scheduler.params.{peaks[kind]}"
    peak = case.get(key)
    if peak is None and kind == "WarmupDecayLR":
        yield Repair(key, lr, "derived: optimizer.params.lr; DeepSpeed would take 0.001 whatever the optimizer says")
    elif peak is not None and peak != lr:
        yield f"{key} {peak} wins over optimizer.params.lr {lr}, which is not read then: write the same number"


def one_momentum(case: Case) -> Iterator[str]:
    cycles = case.get("scheduler.type") == "OneCycle" and case.get("scheduler.params.cycle_momentum") is None
    if cycles and case.get("optimizer.params.betas") is not None:
        yield (
            "scheduler OneCycle replaces optimizer.params.betas by a momentum of its own: write "
            '"cycle_momentum": false, or leave betas out'
        )


def schedule_start(case: Case) -> Iterator[str]:
    if case.get("scheduler.params.last_batch_iteration", -1) != -1:
        yield "scheduler.params.last_batch_iteration is set by resuming: leave it out"


def warmup_fits(case: Case) -> Iterator[str]:
    kind, total = case.get("scheduler.type"), case.get("scheduler.params.total_num_steps")
    if kind not in ("WarmupDecayLR", "WarmupCosineLR") or total is None:
        return
    given = case.get("scheduler.params.warmup_num_steps")
    warmup = 1000 if given is None else given
    if warmup > total:
        default = " (DeepSpeed's default)" if given is None else ""
        yield (
            f"scheduler.params.warmup_num_steps {warmup}{default} is longer than the schedule's {total} steps: "
            f"write at most {max(1, total // 10)}"
        )


def packages(case: Case) -> Iterator[str]:
    for block, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")):
        if case.get(f"{block}.enabled") is True and find_spec(package) is None:
            yield f"{block} needs the package {package}, which is not installed: pip install {package}"


RULES: tuple[Rule, ...] = (
    block_without_switch,
    key_without_effect,
    engine_owns_the_step,
    checkpointing_block,
    compile_block,
    samples_on_the_way,
    schedule_params,
    one_learning_rate,
    one_momentum,
    schedule_start,
    warmup_fits,
    packages,
)
