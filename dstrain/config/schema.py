"""Is every key of a configuration one that DeepSpeed reads, and does every value have the right kind and range?

DeepSpeed ignores unknown keys at the top and inside several blocks; here a key is known or the run does not start.
"""

from typing import Any

from dstrain.config.kinds import Key, closest, did_you_mean, wrong_value
from dstrain.config.load import describe
from dstrain.config.reading import class_of
from dstrain.config.removed import REMOVED
from dstrain.config.schema_keys import TOP
from dstrain.config.schema_types import (
    DEEPSPEED_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
    allowed_params,
    canonical_optimizer,
)

Problem = tuple[str, str]  # dotted key, what is wrong and what to write


def meant(problem_key: str) -> set[str]:
    """The dotted keys whose values a wrong key leaves unknown: itself, and what it was probably meant to be."""
    keys = {problem_key}
    if problem_key in REMOVED and REMOVED[problem_key].successor:
        keys.add(str(REMOVED[problem_key].successor))
    *blocks, name = problem_key.split(".")
    siblings = TOP
    for place in blocks:
        siblings = siblings[place].keys if place in siblings else {}
    if name not in siblings:
        keys.update(_places(name))
        if word := closest(name, siblings):
            keys.add(".".join([*blocks, word]))
    return keys


def check_schema(config: dict[str, Any]) -> list[Problem]:
    """Every unknown or removed key and every wrong value, as (dotted key, message without the file's name)."""
    problems = _check_block(config, TOP, "")
    wrong = {key for key, _ in problems}
    if "optimizer" not in wrong and isinstance(config.get("optimizer"), dict):
        problems += _check_optimizer(config, wrong)
    if "scheduler" not in wrong and isinstance(config.get("scheduler"), dict):
        problems += _check_scheduler(config["scheduler"])
    return problems


def whole_numbers(config: dict[str, Any], keys: dict[str, Key] = TOP) -> dict[str, Any]:
    """A copy in which 5e8, a float to JSON, is a whole number wherever the schema asks for one."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        key = keys.get(name)
        if key and key.kind == "block" and isinstance(value, dict):
            value = whole_numbers(value, key.keys)
        elif key and key.kind == "int" and isinstance(value, float) and value.is_integer():
            value = int(value)
        result[name] = value
    return result


def _check_block(values: dict[str, Any], keys: dict[str, Key], prefix: str) -> list[Problem]:
    problems: list[Problem] = []
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if name not in keys:
            problems.append((dotted, f"{dotted} {_unknown(name, dotted, keys)}"))
            continue
        key = keys[name]
        if value == "auto" and key.kind not in ("block", "free"):
            continue  # filled or refused by auto.py
        if dotted == "zero_optimization" and isinstance(value, bool):
            problems.append((dotted, f'{dotted} is {describe(value)}: write {{"stage": {int(value)}}}'))
        elif message := wrong_value(key, value):
            problems.append((dotted, f"{dotted} {message}"))
        elif key.kind == "block" and value is not None:
            problems += _check_block(value, key.keys, f"{dotted}.")
    return problems


def _unknown(name: str, dotted: str, keys: dict[str, Key]) -> str:
    if dotted in REMOVED:
        return REMOVED[dotted].advice
    places = [place for place in _places(name) if place != dotted]
    if places:
        return f"does not belong here: write it as {' or '.join(places[:2])}"
    return f"is no key of DeepSpeed 0.19.8{did_you_mean(name, keys)}: correct it or leave it out"


def _places(name: str, keys: dict[str, Key] = TOP, prefix: str = "") -> list[str]:
    """Where a key of this name does exist; words that many blocks share tell nothing."""
    if name in ("enabled", "type", "params", "dtype"):
        return []
    found = [f"{prefix}{name}"] if name in keys else []
    for block_name, key in keys.items():
        if key.kind == "block" and block_name not in ("autotuning", "hybrid_engine", "weight_quantization"):
            found += _places(name, key.keys, f"{prefix}{block_name}.")
    return found


def _check_params(params: dict[str, Any], keys: dict[str, Key], prefix: str, owner: str) -> list[Problem]:
    problems: list[Problem] = []
    for name, value in params.items():
        dotted = f"{prefix}.{name}"
        if dotted in REMOVED:
            problems.append((dotted, f"{dotted} {REMOVED[dotted].advice}"))
        elif name not in keys:
            hint = did_you_mean(name, keys)
            problems.append((dotted, f"{dotted} is no parameter of {owner}{hint}: correct it or leave it out"))
        elif value != "auto" and (message := wrong_value(keys[name], value)):
            problems.append((dotted, f"{dotted} {message}"))
    for name, key in keys.items():
        if key.required and params.get(name) is None:
            problems.append((f"{prefix}.{name}", f"{prefix}.{name} is missing, but {owner} needs it: write a number"))
    return problems


def _check_optimizer(config: dict[str, Any], wrong: set[str]) -> list[Problem]:
    optimizer = config["optimizer"]
    name, params = optimizer.get("type"), optimizer.get("params") or {}
    if name is None or "optimizer.type" in wrong:
        return [] if "optimizer.type" in wrong else [("optimizer.type", "optimizer.type is missing: write e.g. AdamW")]
    if name == "auto":
        return [("optimizer.type", 'optimizer.type is "auto": write a name, e.g. AdamW')]
    canonical = canonical_optimizer(name)
    if canonical is None:
        refused = {known.lower(): (known, reason) for known, reason in REFUSED_OPTIMIZERS.items()}.get(name.lower())
        known = (*DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS)
        reason = refused[1] if refused else f"write one of {', '.join(known)}"
        hint = "" if refused else did_you_mean(name, known)
        return [("optimizer.type", f"optimizer.type is {name!r}{hint}: {reason}")]
    if "optimizer.params" in wrong:
        return []
    cls = class_of(config)
    assert cls is not None
    owner = f"{canonical} ({cls.name} here)"
    return _check_params(params, allowed_params(canonical, cls), "optimizer.params", owner)


def _check_scheduler(scheduler: dict[str, Any]) -> list[Problem]:
    name, params = scheduler.get("type"), scheduler.get("params") or {}
    if name is None:
        return [("scheduler.type", "scheduler.type is missing: write e.g. WarmupCosineLR")]
    if not isinstance(name, str) or not isinstance(params, dict):
        return []
    if name in TORCH_SCHEDULERS:
        reason = "torch's schedules refuse the optimizers that ZeRO and 16 bits wrap"
        return [("scheduler.type", f"scheduler.type is {name!r}: {reason}: write one of {', '.join(SCHEDULERS)}")]
    if name not in SCHEDULERS:
        hint = did_you_mean(name, SCHEDULERS)
        return [("scheduler.type", f"scheduler.type is {name!r}{hint}: write one of {', '.join(SCHEDULERS)}")]
    return _check_params(params, SCHEDULERS[name], "scheduler.params", name)
