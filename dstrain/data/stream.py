"""Streams: training text that is read and tokenized while training, in blocks that are a pure function of the source.

Documents are laid end to end and cut every `block_size` tokens, as `BlockSamples` does; behind the last document comes
the first again, without a gap. Blocks have numbers, and windows of blocks are put in random order one by one, so that
the order needs no state. What a checkpoint keeps is a mark, the place in the source where a window begins: a shortcut,
without which a resumed run would read from the beginning to the same end.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dstrain.arguments import DataArguments
from dstrain.data.columns import ColumnFlags, choose_shape, value_kind
from dstrain.data.files import read_file
from dstrain.data.order import epoch_order
from dstrain.data.packing import Samples
from dstrain.data.rows import EMPTY, NUM_PLACES, BadRow, Row, SkippedRows, read_row
from dstrain.data.sources import find_files, load_hub
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

SHUFFLE_BUFFER = 1000
_JOB_CHARACTERS, _JOB_DOCUMENTS = 2**18, 256  # text that is tokenized at once
_MARKED_BLOCKS = 2**17  # marks are kept of so many blocks: more than a checkpoint's step can lie behind
_END_BYTES = 2**16
logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A document: row `row` of file `file`, of whose epoch the files before hold `before` documents."""

    epoch: int = 0
    file: int = 0
    row: int = 0
    before: int = 0


class Mark(NamedTuple):
    """Where a block begins: `offset` tokens into a document, counted with its special tokens."""

    block: int = 0
    offset: int = 0
    place: Place = Place()


class StreamSource(Protocol):
    """Files of rows. identity: name -> what is known of a file without reading it whole."""

    description: str
    identity: dict[str, str]

    def __len__(self) -> int:
        """How many files."""
        ...

    def read(self, file: int, first: int) -> Iterator[Row | BadRow]:
        """The rows of one file from number `first` on."""
        ...


class FileStream:
    """Local files, in the order given."""

    def __init__(self, files: list[Path], columns: ColumnFlags):
        self._files, self._columns = files, columns
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        self.description = f"stream of {files[0]}{more}"
        self.identity = name_files(files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, file: int, first: int) -> Iterator[Row | BadRow]:
        return islice(read_file(self._files[file], self._columns), first, None)


class HubStream:
    """The training split of a dataset of the hub, or of a local folder in hub layout, as one file."""

    def __init__(self, name: str, config: str | None, columns: ColumnFlags):
        import datasets

        self._rows = load_hub(name, config, streaming=True)["train"]
        self._where = f"{name} (train)"
        self.description = f"stream of dataset {self._where}"
        first: dict = next(iter(self._rows), {})
        kinds = {column: value_kind(cell) for column, cell in first.items()}
        self._shape = choose_shape(f"--dataset_name {self._where}", kinds, columns)
        files = (datasets.load_dataset_builder(name, config).config.data_files or {}).get("train", [])
        local = [Path(file) for file in files if Path(file).is_file()]
        # Of a file on the hub the address says all, since the revision is part of it.
        self.identity = name_files(local) | {file: "" for file in files if not Path(file).is_file()}

    def __len__(self) -> int:
        return 1

    def read(self, file: int, first: int) -> Iterator[Row | BadRow]:
        rows = self._rows.select_columns(list(self._shape.columns)).skip(first)
        return (read_row(f"{self._where} row {number}", row, self._shape) for number, row in enumerate(rows, first + 1))


def name_files(files: list[Path]) -> dict[str, str]:
    """File name -> its size and a hash of its first and last 64 KiB. Raises UserError for one that cannot be read."""
    found: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(_END_BYTES))
                size = file.seek(0, 2)
                file.seek(max(0, size - _END_BYTES))
                digest.update(file.read(_END_BYTES))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        name = path.name if path.name not in found else f"{path.name} ({number})"
        found[name] = f"{size} bytes, ends {digest.hexdigest()[:16]}"
    return found


def open_stream(dargs: DataArguments) -> StreamSource:
    """The training text that the flags name. Raises UserError."""
    if dargs.dataset_name:
        return HubStream(dargs.dataset_name, dargs.dataset_config_name, ColumnFlags.of(dargs))
    return FileStream(find_files(dargs.train_file, "--train_file"), ColumnFlags.of(dargs))


class StreamSamples(Samples):
    """The blocks of a stream, by number, without end. Made to be read in its order; elsewhere it reads from a mark on.

    window: blocks that are shuffled among each other. In memory are one window, and another as far as a thread has read
    ahead.
    """

    def __init__(
        self,
        source: StreamSource,
        encoder: TextEncoder,
        block_size: int,
        window: int,
        max_documents: int | None = None,
        bad_rows: str = "refuse",
    ):
        self.block_size, self.window = block_size, window
        self._source, self._encoder, self._max_documents = source, encoder, max_documents
        self._skipped = SkippedRows(bad_rows)
        self._tell: Callable[[int, str], None] = lambda position, text: None
        self._lock = threading.Lock()  # a report on a broken batch reads in another thread
        self._reader: Any = None  # Loader of (Mark, tokens)
        self._number = -1  # of the window in memory
        self._blocks: list[np.ndarray] = []
        self._epoch = 0
        self._resumed = Mark()
        self._marks: dict[int, Mark] = {}  # window -> where it begins
        next(self._documents(Place()))  # what cannot be read at all is refused at once

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def order(self, seed: int) -> "WindowOrder":
        return WindowOrder(self.window, seed)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, within = divmod(index, self.window)
        with self._lock:
            if number < self._number:
                _, ids = next(self._blocks_from(index))
            else:
                while self._number < number:
                    self._read_window(number)
                ids = self._blocks[within]
        input_ids = ids.astype(np.int64)
        return {"input_ids": input_ids, "labels": input_ids.copy()}

    def state_at(self, position: int) -> dict[str, Any]:
        block, offset, place = self._mark_before(position // self.window * self.window)
        return {"block": block, "offset": offset, "place": list(place)}

    def load_state(self, state: dict[str, Any], tell: Callable[[int, str], None]) -> None:
        self._tell = tell
        if state:
            self._resumed = Mark(state["block"], state["offset"], Place(*state["place"]))
            self._epoch = self._resumed.place.epoch

    def close(self) -> None:
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._number, self._blocks = None, -1, []

    def _mark_before(self, block: int) -> Mark:
        """The nearest known mark at or before a block."""
        known = [Mark(), self._resumed, *list(self._marks.values())]
        return max((mark for mark in known if mark.block <= block), key=lambda mark: mark.block)

    def _read_window(self, wanted: int) -> None:
        """The next window; the first of all is `wanted`."""
        if self._reader is None:
            from dstrain.data.loader import Loader

            self._number = wanted - 1
            self._reader = Loader(self._blocks_from(wanted * self.window), depth=self.window)
        items = list(islice(self._reader, self.window))
        self._number += 1
        self._blocks = [ids for _, ids in items]
        self._marks[self._number] = items[0][0]
        self._marks.pop(self._number - 2 - _MARKED_BLOCKS // self.window, None)
        for mark, _ in items:
            if mark.place.epoch > self._epoch:
                self._epoch = mark.place.epoch
                self._tell(mark.block, f"the stream has ended and begins again: pass {self._epoch + 1}")

    def _blocks_from(self, first: int) -> Iterator[tuple[Mark, np.ndarray]]:
        return dropwhile(lambda item: item[0].block < first, self.blocks(self._mark_before(first)))

    def blocks(self, mark: Mark) -> Iterator[tuple[Mark, np.ndarray]]:
        """The blocks from a mark on: where each begins, and its tokens [block_size] in the encoder's dtype."""
        number, at = mark.block, mark.offset
        begin, tokens, filled = mark, np.empty(self.block_size, self._encoder.dtype), 0
        for place, ids in self._encoded(self._documents(mark.place)):
            while at < len(ids):
                if filled == 0:
                    begin = Mark(number, at, place)
                part = ids[at : at + self.block_size - filled]
                tokens[filled : filled + len(part)] = part
                filled, at = filled + len(part), at + len(part)
                if filled == self.block_size:
                    yield begin, tokens
                    number, tokens, filled = number + 1, np.empty_like(tokens), 0
            at = 0

    def _encoded(self, documents: Iterator[tuple[Place, str]]) -> Iterator[tuple[Place, np.ndarray]]:
        """Each document's tokens, special ones included."""
        prefix, suffix = self._encoder.affixes
        for job in _jobs(documents):
            pieces = [self._encoder.split(text, _JOB_CHARACTERS) for _, text in job]
            arrays = iter(self._encoder.encode([piece for parts in pieces for piece in parts]))
            for (place, _), parts in zip(job, pieces, strict=True):
                yield place, np.concatenate([prefix, *islice(arrays, len(parts)), suffix])

    def _documents(self, place: Place) -> Iterator[tuple[Place, str]]:
        """The documents with text in them from a place on, pass after pass."""
        while True:
            empty = place == Place(place.epoch)  # until a document shows
            for here, row in self._pass(place):
                if isinstance(row, BadRow):
                    self._skip(row)
                elif not isinstance(row.document, tuple) or len(row.document) != 1:
                    raise UserError(
                        f"{row.where} holds a prompt or a chat, and --streaming reads plain text: leave it out, "
                        "or name one column with --text_column"
                    )
                else:
                    empty = False
                    yield here, row.document[0]
            if empty:
                raise UserError(f"{self._source.description} holds no text: name files or a column with text in them")
            place = Place(place.epoch + 1)

    def _skip(self, bad: BadRow) -> None:
        self._skipped.add(bad)
        if bad.kind != EMPTY and self._skipped.kinds[bad.kind]["rows"] <= NUM_PLACES:
            logger.warning("left out: %s", bad.problem)

    def _pass(self, place: Place) -> Iterator[tuple[Place, Row | BadRow]]:
        epoch, file, number, before = place
        for which in range(file, len(self._source)):
            for row in self._source.read(which, number):
                if before + number == self._max_documents:
                    return
                yield Place(epoch, which, number, before), row
                number += 1
            before, number = before + number, 0


def _jobs(documents: Iterator[tuple[Place, str]]) -> Iterator[list[tuple[Place, str]]]:
    """Documents together worth tokenizing at once. There is always one more: documents have no end."""
    while True:
        job: list[tuple[Place, str]] = []
        characters = 0
        try:
            while characters < _JOB_CHARACTERS and len(job) < _JOB_DOCUMENTS:
                job.append(next(documents))
                characters += len(job[-1][1]) + 1
        except UserError:
            yield job  # what stands before the broken row is trained on
            raise
        yield job


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
