"""Each rule: a configuration that DeepSpeed 0.19.8 ignores or gets wrong, and the words that refuse or repair it."""

import copy

import pytest

from dstrain.config import RunFacts, resolve, resolve_config, rules
from dstrain.config.load import get_value, set_value
from dstrain.errors import UserError

BASE = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
BF16 = {"bf16.enabled": True, "zero_optimization.stage": 1}
FP16 = {"fp16.enabled": True, "zero_optimization.stage": 1}
STAGE = "zero_optimization.stage"
OFFLOAD = "zero_optimization.offload_optimizer.device"
PARAM = "zero_optimization.offload_param.device"
TYPE = "optimizer.type"
PARAMS = "optimizer.params"
COSINE = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}}}


def configuration(changes):
    config = copy.deepcopy(BASE)
    for key, value in changes.items():
        set_value(config, key, copy.deepcopy(value))
    return config


REFUSED = [
    # stages
    ({STAGE: 2, "zero_optimization.stage3_max_live_parameters": 1e6}, "read at stage 3 only and ignored at stage 2"),
    ({STAGE: 3, "zero_optimization.round_robin_gradients": True}, "read at stages 1 and 2 only and ignored at stage 3"),
    ({"zero_optimization.overlap_comm": True}, "read at stages 1, 2 and 3 only and ignored at stage 0"),
    ({STAGE: 2, PARAM: "cpu"}, "offload_param is read at stage 3 only"),
    ({STAGE: 2, "zero_optimization.zero_hpz_partition_size": 2}, "zero_hpz_partition_size is read at stage 3 only"),
    ({STAGE: 1, "zero_optimization.zero_quantized_weights": True}, "zero_quantized_weights is read at stage 3 only"),
    ({STAGE: 1, "zero_optimization.allgather_partitions": False}, "read by nothing"),
    ({STAGE: 2, "zero_optimization.allgather_bucket_size": 1001}, "is odd"),
    ({STAGE: 1, "zero_optimization.compute_grad_norm": False}, "no gradient norm"),
    ({STAGE: 3, "zero_optimization.zero_hpz_partition_size": 3}, "does not divide the 4 data-parallel ranks"),
    ({STAGE: 2, "prescale_gradients": True}, "prescale_gradients is refused by DeepSpeed at stage 2"),
    ({STAGE: 3, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor is refused"),
    ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, "is ignored with prescale_gradients"),
    (
        {STAGE: 3, "zero_optimization.zero_quantized_gradients": True, "zero_optimization.reduce_scatter": False},
        "needs",
    ),
    # offload
    ({OFFLOAD: "cpu"}, "does not offload at stage 0"),
    ({STAGE: 2, OFFLOAD: "nvme", "zero_optimization.offload_optimizer.nvme_path": "/x"}, "becomes cpu at stage 2"),
    ({STAGE: 3, OFFLOAD: "nvme"}, "offload_optimizer has no nvme_path"),
    ({STAGE: 3, PARAM: "nvme"}, "offload_param has no nvme_path"),
    ({STAGE: 3, "zero_optimization.offload_param": {}}, "offload_param has no device"),
    ({STAGE: 2, "zero_optimization.offload_optimizer": {"pin_memory": False}}, "offload_optimizer has no device"),
    ({STAGE: 2, OFFLOAD: "cpu", "zero_optimization.offload_optimizer.buffer_count": 8}, "read with device nvme only"),
    ({STAGE: 2, "aio.queue_depth": 16}, "aio is read with offload to nvme only"),
    ({STAGE: 2, OFFLOAD: "cpu", "zero_optimization.offload_optimizer.ratio": 0.5}, "ratio below 1 is refused"),
    ({STAGE: 3, OFFLOAD: "cpu", "zero_optimization.offload_optimizer.super_offload": True}, "super_offload"),
    (
        {STAGE: 3, OFFLOAD: "cpu", "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.5},
        "with super_offload only",
    ),
    ({STAGE: 2, OFFLOAD: "cpu", "zero_optimization.zenflow": {"topk_ratio": 0.1}}, "zenflow delays updates"),
    ({"zero_force_ds_cpu_optimizer": False}, "optimizers made outside the JSON"),
    # optimizers
    ({TYPE: None}, "optimizer.type is missing"),
    ({TYPE: "Lamb", STAGE: 1}, "looks at whole parameters"),
    ({TYPE: "Adafactor", STAGE: 2}, "looks at whole parameters"),
    ({f"{PARAMS}.adam_w_mode": False}, "ignored for AdamW"),
    ({f"{PARAMS}.amsgrad": True}, "amsgrad is not supported by FusedAdam"),
    ({TYPE: "Adagrad", STAGE: 2}, "out of the schedule's reach"),
    ({TYPE: "Muon", STAGE: 2}, "clips its update instead of the gradient"),
    ({TYPE: "Muon", STAGE: 2, "bf16.enabled": True, "gradient_clipping": 0}, "write stage 0, or bf16 at stage 1"),
    ({TYPE: "Muon", **FP16}, "with fp16"),
    ({"optimizer.legacy_fusion": True}, "legacy_fusion is read at stage 0 with 16 bits only"),
    # precision
    ({**BF16, "fp16.enabled": True}, "bf16 and fp16 are both enabled"),
    ({**BF16, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16 and torch_autocast are both enabled"),
    ({"bf16.enabled": True, TYPE: "Lamb"}, "bf16 at ZeRO stage 0 gives wrong numbers"),
    ({"bf16.enabled": True, OFFLOAD: "cpu"}, "bf16 at ZeRO stage 0 gives wrong numbers"),
    ({"fp16.enabled": True, "pipeline.stages": 2}, "adds up gradients in 16 bits"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}, STAGE: 2}, "leaves the loss scale in the gradient norm"),
    ({"torch_autocast": {"enabled": True, "dtype": "fp16"}, STAGE: 3}, "leaves the loss scale in the gradient norm"),
    ({"torch_autocast": {"enabled": True, "dtype": "half"}}, "has no loss scaling"),
    ({"data_types.grad_accum_dtype": "bf16"}, "grad_accum_dtype bf16 is refused"),
    ({**BF16, "data_types.param_dtype": "fp16"}, "contradicts the precision bf16"),
    ({**BF16, "data_types.keep_in_fp32_modules": "norm"}, "neither"),
    ({**BF16, "bf16.bf16_master_weights_and_grads": True}, "needs Adam or AdamW offloaded"),
    ({**BF16, "bf16.bf16_optimizer_states": True}, "needs bf16.bf16_master_weights_and_grads"),
    ({**FP16, "fp16.fp16_master_weights_and_grads": True}, "needs Adam or AdamW offloaded"),
    ({"bf16.enabled": True, STAGE: 2, "bf16.immediate_grad_update": True}, "at stage 1 only"),
    # parallelism (four processes)
    ({"pipeline.stages": 2, STAGE: 2}, "pipeline.stages with zero_optimization.stage 2 is not possible"),
    ({"pipeline.stages": 2, STAGE: 3}, "pipeline.stages with zero_optimization.stage 3 is not possible"),
    ({"pipeline.stages": 2}, "clips by the norm of the first pipeline stage only"),
    ({"pipeline.activation_checkpoint_interval": 1}, "ignored without pipeline.stages"),
    ({"pipeline.stages": 2, STAGE: 1, "pipeline.activation_checkpoint_interval": 1}, "--gradient_checkpointing"),
    ({"pipeline": {}}, "pipeline is empty"),
    ({"pipeline.stages": 2, STAGE: 1, "pipeline.partition": "type:block"}, "read by nothing"),
    ({"pipeline.stages": 2, STAGE: 1, "pipeline.partition": "dualpipev"}, "at least 2 x stages = 4 micro-batches"),
    ({"pipeline.stages": 2, "tensor_parallel.autotp_size": 2, STAGE: 1}, "together are not shown"),
    ({"tensor_parallel.autotp_size": 2, "sequence_parallel_size": 2, STAGE: 1}, "together are not shown"),
    ({"pipeline.stages": 2, "sequence_parallel_size": 2, STAGE: 1}, "together are not shown"),
    ({"tensor_parallel.autotp_size": 2, "sequence_parallel_size": 2}, "together are not shown"),
    ({"data_parallel_size": 4}, "data_parallel_size follows from the number of processes"),
    ({"tensor_parallel.tp_overlap_comm": True}, "ignored without autotp_size"),
    ({"tensor_parallel": {}}, "tensor_parallel is empty"),
    ({"tensor_parallel.autotp_size": 2, "tensor_parallel.tp": {"tp_size": 2}}, "for inference"),
    ({"expert_parallel.enabled": True}, "expert_parallel splits and renames the experts"),
    ({"use_data_before_expert_parallelism": True}, "with expert parallelism only"),
    ({"sequence_parallel_size": 2, "gradient_predivide_factor": 2.0}, "scales gradients by the number of ranks"),
    ({"seq_parallel_communication_data_type": "bf16"}, "sequence_parallel_size above 1 only"),
    ({"tensor_parallel.autotp_size": 3}, "4 processes cannot be split"),
    ({"pipeline.stages": 8, STAGE: 1}, "4 processes cannot be split"),
    # switches and flags
    ({"bf16": {}}, 'bf16 does nothing without "enabled"'),
    ({"fp16": {"loss_scale": 128}}, 'fp16 does nothing without "enabled"'),
    ({"tensorboard": {"output_path": "x"}}, 'tensorboard does nothing without "enabled"'),
    ({"activation_checkpointing": {}}, "add the flag --gradient_checkpointing"),
    ({"activation_checkpointing.cpu_checkpointing": True}, "not read by a Hugging Face model's own checkpointing"),
    ({"compile.deepcompile": True}, "add the flag --compile"),
    ({"compile.double_buffer": False}, 'read with "deepcompile": true only'),
    ({"dataloader_drop_last": True}, "dstrain has its own"),
    ({"data_efficiency": {"enabled": True}}, "dstrain has its own"),
    ({"checkpoint.writer": {"type": "FAST"}}, "none of DeepSpeed 0.19.8's works"),
    ({"checkpoint.load_universal": True}, "dstrain's own business"),
    ({"datastates_ckpt": {}}, "cannot load"),
    ({"hybrid_engine.enabled": True}, "reinforcement learning"),
    ({"autotuning.enabled": True}, "ends the run"),
    ({"weight_quantization": {"enabled": True}}, "is for inference"),
    ({"vocabulary_size": 1000}, "only makes DeepSpeed warn"),
    ({"disable_allgather": True}, "read by nothing"),
    ({"managed_gradient_accumulation": False}, "takes the step away"),
    ({"gradient_allreduce_op": "sum"}, "grow with the number of ranks"),
    # schedules
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}}, "wins over optimizer.params.lr"),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-2}}},
        "scheduler.params.cycle_max_lr 0.01 wins over",
    ),
    (
        {
            "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}},
            f"{PARAMS}.betas": [0.9, 0.95],
        },
        "replaces optimizer.params.betas",
    ),
    ({**COSINE, "scheduler.params.warmup_num_steps": 200}, "is longer than the schedule's 100 steps"),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100}}}, "DeepSpeed's default"),
    ({**COSINE, "scheduler.params.last_batch_iteration": 5}, "set by resuming"),
    ({"comet.enabled": True}, "needs the package comet_ml"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_refused(changes, words):
    with pytest.raises(UserError) as refusal:
        resolve_config(configuration(changes), world_size=4)
    assert [problem for problem in refusal.value.problems if words in problem], refusal.value.problems
    for problem in refusal.value.problems:
        assert "\n" not in problem
        assert ": " in problem.split(": ", 1)[1], f"no fix in {problem!r}"


ON_CPU = RunFacts(device="cpu", device_supports_fp16=False, device_supports_bf16=True, has_libaio=False, samples=True)
TP_WITH_ADAPTERS = (
    {"tensor_parallel.autotp_size": 2, "tensor_parallel.preset_model": "llama", STAGE: 1},
    RunFacts(adapters=True),
)
IN_4_BITS = RunFacts(adapters=True, load_in_4bit=True)
NVME = {STAGE: 3, OFFLOAD: "nvme", "zero_optimization.offload_optimizer.nvme_path": "/x"}
REFUSED_ON_A_CPU = [
    (FP16, "fp16 is not supported by this CPU"),
    ({TYPE: "Lion", STAGE: 1}, "has no CPU kernel without offload"),
    ({TYPE: "Lamb"}, "has no CPU kernel"),
    (NVME, "libaio-dev"),
    ({**NVME, "aio.use_gds": True}, "needs a CUDA device"),
    ({STAGE: 3, "zero_optimization.zero_quantized_weights": True}, "needs CUDA kernels"),
    ({"compile.deepcompile": True}, "needs CUDA"),
    ({"pipeline.stages": 2, STAGE: 1}, "--sample_steps needs the whole model on each rank"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED_ON_A_CPU)
def test_refused_on_this_device(changes, words):
    with pytest.raises(UserError) as refusal:
        resolve_config(configuration(changes), world_size=4, facts=ON_CPU)
    assert [problem for problem in refusal.value.problems if words in problem], refusal.value.problems


def test_tensor_parallelism_with_adapters_takes_the_model_s_own_plan():
    with pytest.raises(UserError, match="does not know the layers of adapters"):
        resolve_config(configuration(TP_WITH_ADAPTERS[0]), world_size=4, facts=TP_WITH_ADAPTERS[-1])


REPAIRED = [
    ({TYPE: "SGD", STAGE: 2}, "zero_allow_untested_optimizer", True),
    ({TYPE: "Adam"}, f"{PARAMS}.adam_w_mode", True),
    ({"torch_autocast.enabled": True}, "torch_autocast.dtype", "bfloat16"),
    ({"scheduler.type": "WarmupLR"}, "scheduler.params", {}),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 2000}}},
        "scheduler.params.warmup_max_lr",
        1e-3,
    ),
    (BF16, "data_types.grad_accum_dtype", "fp32"),
    ({"bf16.enabled": True}, STAGE, 1),
    ({"bf16.enabled": True, STAGE: 0, TYPE: "SGD"}, STAGE, 1),
    ({"bf16.enabled": True, TYPE: "SGD"}, "zero_allow_untested_optimizer", True),
    ({"fp16.enabled": True, "gradient_accumulation_steps": 2}, "data_types.grad_accum_dtype", "fp32"),
    ({"tensor_parallel.autotp_size": 2, "bf16.enabled": True, TYPE: "SGD"}, STAGE, 1),
    ({}, "gradient_clipping", 1.0),
    ({f"{PARAMS}.torch_adam": True}, f"{PARAMS}.weight_decay", 0.01),
]


@pytest.mark.parametrize(("changes", "key", "value"), REPAIRED)
def test_repaired(changes, key, value):
    resolved = resolve_config(configuration(changes), world_size=4)
    assert get_value(resolved.deepspeed, key) == value
    assert resolved.origins[key].startswith(("derived: ", "default"))


ACCEPTED = [
    {},
    BF16,
    {**BF16, "gradient_accumulation_steps": 2},
    {"bf16.enabled": True, STAGE: 3, OFFLOAD: "cpu", PARAM: "cpu"},
    NVME,
    {TYPE: "Lion", STAGE: 2, OFFLOAD: "cpu"},
    {TYPE: "Lamb"},
    {TYPE: "SGD", f"{PARAMS}.momentum": 0.9, STAGE: 3, "gradient_clipping": 0},
    {TYPE: "Muon", **BF16},
    {f"{PARAMS}.torch_adam": True, f"{PARAMS}.amsgrad": True},
    {"pipeline.stages": 2, STAGE: 1},
    {"pipeline.stages": 4, "gradient_clipping": 0},
    {"pipeline.stages": 2, STAGE: 1, "pipeline.partition": "dualpipev", "gradient_accumulation_steps": 4},
    {"tensor_parallel.autotp_size": 2, STAGE: 1},
    {"sequence_parallel_size": 2, STAGE: 3},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, STAGE: 3},
    {"zero_optimization.stage3_max_live_parameters": 1e9, STAGE: 2},  # the default, so that nothing is ignored
    COSINE,
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
    {"csv_monitor": {"enabled": True, "output_path": "x"}, "flops_profiler": {"enabled": True}},
    {"zero_allow_untested_optimizer": True, "wall_clock_breakdown": True, "comms_logger": {"enabled": True}},
    {"bf16.enabled": True, STAGE: 2, "bf16.bf16_master_weights_and_grads": True, "bf16.bf16_optimizer_states": True},
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_accepted(changes):
    resolve_config(configuration(changes), world_size=4)


def test_a_replaced_value_is_told():
    asked = resolve_config(configuration({"bf16.enabled": True, STAGE: 0}), world_size=2)
    assert asked.notices == (
        "zero_optimization.stage 0 was replaced by 1: stage 0 gives wrong numbers in 16 bits (an empty step before the "
        "first); stage 1 is right",
    )
    assert resolve_config(configuration(BF16), world_size=2).notices == ()
    assert resolve_config(configuration({TYPE: "SGD", STAGE: 2}), world_size=2).notices == ()


def test_flags_lift_the_refusal_of_their_blocks():
    with_flags = RunFacts(gradient_checkpointing=True, compile=True, device="cuda")
    config = configuration({"activation_checkpointing": {}, "compile.deepcompile": True})
    resolve_config(config, world_size=4, facts=with_flags)
    resolve_config(config, world_size=4, facts=RunFacts(config_only=True))


def test_a_pipeline_checkpoints_without_reentering():
    facts = RunFacts(gradient_checkpointing=True)
    config = configuration({"pipeline.stages": 2, STAGE: 1})
    assert resolve_config(config, world_size=4, facts=facts).deepspeed["pipeline"]["use_reentrant"] is False
    with pytest.raises(UserError, match="use_reentrant true loses the gradients"):
        resolve_config({**config, "pipeline": {"stages": 2, "use_reentrant": True}}, world_size=4, facts=facts)


PACKED = [
    {"zero_optimization.zero_quantized_nontrainable_weights": True},
    {"zero_optimization.stage3_use_all_reduce_for_fetch_params": True},
    {"zero_optimization.zero_hpz_partition_size": 2},
    {"zero_optimization.offload_param.device": "nvme", "zero_optimization.offload_param.nvme_path": "/x"},
    {"torch_autocast.enabled": True},
]


@pytest.mark.parametrize("changes", PACKED, ids=lambda changes: next(iter(changes)))
def test_what_takes_packed_weights_for_numbers_is_refused(changes):
    config = configuration({STAGE: 3, **changes})
    resolve_config(config, world_size=4, facts=RunFacts(adapters=True))
    with pytest.raises(UserError, match="at stage 3 does not go with weights packed in 4 bits"):
        resolve_config(config, world_size=4, facts=IN_4_BITS)


def test_tensor_parallelism_does_not_divide_packed_weights():
    with pytest.raises(UserError, match="cannot divide weights packed in 4 bits"):
        resolve_config(configuration({"tensor_parallel.autotp_size": 2, STAGE: 1}), world_size=4, facts=IN_4_BITS)


def test_every_rule_has_a_case_here(monkeypatch):
    """Runs all cases once and notes which rules answered."""
    answered = set()

    def noting(rule):
        def noted(case):
            for outcome in rule(case):
                answered.add(rule.__name__)
                yield outcome

        return noted

    original = (*rules.EARLY, *rules.RULES)
    monkeypatch.setattr(resolve, "EARLY", tuple(noting(rule) for rule in rules.EARLY))
    monkeypatch.setattr(resolve, "RULES", tuple(noting(rule) for rule in rules.RULES))
    for changes, *_, facts in [
        *((*row, None) for row in (*REFUSED, *REPAIRED)),
        *((*row, ON_CPU) for row in REFUSED_ON_A_CPU),
        TP_WITH_ADAPTERS,
        *(({STAGE: 3, **changes}, IN_4_BITS) for changes in PACKED),
    ]:
        try:
            resolve_config(configuration(changes), world_size=4, facts=facts or RunFacts())
        except UserError:
            continue
    # The schema answers first where there is no optimizer type; this rule is for a file without the block.
    # `tensor_parallel_plan` answers once the model is known: tests/distributed/test_tensor_parallel.py.
    assert {rule.__name__ for rule in original} - answered == {"optimizer_is_named", "tensor_parallel_plan"}
    with pytest.raises(UserError, match="there is no optimizer"):
        resolve_config({"train_batch_size": 8}, world_size=1)
