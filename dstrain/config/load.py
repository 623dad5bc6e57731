"""Read a DeepSpeed JSON strictly and change single values of it: `--set a.b=c`."""

import copy
import json
import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from dstrain.errors import UserError


def load_config(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises UserError for a file that cannot be read, is not strict JSON (comments, NaN, a key given twice), or holds no
    object. DeepSpeed itself reads Hjson, which takes a forgotten quote or comma for part of a value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name a DeepSpeed JSON, e.g. ds_configs/zero2.json") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a DeepSpeed JSON in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a DeepSpeed JSON") from None

    problems: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                problems.append(f"{path}: {key!r} is given twice in one block: keep one")
            seen[key] = value
        return seen

    def constant(name: str) -> float:
        problems.append(f"{path}: {name} is not a JSON number: write a finite one")
        return 0.0

    try:
        config = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a DeepSpeed JSON") from None
    if problems:
        raise UserError(problems)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {describe(config)}: a DeepSpeed JSON is one object {{...}}")
    return config


def describe(value: Any) -> str:
    """A value as the user wrote it, with the kind of thing it is when that is not plain to see."""
    if isinstance(value, dict):
        return "a block {...}" if value else "an empty block {}"
    if isinstance(value, list):
        return f"the list {json.dumps(value)}"
    if isinstance(value, str):
        return f"the text {json.dumps(value)}"
    return json.dumps(value)


def apply_overrides(config: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `config` with each "a.b=c" applied in turn; c is read as JSON where it is JSON, else as text.

    Raises UserError for words that are not of this form and for paths through a value that is no block.
    """
    config, problems = copy.deepcopy(config), []
    for override in overrides:
        try:
            set_value(config, *parse_override(override))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return config


def parse_override(override: str) -> tuple[str, Any]:
    """ "a.b=c" -> ("a.b", c)."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(f"--set {override}: write --set block.key=value, e.g. --set optimizer.params.lr=1e-4")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = text.strip()
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--set {override}: {text.strip()} is not a JSON number: write a finite one")
    return key, value


def set_value(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in place, making blocks on the way."""
    *blocks, last = key.split(".")
    block = config
    for depth, name in enumerate(blocks):
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise UserError(f"--set {key}: {'.'.join(blocks[: depth + 1])} is {describe(block)}, not a block")
    block[last] = value


def get_value(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """The value at the dotted `key`, or `default` where a block on the way is missing."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return default
        value = value[name]
    return value


def remove_value(config: dict[str, Any], key: str) -> None:
    """Drop the dotted `key` in place if it is there."""
    *blocks, last = key.split(".")
    block: Any = config
    for name in blocks:
        block = block.get(name) if isinstance(block, dict) else None
    if isinstance(block, dict):
        block.pop(last, None)


def without(config: dict[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """A copy that lacks the dotted `keys`; names that hold dots themselves are found too."""
    return {
        name: without(value, keys, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in config.items()
        if f"{prefix}{name}" not in keys
    }


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a block; an empty block counts as a value."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value
