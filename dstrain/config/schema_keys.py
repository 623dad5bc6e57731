"""Every key of DeepSpeed 0.19.8's JSON with its default and range, as data. tests/unit/test_config_schema.py reads the
same out of the installed DeepSpeed and fails on any difference.

Optimizers and schedulers, whose parameters depend on their type, are in schema_types.py; keys that DeepSpeed removed
or spells in two ways are in removed.py.
"""

import sys

from dstrain.config.kinds import Key, anything, block, boolean, free, integer, number, text, texts

DTYPES = ("fp16", "bf16", "fp32", "float16", "bfloat16", "float32", "half", "float")
AUTOCAST_DTYPES = ("bfloat16", "float16", "bf16", "fp16", "half", "torch.bfloat16", "torch.float16")

_OFFLOAD_DEVICES = ("none", "cpu", "nvme")

# runtime/zero/offload_config.py
OFFLOAD_PARAM = block(
    device=text("none", _OFFLOAD_DEVICES),
    nvme_path=text(),
    buffer_count=integer(5, low=0),
    buffer_size=integer(100_000_000, low=0),
    max_in_cpu=integer(1_000_000_000, low=0),
    pin_memory=boolean(True),
)
OFFLOAD_OPTIMIZER = block(
    device=text("none", _OFFLOAD_DEVICES),
    nvme_path=text(),
    buffer_count=integer(4, low=0),
    pin_memory=boolean(True),
    pipeline_read=boolean(),
    pipeline_write=boolean(),
    fast_init=boolean(),
    ratio=number(1.0, low=0, high=1),
    super_offload=boolean(),
    cpuadam_cores_perc=number(0.8, low=0, high=1),
)
# runtime/zenflow/zenflow_config.py
ZENFLOW = block(
    topk_ratio=number(0.1, above=0, high=1),
    select_strategy=text("auto", ("auto", "step", "epoch")),
    select_interval=anything("auto"),
    update_interval=anything("auto"),
    overlap_step=boolean(),
    offload=boolean(),
    auto_ratio=number(0.99, low=0, high=1),
    full_warm_up_rounds=integer(0, low=0),
    pt_reserved_cores_perc=number(0.5, low=0, high=1),
    steps_per_epoch=integer(),
)
LEAF_MODULE = block(
    classes=texts(
        [
            "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
            "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
            "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
        ]
    ),
    names=texts([]),
    name_suffixes=texts([]),
)
# runtime/zero/config.py
ZERO = block(
    stage=integer(0, choices=(0, 1, 2, 3)),
    contiguous_gradients=boolean(True),
    reduce_scatter=boolean(True),
    reduce_bucket_size=integer(500_000_000, low=1),
    use_multi_rank_bucket_allreduce=boolean(True),
    allgather_partitions=boolean(True),
    allgather_bucket_size=integer(500_000_000, low=0),
    overlap_comm=boolean(None),
    compute_grad_norm=boolean(True),
    load_from_fp32_weights=boolean(True),
    offload_param=OFFLOAD_PARAM,
    offload_optimizer=OFFLOAD_OPTIMIZER,
    zenflow=ZENFLOW,
    sub_group_size=integer(1_000_000_000, low=0),
    stage3_prefetch_bucket_size=integer(50_000_000, low=0),
    stage3_param_persistence_threshold=integer(100_000, low=0),
    stage3_model_persistence_threshold=integer(sys.maxsize, low=0),
    stage3_max_live_parameters=integer(1_000_000_000, low=0),
    stage3_max_reuse_distance=integer(1_000_000_000, low=0),
    stage3_gather_16bit_weights_on_model_save=boolean(),
    stage3_module_granularity_threshold=integer(0),
    stage3_use_all_reduce_for_fetch_params=boolean(),
    stage3_allgather_sequential=boolean(),
    ignore_unused_parameters=boolean(True),
    round_robin_gradients=boolean(),
    parameter_alignment=boolean(),
    zero_hpz_partition_size=integer(1, low=0),
    zero_quantized_weights=boolean(),
    zero_quantized_nontrainable_weights=boolean(),
    zero_quantized_gradients=boolean(),
    memory_efficient_linear=boolean(True),
    pipeline_loading_checkpoint=boolean(),
    override_module_apply=boolean(True),
    log_trace_cache_warnings=boolean(),
    enable_sanity_checks=boolean(),
    save_muon_momentum_buffer_in_memory=boolean(),
    leaf_module=LEAF_MODULE,
)
# runtime/precision_config.py
BF16 = block(
    enabled=boolean(),
    immediate_grad_update=boolean(),
    check_grad_overflow=boolean(True),
    bf16_master_weights_and_grads=boolean(),
    bf16_optimizer_states=boolean(),
)
FP16 = block(
    enabled=boolean(),
    auto_cast=boolean(),
    loss_scale=number(0, low=0),
    initial_scale_power=integer(16, low=0, high=127),
    loss_scale_window=integer(1000, low=1),
    hysteresis=integer(2, low=1),
    consecutive_hysteresis=boolean(),
    min_loss_scale=integer(1, low=1),
    fp16_master_weights_and_grads=boolean(),
)
# runtime/config.py, get_torch_autocast_*
TORCH_AUTOCAST = block(
    enabled=boolean(),
    dtype=text(None, AUTOCAST_DTYPES),
    lower_precision_safe_modules=texts(),
)
# runtime/constants.py, "Data types config params"
DATA_TYPES = block(
    grad_accum_dtype=text(None, DTYPES),
    param_dtype=text(None, DTYPES),
    buffer_dtype=text(None, DTYPES),
    keep_in_fp32_modules=anything("auto"),
)
# runtime/activation_checkpointing/config.py
ACTIVATION_CHECKPOINTING = block(
    partition_activations=boolean(),
    number_checkpoints=integer(None, low=1),
    contiguous_memory_optimization=boolean(),
    synchronize_checkpoint_boundary=boolean(),
    profile=boolean(),
    cpu_checkpointing=boolean(),
)
# runtime/constants.py and runtime/model_checkpointing/constants.py
CHECKPOINT = block(
    tag_validation=text("WARN", ("WARN", "IGNORE", "FAIL"), fold=True),
    load_universal=boolean(),
    use_node_local_storage=boolean(),
    parallel_write=block(pipeline_stage=boolean()),
    checkpoint_serialization=boolean(True),
    writer=block(
        type=text("FAST", ("MOCK", "PYTHON", "FAST"), fold=True),
        io_buffer_size=integer(64 * 1024**2, low=1),
        io_buffer_double=boolean(True),
        io_multiplier=integer(1, low=1),
        show_statistics=boolean(),
        data_parallel=text(None, ("REPLICA", "SOCKET", "MACHINE"), fold=True),
        decoupled=boolean(),
    ),
)
# profiling/constants.py
FLOPS_PROFILER = block(
    enabled=boolean(),
    recompute_fwd_factor=number(0.0, low=0),
    profile_step=integer(1, low=1),
    module_depth=integer(-1, low=-1),
    top_modules=integer(1, low=1),
    detailed=boolean(True),
    output_file=text(),
)
# runtime/swap_tensor/constants.py
AIO = block(
    block_size=integer(1048576, low=1),
    queue_depth=integer(8, low=1),
    intra_op_parallelism=integer(1, low=1),
    single_submit=boolean(),
    overlap_events=boolean(True),
    use_gds=boolean(),
)
# runtime/tensor_parallel/config.py
TENSOR_PARALLEL = block(
    dtype=anything("torch.float16"),
    autotp_size=integer(0, low=0),
    tp_overlap_comm=boolean(),
    vocab_parallel_lm_head=boolean(None),
    vocab_parallel_ce_backend=text("torch", ("torch", "liger")),
    tp=block(tp_size=integer(1, low=1), tp_grain_size=integer(1, low=1), mpu=anything(), tp_group=anything()),
    injection_policy_tuple=anything(),
    partition_config=free(),
    preset_model=text(),
    keep_module_on_host=boolean(),
    kernel_inject=boolean(),
)
# module_inject/auto_ep_presets/base.py: AutoEPConfig
EXPERT_PARALLEL = block(
    enabled=boolean(),
    autoep_size=integer(1, low=1),
    expert_tensor_parallel_size=integer(1, low=1),
    validate_folding_routing=boolean(),
    async_split_plan=boolean(),
    preset_model=text(),
    moe_layer_pattern=text(),
    expert_pattern=text(),
    router_pattern=text(),
    use_grouped_mm=boolean(True),
    disable_triton_grouped_mm=boolean(),
    route_norm=boolean(None),
    route_scale=number(1.0),
    score_apply=text("auto", ("auto", "pre", "post")),
    combine_impl=text("auto", ("auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm")),
    row_weighting_impl=text("auto", ("auto", "eager", "fused")),
    gate_up_impl=text("separate", ("separate", "fused")),
    comm_backend=text("comm", ("comm", "deepep")),
    comm_num_sm=integer(12, low=1),
    comm_qp_margin=integer(4, low=0),
    comm_max_tokens_per_rank=integer(0, low=0),
    num_expert_groups=integer(None, low=1),
    num_limited_groups=integer(None, low=1),
    score_func=text("auto", ("auto", "softmax", "sigmoid")),
    top_k=anything("auto"),
    load_balance_coeff=number(),
    routed_scaling_factor=anything("auto"),
    expert_w1=text(),
    expert_w2=text(),
    expert_w3=text(),
    num_experts_attr=text(),
    top_k_attr=text(),
    has_shared_experts=boolean(None),
    shared_experts_pattern=text(),
    shared_experts_gate_pattern=text(),
    expert_activation=text(),
)
# A value of pipeline.partition, which DeepSpeed 0.19.8 does not read: dstrain lays the layers over the ranks in a V, so
# that DeepSpeed's DualPipeV schedule can run them. DeepSpeed itself chooses that by the class of the module alone.
DUALPIPEV = "dualpipev"
# runtime/config.py, get_pipeline_config; runtime/pipe/engine.py adds use_reentrant
PIPELINE = block(
    stages=integer(None, low=1),
    partition=text("best"),
    seed_layers=boolean(),
    activation_checkpoint_interval=integer(0, low=0),
    pipe_partitioned=boolean(True),
    grad_partitioned=boolean(True),
    use_reentrant=boolean(True),
)
# compile/config.py
COMPILE = block(
    deepcompile=boolean(),
    autoep_non_moe=boolean(),
    free_activation=boolean(),
    free_activation_threshold=integer(10 * 1024 * 1024, low=0),
    offload_activation=boolean(),
    offload_activation_pin_memory=boolean(True),
    offload_opt_states=boolean(),
    double_buffer=boolean(True),
    symmetric_memory=boolean(),
    debug_log=boolean(),
    offload_parameters=boolean(),
    sync_before_reduce=boolean(),
    sync_after_reduce=boolean(),
    sync_before_allgather=boolean(),
    sync_after_allgather=boolean(),
    keep_int_input_tensors=boolean(True),
    keep_all_input_tensors=boolean(),
    passes=texts(),
)
# monitor/config.py
_FILE_MONITOR = {"enabled": boolean(), "output_path": text(""), "job_name": text("DeepSpeedJobName")}
TENSORBOARD = block(**_FILE_MONITOR)
CSV_MONITOR = block(**_FILE_MONITOR)
WANDB = block(enabled=boolean(), group=text(), team=text(), project=text("deepspeed"))
COMET = block(
    enabled=boolean(),
    samples_log_interval=integer(100, low=1),
    project=text(),
    workspace=text(),
    api_key=text(),
    experiment_name=text(),
    experiment_key=text(),
    online=boolean(None),
    mode=text(None, ("get", "create", "get_or_create")),
)
COMMS_LOGGER = block(enabled=boolean(), prof_all=boolean(True), prof_ops=texts([]), verbose=boolean(), debug=boolean())
TIMERS = block(throughput=block(enabled=boolean(True), synchronized=boolean(True)))
# runtime/config.py, HybridEngineConfig (reinforcement learning)
HYBRID_ENGINE = block(
    enabled=boolean(),
    max_out_tokens=integer(512, low=1),
    inference_tp_size=integer(1, low=1),
    release_inference_cache=boolean(),
    pin_parameters=boolean(True),
    tp_gather_partition_size=integer(8, low=1),
    enable_cuda_graph=boolean(),
)
# autotuning/constants.py
AUTOTUNING = block(
    enabled=boolean(),
    fast=boolean(True),
    results_dir=text("autotuning_results"),
    exps_dir=text("autotuning_exps"),
    overwrite=boolean(True),
    start_profile_step=integer(3, low=0),
    end_profile_step=integer(5, low=0),
    metric=text("throughput", ("throughput", "latency", "flops", "forward", "step")),
    metric_path=text(),
    tuner_type=text("gridsearch", ("gridsearch", "random", "model_based")),
    tuner_early_stopping=integer(5),
    tuner_num_trials=integer(50),
    arg_mappings=free(),
    model_info=block(profile=boolean(), num_params=integer(), hidden_size=integer(), num_layers=integer()),
    model_info_path=text(),
    mp_size=integer(1, low=1),
    max_train_batch_size=integer(),
    min_train_batch_size=integer(1),
    max_train_micro_batch_size_per_gpu=integer(1024),
    min_train_micro_batch_size_per_gpu=integer(1),
    num_tuning_micro_batch_sizes=integer(3),
)
# runtime/data_pipeline/constants.py
DATA_EFFICIENCY = block(enabled=boolean(), seed=integer(1234), data_sampling=free(), data_routing=free())
# inference/config.py, WeightQuantConfig
WEIGHT_QUANTIZATION = block(
    enabled=boolean(True),
    num_bits=integer(8, low=1),
    q_type=text("symmetric", ("symmetric", "asymmetric")),
    q_groups=integer(1, low=1),
    quantized_initialization=free({}),
    post_init_quant=free({}),
)

TOP: dict[str, Key] = {
    "train_batch_size": integer(None, low=1),
    "train_micro_batch_size_per_gpu": integer(None, low=1),
    "gradient_accumulation_steps": integer(None, low=1),
    "optimizer": block(type=text(None), params=free(), legacy_fusion=boolean()),
    "scheduler": block(type=text(None), params=free()),
    "gradient_clipping": number(1.0, low=0),
    "zero_optimization": ZERO,
    "bf16": BF16,
    "fp16": FP16,
    "torch_autocast": TORCH_AUTOCAST,
    "data_types": DATA_TYPES,
    "tensor_parallel": TENSOR_PARALLEL,
    "sequence_parallel_size": integer(None, low=1),
    "data_parallel_size": integer(None, low=1),
    "pipeline": PIPELINE,
    "expert_parallel": EXPERT_PARALLEL,
    "use_data_before_expert_parallelism": boolean(),
    "activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "compile": COMPILE,
    "managed_gradient_accumulation": boolean(True),
    "communication_data_type": text(None, ("fp16", "bf16", "fp32"), fold=True),
    "seq_parallel_communication_data_type": text("fp32", ("fp16", "bf16", "fp32"), fold=True),
    "prescale_gradients": boolean(),
    "gradient_predivide_factor": number(1.0, above=0),
    "gradient_allreduce_op": text("mean", ("mean", "sum"), fold=True),
    "zero_allow_untested_optimizer": boolean(),
    "zero_force_ds_cpu_optimizer": boolean(True),
    "checkpoint": CHECKPOINT,
    "datastates_ckpt": free(),
    "aio": AIO,
    "steps_per_print": integer(None, low=1),
    "wall_clock_breakdown": boolean(),
    "memory_breakdown": boolean(),
    "timers": TIMERS,
    "flops_profiler": FLOPS_PROFILER,
    "comms_logger": COMMS_LOGGER,
    "tensorboard": TENSORBOARD,
    "wandb": WANDB,
    "csv_monitor": CSV_MONITOR,
    "comet": COMET,
    "log_level": text(None, ("debug", "info", "warning", "error", "critical")),
    "dump_state": boolean(),
    "disable_python_gc": boolean(),
    "disable_allgather": boolean(),
    "vocabulary_size": integer(None, low=1),
    "dataloader_drop_last": boolean(),
    "data_efficiency": DATA_EFFICIENCY,
    "autotuning": AUTOTUNING,
    "hybrid_engine": HYBRID_ENGINE,
    "weight_quantization": WEIGHT_QUANTIZATION,
}
