"""Documents as segments of text, each with the tokens of it that carry loss; and segments as ids."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dstrain.data.chats import ChatRenderer, Spans
from dstrain.data.rows import BadRow, Chat, Document, Row, SkippedRows
from dstrain.data.sources import Source
from dstrain.data.templates import RowError
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

JOB_CHARACTERS = 2**18  # text per job: large enough to hide the cost of a job, small enough to bound memory


@dataclass(frozen=True)
class RowRules:
    """What the flags of these names say about rows: what becomes of bad ones, and which tokens carry loss."""

    bad_rows: str = "refuse"
    train_on_prompts: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a document's text on its way to tokens.

    loss: whether all or none of its tokens carry loss, or the characters whose tokens do: a token belongs to where it
    begins. kind: "text", "prompt" or "chat", which have ends of their own.
    """

    text: str
    kind: str
    loss: bool | Spans
    starts_document: bool = True
    ends_document: bool = True


class RowReader:
    """Rows as segments. skipped: those that cannot be used are refused or counted there; kinds: of the segments so far.

    description: of their source, for messages. tell: as in `SkippedRows`.
    """

    def __init__(
        self,
        description: str,
        encoder: TextEncoder,
        rules: RowRules,
        tell: Callable[[str], None] = lambda problem: None,
    ):
        self._description, self._encoder, self._rules = description, encoder, rules
        self.skipped = SkippedRows(rules.bad_rows, tell)
        self.kinds: list[str] = []

    @cached_property
    def _chats(self) -> ChatRenderer:
        return ChatRenderer(self._encoder)

    def read(self, row: Row) -> list[Segment]:
        """The segments of all documents that come from a row; none if the chat template refuses it.

        Raises UserError, also for plain text beside rows of prompts or chats.
        """
        try:
            segments = self._segments_of(row)
        except RowError as error:
            self.skipped.add(BadRow(row.where, error.kind, f"{row.where}{error}"))
            return []
        if segments[0].kind not in self.kinds:
            self.kinds.append(segments[0].kind)
        if len(self.kinds) > 1 and "text" in self.kinds:
            raise UserError(f"{self._description} mixes plain text with prompt and completion: train on one kind")
        return segments

    def _segments_of(self, row: Row) -> list[Segment]:
        document, everything = row.document, self._rules.train_on_prompts
        if isinstance(document, Chat):
            if everything:
                return [Segment(self._chats.whole(document), "chat", True)]
            return [Segment(text, "chat", spans) for text, spans in self._chats.texts(document)]
        if len(document) == 2:
            prompt, completion = document
            return [
                Segment(prompt, "prompt", everything, ends_document=False),
                Segment(completion, "prompt", True, starts_document=False),
            ]
        pieces = self._encoder.split(document[0], JOB_CHARACTERS)
        return [Segment(text, "text", True, i == 1, i == len(pieces)) for i, text in enumerate(pieces, 1)]


class Segments:
    """The segments of a source, in order; iterate once. Counts and notes on the way.

    hashes: uint64 of each document's text, equal for all that come from one row; places: file and line of each row's
    documents (of plain text none).
    """

    def __init__(self, source: Source, encoder: TextEncoder, rules: RowRules):
        self._source, self._reader = source, RowReader(source.description, encoder, rules)
        self.skipped, self.kinds = self._reader.skipped, self._reader.kinds
        self.hashes: list[int] = []
        self.places: list[str] = []
        self.num_bytes = 0

    def __iter__(self) -> Iterator[Segment]:
        for row in self.skipped.accept(self._source.documents()):
            for segment in self._reader.read(row):
                self.num_bytes += len(segment.text.encode())
                if segment.starts_document:
                    self.hashes.append(_hash(row.document))
                    if segment.kind != "text":
                        self.places.append(row.where)
                yield segment


def _hash(document: Document) -> int:
    content = (
        json.dumps([document.messages, document.first], default=str)
        if isinstance(document, Chat)
        else "\0".join(document)
    )
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def encode_segments(segments: list[Segment], encoder: TextEncoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, whether each carries loss: bool) of each segment, both [n], with the special tokens that stand before and
    behind its document."""
    texts = [segment.text for segment in segments]
    if all(isinstance(segment.loss, bool) for segment in segments):
        encoded = [(ids, np.full(len(ids), s.loss)) for s, ids in zip(segments, encoder.encode(texts), strict=True)]
    else:
        placed = zip(segments, encoder.encode_with_begins(texts), strict=True)
        encoded = [(ids, _carries_loss(s.loss, begins)) for s, (ids, begins) in placed]
    return [_with_ends(segment, *found, encoder) for segment, found in zip(segments, encoded, strict=True)]


def _carries_loss(loss: bool | Spans, begins: np.ndarray) -> np.ndarray:
    if isinstance(loss, bool):
        return np.full(len(begins), loss)
    carries = np.zeros(len(begins), bool)
    for start, stop in loss:
        carries |= (begins >= start) & (begins < stop)
    return carries


def _with_ends(
    segment: Segment, ids: np.ndarray, carries: np.ndarray, encoder: TextEncoder
) -> tuple[np.ndarray, np.ndarray]:
    """Its end carries loss; what stands before a document does where all of it does."""
    if segment.kind == "chat":  # a chat template writes the special tokens itself
        return ids, carries
    end = encoder.affixes[1] if segment.kind == "text" else encoder.completion_suffix
    prefix = encoder.affixes[0] if segment.starts_document else ids[:0]
    suffix = end if segment.ends_document else ids[:0]
    loss = [np.full(len(prefix), segment.loss is True), carries, np.ones(len(suffix), bool)]
    return np.concatenate([prefix, ids, suffix]), np.concatenate(loss)
