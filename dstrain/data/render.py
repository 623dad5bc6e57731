"""Samples as a person can read them: every token, whether it carries loss, and where documents begin."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dstrain.data.packing import IGNORE

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Cell:
    """One token, or the tokens that make one character together."""

    text: str
    num_tokens: int
    num_with_loss: int
    is_special: bool

    @property
    def carries_loss(self) -> bool:
        return self.num_with_loss > 0


def documents(tokenizer: "PreTrainedTokenizerBase", sample: dict[str, np.ndarray]) -> list[list[Cell]]:
    """The cells of each document in a sample. sample: as `Samples` gives it; only packed ones know their documents."""
    ids, carries = sample["input_ids"], sample["labels"] != IGNORE
    carries[0] = False  # has no predecessor
    starts = np.flatnonzero(sample.get("position_ids", np.empty(0)) == 0)[1:]
    pieces = zip(np.split(ids, starts), np.split(carries, starts), strict=True)
    return [list(_cells(tokenizer, ids.tolist(), carries)) for ids, carries in pieces]


def _cells(tokenizer: "PreTrainedTokenizerBase", ids: list[int], carries: np.ndarray) -> Iterator[Cell]:
    """A token is decoded behind the one before it, since some tokenizers drop the space at the beginning of a text."""
    special = set(tokenizer.all_special_ids)
    before = start = 0
    for end in range(1, len(ids) + 1):
        known, text = _decode(tokenizer, ids[before:start]), _decode(tokenizer, ids[before:end])
        unfinished = text.endswith(_REPLACEMENT) and ids[end - 1] not in special
        if unfinished and end < len(ids) and end - start < _LONGEST_CHARACTER:
            continue
        yield Cell(text[len(known) :], end - start, int(carries[start:end].sum()), ids[start] in special)
        before, start = start, end


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """Line feeds with a sign before them; whatever else a terminal would obey, escaped."""
    shown = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"}
    return "".join(c if c.isprintable() else shown.get(c) or c.encode("unicode_escape").decode("ascii") for c in text)


def count(parts: list[list[Cell]]) -> str:
    """In words, the tokens of some documents."""
    cells = [cell for part in parts for cell in part]
    return f"{sum(cell.num_tokens for cell in cells)} tokens, {sum(cell.num_with_loss for cell in cells)} with loss"


def plain(document: list[Cell]) -> str:
    """Tokens apart by |, runs without loss inside ⟦ ⟧."""
    parts = []
    for i, cell in enumerate(document):
        before = document[i - 1].carries_loss if i else True
        if cell.carries_loss != before:
            parts.append("⟧" if cell.carries_loss else "⟦")
        elif i:
            parts.append("|")
        parts.append(_visible(cell.text))
    return "".join(parts) + ("" if document[-1].carries_loss else "⟧")


def coloured(document: list[Cell]) -> "Text":
    """Tokens in two colours by turns, special ones in a third; those without loss dimmed."""
    from rich.text import Text

    text = Text()
    for i, cell in enumerate(document):
        colour = "magenta" if cell.is_special else ("cyan", "default")[i % 2]
        text.append(_visible(cell.text), style=colour if cell.carries_loss else f"dim {colour}")
    return text
