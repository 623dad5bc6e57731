"""Streams: training data that are read and tokenized while training, in samples that are a pure function of the source.

Text is cut as `BlockSamples` does it, rows of prompts and chats as `RowSamples` does; behind the last row comes the
first again, without a gap. Samples have numbers, and windows of samples are put in random order one by one, so that the
order needs no state. What a checkpoint keeps is a mark, the place in the source where a window begins: a shortcut,
without which a resumed run would read from the beginning to the same end.
"""

import threading
from collections.abc import Callable, Iterator
from itertools import dropwhile, islice
from typing import Any

import numpy as np

from dstrain.arguments import DataArguments
from dstrain.data.order import epoch_order
from dstrain.data.packing import Samples
from dstrain.data.segments import RowRules
from dstrain.data.stream_cuts import BlockCut, Cut, Cutting, Mark, PackCut, RowCut
from dstrain.data.stream_rows import Place, StreamRows
from dstrain.data.stream_source import StreamSource
from dstrain.data.tokenization import TextEncoder

_SHUFFLE_BUFFER = 1000
_MARKED_SAMPLES = 2**17  # marks are kept of so many: more than a checkpoint's step can lie behind


class StreamSamples(Samples):
    """The samples of a stream, by number, without end. Made to be read in its order; elsewhere it reads from a mark on.

    window: samples that are shuffled among each other. In memory are one window, and another as far as a thread has
    read ahead. kinds: of the rows so far, as in `Segment`.
    """

    def __init__(self, source: StreamSource, encoder: TextEncoder, dargs: DataArguments, block_size: int):
        """Raises UserError for what cannot be read at all."""
        self.block_size, self.window = block_size, dargs.shuffle_buffer or _SHUFFLE_BUFFER
        rows = StreamRows(source, encoder, RowRules(dargs.bad_rows, dargs.train_on_prompts), dargs.max_train_samples)
        self.is_text, self.kinds = rows.is_text, rows.kinds
        self._cut: Cut
        if dargs.packing:
            self._cut = PackCut(rows, block_size, dargs.long_rows)
        elif rows.is_text:
            self._cut = BlockCut(rows, block_size, encoder.dtype)
        else:
            self._cut = RowCut(rows, block_size, dargs.long_rows)
        self._tell: Callable[[int, str], None] = lambda position, text: None
        self._lock = threading.Lock()  # a report on a broken batch reads in another thread
        self._reader: Any = None  # Loader of Cutting
        self._number = -1  # of the window in memory
        self._cuttings: list[Cutting] = []
        self._epoch: int | None = 0  # of the last sample read; None: of the next one, which was told before
        self._resumed = Mark()
        self._marks: dict[int, Mark] = {}  # window -> where it begins
        next(self._cut.cut(Mark()))

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def order(self, seed: int) -> "WindowOrder":
        return WindowOrder(self.window, seed)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, within = divmod(index, self.window)
        with self._lock:
            if number < self._number:
                cutting = next(self._from(index))
            else:
                while self._number < number:
                    self._read_window(number)
                cutting = self._cuttings[within]
        return self._cut.sample(cutting.content)

    def state_at(self, position: int) -> dict[str, Any]:
        sample, offset, place = self._mark_before(position // self.window * self.window)
        return {"sample": sample, "offset": offset, "place": list(place)}

    def load_state(self, state: dict[str, Any], tell: Callable[[int, str], None]) -> None:
        self._tell = tell
        if state:
            self._resumed = Mark(state["sample"], state["offset"], Place(*state["place"]))
            self._epoch = None

    def close(self) -> None:
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._number, self._cuttings = None, -1, []

    def _mark_before(self, sample: int) -> Mark:
        """The nearest known mark at or before a sample."""
        known = [Mark(), self._resumed, *list(self._marks.values())]
        return max((mark for mark in known if mark.sample <= sample), key=lambda mark: mark.sample)

    def _read_window(self, wanted: int) -> None:
        """The next window; the first of all is `wanted`."""
        if self._reader is None:
            from dstrain.data.loader import Loader

            self._number = wanted - 1
            self._reader = Loader(self._from(wanted * self.window), depth=self.window)
        self._cuttings = list(islice(self._reader, self.window))
        self._number += 1
        self._marks[self._number] = self._cuttings[0].mark
        self._marks.pop(self._number - 2 - _MARKED_SAMPLES // self.window, None)
        for cutting in self._cuttings:
            if self._epoch is not None and cutting.epoch > self._epoch:
                self._tell(cutting.number, f"the stream has ended and begins again: pass {cutting.epoch + 1}")
            self._epoch = max(cutting.epoch, self._epoch or 0)

    def _from(self, first: int) -> Iterator[Cutting]:
        return dropwhile(lambda cutting: cutting.number < first, self._cut.cut(self._mark_before(first)))


class WindowOrder:
    """order[position] -> block: windows of so many blocks, each in a permutation of its own."""

    def __init__(self, window: int, seed: int):
        self.window, self.seed = window, seed
        self._number, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        number, within = divmod(position, self.window)
        if number != self._number:
            self._order = epoch_order(self.window, self.seed, number, 0, self.window)
            self._number = number
        return number * self.window + int(self._order[within])
