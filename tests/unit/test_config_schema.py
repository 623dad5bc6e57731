"""The schema against the installed DeepSpeed: every key it reads, with its default. An upgrade that adds one fails."""

import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path

import deepspeed
import pytest
from deepspeed.autotuning import constants as autotuning
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.monitor import config as monitor
from deepspeed.runtime import config as runtime
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from dstrain.config import schema_keys as keys
from dstrain.config.removed import REMOVED
from dstrain.config.rules_zero import _STAGE_3, _STAGES_1_2
from dstrain.config.schema import check_schema

PYDANTIC = {
    "zero_optimization": (keys.ZERO, DeepSpeedZeroConfig),
    "zero_optimization.offload_param": (keys.OFFLOAD_PARAM, DeepSpeedZeroOffloadParamConfig),
    "zero_optimization.offload_optimizer": (keys.OFFLOAD_OPTIMIZER, DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.zenflow": (keys.ZENFLOW, ZenFlowConfig),
    "zero_optimization.leaf_module": (keys.LEAF_MODULE, DeepSpeedZeroLeafModuleConfig),
    "bf16": (keys.BF16, DeepSpeedBF16Config),
    "fp16": (keys.FP16, DeepSpeedFP16Config),
    "tensor_parallel": (keys.TENSOR_PARALLEL, TPTrainingConfig),
    "tensor_parallel.tp": (keys.TENSOR_PARALLEL.keys["tp"], TPConfig),
    "compile": (keys.COMPILE, CompileConfig),
    "tensorboard": (keys.TENSORBOARD, monitor.TensorBoardConfig),
    "csv_monitor": (keys.CSV_MONITOR, monitor.CSVConfig),
    "wandb": (keys.WANDB, monitor.WandbConfig),
    "comet": (keys.COMET, monitor.CometConfig),
    "comms_logger": (keys.COMMS_LOGGER, CommsLoggerConfig),
    "timers.throughput": (keys.TIMERS.keys["throughput"], DeepSpeedThroughputTimerConfig),
    "hybrid_engine": (keys.HYBRID_ENGINE, runtime.HybridEngineConfig),
    "weight_quantization": (keys.WEIGHT_QUANTIZATION, WeightQuantConfig),
}


@pytest.mark.parametrize("name", PYDANTIC)
def test_pydantic_blocks_have_the_same_keys_defaults_and_ranges(name):
    block, model = PYDANTIC[name]
    theirs = {field.alias or field_name: field for field_name, field in model.model_fields.items()}
    old = {key for key in theirs if f"{name}.{key}" in REMOVED}
    assert set(block.keys) == set(theirs) - old
    for key, ours in block.keys.items():
        field = theirs[key]
        default = field.get_default(call_default_factory=True)
        default = default.value if isinstance(default, Enum) else default
        if ours.kind not in ("block", "free", "any"):
            assert ours.default == default, key
        limits = {type(limit).__name__: limit for limit in field.metadata}
        if "Ge" in limits:
            assert ours.low == limits["Ge"].ge, key
        if "Gt" in limits:  # a whole number above 0 is one of at least 1
            assert (ours.above == limits["Gt"].gt) or (ours.kind == "int" and ours.low == limits["Gt"].gt + 1), key
        if "Le" in limits:
            assert ours.high == limits["Le"].le, key


def test_second_spellings_and_deprecated_fields_are_named():
    for name, (_, model) in PYDANTIC.items():
        for field_name, field in model.model_fields.items():
            if field.alias and field.alias != field_name:
                assert f"{name}.{field_name}" in REMOVED, (name, field_name)
            if (field.json_schema_extra or {}).get("deprecated"):
                assert f"{name}.{field_name}" in REMOVED, (name, field_name)


def test_removed_keys_of_deepspeed_are_named():
    assert set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REMOVED)
    assert {f"zero_optimization.{key}" for key in runtime._REMOVED_ZERO_CONFIG_KEYS} <= set(REMOVED)
    for key in REMOVED:
        value = {}
        config = {key: value} if "." not in key else {key.split(".")[0]: {key.split(".", 1)[1]: value}}
        if key.startswith("optimizer.params"):
            config = {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}
        (problem,) = [message for where, message in check_schema(config) if where == key]
        assert REMOVED[key].advice in problem


class Reader(dict):
    """A configuration that notes which of its keys are asked for."""

    def __init__(self, values=(), asked=None):
        super().__init__(values)
        self.asked = set() if asked is None else asked

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self

    def __copy__(self):
        return Reader(self, self.asked)


# What DeepSpeed writes into the dict it is given is not read from a user's file.
MISSPELT_OR_OLD = set(REMOVED) | {"nebula"}


def test_top_level_is_what_deepspeed_asks_for():
    reader = Reader({"train_micro_batch_size_per_gpu": 1})
    runtime.DeepSpeedConfig(reader)
    # Read before a DeepSpeedConfig exists: `config["x"]`, `config.get("x")`, `"x" in config` in deepspeed.initialize.
    source = inspect.getsource(deepspeed.initialize)
    early = re.findall(r'config(?:\.get\(|\[)"(\w+)"', source) + re.findall(r'"(\w+)" in config\b', source)
    assert {"sequence_parallel_size", "data_parallel_size", "tensor_parallel"} <= set(early)
    asked = reader.asked | set(early)
    assert asked - set(keys.TOP) - MISSPELT_OR_OLD == set()
    assert set(keys.TOP) - asked == set()


READ_BY_HAND = {
    "activation_checkpointing": keys.ACTIVATION_CHECKPOINTING,
    "flops_profiler": keys.FLOPS_PROFILER,
    "aio": keys.AIO,
    "data_types": keys.DATA_TYPES,
    "checkpoint": keys.CHECKPOINT,
    "torch_autocast": keys.TORCH_AUTOCAST,
    "expert_parallel": keys.EXPERT_PARALLEL,
    "autotuning": keys.AUTOTUNING,
    "data_efficiency": keys.DATA_EFFICIENCY,
    "optimizer": keys.TOP["optimizer"],
    "scheduler": keys.TOP["scheduler"],
    "timers": keys.TIMERS,
}
ENOUGH = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "torch_autocast": {"dtype": "bf16"}}


@pytest.mark.parametrize("name", READ_BY_HAND)
def test_blocks_that_ignore_unknown_keys(name):
    reader = Reader(ENOUGH.get(name, {"unknown": 1}))
    runtime.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, name: reader})
    # An AutoEP key that is not there is not asked for: its parser names all of them itself.
    assert reader.asked - {"unknown"} == set(READ_BY_HAND[name].keys)


@pytest.mark.parametrize(("name", "inner"), [("checkpoint", "writer"), ("checkpoint", "parallel_write")])
def test_inner_blocks_that_ignore_unknown_keys(name, inner):
    reader = Reader({"unknown": 1})
    runtime.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, name: {inner: reader}})
    assert reader.asked - {"unknown"} == set(READ_BY_HAND[name].keys[inner].keys)


def test_model_info_of_autotuning():
    assert set(keys.AUTOTUNING.keys["model_info"].keys) == set(autotuning.MODEL_INFO_KEY_DEFAULT_DICT)


def test_pipeline_block_is_what_the_engine_reads():
    source = (Path(deepspeed.__file__).parent / "runtime/pipe/engine.py").read_text()
    used = set(re.findall(r"_config\.pipeline(?:\[|\.get\()'(\w+)'", source))
    assert used | set(runtime.get_pipeline_config({})) == set(keys.PIPELINE.keys)


def test_expert_parallel_defaults():
    for field in dataclasses.fields(AutoEPConfig):
        if not field.name.startswith("_") and field.name not in ("load_balance_coeff", "expert_w3"):
            assert keys.EXPERT_PARALLEL.keys[field.name].default == field.default, field.name


def test_tables_of_stages_name_known_keys():
    assert set(_STAGE_3) | set(_STAGES_1_2) <= set(keys.ZERO.keys)


def test_defaults_that_deepspeed_computes():
    config = runtime.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})
    for key in (
        "gradient_clipping",
        "prescale_gradients",
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "managed_gradient_accumulation",
        "steps_per_print",
        "wall_clock_breakdown",
        "dataloader_drop_last",
        "disable_allgather",
        "dump_state",
        "log_level",
    ):
        assert keys.TOP[key].default == getattr(config, key), key
    for name, block in (("aio_config", keys.AIO), ("flops_profiler_config", keys.FLOPS_PROFILER)):
        theirs = getattr(config, name)
        theirs = theirs if isinstance(theirs, dict) else vars(theirs)
        assert {key: value.default for key, value in block.keys.items()} == theirs
    checkpointing = vars(config.activation_checkpointing_config)
    assert {key: value.default for key, value in keys.ACTIVATION_CHECKPOINTING.keys.items()} == checkpointing
