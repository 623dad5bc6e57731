"""Prompts from files, and how one that is too long is cut."""

from collections.abc import Iterator, Sequence
from itertools import islice

from dstrain.arguments import DataArguments
from dstrain.data.columns import Document
from dstrain.data.files import read_file
from dstrain.data.sources import find_files
from dstrain.errors import UserError


def read_documents(patterns: list[str], flag: str, dargs: DataArguments, limit: int | None = None) -> list[Document]:
    """The rows of files, read as training reads them; at most `limit`. Raises UserError."""

    def rows() -> Iterator[Document]:
        for file in find_files(patterns, flag):
            yield from read_file(file, dargs.text_column)

    found = list(islice(rows(), limit))
    if not found:
        raise UserError(f"{flag} {' '.join(patterns)} holds no row")
    return found


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
