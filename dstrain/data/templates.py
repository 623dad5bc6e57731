"""Texts made of a row's columns: a column as it is, or a template such as `{text}\\n\\nSentiment:`."""

import difflib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.errors import UserError

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


class RowError(Exception):
    """What is wrong with a row. kind: a few words to count by; the text goes behind the row's file and line."""

    def __init__(self, kind: str, text: str):
        self.kind = kind
        super().__init__(text)


def get_cell(row: Mapping[str, Any], column: str) -> Any:
    """Raises RowError when the row has no such column."""
    if column not in row:
        have = ", ".join(map(str, row)) or "none"
        raise RowError("missing column", f" has no column {column} (it has {have})")
    return row[column]


def cell_kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)


@dataclass(frozen=True)
class Column:
    """A column's text, as it is."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def fill(self, row: Mapping[str, Any]) -> str:
        """A null cell is an empty text. Raises RowError for one that holds no text."""
        cell = get_cell(row, self.column)
        if cell is not None and not isinstance(cell, str):
            problem = f": column {self.column} holds {cell_kind(cell)}, not a text: mend or drop the row"
            raise RowError("wrong type", problem)
        return cell or ""


@dataclass(frozen=True)
class Template:
    """Literal text and columns by turns. parts: (text before, column or None, the words its number chooses from)."""

    parts: tuple[tuple[str, str | None, tuple[str, ...]], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, column, _ in self.parts if column is not None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Raises RowError for a cell that is neither text nor whole number, or has no word."""
        return "".join(text + (_value(row, column, words) if column else "") for text, column, words in self.parts)


def _value(row: Mapping[str, Any], column: str, words: tuple[str, ...]) -> str:
    cell = get_cell(row, column)
    if words:
        number = int(cell) if isinstance(cell, int) or (isinstance(cell, str) and cell.strip().isdecimal()) else -1
        if not 0 <= number < len(words):
            problem = f": column {column} holds {cell!r}: its template has words for 0 to {len(words) - 1}"
            raise RowError("number without a word", problem)
        return words[number]
    if cell is not None and (not isinstance(cell, str | int) or isinstance(cell, bool)):
        problem = f": column {column} holds {cell_kind(cell)}, neither a text nor a whole number: mend or drop the row"
        raise RowError("wrong type", problem)
    return "" if cell is None else str(cell)


def parse_template(flag: str, text: str) -> Template:
    """`{column}` is its text or whole number, `{label:negative|positive}` the word with that number, counted from 0.

    `{{` and `}}` are braces; `\\n`, `\\t` and `\\\\` what they are in Python, since a shell hands them on as they are.
    Raises UserError that names the flag.
    """
    parts = []
    try:
        for literal, column, words, conversion in string.Formatter().parse(_unescape(text)):
            if column == "" or conversion or "{" in (words or ""):
                raise ValueError("only {column} and {column:word|word} are known")
            parts.append((literal, column, tuple(words.split("|")) if words else ()))
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error}: write a brace that is meant as text twice") from None
    template = Template(tuple(parts))
    if not template.columns:
        raise UserError(f"{flag} {text!r} names no column: write one in braces, such as {{text}}")
    return template


def _unescape(text: str) -> str:
    """`\\n` -> a line feed; a backslash before anything else stays."""
    pieces, rest = [], text
    while (at := rest.find("\\")) >= 0 and at + 1 < len(rest):
        pieces.append(rest[:at] + _ESCAPES.get(rest[at + 1], rest[at : at + 2]))
        rest = rest[at + 2 :]
    return "".join([*pieces, rest])


def check_columns(where: str, flag: str, template: Template, columns: Iterable[str]) -> None:
    """Raises UserError for a name in the template that is no column."""
    columns = list(columns)
    for name in template.columns:
        if name not in columns:
            close = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean {{{close[0]}}}? " if close else ""
            raise UserError(f"{flag}: {where} has no column {name}: {hint}(its columns are {', '.join(columns)})")


# The prompts that Alpaca was trained with, without and with an input:
# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py (PROMPT_DICT)
_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA = (
    parse_template("", f"{_TASK}. {_WRITE}### Response:"),
    parse_template(
        "",
        f"{_TASK}, paired with an input that provides further context. {_WRITE}### Input:\n{{input}}\n\n### Response:",
    ),
)
