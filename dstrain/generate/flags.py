"""Flags that `dstrain generate` and `dstrain evaluate` share. Imports nothing heavy."""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dstrain.arguments import DataArguments, is_taken, parse_arguments
from dstrain.errors import UserError

_MODEL_FLAGS = ("tokenizer_name", "chat_template", "attn_implementation", "dtype", "trust_remote_code", "base_model")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it: what `load_named` reads."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder, a step_* folder, a Hugging Face folder, one of peft's adapters, or a hub name",
    )
    parser.add_argument("--base_model", help="of adapters: where their base is now, if not as in training")
    parser.add_argument("--tokenizer_name", help="default: the model's own")
    parser.add_argument("--chat_template", help="Jinja file (or its text), in place of the tokenizer's own")
    parser.add_argument("--attn_implementation", help="attention kernel: eager, sdpa")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: as stored)")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a hub repository to run its own code")


def load_named(args: argparse.Namespace) -> Any:
    """The `LoadedModel` that the flags of `add_model_arguments` name. Raises UserError."""
    from dstrain.generate.model import load

    return load(args.model, **{name: getattr(args, name) for name in _MODEL_FLAGS})


def row_flags(more: Iterable[str] = ()) -> list[str]:
    """The flags of train.py that say how a row of a file is read, and `more` of its flags for data."""
    names = [f.name for f in dataclasses.fields(DataArguments)]
    return [name for name in names if name.endswith(("_column", "_template")) or name in ("bad_rows", *more)]


def add_row_flags(group: Any, more: Iterable[str] = ()) -> None:
    """group: a parser or a group of its arguments."""
    for f in dataclasses.fields(DataArguments):
        if f.name in row_flags(more):
            bare = {"nargs": "?", "const": "true"} if f.type is bool else {}
            group.add_argument(f"--{f.name}", help=f.metadata["help"].replace("%", "%%"), **bare)


def row_arguments(args: argparse.Namespace, more: Iterable[str] = ()) -> DataArguments:
    """Their values, through train.py's own parser. Raises UserError."""
    given = {name: getattr(args, name) for name in row_flags(more)}
    return parse_arguments([f"--{name}={value}" for name, value in given.items() if value is not None]).data


def check_output(flag: str, path: str | None) -> None:
    """Refuse a file that is there, or that no folder is there for."""
    if path is None:
        return
    if is_taken(Path(path)):
        raise UserError(f"{flag} {path} is there already: name a new file")
    if not Path(path).parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {Path(path).parent}")
