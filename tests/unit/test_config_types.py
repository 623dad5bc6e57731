"""Optimizers and schedules of the schema against the signatures of the classes that DeepSpeed builds."""

import inspect

import deepspeed
import pytest
import torch
from deepspeed.runtime import config as runtime
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.engine import DeepSpeedEngine

from dstrain.config.schema import check_schema
from dstrain.config.schema_types import (
    CLASSES,
    DEEPSPEED_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
    optimizer_class,
)

MODULES = {
    "FusedAdam": deepspeed.ops.adam.FusedAdam,
    "DeepSpeedCPUAdam": deepspeed.ops.adam.DeepSpeedCPUAdam,
    "DeepSpeedCPUAdagrad": deepspeed.ops.adagrad.DeepSpeedCPUAdagrad,
    "FusedLion": deepspeed.ops.lion.FusedLion,
    "DeepSpeedCPULion": deepspeed.ops.lion.DeepSpeedCPULion,
    "FusedLamb": deepspeed.ops.lamb.FusedLamb,
}
# Set by the engine and not by the user; or refused by the class itself.
NOT_FOR_USERS = {"params", "model_params", "adam_w_mode", "adamw_mode", "max_grad_norm"}


def signature(cls):
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name not in NOT_FOR_USERS | {"optimizer"}}


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "MuonWithAuxAdam"])
def test_parameters_and_defaults_are_those_of_the_class(name):
    theirs = signature(MODULES.get(name) or getattr(torch.optim, name.removeprefix("torch.optim.")))
    ours = {key: value.default for key, value in CLASSES[name].params.items()}
    theirs = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    ours = {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()}
    if name == "torch.optim.Adam" and "decoupled_weight_decay" not in theirs:
        ours.pop("decoupled_weight_decay")  # torch < 2.8
    assert ours == theirs


def test_parameters_of_muon():
    halves = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS}
    assert set(CLASSES["MuonWithAuxAdam"].params) == halves | {"muon_lr", "adam_lr", "per_head_muon"}


def test_every_optimizer_is_known_or_refused():
    known = {name.lower() for name in (*DEEPSPEED_OPTIMIZERS, *REFUSED_OPTIMIZERS)}
    assert set(runtime.DEEPSPEED_OPTIMIZERS) <= known
    torchs = {name for name, cls in vars(torch.optim).items() if inspect.isclass(cls)} - {"Optimizer"}
    assert torchs <= {*TORCH_OPTIMIZERS, *REFUSED_OPTIMIZERS, "Adam", "AdamW", "Adagrad", "Muon"}
    for name in (*DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS):
        assert check_schema({"optimizer": {"type": name, "params": {"lr": 1e-3}}}) == []
    for name in REFUSED_OPTIMIZERS:
        assert check_schema({"optimizer": {"type": name}})[0][1].startswith("optimizer.type is")


def test_zero_tests_the_same_optimizers():
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    theirs = {cls.__name__ for cls in ZERO_SUPPORTED_OPTIMIZERS} - {"ZenFlowCPUAdam", "MuonWithAuxAdam"}
    ours = {name.removeprefix("torch.optim.") for name, cls in CLASSES.items() if cls.tested_with_zero}
    assert ours - {"MuonWithAuxAdam"} == theirs


def test_schedules_and_their_parameters():
    assert list(SCHEDULERS) == sorted(SCHEDULERS, key=list(SCHEDULERS).index)
    assert set(SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, params in SCHEDULERS.items():
        theirs = signature(getattr(lr_schedules, name))
        assert set(params) == set(theirs), name
        for key, default in theirs.items():
            if default is not inspect.Parameter.empty:
                assert params[key].default == default, (name, key)
            elif not params[key].required:
                assert key == "total_num_steps"  # dstrain fills it in from the run's length


def test_torch_schedules_are_known_to_be_refused():
    theirs = {name for name, cls in vars(torch.optim.lr_scheduler).items() if inspect.isclass(cls)}
    theirs = {name for name in theirs if name.endswith(("LR", "Plateau", "Restarts"))}
    theirs -= {"LRScheduler", "_LRScheduler", "ChainedScheduler", "SWALR"}
    assert set(TORCH_SCHEDULERS) == theirs


@pytest.mark.parametrize(
    ("name", "params", "cpu", "expected"),
    [
        ("AdamW", {}, False, "FusedAdam"),
        ("AdamW", {}, True, "DeepSpeedCPUAdam"),
        ("Adam", {"torch_adam": True}, False, "torch.optim.AdamW"),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, True, "torch.optim.Adam"),
        ("Adagrad", {}, True, "DeepSpeedCPUAdagrad"),
        ("Lion", {}, True, "DeepSpeedCPULion"),
        ("SGD", {}, True, "torch.optim.SGD"),
    ],
)
def test_class_that_is_built(name, params, cpu, expected):
    assert optimizer_class(name, params, cpu).name == expected
