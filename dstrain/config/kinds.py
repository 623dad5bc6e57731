"""What one key of the DeepSpeed JSON may hold: kind, default, range, words. The vocabulary of the schema's tables."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dstrain.config.load import describe


@dataclass(frozen=True)
class Key:
    """One key. `default` is DeepSpeed's; a key whose default is None may also hold null.

    kind: "bool", "int", "number", "text", "list" (of `items`), "free" (any block), "block" (of `keys`), "any".
    low and high are inclusive, above exclusive. choices: words, compared without case where `fold` is set.
    """

    kind: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()
    fold: bool = False
    items: str = "text"
    length: int | None = None
    keys: dict[str, "Key"] = field(default_factory=dict)
    required: bool = False


def boolean(default: bool | None = False) -> Key:
    return Key("bool", default)


def integer(default: int | None = None, low: float | None = None, high: float | None = None, **more: Any) -> Key:
    return Key("int", default, low, high, **more)


def number(default: float | None = None, low: float | None = None, high: float | None = None, **more: Any) -> Key:
    return Key("number", default, low, high, **more)


def text(default: str | None = None, choices: tuple[str, ...] = (), fold: bool = False) -> Key:
    return Key("text", default, choices=choices, fold=fold)


def texts(default: list[str] | None = None) -> Key:
    return Key("list", default, items="text")


def numbers(default: list[float] | None = None, length: int | None = None, **more: Any) -> Key:
    return Key("list", default, items="number", length=length, **more)


def anything(default: Any = None) -> Key:
    """A key that DeepSpeed reads into objects of its own; only its presence is checked."""
    return Key("any", default)


def free(default: dict | None = None) -> Key:
    """A block whose keys are the user's own words."""
    return Key("free", default)


def block(**keys: Key) -> Key:
    return Key("block", keys=keys)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known word that `name` probably stands for."""
    folded = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known word as a question in brackets, or nothing."""
    word = closest(name, known)
    return f" (did you mean {word!r}?)" if word else ""


_EXPECTED = {"bool": "true or false", "int": "a whole number", "number": "a number", "text": "a text in quotes"}


def wrong_value(key: Key, value: Any) -> str | None:
    """What is wrong with a value that is no block of known keys, and what to write; None where it is right."""
    if value is None:
        return None if key.default is None and not key.required else f"is null: write {expected(key)} or leave it out"
    if key.kind == "any":
        return None
    if key.kind in ("block", "free"):
        return None if isinstance(value, dict) else f"is {describe(value)}: write a block {{...}}"
    if key.kind == "list":
        return _wrong_list(key, value)
    if not _is_kind(key.kind, value):
        return f"is {describe(value)}: write {expected(key)}{_unquoted(key.kind, value)}"
    if key.choices and not _is_choice(key, value):
        hint = did_you_mean(value, key.choices) if isinstance(value, str) else ""
        return f"is {describe(value)}{hint}: write {expected(key)}"
    if key.kind in ("int", "number"):
        return _out_of_range(key, value)
    return None


def expected(key: Key) -> str:
    if key.choices:
        return "one of " + ", ".join(describe(word).removeprefix("the text ") for word in key.choices)
    words = _EXPECTED.get(key.kind, "a list")
    limits = []
    if key.above is not None:
        limits.append(f"above {key.above:g}")
    if key.low is not None:
        limits.append(f"of at least {key.low:g}")
    if key.high is not None:
        limits.append(f"of at most {key.high:g}")
    return " ".join([words, " and ".join(limits)]).strip()


def _is_kind(kind: str, value: Any) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "text":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int):
        return abs(value) < 2**63
    # 5e8 is a float to JSON and a whole number to everyone who writes it.
    return math.isfinite(value) and (kind == "number" or value.is_integer())


def _is_choice(key: Key, value: Any) -> bool:
    if key.fold and isinstance(value, str):
        return value.lower() in [word.lower() for word in key.choices]
    return value in key.choices


def _out_of_range(key: Key, value: float) -> str | None:
    if (
        (key.low is not None and value < key.low)
        or (key.high is not None and value > key.high)
        or (key.above is not None and value <= key.above)
    ):
        return f"is {describe(value)}: write {expected(key)}"
    return None


def _wrong_list(key: Key, value: Any) -> str | None:
    if not isinstance(value, list):
        return f"is {describe(value)}: write a list [...]"
    if key.length is not None and len(value) != key.length:
        return f"has {len(value)} values: write {key.length}"
    item = Key(key.items, low=key.low, high=key.high, above=key.above)
    for position, entry in enumerate(value):
        if not _is_kind(key.items, entry):
            return f"holds {describe(entry)} at place {position + 1}: write {expected(item)}"
        if key.items == "number" and _out_of_range(item, entry):
            return f"holds {describe(entry)} at place {position + 1}: write {expected(item)}"
    return None


def _unquoted(kind: str, value: Any) -> str:
    """The number or word that a quoted value stands for, as a hint."""
    if not isinstance(value, str):
        return ""
    if kind == "bool" and value.lower() in ("true", "false"):
        return f", i.e. {value.lower()} without quotes"
    try:
        number = float(value)
    except ValueError:
        return ""
    return f", i.e. {value} without quotes" if kind in ("int", "number") and math.isfinite(number) else ""
