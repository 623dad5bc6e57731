"""Which shape the rows of a table have: told by the names of its columns, or by flags."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.arguments import DataArguments
from dstrain.data.rows import AlpacaShape, ChatPromptShape, ChatShape, PromptShape, Shape, TextShape
from dstrain.data.templates import Column, Template, check_columns, parse_template
from dstrain.errors import UserError

TEXT, LIST, NULL, OTHER = "text", "list", "null", "other"
"""What the cells of a column are; null may turn out to be anything."""


@dataclass(frozen=True)
class ColumnFlags:
    """The flags of the same names. They count into the hash of the data: lay them down with `dataclasses.astuple`."""

    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    prompt_template: str | None = None
    completion_template: str | None = None

    @classmethod
    def of(cls, dargs: DataArguments) -> "ColumnFlags":
        return cls(**{name: getattr(dargs, name) for name in cls.__dataclass_fields__})

    @property
    def needing_columns(self) -> list[str]:
        """The flags that a plain text cannot follow, as they are written."""
        return [f"--{name}" for name in self.__dataclass_fields__ if name != "text_column" and getattr(self, name)]


def value_kind(cell: Any) -> str:
    kinds = {str: TEXT, list: LIST, type(None): NULL}
    return kinds.get(type(cell), OTHER)


def choose_shape(where: str, columns: Mapping[str, str], flags: ColumnFlags) -> Shape:
    """The shape that the flags say, else the first whose columns are there: prompt and completion, messages, ShareGPT's
    conversations, Alpaca, `text`, the only column of text.

    columns: name -> kind of its cells (of the first row, where a format has no types). Raises UserError.
    """
    if flags.messages_column:
        _check(where, columns, "--messages_column", flags.messages_column, (LIST, TEXT))
        return ChatShape(flags.messages_column)
    if flags.needing_columns:
        return _prompt_shape(where, columns, flags)
    if flags.text_column:
        _check(where, columns, "--text_column", flags.text_column, (TEXT,))
        return TextShape(flags.text_column)
    return _recognise(where, columns)


def _recognise(where: str, columns: Mapping[str, str]) -> Shape:
    def has(kind: str, *names: str) -> bool:
        return all(columns.get(name, OTHER) in (kind, NULL) for name in names)

    chats = [name for name in ("messages", "conversations") if name in columns]
    texts = [name for name, kind in columns.items() if kind == TEXT]
    if has(TEXT, "prompt", "completion"):
        return PromptShape(Column("prompt"), Column("completion"))
    if has(LIST, "prompt", "completion"):
        return ChatPromptShape("prompt", "completion")
    for name in chats:
        if has(LIST, name):
            return ChatShape(name)
    if has(TEXT, "instruction", "output"):
        return AlpacaShape("input" in columns)
    if has(TEXT, "text"):
        return TextShape("text")
    for name in chats:
        if name in texts:  # a table without lists, such as CSV: the chat is JSON in its cell
            return ChatShape(name)
    if len(texts) != 1:
        raise UserError(f"{where}: which column is the text? Name it with --text_column ({_listed(columns)})")
    return TextShape(texts[0])


def _prompt_shape(where: str, columns: Mapping[str, str], flags: ColumnFlags) -> Shape:
    parts: list[Column | Template] = []
    for name in ("prompt", "completion"):
        template, column = getattr(flags, f"{name}_template"), getattr(flags, f"{name}_column")
        if template:
            parts.append(parse_template(f"--{name}_template", template))
            check_columns(where, f"--{name}_template", parts[-1], columns)  # type: ignore[arg-type]
        else:
            assert column, f"--{name}_column or --{name}_template: arguments.py refuses one without the other"
            _check(where, columns, f"--{name}_column", column, (TEXT, LIST))
            parts.append(Column(column))
    lists = [isinstance(part, Column) and columns[part.column] == LIST for part in parts]
    if all(lists):
        return ChatPromptShape(flags.prompt_column or "", flags.completion_column or "")
    if any(lists):
        raise UserError(f"{where}: the prompt and the completion are both texts, or both lists of messages")
    return PromptShape(*parts)


def _check(where: str, columns: Mapping[str, str], flag: str, column: str, kinds: tuple[str, ...]) -> None:
    check_column(where, columns, column)
    if columns[column] not in (*kinds, NULL):
        what = "text" if kinds == (TEXT,) else "text and no list of messages"
        raise UserError(f"{where}: column {column} holds no {what}: name another with {flag} ({_listed(columns)})")


def check_column(where: str, columns: Collection[str], column: str) -> None:
    """Raises UserError where there is no such column."""
    if column not in columns:
        close = difflib.get_close_matches(column, columns, n=1)
        hint = f"did you mean {close[0]}? ({_listed(columns)})" if close else _listed(columns)
        raise UserError(f"{where} has no column {column}: {hint}")


def _listed(columns: Collection[str]) -> str:
    return f"its columns are {', '.join(columns)}" if columns else "it has no columns"
