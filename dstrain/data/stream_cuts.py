"""How the rows of a stream become its samples: each from a mark on, so that any sample can be the first."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from dstrain.data.packing import order_in_packs, packed_sample, row_sample
from dstrain.data.rows import BadRow
from dstrain.data.stream_rows import Place, StreamRows, TokenRow
from dstrain.errors import UserError

_PACKED_TOGETHER = 64  # blocks: more would fill them little better, and a start has to read so many
Piece = tuple[np.ndarray, np.ndarray]
"""(ids, whether each carries loss), both [n <= block_size]."""


class Mark(NamedTuple):
    """Where sample number `sample` begins: `offset` into a row, in tokens where text is cut into blocks, else in pieces
    (of a long text, or the documents that come from one chat)."""

    sample: int = 0
    offset: int = 0
    place: Place = Place()


class Cutting(NamedTuple):
    """A sample that is not made yet. number: which; epoch: the pass in which it begins; mark: at or before it; content:
    what `Cut.sample` takes."""

    number: int
    epoch: int
    mark: Mark
    content: Any


class Cut(Protocol):
    def cut(self, mark: Mark) -> Iterator[Cutting]:
        """The samples from a mark on, without end. Their content is kept until they are read, and so is small."""
        ...

    def sample(self, content: Any) -> dict[str, np.ndarray]:
        """As `Samples` gives it."""
        ...


class BlockCut:
    """Text laid end to end and cut every `block_size` tokens, as `BlockSamples` does it."""

    def __init__(self, rows: StreamRows, block_size: int, dtype: np.dtype):
        self._rows, self._block_size, self._dtype = rows, block_size, dtype

    def cut(self, mark: Mark) -> Iterator[Cutting]:
        number, at = mark.sample, mark.offset
        begin, tokens, filled = mark, np.empty(self._block_size, self._dtype), 0
        for place, _, ((ids, _),) in self._rows.tokens(mark.place):
            while at < len(ids):
                if filled == 0:
                    begin = Mark(number, at, place)
                part = ids[at : at + self._block_size - filled]
                tokens[filled : filled + len(part)] = part
                filled, at = filled + len(part), at + len(part)
                if filled == self._block_size:
                    yield Cutting(number, begin.place.epoch, begin, tokens)
                    number, tokens, filled = number + 1, np.empty_like(tokens), 0
            at = 0

    def sample(self, content: np.ndarray) -> dict[str, np.ndarray]:
        input_ids = content.astype(np.int64)
        return {"input_ids": input_ids, "labels": input_ids.copy()}


class RowCut:
    """One document a sample, cut at `block_size`; those without a token to learn are left out, as by `RowSamples`."""

    def __init__(self, rows: StreamRows, block_size: int, long_rows: str):
        self._rows, self._block_size, self._long_rows = rows, block_size, long_rows

    def cut(self, mark: Mark) -> Iterator[Cutting]:
        for number, (place, offset, piece) in enumerate(self._pieces(mark), mark.sample):
            yield Cutting(number, place.epoch, Mark(number, offset, place), piece)

    def sample(self, content: Any) -> dict[str, np.ndarray]:
        return row_sample(*content)

    def _pieces(self, mark: Mark) -> Iterator[tuple[Place, int, Piece]]:
        """Those that carry loss, and the number of each in its row."""
        last = mark.place.epoch - 1  # pass that held one
        for row in self._rows.tokens(mark.place):
            if row.place.epoch > last + 1:
                raise UserError(
                    f"the training data ({self._rows.description}) hold no token to predict: give more text"
                )
            for offset, (ids, carries) in enumerate(self._cut(row)):
                if carries[1:].any() and (row.place, offset) >= (mark.place, mark.offset):
                    last = row.place.epoch
                    yield row.place, offset, (ids, carries)

    def _cut(self, row: TokenRow) -> Iterator[Piece]:
        size = self._block_size
        for ids, carries in row.documents:
            if self._rows.is_text:
                starts = range(0, len(ids), size)
                yield from ((ids[at : at + size], carries[at : at + size]) for at in starts)
            elif len(ids) <= size:
                yield ids, carries
            elif self._long_rows.startswith("cut"):
                kept = slice(-size, None) if self._long_rows == "cut_start" else slice(size)
                yield ids[kept].copy(), carries[kept].copy()  # not a view, which would keep the long row
            else:
                self._refuse_or_skip(row.where, len(ids))

    def _refuse_or_skip(self, where: str, length: int) -> None:
        problem = f"{where} has {length:,} tokens, more than a block of {self._block_size}"
        if self._long_rows == "refuse":
            raise UserError(f"{problem}: raise --block_size, or write --long_rows cut, cut_start or skip")
        self._rows.skipped.leave_out(BadRow(where, "longer than the block", problem))


class PackCut(RowCut):
    """Several of them a sample, as `PackedSamples` does it; but only those of a few blocks are packed together, so that
    the packs can begin anew anywhere."""

    def cut(self, mark: Mark) -> Iterator[Cutting]:
        number = mark.sample
        for group in self._groups(mark):
            place, offset, _ = group[0]
            begin = Mark(number, offset, place)
            order, packs = order_in_packs(np.array([len(ids) for _, _, (ids, _) in group]), self._block_size)
            for pack in np.split(order, np.flatnonzero(np.diff(packs)) + 1):
                yield Cutting(number, group[pack[0]][0].epoch, begin, [group[i][2] for i in pack])
                number += 1

    def _groups(self, mark: Mark) -> Iterator[list[tuple[Place, int, Piece]]]:
        group, num_tokens = [], 0
        for found in self._pieces(mark):
            group.append(found)
            num_tokens += len(found[2][0])
            if num_tokens >= _PACKED_TOGETHER * self._block_size:
                yield group
                group, num_tokens = [], 0

    def sample(self, content: Any) -> dict[str, np.ndarray]:
        return packed_sample([row_sample(*piece) for piece in content])
