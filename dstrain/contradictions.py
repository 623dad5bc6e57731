"""Flags that do not go together. Each of them alone is right."""

from typing import Any

from dstrain.adapter import adapter_settings
from dstrain.errors import UserError

_PARTS = ("prompt", "completion")


def contradictions(given: dict[str, Any]) -> list[str]:
    """A line for each problem. given: flag name -> value, of those that the user gave."""
    problems = []
    if given.get("model_name_or_path") and given.get("config_name"):
        problems.append(
            "--model_name_or_path and --config_name are both given: keep the first to go on with a "
            "pretrained model, the second to train from scratch"
        )
    if given.get("model_name_or_path") and given.get("config_overrides"):
        problems.append(
            "--config_overrides changes a model trained from scratch: use it with --config_name, not with "
            "--model_name_or_path"
        )
    problems += _contradictory_sources(given)
    problems += _contradictory_rows(given)
    if given.get("streaming"):
        problems += _contradictory_stream(given)
    elif given.get("shuffle_buffer"):
        problems.append("--shuffle_buffer is for --streaming: other data are shuffled whole")
    if given.get("max_steps", -1) > 0 and "num_train_epochs" in given:
        problems.append("--max_steps and --num_train_epochs are both given, and the first would win: keep one")
    by_epoch, by_steps = given.get("eval_strategy") == "epoch", given.get("eval_steps") is not None
    if by_epoch and by_steps:
        problems.append("--eval_strategy epoch and --eval_steps are both given: keep one")
    if not by_epoch and not by_steps:
        problems += [
            f"--{name} needs evaluations on the way: add --eval_steps N or --eval_strategy epoch"
            for name in ("early_stopping_patience", "load_best_model_at_end")
            if given.get(name)
        ]
    if given.get("early_stopping_threshold") and not given.get("early_stopping_patience"):
        problems.append("--early_stopping_threshold needs --early_stopping_patience")
    if given.get("label_smoothing_factor", 0.0) >= 1.0:
        problems.append("--label_smoothing_factor must be below 1: 0.1 is usual")
    if "none" in given.get("report_to", []) and len(set(given["report_to"])) > 1:
        problems.append("--report_to none and another --report_to are both given: keep one")
    if given.get("max_time") == 0:
        problems.append("--max_time is 0: write a positive number of seconds, or leave it out")
    if given.get("max_steps") == 0:
        problems.append("--max_steps is 0: write a positive number, or leave it out to train for --num_train_epochs")
    if given.get("num_train_epochs") == 0:
        problems.append("--num_train_epochs is 0: write a positive number")
    try:
        adapter_settings(given)
    except UserError as error:
        problems += error.problems
    return problems


def _contradictory_rows(given: dict[str, Any]) -> list[str]:
    problems = []
    for kind in _PARTS:
        ways = ("text_column", "messages_column", f"{kind}_column", f"{kind}_template")
        if len(used := [f"--{name}" for name in ways if given.get(name)]) > 1:
            problems.append(f"{' and '.join(used)} are both given, and say in two ways what a row is: keep one")
    has_prompt, has_completion = (any(given.get(f"{k}_{x}") for x in ("column", "template")) for k in _PARTS)
    if has_prompt != has_completion:
        have, lack = _PARTS if has_prompt else _PARTS[::-1]
        problems.append(f"a {have} needs a {lack}: give --{lack}_column or --{lack}_template too")
    return problems


def _contradictory_sources(given: dict[str, Any]) -> list[str]:
    weights, files = given.get("train_weight", []), given.get("train_file", [])
    problems = []
    if given.get("dataset_name") and files:
        problems.append("--dataset_name and --train_file are both given: keep one source of training data")
    if given.get("dataset_config_name") and not given.get("dataset_name"):
        problems.append("--dataset_config_name needs --dataset_name")
    problems += [f"--train_weight is {weight}: write a positive number" for weight in weights if weight <= 0]
    if weights and len(weights) != len(files):
        problems.append(
            f"--train_weight is given {len(weights)} times and --train_file {len(files)} times: "
            "write one weight for each file, in the same order"
        )
    return problems


def _contradictory_stream(given: dict[str, Any]) -> list[str]:
    problems = []
    if given.get("max_steps", -1) <= 0:
        problems.append("--streaming needs --max_steps: how long a stream is shows only at its end")
    if given.get("eval_strategy") == "epoch":
        problems.append("--eval_strategy epoch does not go with --streaming: write --eval_steps N")
    if not given.get("train_file") and not given.get("dataset_name"):
        problems.append("--streaming needs --train_file or --dataset_name: the built-in corpus is no stream")
    mixed = [file for file in given.get("train_file", []) if file.lower().endswith((".yaml", ".yml"))]
    if given.get("train_weight") or mixed:
        problems.append("a mixture does not go with --streaming: leave one of them out")
    return problems
