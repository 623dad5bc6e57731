"""Optimizers and schedules of DeepSpeed 0.19.8, and the parameters that each class really takes.

One name in the JSON stands for different classes: AdamW is FusedAdam, DeepSpeedCPUAdam under offload, or
torch.optim.AdamW with `torch_adam`, each with its own parameters (runtime/engine.py, `_configure_basic_optimizer`).
tests/unit/test_config_types.py compares every table with the classes' signatures.
"""

from dataclasses import dataclass
from typing import Any

from dstrain.config.kinds import Key, boolean, integer, number, numbers, text


@dataclass(frozen=True)
class OptimizerClass:
    """`elementwise`: the update of an element depends on nothing else, so that ZeRO may flatten and cut at will."""

    name: str
    params: dict[str, Key]
    elementwise: bool = True
    tested_with_zero: bool = True  # in DeepSpeed's own list; else zero_allow_untested_optimizer is needed


def _lr(default: float) -> Key:
    return number(default, low=0)


def _betas(first: float = 0.9, second: float = 0.999) -> Key:
    return numbers([first, second], length=2, low=0, high=1)


def _eps(default: float = 1e-8) -> Key:
    return number(default, low=0)


def _decay(default: float = 0.0) -> Key:
    return number(default, low=0)


_FOREACH = {"foreach": boolean(None), "maximize": boolean(), "differentiable": boolean()}
_TORCH = dict(**_FOREACH, capturable=boolean())
_ADAM = {"lr": _lr(1e-3), "betas": _betas(), "eps": _eps()}

CLASSES = {
    cls.name: cls
    for cls in (
        OptimizerClass(
            "FusedAdam",
            dict(
                **_ADAM,
                weight_decay=_decay(),
                bias_correction=boolean(True),
                amsgrad=boolean(),
                set_grad_none=boolean(True),
            ),
        ),
        OptimizerClass(
            "DeepSpeedCPUAdam",
            dict(
                **_ADAM,
                weight_decay=_decay(),
                bias_correction=boolean(True),
                amsgrad=boolean(),
                fp32_optimizer_states=boolean(True),
            ),
        ),
        OptimizerClass(
            "torch.optim.Adam",
            dict(
                **_ADAM,
                weight_decay=_decay(),
                amsgrad=boolean(),
                **_TORCH,
                fused=boolean(None),
                decoupled_weight_decay=boolean(),
            ),
        ),
        OptimizerClass(
            "torch.optim.AdamW",
            dict(**_ADAM, weight_decay=_decay(0.01), amsgrad=boolean(), **_TORCH, fused=boolean(None)),
        ),
        OptimizerClass(
            "torch.optim.Adagrad",
            dict(
                lr=_lr(0.01),
                lr_decay=number(0, low=0),
                weight_decay=_decay(),
                initial_accumulator_value=number(0, low=0),
                eps=_eps(1e-10),
                **_FOREACH,
                fused=boolean(None),
            ),
        ),
        OptimizerClass(
            "DeepSpeedCPUAdagrad",
            {
                "lr": _lr(1e-2),
                "eps": _eps(1e-10),
                "weight_decay": _decay(),
                "amsgrad": boolean(),
                "fp32_optimizer_states": boolean(True),
            },
        ),
        OptimizerClass(
            "FusedLion", {"lr": _lr(1e-3), "betas": _betas(), "weight_decay": _decay(), "set_grad_none": boolean(True)}
        ),
        OptimizerClass(
            "DeepSpeedCPULion",
            {"lr": _lr(1e-3), "betas": _betas(), "weight_decay": _decay(), "fp32_optimizer_states": boolean(True)},
        ),
        OptimizerClass(
            "FusedLamb",
            dict(
                **_ADAM,
                bias_correction=boolean(True),
                eps_inside_sqrt=boolean(),
                weight_decay=_decay(),
                max_coeff=number(10.0, above=0),
                min_coeff=number(0.01, low=0),
                amsgrad=boolean(),
            ),
            elementwise=False,
            tested_with_zero=False,
        ),
        OptimizerClass(
            "MuonWithAuxAdam",
            {
                "lr": _lr(1e-3),
                "momentum": number(0.95, low=0, high=1),
                "ns_method": text("gram", ("standard", "gram")),
                "betas": _betas(0.9, 0.95),
                "eps": _eps(1e-10),
                "weight_decay": _decay(),
                "muon_lr": _lr(0.02),
                "adam_lr": _lr(3e-4),
                "per_head_muon": boolean(),
            },
        ),
        OptimizerClass(
            "torch.optim.SGD",
            dict(
                lr=_lr(1e-3),
                momentum=number(0, low=0),
                dampening=number(0),
                weight_decay=_decay(),
                nesterov=boolean(),
                **_FOREACH,
                fused=boolean(None),
            ),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.RMSprop",
            dict(
                lr=_lr(0.01),
                alpha=number(0.99, low=0),
                eps=_eps(),
                weight_decay=_decay(),
                momentum=number(0, low=0),
                centered=boolean(),
                **_TORCH,
            ),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.Adadelta",
            dict(lr=_lr(1.0), rho=number(0.9, low=0, high=1), eps=_eps(1e-6), weight_decay=_decay(), **_TORCH),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.Adamax",
            dict(lr=_lr(2e-3), betas=_betas(), eps=_eps(), weight_decay=_decay(), **_TORCH),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.NAdam",
            dict(
                lr=_lr(2e-3),
                betas=_betas(),
                eps=_eps(),
                weight_decay=_decay(),
                momentum_decay=number(4e-3, low=0),
                decoupled_weight_decay=boolean(),
                **_TORCH,
            ),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.RAdam",
            dict(**_ADAM, weight_decay=_decay(), decoupled_weight_decay=boolean(), **_TORCH),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.ASGD",
            dict(
                lr=_lr(0.01),
                lambd=number(1e-4),
                alpha=number(0.75),
                t0=number(1e6),
                weight_decay=_decay(),
                **_TORCH,
            ),
            tested_with_zero=False,
        ),
        OptimizerClass(
            "torch.optim.Adafactor",
            {
                "lr": _lr(0.01),
                "beta2_decay": number(-0.8, high=0),
                "eps": Key("any", (None, 1e-3)),
                "d": number(1.0, low=1),
                "weight_decay": _decay(),
                "foreach": boolean(None),
                "maximize": boolean(),
            },
            elementwise=False,
            tested_with_zero=False,
        ),
    )
}

# Names as DeepSpeed takes them: its own without regard to case, torch's exactly.
DEEPSPEED_OPTIMIZERS = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")
TORCH_OPTIMIZERS = ("SGD", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Adafactor")
REFUSED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times a step, which a DeepSpeed engine does not do: write AdamW",
    "SparseAdam": "it is for sparse gradients: write AdamW",
    "Rprop": "it is for full batches: write SGD or AdamW",
    "MuAdam": "it needs a model with mup base shapes, which dstrain does not build: write AdamW",
    "MuAdamW": "it needs a model with mup base shapes, which dstrain does not build: write AdamW",
    "MuSGD": "it needs a model with mup base shapes, which dstrain does not build: write SGD",
    "OneBitAdam": "DeepSpeed 0.19 removed the 1-bit optimizers: write AdamW (or run `dstrain config migrate`)",
    "ZeroOneAdam": "DeepSpeed 0.19 removed the 1-bit optimizers: write AdamW (or run `dstrain config migrate`)",
    "OneBitLamb": "DeepSpeed 0.19 removed the 1-bit optimizers: write Lamb (or run `dstrain config migrate`)",
    "FusedAdam": "DeepSpeed picks the class itself: write Adam or AdamW",
    "CPUAdam": "DeepSpeed picks the class itself: write Adam or AdamW",
    "DeepSpeedCPUAdam": "DeepSpeed picks the class itself: write Adam or AdamW",
    "FusedLion": "DeepSpeed picks the class itself: write Lion",
    "FusedLamb": "DeepSpeed picks the class itself: write Lamb",
    "AdamW8bit": "DeepSpeed has no such optimizer: write AdamW",
    "adamw_torch": 'this is a name of TrainingArguments: write AdamW (with "torch_adam": true for torch\'s own)',
}
# Switches that DeepSpeed takes out of `params` before it builds Adam or Muon.
ADAM_SWITCHES = {
    "adam_w_mode": boolean(True),
    "torch_adam": boolean(),
    "foreach": boolean(None),
    "fp32_optimizer_states": boolean(True),
}


def canonical_optimizer(name: str) -> str | None:
    """The name as DeepSpeed knows it, or None: "adamw" -> "AdamW", "SGD" -> "SGD", "sgd" -> None."""
    own = {known.lower(): known for known in DEEPSPEED_OPTIMIZERS}.get(name.lower())
    return own or (name if name in TORCH_OPTIMIZERS else None)


def optimizer_class(name: str, params: dict[str, Any], cpu_offload: bool) -> OptimizerClass:
    """The class that DeepSpeed builds for a canonical name."""
    if name in ("Adam", "AdamW"):
        if params.get("torch_adam") is True:
            decoupled = name == "AdamW" or params.get("adam_w_mode", True)
            return CLASSES["torch.optim.AdamW" if decoupled else "torch.optim.Adam"]
        return CLASSES["DeepSpeedCPUAdam" if cpu_offload else "FusedAdam"]
    if name == "Adagrad":
        return CLASSES["DeepSpeedCPUAdagrad" if cpu_offload else "torch.optim.Adagrad"]
    if name == "Lion":
        return CLASSES["DeepSpeedCPULion" if cpu_offload else "FusedLion"]
    return CLASSES[{"Lamb": "FusedLamb", "Muon": "MuonWithAuxAdam"}.get(name, f"torch.optim.{name}")]


def allowed_params(name: str, cls: OptimizerClass) -> dict[str, Key]:
    """Everything that may stand in `optimizer.params` for this name and class."""
    if name in ("Adam", "AdamW"):
        switches = {"adam_w_mode", "torch_adam"} | ({"fp32_optimizer_states"} & cls.params.keys())
    else:
        switches = {"adam_w_mode", "torch_adam"} if name == "Muon" else set()
    return {**cls.params, **{key: ADAM_SWITCHES[key] for key in switches}}


_WARMUP = {"warmup_num_steps": integer(1000, low=1), "warmup_type": text("log", ("log", "linear"))}
_WARMUP_LR = {
    "warmup_min_lr": number(0.0, low=0),
    "warmup_max_lr": number(None, low=0),
    "last_batch_iteration": integer(-1, low=-1),
}
# runtime/lr_schedules.py. torch's own schedules are not here: they refuse every optimizer that ZeRO or a 16-bit
# precision wraps (TypeError: "... is not an Optimizer").
SCHEDULERS: dict[str, dict[str, Key]] = {
    "WarmupLR": dict(**_WARMUP_LR, **_WARMUP),
    "WarmupDecayLR": dict(
        total_num_steps=integer(None, low=1), **{**_WARMUP_LR, "warmup_max_lr": number(0.001, low=0)}, **_WARMUP
    ),
    "WarmupCosineLR": dict(
        total_num_steps=integer(None, low=1),
        warmup_min_ratio=number(0.0, low=0, high=1),
        cos_min_ratio=number(0.0001, low=0, high=1),
        last_batch_iteration=integer(-1, low=-1),
        **_WARMUP,
    ),
    "OneCycle": {
        "cycle_min_lr": number(None, low=0, required=True),
        "cycle_max_lr": number(None, low=0, required=True),
        "decay_lr_rate": number(0.0, low=0),
        "cycle_first_step_size": integer(2000, low=1),
        "cycle_second_step_size": integer(None, low=1),
        "cycle_first_stair_count": integer(0, low=0),
        "cycle_second_stair_count": integer(None, low=0),
        "decay_step_size": integer(0, low=0),
        "cycle_momentum": boolean(True),
        "cycle_min_mom": number(0.8, low=0, high=1),
        "cycle_max_mom": number(0.9, low=0, high=1),
        "decay_mom_rate": number(0.0, low=0),
        "last_batch_iteration": integer(-1, low=-1),
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": number(1e-3, low=0),
        "lr_range_test_step_size": integer(2000, low=1),
        "lr_range_test_step_rate": number(1.0, low=0),
        "lr_range_test_staircase": boolean(),
        "last_batch_iteration": integer(-1, low=-1),
    },
}
TORCH_SCHEDULERS = (
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
)
