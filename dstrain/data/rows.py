"""What a row of a table means: a text, a prompt with its completion, or a chat; and which rows cannot be used."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dstrain.data.templates import ALPACA, Column, RowError, Template, cell_kind, get_cell
from dstrain.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# The names that ShareGPT's exports and their descendants give to the same roles.
_OTHER_NAMES = {
    **dict.fromkeys(["human"], "user"),
    **dict.fromkeys(["gpt", "chatgpt", "bard", "bing", "bot", "model"], "assistant"),
    **dict.fromkeys(["function", "observation"], "tool"),
}
EMPTY = "empty"
NUM_PLACES = 5  # of bad rows that are named, for each kind


@dataclass(frozen=True, slots=True)
class Chat:
    """messages: tables with `role` (one of ROLES) and `content`, and what else the row's messages hold.

    first: answers before this message belong to the prompt, and carry no loss.
    """

    messages: tuple[dict[str, Any], ...]
    first: int = 0


Document = tuple[str] | tuple[str, str] | Chat
"""`(text,)`; `(prompt, completion)`, where only the completion carries loss; or a chat, where only answers do."""


@dataclass(frozen=True, slots=True)
class Row:
    """where: file and line, for messages. group: the text of the column that rows are grouped by, if one was named."""

    where: str
    document: Document
    group: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. kind: a few words to count by; problem: the line for the user, with file and line."""

    where: str
    kind: str
    problem: str


class SkippedRows:
    """Refuses bad rows, or counts them and lets the others pass. Empty ones are no damage, and only counted.

    tell: is given the problem of the first few of each kind that are left out.
    """

    def __init__(self, bad_rows: str, tell: Callable[[str], None] = lambda problem: None):
        self._bad_rows, self._tell = bad_rows, tell
        self.kinds: dict[str, dict[str, Any]] = {}

    def accept(self, rows: Iterable[Row | BadRow]) -> Iterator[Row]:
        """The usable rows. Raises UserError at the first bad one unless `bad_rows` is "skip"."""
        for row in rows:
            if isinstance(row, BadRow):
                self.add(row)
            else:
                yield row

    def add(self, bad: BadRow) -> None:
        if self._bad_rows != "skip" and bad.kind != EMPTY:
            raise UserError(f"{bad.problem} (or leave such rows out with --bad_rows skip)")
        self.leave_out(bad)

    def leave_out(self, bad: BadRow) -> None:
        """Only count it, whatever `bad_rows` says."""
        found = self.kinds.setdefault(bad.kind, {"rows": 0, "first": []})
        found["rows"] += 1
        if len(found["first"]) < NUM_PLACES and bad.where not in found["first"]:  # a stream reads rows again
            found["first"].append(bad.where)
            if bad.kind != EMPTY:
                self._tell(bad.problem)


def describe_skipped(kinds: Mapping[str, Mapping[str, Any]], source: str) -> list[str]:
    """A line for the user if rows were skipped that were not just empty. kinds: as `SkippedRows` has them."""
    kinds = {kind: found for kind, found in kinds.items() if kind != EMPTY}
    if not kinds:
        return []
    parts = []
    for kind, found in kinds.items():
        more = ", ..." if found["rows"] > len(found["first"]) else ""
        parts.append(f"{kind}: {found['rows']:,} ({', '.join(found['first'])}{more})")
    return [f"rows of {source} left out: {'; '.join(parts)}"]


class Shape(Protocol):
    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are read."""

    def read(self, row: Mapping[str, Any]) -> Document:
        """Raises RowError."""


@dataclass(frozen=True)
class TextShape:
    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, row: Mapping[str, Any]) -> Document:
        return (Column(self.column).fill(row),)


@dataclass(frozen=True)
class PromptShape:
    prompt: Column | Template
    completion: Column | Template

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.prompt.columns, *self.completion.columns]))

    def read(self, row: Mapping[str, Any]) -> Document:
        return (self.prompt.fill(row), self.completion.fill(row))


@dataclass(frozen=True)
class AlpacaShape:
    """`instruction` and `output`, with an `input` that may be empty. has_input: whether there is such a column."""

    has_input: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return ("instruction", *(["input"] if self.has_input else []), "output")

    def read(self, row: Mapping[str, Any]) -> Document:
        has_input = bool(row.get("input"))
        return (ALPACA[has_input].fill(row), Column("output").fill(row))


@dataclass(frozen=True)
class ChatShape:
    """A column of messages: OpenAI's `role` and `content`, or ShareGPT's `from` and `value`."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, row: Mapping[str, Any]) -> Document:
        return _checked_chat(_messages(row, self.column), 0)


@dataclass(frozen=True)
class ChatPromptShape:
    """A prompt and a completion that are lists of messages: only the completion's answers carry loss."""

    prompt: str
    completion: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, self.completion)

    def read(self, row: Mapping[str, Any]) -> Document:
        prompt = _messages(row, self.prompt)
        return _checked_chat((*prompt, *_messages(row, self.completion)), len(prompt))


def _messages(row: Mapping[str, Any], column: str) -> tuple[dict[str, Any], ...]:
    cell = get_cell(row, column)
    if isinstance(cell, str):  # CSV knows no lists, and some parquet files hold theirs as JSON
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            problem = f": column {column} holds neither a list of messages nor JSON ({error.msg})"
            raise RowError("invalid JSON", f"{problem}: name the columns with flags, see docs/data.md") from None
    if not isinstance(cell, list):
        raise RowError("wrong type", f": column {column} holds {cell_kind(cell)}, not a list of messages")
    return tuple(_message(message, f": column {column}, message {number}") for number, message in enumerate(cell, 1))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError("wrong type", f"{where} is {cell_kind(message)}, not a table with role and content")
    rest = {name: value for name, value in message.items() if value is not None}  # tables of parquet hold every name
    role, content = rest.pop("role", rest.pop("from", None)), rest.pop("content", rest.pop("value", None))
    known = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if known not in ROLES:
        raise RowError("broken chat", f"{where}: its role is {role!r}: write one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError("broken chat", f"{where}: its content is {cell_kind(content)}, not a text")
    return {"role": known, "content": content, **rest}


def _checked_chat(messages: tuple[dict[str, Any], ...], first: int) -> Chat:
    if not messages:
        raise RowError("broken chat", " holds no message")
    if messages[0]["role"] == "assistant":
        raise RowError("broken chat", " begins with an answer: put what it answers before it")
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise RowError("broken chat", " holds no answer (role assistant): there is nothing to learn")
    return Chat(messages, first)


def read_row(where: str, row: Mapping[str, Any], shape: Shape, group_column: str | None = None) -> Row | BadRow:
    """The document of a row, and its group; a null cell is an empty text."""
    try:
        document = shape.read(row)
        group = _group(row, group_column) if group_column else None
    except RowError as error:
        return BadRow(where, error.kind, f"{where}{error}")
    found = check_document(where, document)
    return found if group is None or isinstance(found, BadRow) else replace(found, group=group)


def _group(row: Mapping[str, Any], column: str) -> str:
    cell = get_cell(row, column)
    if isinstance(cell, list | dict):
        raise RowError("wrong type", f": column {column} holds {cell_kind(cell)}, which is no group: name another")
    return "" if cell is None else str(cell)


def check_document(where: str, document: Document) -> Row | BadRow:
    """A row, unless the document is empty or holds what is no character."""
    if isinstance(document, Chat):
        texts = [value for message in document.messages for value in message.values() if isinstance(value, str)]
    else:
        texts = list(document)
    for text in texts:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                code = f"\\u{ord(text[error.start]):04x}"
                problem = f"{where} holds half a surrogate pair ({code}), which is no character: mend it"
                return BadRow(where, "half a surrogate pair", problem)
    if not isinstance(document, Chat) and not texts[-1].strip():
        return BadRow(where, EMPTY, f"{where} is empty")
    return Row(where, document)
