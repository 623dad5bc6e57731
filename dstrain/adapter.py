"""Which adapters a run trains: what `--lora_rank` and its like, or a `--peft_config`, ask of peft's LoraConfig; what
they are beside; and the names of their parameters.

Without torch and without peft, so that a wrong flag is refused at once.
"""

import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstrain.errors import UserError

NAME = "default"  # peft's name for the only adapter of a model; part of its parameters' names
_FLAGS = ("lora_alpha", "lora_dropout", "lora_target_modules")
# Names of an adapter_config.json that say which adapters there are and how they start.
_TAKEN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "fan_in_fan_out",
)
# Names that say where it came from, or that only matter to what is refused below.
_LEFT_OUT = (
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)


def adapter_settings(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """What LoraConfig is to be made with, as plain JSON; None where no adapters are asked for.

    model: the values of `ModelArguments`, all or those given. Raises UserError with every problem.
    """
    rank, file = model.get("lora_rank"), model.get("peft_config")
    given = [f"--{name}" for name in _FLAGS if model.get(name)]
    if rank is None and file is None:
        if given:
            raise UserError(f"{given[0]} is for adapters: add --lora_rank, for example --lora_rank 16, or leave it out")
        if model.get("load_in_4bit"):
            raise UserError(
                "--load_in_4bit is for the model beside adapters, as weights in 4 bits cannot be trained: add "
                "--lora_rank, for example --lora_rank 16, or leave it out"
            )
        return None
    problems = []
    if file is not None and (rank is not None or given):
        other = "--lora_rank" if rank is not None else given[0]
        problems.append(f"--peft_config and {other} are both given: keep the file, or the flags")
    if not model.get("model_name_or_path"):
        problems.append(
            "adapters are trained beside the weights of a pretrained model: name it with --model_name_or_path"
        )
    if find_spec("peft") is None:
        problems.append("adapters need the package peft, which is not installed: pip install peft")
    if model.get("load_in_4bit") and find_spec("bitsandbytes") is None:
        problems.append(
            "--load_in_4bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    if (model.get("lora_dropout") or 0.0) >= 1.0:
        problems.append(f"--lora_dropout is {model['lora_dropout']}: write a number below 1")
    settings: dict[str, Any] = {}
    try:
        settings = _from_file(str(file)) if file is not None else _from_flags(model)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return settings


def _from_flags(model: Mapping[str, Any]) -> dict[str, Any]:
    rank, targets = model["lora_rank"], sorted(set(model.get("lora_target_modules") or []))
    if "all-linear" in targets and len(targets) > 1:
        raise UserError("--lora_target_modules all-linear and names of modules are both given: keep one")
    return {
        "r": rank,
        "lora_alpha": model.get("lora_alpha") or 2 * rank,
        "lora_dropout": model.get("lora_dropout") or 0.0,
        "target_modules": "all-linear" if targets in ([], ["all-linear"]) else targets,
    }


def _from_file(file: str) -> dict[str, Any]:
    """The settings of an adapter_config.json. Raises UserError for what would train more than LoRA's matrices, or start
    from other weights than a function of the seed."""
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--peft_config {file} cannot be read ({error.strerror}): name an adapter_config.json"
        ) from None
    except ValueError as error:
        raise UserError(f"--peft_config {file} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise UserError(f'--peft_config {file} is no LoRA: write {{"peft_type": "LORA", "r": 16, ...}}')
    problems = []
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"--peft_config {file}: task_type is {values['task_type']!r}: write CAUSAL_LM")
    if not isinstance(values.get("r"), int) or values["r"] < 1:
        problems.append(f"--peft_config {file}: r is {values.get('r')!r}: write a rank of at least 1")
    if values.get("init_lora_weights", True) not in (True, "gaussian"):
        problems.append(
            f"--peft_config {file}: init_lora_weights is {values['init_lora_weights']!r}: write true or gaussian, "
            "whose weights are a function of the seed alone"
        )
    for name in unknown_settings(values):
        problems.append(f"--peft_config {file}: {name} {values[name]!r} is not supported: leave it out")
    if problems:
        raise UserError(problems)
    return {name: values[name] for name in _TAKEN if values.get(name) is not None}


def unknown_settings(values: Mapping[str, Any], known: Collection[str] = ()) -> list[str]:
    """The names in an adapter_config.json that ask for something beyond LoRA's two matrices, and beyond `known`."""
    names = sorted(values.keys() - {*_TAKEN, *_LEFT_OUT, *known})
    return [name for name in names if values[name] not in (None, False, "none", [], {})]


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name in a model."""
    return f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name


def peft_name(name: str) -> str:
    """The key of such a parameter in an adapter_model.safetensors (`get_peft_model_state_dict` of peft)."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def is_base_in_4bit(identity: Mapping[str, Any]) -> bool:
    """Whether the adapters of a run were trained beside a base in 4 bits, by the identity in its manifests."""
    return bool((identity.get("adapter") or {}).get("load_in_4bit"))
