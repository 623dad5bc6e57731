"""Which columns of a table hold the text, and what a cell must look like."""

import difflib
from collections.abc import Mapping
from typing import Any

from dstrain.errors import UserError

Document = tuple[str] | tuple[str, str]
"""`(text,)`, or `(prompt, completion)` where only the completion carries loss."""


def choose_columns(where: str, columns: Mapping[str, bool], text_column: str | None) -> tuple[str, ...]:
    """The text column, or ("prompt", "completion"). columns: name -> does it hold text. Raises UserError.

    Without `--text_column`: prompt and completion if both are there, else `text`, else the only column of text.
    """
    listed = f"its columns are {', '.join(columns)}" if columns else "it has no columns"
    if text_column is not None:
        if text_column not in columns:
            close = difflib.get_close_matches(text_column, columns, n=1)
            hint = f"did you mean {close[0]}? ({listed})" if close else listed
            raise UserError(f"{where} has no column {text_column}: {hint}")
        if not columns[text_column]:
            raise UserError(f"{where}: column {text_column} holds no text: name another with --text_column ({listed})")
        return (text_column,)
    if columns.get("prompt") and columns.get("completion"):
        return ("prompt", "completion")
    if columns.get("text"):
        return ("text",)
    texts = [name for name, is_text in columns.items() if is_text]
    if len(texts) != 1:
        raise UserError(f"{where}: which column is the text? Name it with --text_column ({listed})")
    return (texts[0],)


def read_row(where: str, row: Mapping[str, Any], columns: tuple[str, ...]) -> Document:
    """The document of a row; a null cell is an empty text. Raises UserError that names `where`."""
    cells = []
    for column in columns:
        if column not in row:
            raise UserError(f"{where} has no column {column} (it has {', '.join(map(str, row)) or 'none'})")
        cell = row[column]
        if cell is not None and not isinstance(cell, str):
            raise UserError(f"{where}: column {column} holds {_kind(cell)}, not a text: mend or drop the row")
        cells.append(cell or "")
    return tuple(cells)  # type: ignore[return-value]


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return kinds.get(type(value), type(value).__name__)
