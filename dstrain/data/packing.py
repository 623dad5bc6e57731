"""Samples: how the tokens of documents become the rows of a batch. Pure functions of a token store; NumPy only."""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dstrain.data.order import Order, SampleOrder
from dstrain.data.store import TokenStore, count_labels

IGNORE = -100


class Samples(ABC):
    """A fixed list of samples.

    `samples[i]` is a dict of int64 arrays of one length n <= block_size: `input_ids`, `labels` (not shifted, as in
    Hugging Face; -100: no loss), and `position_ids` where documents that do not see each other share the sample.

    token_counts: int64 [len], the n of every sample; label_counts: int64 [len], the tokens of each that a next-token
    loss counts (labels[1:] != -100).
    """

    block_size: int
    token_counts: np.ndarray
    label_counts: np.ndarray

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    def __len__(self) -> int:
        return len(self.token_counts)

    def order(self, seed: int) -> SampleOrder:
        """order[position] -> index, without end: in which order training reads the samples."""
        return Order(len(self), seed)

    def state_at(self, position: int) -> dict[str, Any]:
        """JSON for a checkpoint: what helps a later start to read on from a position of the order. Nothing, mostly."""
        return {}

    def load_state(self, state: dict[str, Any], tell: Callable[[int, str], None]) -> None:
        """Before the first sample is read. state: from `state_at`, or {}. tell(position, text): what has happened."""
        return

    def close(self) -> None:
        """End what reading has begun."""
        return

    @cached_property
    def num_tokens(self) -> int:
        return int(self.token_counts.sum())

    @cached_property
    def num_label_tokens(self) -> int:
        return int(self.label_counts.sum())


class Subset(Samples):
    """Some of the samples. indices: int64 [len]."""

    def __init__(self, samples: Samples, indices: np.ndarray):
        self.samples, self.indices, self.block_size = samples, indices, samples.block_size
        self.token_counts, self.label_counts = samples.token_counts[indices], samples.label_counts[indices]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.samples[int(self.indices[index])]


class BlockSamples(Samples):
    """Documents laid end to end and cut every `block_size` tokens, as Hugging Face's `run_clm.py` does.

    The rest shorter than a block is dropped, unless it is all there is. Blocks are arithmetic: no index is stored.
    documents: int64 [m], which documents of the store, in order.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, block_size: int):
        self.store, self.documents, self.block_size = store, documents, block_size
        self._lengths = store.lengths[documents]
        self._ends = np.cumsum(self._lengths)
        total = int(self._ends[-1]) if len(documents) else 0
        self._length = min(total, block_size)
        count = total // block_size if total >= block_size else int(total > 0)
        self.token_counts = np.broadcast_to(np.int64(self._length), count)
        self.label_counts = np.broadcast_to(np.int64(self._length - 1), count)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        input_ids = np.empty(self._length, np.int64)
        filled, position = 0, index * self._length
        which = int(np.searchsorted(self._ends, position, side="right"))
        while filled < self._length:
            end = int(self._ends[which])
            take = min(self._length - filled, end - position)
            begin = int(self.store.offsets[self.documents[which]] + self._lengths[which]) - (end - position)
            input_ids[filled : filled + take] = self.store.tokens[begin : begin + take]
            filled, position, which = filled + take, position + take, which + 1
        return {"input_ids": input_ids, "labels": input_ids.copy()}


def cut_rows(
    store: TokenStore, documents: np.ndarray, block_size: int, keep_end: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(begins in the store's tokens, lengths) of what a block holds of each row, int64 [m]: its start or its end."""
    lengths = store.lengths[documents]
    taken = np.minimum(lengths, block_size)
    return np.asarray(store.offsets)[documents] + (lengths - taken) * keep_end, taken


class RowSamples(Samples):
    """One document a sample, cut at `block_size`. Rows without a token to learn are left out.

    keep_end: a row that is cut loses its beginning. num_cut: rows longer than a block; num_without_loss: rows left out.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, block_size: int, keep_end: bool = False):
        self.store, self.block_size = store, block_size
        lengths = store.lengths[documents]
        begins, taken = cut_rows(store, documents, block_size, keep_end)
        counts = count_labels(store, begins, taken)
        keep = counts > 0
        self._begins = begins[keep]
        self.token_counts, self.label_counts = taken[keep], counts[keep]
        self.num_cut = int((lengths[keep] > block_size).sum())
        self.num_without_loss = int((~keep).sum())

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _read(self.store, int(self._begins[index]), int(self.token_counts[index]))


def _read(store: TokenStore, begin: int, length: int) -> dict[str, np.ndarray]:
    piece = slice(begin, begin + length)
    return row_sample(store.tokens[piece], None if store.carries_loss is None else store.carries_loss[piece])


def row_sample(ids: np.ndarray, carries_loss: np.ndarray | None) -> dict[str, np.ndarray]:
    """A document, or a piece of one, as a sample: nothing precedes its first token, which has no label.

    carries_loss: bool [n], or None where every token does.
    """
    input_ids = ids.astype(np.int64)
    labels = input_ids.copy()
    if carries_loss is not None:
        labels[~carries_loss] = IGNORE
    labels[:1] = IGNORE
    return {"input_ids": input_ids, "labels": labels}


def packed_sample(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Samples that do not see each other as one."""
    return {
        "input_ids": np.concatenate([row["input_ids"] for row in rows]),
        "labels": np.concatenate([row["labels"] for row in rows]),
        "position_ids": np.concatenate([np.arange(len(row["input_ids"])) for row in rows]),
    }


class PackedSamples(Samples):
    """Blocks filled with whole documents that do not see each other.

    `position_ids` begin at 0 with each document, which is how Hugging Face's attention functions tell documents apart
    (when there is no attention_mask); a document's first token carries no loss, so that no prediction crosses over.

    pieces: int64 [p, 4] from `pack_documents`, sorted by pack. num_documents: how many documents they were made of.
    """

    def __init__(self, store: TokenStore, pieces: np.ndarray, block_size: int, num_documents: int):
        self.store, self.pieces, self.block_size = store, pieces, block_size
        is_start = np.diff(pieces[:, 0], prepend=-1) != 0
        starts = np.flatnonzero(is_start)
        self._bounds = np.append(starts, len(pieces))
        sums = np.add.reduceat(pieces[:, 2:], starts) if len(starts) else np.empty((0, 2), np.int64)
        self.token_counts, self.label_counts = sums[:, 0], sums[:, 1]
        if store.is_rows:
            documents = np.searchsorted(store.offsets, pieces[:, 1], side="right") - 1
            self.num_cut = int((store.lengths[documents] > block_size).sum())
            self.num_without_loss = num_documents - len(pieces)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pieces = self.pieces[self._bounds[index] : self._bounds[index + 1]].tolist()
        return packed_sample([_read(self.store, begin, length) for _, begin, length, _ in pieces])


def pack_documents(store: TokenStore, documents: np.ndarray, block_size: int, keep_end: bool = False) -> np.ndarray:
    """Put documents into as few blocks as best-fit decreasing finds: int64 [p, 4], a row per piece of a document.

    Columns: pack, begin (in the store's tokens), length, labels (the tokens of it that a next-token loss counts).
    documents: int64 [m], ascending. Plain documents longer than a block are cut into blocks and a rest; rows are cut
    off at the block (keep_end: they lose their beginning), since a rest would have lost its prompt. Pieces without a
    label are left out, hence every piece has at least two tokens.
    """
    if store.is_rows:
        begins, lengths = cut_rows(store, documents, block_size, keep_end)
    else:
        lengths, begins = store.lengths[documents], np.asarray(store.offsets)[documents]
        counts = -(-lengths // block_size)
        part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        lengths = np.minimum(np.repeat(lengths, counts) - part * block_size, block_size)
        begins = np.repeat(begins, counts) + part * block_size
    labels = count_labels(store, begins, lengths)
    keep = labels > 0
    lengths, begins, labels = lengths[keep], begins[keep], labels[keep]
    order, packs = order_in_packs(lengths, block_size)
    return np.stack([packs, begins[order], lengths[order], labels[order]], axis=1).astype(np.int64)


def order_in_packs(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents pack by pack, the pack of each), int64 [n]. Packs are numbered by their first document, documents keep
    their order inside a pack. lengths: int64 [n], each in 1..block_size."""
    packs = best_fit_decreasing(lengths, block_size)
    first_of_pack = np.full(len(lengths), len(lengths))
    np.minimum.at(first_of_pack, packs, np.arange(len(packs)))
    order = np.lexsort((np.arange(len(packs)), first_of_pack[packs]))
    return order, np.cumsum(np.diff(first_of_pack[packs][order], prepend=-1) != 0) - 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each item, int64 [n]: longest items first, each into the fullest bin that has room (Johnson 1973).

    lengths: int64 [n], each in 1..capacity. Works on all items of one length at once, so the cost grows with the
    number of distinct lengths, not with n (beyond the sort).
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else []
    rooms: list[int] = []  # room left, sorted; bins_with[room] are the bins
    bins_with: dict[int, list[np.ndarray]] = {}
    num_bins = 0

    def put_back(room: int, which: np.ndarray) -> None:
        if room and len(which):
            if room not in bins_with:
                bins_with[room] = []
                insort(rooms, room)
            bins_with[room].append(which)

    for items in groups:
        length = int(lengths[items[0]])
        while len(items):
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                stock = bins_with.pop(room)
                available = stock[0] if len(stock) == 1 else np.sort(np.concatenate(stock))
            else:
                room = capacity
                available = np.arange(num_bins, num_bins + -(-len(items) // (room // length)))
                num_bins += len(available)
            # A bin that takes one item of this length is then the fullest with room for the next: fill it up.
            each = room // length
            used = min(-(-len(items) // each), len(available))
            here, items = items[: used * each], items[used * each :]
            bins[here] = np.repeat(available[:used], each)[: len(here)]
            in_last = len(here) - (used - 1) * each
            put_back(room - each * length, available[: used - 1])
            put_back(room - in_last * length, available[used - 1 : used])
            put_back(room, available[used:])
    return bins
