"""Rules about pipeline, tensor, sequence and expert parallelism."""

from collections.abc import Iterator

from dstrain.config.case import Case, Repair, Rule
from dstrain.config.schema_keys import DUALPIPEV, PIPELINE, TENSOR_PARALLEL


def pipeline_stage(case: Case) -> Iterator[str]:
    if case.pipeline and case.stage > 1:
        yield (
            f"pipeline.stages with zero_optimization.stage {case.stage} is not possible (the pipeline keeps its own "
            "gradients): write stage 1"
        )


def pipeline_clipping(case: Case) -> Iterator[str]:
    if case.pipeline and case.stage == 0 and case.clipping:
        yield (
            "pipeline.stages at ZeRO stage 0 clips by the norm of the first pipeline stage only: write "
            "zero_optimization.stage 1, or gradient_clipping 0"
        )


def pipeline_checkpointing(case: Case) -> Iterator[str | Repair]:
    if not case.pipeline:
        return
    if case.get("pipeline.activation_checkpoint_interval"):
        yield (
            "pipeline.activation_checkpoint_interval counts DeepSpeed's layers, of which a stage is one: leave it out, "
            "and add the flag --gradient_checkpointing, which recomputes the model's own"
        )
    recomputes = case.facts.gradient_checkpointing
    given = case.get("pipeline.use_reentrant")
    if recomputes and given is True:
        yield "pipeline.use_reentrant true loses the gradients of integer inputs: leave it out"
    if recomputes and given is None:
        reason = "derived: reentrant checkpointing needs an input with a gradient, and token ids have none"
        yield Repair("pipeline.use_reentrant", False, reason)


def pipeline_keys_without_stages(case: Case) -> Iterator[str]:
    values = case.get("pipeline")
    if isinstance(values, dict) and not case.pipeline:
        for key, value in values.items():
            if key != "stages" and value != PIPELINE.keys[key].default:
                yield f"pipeline.{key} is ignored without pipeline.stages above 1: leave it out"
        if not values:
            yield 'pipeline is empty and does nothing: write "stages": N, or leave it out'
    if case.pipeline and case.get("pipeline.seed_layers"):
        yield "pipeline.seed_layers is read by nothing in DeepSpeed 0.19.8: leave it out"


def pipeline_partition(case: Case) -> Iterator[str]:
    partition = case.get("pipeline.partition", PIPELINE.keys["partition"].default)
    if not case.pipeline or partition == PIPELINE.keys["partition"].default:
        return
    if partition != DUALPIPEV:
        yield (
            f"pipeline.partition {partition} is read by nothing in DeepSpeed 0.19.8, and stages are balanced by "
            f"themselves: leave it out, or write {DUALPIPEV} for that schedule with two stages a rank"
        )
        return
    needed, found = 2 * case.dims.pp_size, case.get("gradient_accumulation_steps")
    if found is not None and found < needed:
        yield (
            f"pipeline.partition {DUALPIPEV} needs at least 2 x stages = {needed} micro-batches a step and has "
            f"{found}: write a smaller train_micro_batch_size_per_gpu, or leave partition out"
        )


def one_model_parallelism(case: Case) -> Iterator[str]:
    sizes = {
        "pipeline.stages": case.dims.pp_size,
        "tensor_parallel.autotp_size": case.dims.tp_size,
        "sequence_parallel_size": case.dims.sp_size,
    }
    on = [key for key, size in sizes.items() if size > 1]
    if len(on) > 1:
        yield f"{' and '.join(on)} together are not shown to give the plain numbers: keep one, with data parallelism"


def data_parallel_size(case: Case) -> Iterator[str]:
    if case.get("data_parallel_size") is not None:
        yield (f"data_parallel_size follows from the number of processes and is {case.dims.dp_size} here: leave it out")


def tensor_parallel_keys(case: Case) -> Iterator[str]:
    values = case.get("tensor_parallel")
    if not isinstance(values, dict):
        return
    if case.dims.tp_size == 1:
        for key, value in values.items():
            if key != "autotp_size" and value != TENSOR_PARALLEL.keys[key].default:
                yield f"tensor_parallel.{key} is ignored without autotp_size above 1: leave it out"
        if not values:
            yield 'tensor_parallel is empty and does nothing: write "autotp_size": N, or leave it out'
        return
    for key in ("tp", "dtype", "injection_policy_tuple", "kernel_inject", "keep_module_on_host"):
        if key in values and values[key] != TENSOR_PARALLEL.keys[key].default:
            yield f"tensor_parallel.{key} is for inference and not for training: leave it out"


def tensor_parallel_head(case: Case) -> Iterator[str | Repair]:
    key = "tensor_parallel.vocab_parallel_lm_head"
    if case.dims.tp_size == 1:
        return
    if case.get(key) is True:
        yield f"{key} leaves generation with a part of the logits: leave it out, the loss is split without it"
    elif case.get(key) is None:
        yield Repair(key, False, "derived: dstrain's loss splits the vocabulary itself; generation needs whole logits")


def tensor_parallel_plan(case: Case) -> Iterator[Repair]:
    if case.dims.tp_size > 1 and case.facts.partition_config and case.get("tensor_parallel.partition_config") is None:
        reason = "derived: the model's own plan without its experts, which AutoTP cannot divide: they stay whole"
        if case.facts.adapters:
            reason = "derived: the model's own plan, with the adapters beside its layers and without its experts"
        yield Repair("tensor_parallel.partition_config", case.facts.partition_config, reason)


def tensor_parallel_adapters(case: Case) -> Iterator[str]:
    given = [name for name in ("partition_config", "preset_model") if case.get(f"tensor_parallel.{name}")]
    derived = case.facts.partition_config is not None
    if case.dims.tp_size > 1 and case.facts.load_in_4bit:
        yield (
            "tensor_parallel.autotp_size above 1 cannot divide weights packed in 4 bits: use ZeRO, or leave "
            "--load_in_4bit out"
        )
    if case.dims.tp_size > 1 and case.facts.adapters and given and not derived:
        yield (
            f"tensor_parallel.{given[0]} does not know the layers of adapters: leave it out, so that the model's own "
            "plan is taken, or leave --lora_rank or --peft_config out"
        )


def expert_parallel(case: Case) -> Iterator[str]:
    if case.get("expert_parallel.enabled") is True:
        yield (
            "expert_parallel splits and renames the experts in ways that dstrain's checkpoints and exports do not "
            "know, and in DeepSpeed 0.19.8 it ends in a TypeError for Mixtral and Qwen3-MoE of transformers 5.23: "
            "leave it out; zero_optimization.stage 3 divides experts over the ranks too (ds_configs/moe_zero3.json)"
        )
    if case.get("use_data_before_expert_parallelism"):
        yield "use_data_before_expert_parallelism is read with expert parallelism only: leave it out"


def sequence_parallel_type(case: Case) -> Iterator[str]:
    if case.get("seq_parallel_communication_data_type", "fp32") != "fp32" and case.dims.sp_size == 1:
        yield "seq_parallel_communication_data_type is read with sequence_parallel_size above 1 only: leave it out"


def sequence_parallel_average(case: Case) -> Iterator[str]:
    if case.dims.sp_size == 1:
        return
    if case.get("gradient_predivide_factor", 1.0) != 1.0:
        yield (
            "gradient_predivide_factor with sequence_parallel_size scales gradients by the number of ranks it happens "
            "to equal: leave it out"
        )
    if case.stage == 3 and case.get("zero_optimization.reduce_scatter", True) is False:
        yield (
            "zero_optimization.reduce_scatter false at stage 3 with sequence_parallel_size averages small and large "
            "gradients over different numbers of ranks: leave it out"
        )


RULES: tuple[Rule, ...] = (
    pipeline_stage,
    pipeline_clipping,
    pipeline_checkpointing,
    pipeline_keys_without_stages,
    pipeline_partition,
    one_model_parallelism,
    data_parallel_size,
    tensor_parallel_keys,
    tensor_parallel_head,
    tensor_parallel_plan,
    tensor_parallel_adapters,
    expert_parallel,
    sequence_parallel_type,
    sequence_parallel_average,
)
