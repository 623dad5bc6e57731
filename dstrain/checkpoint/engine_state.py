"""Everything of an engine that is no tensor: counters, schedule, loss scaler, hyperparameters, random generators."""

import base64
import random
from typing import Any

import numpy as np
import torch

from dstrain.checkpoint.layout import inner_optimizer

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# Optimizers of one family keep the same state and continue each other's.
FAMILIES = {
    "Adam": ("FusedAdam", "DeepSpeedCPUAdam", "Adam", "AdamW", "ZenFlowCPUAdam"),
    "Lion": ("FusedLion", "DeepSpeedCPULion"),
    "Adagrad": ("Adagrad", "DeepSpeedCPUAdagrad"),
}
# The one state that a family names in two ways: (torch's class, its name, the common name).
RENAMED = {("Adagrad", "sum"): "exp_avg_sq"}


def family(optimizer_class: str) -> str:
    return next((name for name, members in FAMILIES.items() if optimizer_class in members), optimizer_class)


def common_kind(optimizer: torch.optim.Optimizer, key: str) -> str:
    """The name under which a state is stored, whichever class of a family wrote it."""
    return RENAMED.get((type(optimizer).__name__, key), key)


def own_key(optimizer: torch.optim.Optimizer, kind: str) -> str:
    """The name that this class of optimizer gives to a stored state."""
    return next((key for (cls, key), k in RENAMED.items() if cls == type(optimizer).__name__ and k == kind), kind)


def state_dtype(optimizer: torch.optim.Optimizer, weights: torch.Tensor) -> torch.dtype:
    """The type in which an optimizer keeps its states; DeepSpeed's CPU optimizers may differ from their weights."""
    return torch.float32 if getattr(optimizer, "fp32_optimizer_states", False) else weights.dtype


def scalars_of(state: dict[str, Any], weights: torch.Tensor) -> dict[str, Any]:
    """What an optimizer keeps besides one value per weight, as JSON: {"step": 3}."""
    scalars: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            scalars[key] = value
        elif value.numel() == 1 and (key == "step" or value.shape != weights.shape):
            scalars[key] = value.item()
        else:
            assert value.shape == weights.shape, f"optimizer state {key} has its own shape {tuple(value.shape)}"
    if "step" in scalars:
        scalars["step"] = int(scalars["step"])
    return scalars


def restore_scalars(optimizer: torch.optim.Optimizer, state: dict[str, Any], scalars: dict[str, Any]) -> None:
    """Put them back in the form in which this class of optimizer keeps them: torch's own keep 0-d fp32 tensors."""
    torchs_own = type(optimizer).__module__.startswith("torch.")
    for key, value in scalars.items():
        old = state.get(key)
        if isinstance(old, torch.Tensor):
            old.fill_(value)
        elif torchs_own and isinstance(value, int | float) and not isinstance(value, bool):
            state[key] = torch.tensor(float(value), dtype=torch.float32)
        else:
            state[key] = value


def hyperparameters(engine: Any) -> list[dict[str, Any]]:
    """Of each group of parameters, what JSON can hold."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "step") and _is_plain(value)}
        for group in inner_optimizer(engine).param_groups
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None)


def capture(engine: Any) -> dict[str, Any]:
    """Plain JSON, equal on every rank."""
    scheduler, scaler = engine.lr_scheduler, _scaler(engine)
    grad_scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return {
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)} if scheduler else None,
        "scaler": {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)},
        "grad_scaler": grad_scaler.state_dict() if grad_scaler is not None else None,
        "optimizer": type(inner_optimizer(engine)).__name__,
        "hyperparameters": hyperparameters(engine),
    }


def restore(engine: Any, saved: dict[str, Any]) -> list[str]:
    """Put `capture`'s result back, and say what the JSON now sets otherwise.

    The rule: the JSON wins. Learning rate, schedule, weight decay and the like are those of this start; where the
    schedule stands is the checkpoint's. Returns one line per difference.
    """
    for name, value in saved["counters"].items():
        setattr(engine, name, value)
    scaler = _scaler(engine)
    for name, value in saved["scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    grad_scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if grad_scaler is not None and saved["grad_scaler"]:
        grad_scaler.load_state_dict(saved["grad_scaler"])
    if engine.lr_scheduler is not None and saved["scheduler"]:
        _place_scheduler(engine.lr_scheduler, saved["scheduler"])
    return _differences(saved["hyperparameters"], hyperparameters(engine))


def _place_scheduler(scheduler: Any, saved: dict[str, Any]) -> None:
    """DeepSpeed's schedules are functions of `last_batch_iteration`; torch's carry their past with them."""
    if "last_batch_iteration" in saved and hasattr(scheduler, "last_batch_iteration"):
        if saved["last_batch_iteration"] >= 0:
            scheduler.step(saved["last_batch_iteration"])
    elif "last_batch_iteration" not in saved and not hasattr(scheduler, "last_batch_iteration"):
        scheduler.load_state_dict(saved)
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr


def _differences(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    if len(before) != len(now):
        return []  # another layout or optimizer groups its parameters otherwise
    lines = []
    for key in sorted({key for group in now for key in group}):
        old, new = [_listed(g.get(key)) for g in before], [_listed(g.get(key)) for g in now]
        if old != new and all(key in group for group in before):
            lines.append(f"optimizer {key} is {_brief(new)} as the JSON says; the checkpoint had {_brief(old)}")
    return lines


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _brief(values: list[Any]) -> str:
    return str(values[0] if all(value == values[0] for value in values) else values)


def random_states() -> dict[str, Any]:
    """This rank's generators, as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
