"""The rows of a stream as tokens, pass after pass, from any row on."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dstrain.data.rows import BadRow, Row
from dstrain.data.segments import JOB_CHARACTERS, RowReader, RowRules, Segment, encode_segments
from dstrain.data.stream_source import StreamSource
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

_JOB_ROWS = 256  # at most so many are tokenized at once
logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Row `row` of file `file`, of whose epoch the files before hold `before` rows."""

    epoch: int = 0
    file: int = 0
    row: int = 0
    before: int = 0


class TokenRow(NamedTuple):
    """where: file and line, for messages. documents: (ids, whether each carries loss), both [n], of each that comes
    from the row: one, unless the chat template rewrites history."""

    place: Place
    where: str
    documents: list[tuple[np.ndarray, np.ndarray]]


class _ReadRow(NamedTuple):
    place: Place
    where: str
    segments: list[Segment]


class StreamRows:
    """Reads and tokenizes. is_text: whether they are documents of plain text, and not prompts or chats.

    max_rows: of each pass. Raises UserError where there is none to read.
    """

    def __init__(self, source: StreamSource, encoder: TextEncoder, rules: RowRules, max_rows: int | None = None):
        self.description = source.description
        self._source, self._encoder, self._max_rows = source, encoder, max_rows
        self._reader = RowReader(source.description, encoder, rules, _tell)
        self.skipped, self.kinds = self._reader.skipped, self._reader.kinds
        next(self._rows(Place()))
        self.is_text = self.kinds == ["text"]

    def tokens(self, place: Place) -> Iterator[TokenRow]:
        """The rows from a place on, without end."""
        for job in _jobs(self._rows(place)):
            encoded = iter(encode_segments([segment for row in job for segment in row.segments], self._encoder))
            for row in job:
                documents, parts = [], []
                for segment in row.segments:
                    parts.append(next(encoded))
                    if segment.ends_document:
                        ids, carries = zip(*parts, strict=True)
                        documents.append((np.concatenate(ids), np.concatenate(carries)))
                        parts = []
                yield TokenRow(row.place, row.where, documents)

    def _rows(self, place: Place) -> Iterator[_ReadRow]:
        """Those that can be used, from a place on, pass after pass."""
        while True:
            empty = place == Place(place.epoch)  # until a row shows
            for here, row in self._pass(place):
                if isinstance(row, BadRow):
                    self.skipped.add(row)
                elif segments := self._reader.read(row):
                    empty = False
                    yield _ReadRow(here, row.where, segments)
            if empty:
                raise UserError(f"{self.description} holds no text: name files or a column with text in them")
            place = Place(place.epoch + 1)

    def _pass(self, place: Place) -> Iterator[tuple[Place, Row | BadRow]]:
        epoch, file, number, before = place
        for which in range(file, len(self._source)):
            for row in self._source.read(which, number):
                if before + number == self._max_rows:
                    return
                yield Place(epoch, which, number, before), row
                number += 1
            before, number = before + number, 0


def _tell(problem: str) -> None:
    logger.warning("left out: %s", problem)


def _jobs(rows: Iterator[_ReadRow]) -> Iterator[list[_ReadRow]]:
    """Rows together worth tokenizing at once. There is always one more: a stream has no end."""
    while True:
        job: list[_ReadRow] = []
        characters = 0
        try:
            while characters < JOB_CHARACTERS and len(job) < _JOB_ROWS:
                job.append(next(rows))
                characters += sum(len(segment.text) + 1 for segment in job[-1].segments)
        except UserError:
            yield job  # what stands before the broken row is trained on
            raise
        yield job
