"""Prompts from files, and how one that is too long is cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.arguments import DataArguments
from dstrain.data.columns import ColumnFlags
from dstrain.data.files import read_file
from dstrain.data.rows import BadRow, Chat, Document, SkippedRows
from dstrain.data.sources import find_files
from dstrain.data.templates import RowError
from dstrain.errors import UserError
from dstrain.generate.model import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """text: as the model reads it (of a chat, by the template); answer: what the row has behind it; None for a plain
    text; ids: the text's tokens, as in training; group: the text of the row's `group_column`."""

    text: str
    answer: str | None
    ids: list[int]
    group: str | None = None


@dataclass(frozen=True)
class Prompts:
    """skipped_rows: kind -> how many were left out, and where the first of them are; empty rows always are."""

    prompts: list[Prompt]
    skipped_rows: dict[str, dict[str, Any]]


def read_prompts(
    patterns: list[str],
    flag: str,
    dargs: DataArguments,
    loaded: LoadedModel,
    limit: int | None = None,
    group_column: str | None = None,
) -> Prompts:
    """The rows of files, read as training reads them; at most `limit`. Raises UserError."""
    skipped, found = SkippedRows(dargs.bad_rows), []
    columns = ColumnFlags.of(dargs)
    rows = (row for file in find_files(patterns, flag) for row in read_file(file, columns, group_column))
    for row in skipped.accept(rows):
        try:
            found.append((*_read(row.document, loaded), isinstance(row.document, Chat), row.group))
        except RowError as error:
            skipped.add(BadRow(row.where, error.kind, f"{row.where}{error}"))
        if len(found) == limit:
            break
    if not found:
        raise UserError(f"{flag} {' '.join(patterns)} holds no row that can be used")
    texts, answers, are_chats, groups = zip(*found, strict=True)
    ids = loaded.encode_prompts(list(texts), are_chats)
    return Prompts([Prompt(*row) for row in zip(texts, answers, ids, groups, strict=True)], skipped.kinds)


def _read(document: Document, loaded: LoadedModel) -> tuple[str, str | None]:
    """What the model sees before the (last) answer, and that answer. Raises RowError for a chat that is refused."""
    if isinstance(document, Chat):
        text, answers = loaded.chats.texts(document)[-1]
        said = [message["content"] for message in document.messages if message["role"] == "assistant"]
        return text[: answers[-1][0]], said[-1]
    return document if len(document) == 2 else (document[0], None)


def room_for_prompts(max_length: int, answer_tokens: int) -> int:
    """Tokens that are left for a prompt. Raises UserError where there are none."""
    if answer_tokens >= max_length:
        raise UserError(
            f"answers of {answer_tokens} tokens leave no room for a prompt: prompt and answer have {max_length} in all"
        )
    return max_length - answer_tokens


def fit_prompts(prompts: Sequence[Sequence[int]], room: int, side: str) -> list[list[int]]:
    """Prompts of at most `room` tokens.

    What all prompts begin and end with (a template's words) stays; of a row's own text between them the end on `side`
    ("left" or "right") gives way. Without such words, or without room for them, the prompt itself is cut on that side.
    """
    head, tail = _shared_ends(prompts)
    if head + tail >= room:
        head = tail = 0
    keep = room - head - tail
    fitted = []
    for prompt in prompts:
        row = list(prompt)
        if len(row) > room:
            own = row[head : len(row) - tail]
            row = [*row[:head], *(own[-keep:] if side == "left" else own[:keep]), *row[len(row) - tail :]]
        fitted.append(row)
    return fitted


def _shared_ends(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all prompts begin with, and how many more they end with."""
    first, shortest = prompts[0], min(map(len, prompts))
    head = next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)
    rest = shortest - head
    tail = next((i for i in range(rest) if any(p[-1 - i] != first[-1 - i] for p in prompts)), rest)
    return head, tail
