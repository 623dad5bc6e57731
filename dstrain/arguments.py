"""Every flag of `dstrain/train.py`, as frozen dataclasses. Flags, `--help`, YAML and JSON files come from the fields.

What DeepSpeed's JSON has a key for has no flag here (see ds_configs/). Names and defaults are those of Hugging Face's
`run_clm.py` and `TrainingArguments` where they exist there. Imports neither torch nor transformers, so that a wrong
flag is refused at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dstrain.adapter import adapter_settings
from dstrain.contradictions import contradictions
from dstrain.errors import UserError


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    """A dataclass field with its help text; `choices` and `alias` go into the metadata."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def is_taken(path: Path) -> bool:
    """Whether something is there that a command must not write over: anything but an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@dataclass(frozen=True)
class ModelArguments:
    model_name_or_path: str | None = flag("pretrained model: a hub name or a folder")
    config_name: str | None = flag(
        "model trained from scratch: a hub name, a folder, or a JSON file that names its model_type"
    )
    config_overrides: str | None = flag("changes to the model's configuration: n_embd=10,n_layer=2")
    tokenizer_name: str | None = flag("hub name or folder of a tokenizer, or `bytes` (256 bytes and specials)")
    chat_template: str | None = flag("Jinja file (or its text) that renders chats, in place of the tokenizer's own")
    attn_implementation: str | None = flag("attention kernel: eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = flag("allow a hub repository to run its own Python code", False)
    gradient_checkpointing: bool = flag("recompute activations in the backward pass", False)
    tiled_mlp: bool = flag("compute MLPs a part of the sequence at a time, for long sequences", False)
    compile: str | None = flag(
        "torch.compile: each decoder layer (`layer`, also for the bare flag) or the whole model (`whole`)",
        choices=("layer", "whole"),
        bare="layer",
    )
    lora_rank: int | None = flag("train LoRA adapters of this rank beside the frozen model, by peft", minimum=1)
    lora_alpha: int | None = flag("their scale: alpha / rank (default: twice the rank)", minimum=1)
    lora_dropout: float = flag("dropout before the adapters", 0.0, minimum=0.0)
    lora_target_modules: list[str] = flag(
        "names of the linear layers that get one; repeatable (default: all-linear, all but the head)", []
    )
    load_in_4bit: bool = flag("quantize the linear layers of the model beside the adapters to 4 bits (QLoRA)", False)
    peft_config: str | None = flag("an adapter_config.json of peft, in place of the flags --lora_...")

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The settings of the adapters to train (`adapter_settings`), or None."""
        return adapter_settings(vars(self))


@dataclass(frozen=True)
class DataArguments:
    dataset_name: str | None = flag("a dataset of the hub, or a local folder in hub layout")
    dataset_config_name: str | None = flag("the dataset's configuration")
    train_file: list[str] = flag(
        "training text: file, folder or glob of text, JSON lines, CSV or parquet, also .gz or .zst; repeatable", []
    )
    train_weight: list[float] = flag(
        "share of the tokens of one --train_file, of any sum; one for each. --train_file mix.yaml can name both", []
    )
    validation_file: list[str] = flag("held-out text, as --train_file; repeatable", [])
    text_column: str | None = flag("column that holds the text (default: `text`, or the only column of text)")
    prompt_column: str | None = flag("column of prompts, which carry no loss (default: `prompt`)")
    completion_column: str | None = flag("column of completions, which do (default: `completion`)")
    prompt_template: str | None = flag("prompt made of columns, such as '{text}\\n\\nSentiment:'")
    completion_template: str | None = flag("completion made of columns, such as ' {label:negative|positive}'")
    messages_column: str | None = flag("column of chats (default: `messages` or `conversations`)")
    train_on_prompts: bool = flag("let prompts and all turns of a chat carry loss, not only completions", False)
    bad_rows: str = flag("rows that cannot be used: refuse or skip", "refuse", choices=("refuse", "skip"))
    long_rows: str = flag(
        "rows longer than a block: cut their end or their start, leave them out, or refuse",
        "cut",
        choices=("cut", "cut_start", "skip", "refuse"),
    )
    max_train_samples: int | None = flag("read only this many training documents", minimum=1)
    streaming: bool = flag("read the training data while training instead of before", False)
    shuffle_buffer: int | None = flag("samples of a stream that are shuffled together (default: 1000)", minimum=1)
    block_size: int | None = flag("tokens read per sample (default: the model's positions, at most 1024)", minimum=2)
    packing: bool = flag("fill blocks with several whole documents that do not see each other", False)


@dataclass(frozen=True)
class RunArguments:
    deepspeed_config: str | None = flag(
        "the DeepSpeed JSON: optimizer, batch, precision, ZeRO, offload, parallelism", alias="--deepspeed"
    )
    set: list[str] = flag("change one value of the DeepSpeed JSON: a.b=c; repeatable", [])
    max_steps: int = flag("optimizer steps (-1: num_train_epochs decides)", -1, minimum=-1)
    num_train_epochs: float = flag("passes over the training data", 3.0, minimum=0.0)
    max_time: float | None = flag("stop and save after this many seconds (exit code 75)", minimum=0.0)
    seed: int = flag("seed of the initial weights and of the order of samples", 42, minimum=0)
    output_dir: str = flag("run folder", "runs/default")
    overwrite_output_dir: bool = flag("start anew in a folder that holds another run", False)
    logging_steps: int = flag("steps per line of metrics.jsonl", 1, minimum=1)
    eval_steps: int | None = flag("evaluate at multiples of this step (always once at the end)", minimum=1)
    eval_strategy: str = flag(
        "steps: evaluate as --eval_steps says; epoch: after each pass over the training data",
        "steps",
        choices=("steps", "epoch"),
    )
    max_eval_batches: int | None = flag("global batches per evaluation", minimum=1)
    early_stopping_patience: int | None = flag(
        "finish after this many evaluations in a row without a lower loss of the held-out text", minimum=1
    )
    early_stopping_threshold: float = flag("lower by at most this much does not count as lower", 0.0, minimum=0.0)
    load_best_model_at_end: bool = flag(
        "save whenever the held-out loss is the lowest so far, and sample and export from that checkpoint", False
    )
    label_smoothing_factor: float = flag(
        "part of each target that is spread over the vocabulary; held-out losses are without", 0.0, minimum=0.0
    )
    sample_steps: int | None = flag("let the model write a text at multiples of this step", minimum=1)
    sample_prompt: str | None = flag("what these texts continue (default: the beginning of a held-out sample)")
    save_steps: int = flag("save at multiples of this step (0: only at the end)", 500, minimum=0)
    save_total_limit: int | None = flag("keep this many checkpoints", minimum=1)
    ignore_full_disk: bool = flag("go on without a checkpoint that finds no room on the disk (not the last)", False)
    ignore_memory_limit: bool = flag("start also where the prediction says that memory does not suffice", False)
    export: str | None = flag(
        "write the final model as a Hugging Face folder (bare or auto: `export` in the run folder)", bare="auto"
    )
    resume_from_checkpoint: str = flag("auto: go on from the newest checkpoint; none; or a path", "auto", bare="auto")
    verify: bool = flag("compare this configuration with plain torch on a shrunk model before training", False)
    hang_timeout: float | None = flag(
        "end the run after this many seconds without progress (exit code 76)", minimum=1.0
    )
    skip_nonfinite: int = flag(
        "leave out up to this many batches whose loss or gradients are not finite (0: stop at the first, exit code 77)",
        0,
        minimum=0,
    )
    profile: bool = flag("write a torch trace of a few steps, and where their time went, into the run folder", False)
    report_to: list[str] = flag(
        "report.html (default) or none; trackers are blocks of the DeepSpeed JSON",
        ["report"],
        choices=("report", "none"),
    )
    co2_country: str | None = flag(
        "report the CO2 of the energy that is counted, for this country's grid: three letters, such as DEU"
    )
    local_rank: int = flag("set by launchers", -1)


@dataclass(frozen=True)
class Arguments:
    model: ModelArguments
    data: DataArguments
    run: RunArguments

    def to_dict(self) -> dict[str, Any]:
        """Flag name -> value, over all groups."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}


# Flags of Hugging Face's scripts that have no counterpart here, because DeepSpeed's JSON has a key for them.
IN_DEEPSPEED_JSON = {
    "adam_beta1": "optimizer.params.betas",
    "adam_beta2": "optimizer.params.betas",
    "adam_epsilon": "optimizer.params.eps",
    "bf16": "bf16.enabled",
    "fp16": "fp16.enabled",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "optimizer.params.lr",
    "lr_scheduler_type": "scheduler.type",
    "max_grad_norm": "gradient_clipping",
    "optim": "optimizer.type",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "train_batch_size": "train_batch_size",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "weight_decay": "optimizer.params.weight_decay",
    "zero_stage": "zero_optimization.stage",
}
GROUPS: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "run": RunArguments}


def _fields() -> dict[str, tuple[str, dataclasses.Field, Any]]:
    """Flag name -> (group, field, type)."""
    return {
        f.name: (group, f, hints[f.name])
        for group, cls in GROUPS.items()
        for hints in [get_type_hints(cls)]
        for f in dataclasses.fields(cls)
    }


def _scalar_type(annotation: Any) -> type:
    """`int | None` -> int, `list[str]` -> str."""
    if get_origin(annotation) in (Union, UnionType, list):
        return next(t for t in get_args(annotation) if t is not type(None))
    return annotation


def _convert(name: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """One value from the command line or a file, as its field's type. `name` goes into the message of a UserError."""
    kind = _scalar_type(annotation)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    wrong = UserError(f"{name} is {value!r}: write {expected}")
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if value is None or isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float)):
        raise wrong
    if value == "":
        raise UserError(f"{name} is empty: write {expected}, or leave it out")
    try:
        value = kind(value)
    except ValueError:
        raise wrong from None
    if kind is float and not math.isfinite(value):
        raise wrong
    if "choices" in metadata and value not in metadata["choices"]:
        raise UserError(f"{name} is {value!r}: write one of {', '.join(metadata['choices'])}")
    if "minimum" in metadata and value < metadata["minimum"]:
        raise UserError(f"{name} is {value}: the smallest value is {metadata['minimum']}")
    return value


class Parser(argparse.ArgumentParser):
    """Usage errors as `UserError`, in one line."""

    def error(self, message: str):
        if match := re.fullmatch(r"argument (--\w+).*: expected one argument", message):
            message = f"{match[1]} has no value: write one after it"
        raise UserError(" ".join(message.split()))


def _help(f: dataclasses.Field) -> str:
    text = f.metadata["help"].replace("%", "%%")
    unset = f.default in (None, dataclasses.MISSING) or "default" in text or f.name == "local_rank"
    return text if unset else f"{text} (default: {f.default})"


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a Hugging Face causal language model with DeepSpeed.",
        usage="%(prog)s [FILE.yaml|FILE.json] [--flag value ...]",
        epilog="A YAML or JSON file with the names of the flags may come first; flags win over it.",
    )
    sections = {group: parser.add_argument_group(group) for group in GROUPS}
    for name, (group, f, annotation) in _fields().items():
        options: dict[str, Any] = {"dest": name, "default": None, "action": "append", "help": _help(f)}
        if annotation is bool:
            options.update(nargs="?", const="true")
        elif "bare" in f.metadata:
            options.update(nargs="?", const=f.metadata["bare"])
        names = [f"--{name}"] + ([f.metadata["alias"]] if "alias" in f.metadata else [])
        if name == "local_rank":
            names.append("--local-rank")
        sections[group].add_argument(*names, **options)
    return parser


def _read_file(path: str) -> dict[str, Any]:
    """The table of flags in a YAML or JSON file. Raises UserError, also for a name that is given twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a YAML or JSON file with flags") from None
    values = _parse_json(path, text) if path.endswith(".json") else parse_yaml(path, text)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no table of flags: write lines such as `max_steps: 100`")
    return values


def _unique(path: str, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [str(name) for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError([f"{path}: {name} is given twice: keep one, or write a list" for name in twice])
    return dict(pairs)


def _parse_json(path: str, text: str) -> Any:
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs), parse_constant=refuse)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def parse_yaml(path: str, text: str) -> Any:
    """The contents of a YAML text. Raises UserError that names `path`, also for a name that is given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            pairs = [
                (self.construct_object(key, deep=True), self.construct_object(value, deep)) for key, value in node.value
            ]
            _unique(path, pairs)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _unknown(token: str, known: Iterable[str]) -> str:
    """What is wrong with a word of the command line that is no flag of ours, and what to write instead."""
    flag_name, _, value = token.partition("=")
    if not token.startswith("-"):
        return f"unexpected word {token!r}: a flag takes one value; repeat the flag to give several"
    if key := IN_DEEPSPEED_JSON.get(flag_name.lstrip("-").replace("-", "_")):
        change = f"--set {key}={value or '...'}"
        return f"unknown flag {flag_name}: it is {key} of the DeepSpeed JSON: write it there, or {change}"
    return f"unknown flag {flag_name}{_did_you_mean(flag_name, ['--' + name for name in known])}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ": see --help"


def _take_config_file(argv: list[str]) -> str | None:
    """Remove and return the file that may come first, behind the `--local_rank` of an old launcher."""
    for index, token in enumerate(argv):
        if not token.startswith(("--local_rank=", "--local-rank=")):
            return None if token.startswith("-") else argv.pop(index)
    return None


def _value_of(
    field_name: str, given: list[str] | None, in_file: Any, source: str | None, annotation: Any, metadata: Any
):
    """A flag's converted value: the command line wins over the file. Raises UserError."""
    name = f"--{field_name}" if given is not None else f"{source}: {field_name}"
    if get_origin(annotation) is list:
        values = given if given is not None else in_file if isinstance(in_file, list) else [in_file]
        return [_convert(name, value, annotation, metadata) for value in values]
    if given is not None and len(set(given)) > 1 and field_name != "local_rank":
        raise UserError(f"{name} is given twice with different values ({', '.join(given)}): keep one")
    return _convert(name, given[-1] if given is not None else in_file, annotation, metadata)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read flags (and a file before them) into `Arguments`.

    argv: without the program's name; None reads sys.argv. Raises UserError with every problem at once; `--help` exits.
    """
    fields, problems = _fields(), []
    argv = list(sys.argv[1:] if argv is None else argv)
    config_file = _take_config_file(argv)
    namespace, unknown = _build_parser().parse_known_args(argv)
    for before, token in zip(["", *unknown], unknown, strict=False):
        if token.startswith("-") or not before.startswith("-") or "=" in before:  # else: an unknown flag's own value
            problems.append(_unknown(token, fields))
    from_file: dict[str, Any] = {}
    try:
        from_file = _read_file(config_file) if config_file is not None else {}
    except UserError as error:
        problems += error.problems
    for name in sorted(map(str, from_file.keys() - fields.keys())):
        problems.append(f"{config_file}: unknown name {name}{_did_you_mean(name, fields)}")

    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, (group, f, annotation) in fields.items():
        given, in_file = getattr(namespace, name), from_file.get(name)
        if given is None and in_file is None:
            continue
        try:
            groups[group][name] = _value_of(name, given, in_file, config_file, annotation, f.metadata)
        except UserError as error:
            problems += error.problems
    problems += contradictions({**groups["model"], **groups["data"], **groups["run"]})
    if problems:
        raise UserError(problems)
    return Arguments(ModelArguments(**groups["model"]), DataArguments(**groups["data"]), RunArguments(**groups["run"]))
