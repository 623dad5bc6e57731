"""The order of samples, and the micro-batches of each step.

The order is one global list, a pure function of the seed; ranks and micro-batches only divide it. So the samples of a
step depend neither on the number of ranks nor on the accumulation, and a resumed run starts anywhere at no cost.
"""

import itertools
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

import numpy as np
import torch

from dstrain.data.packing import IGNORE, Samples
from dstrain.phases import phase

PACKED_MULTIPLE = 64  # nearly all micro-batches get one shape: oneDNN keeps kernels for every shape that it meets
MicroBatch = dict[str, torch.Tensor]
Item = TypeVar("Item")


def collate(rows: list[dict[str, np.ndarray]], pad_token_id: int, block_size: int = 0) -> MicroBatch:
    """Rows of length n_i -> int64 tensors [len(rows), max n_i]; `attention_mask` only where rows are padded.

    Packed rows are filled up to a multiple of PACKED_MULTIPLE, at most to block_size: see there.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    longest, padded = max(lengths), min(lengths) < max(lengths)
    if "position_ids" in rows[0]:
        longest = max(longest, min(-(-longest // PACKED_MULTIPLE) * PACKED_MULTIPLE, block_size))
    fill = {"input_ids": pad_token_id, "labels": IGNORE, "position_ids": 0}
    batch = {}
    for name in rows[0]:
        out = np.full((len(rows), longest), fill[name], np.int64)
        for target, row, length in zip(out, rows, lengths, strict=True):
            target[:length] = row[name]
        batch[name] = torch.from_numpy(out)
    if padded and "position_ids" not in batch:
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return batch


def num_tokens(batch: MicroBatch) -> torch.Tensor:
    """Tokens of a micro-batch without padding: int64 scalar on the batch's device.

    Packed rows have no attention_mask, which would hide from Hugging Face's attention that several documents are in
    one row: their padding is a run of one-token documents (position 0, then 0 again); a real one has at least two.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    count = torch.ones_like(batch["input_ids"])
    if "position_ids" in batch:
        at_start = torch.nn.functional.pad(batch["position_ids"] == 0, (0, 1), value=True)
        count -= (at_start[:, :-1] & at_start[:, 1:]).long()
    return count.sum()


def step_plan(global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> list[range]:
    """Offsets into the step's samples of each of this rank's micro-batches."""
    per_round = micro_batch * dp_size
    assert global_batch % per_round == 0, f"{global_batch} is not a multiple of {micro_batch} x {dp_size}"
    starts = range(dp_rank * micro_batch, global_batch, per_round)
    return [range(start, start + micro_batch) for start in starts]


def build_loader(
    samples: Samples,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    samples_consumed: int = 0,
    pad_token_id: int = 0,
) -> "Loader[list[MicroBatch]]":
    """An endless iterator over steps; each item is the list of this rank's micro-batches of one step.

    Step i reads positions samples_consumed + i * global_batch ... of the order; micro-batch k of rank r takes
    micro_batch positions from (k * dp_size + r) * micro_batch on. Call `close()` (or use `with`) when done.
    """
    plan = step_plan(global_batch, micro_batch, dp_rank, dp_size)

    def steps() -> Iterator[list[MicroBatch]]:
        order = samples.order(seed)
        try:
            for first in itertools.count(samples_consumed, global_batch):
                rows = ([samples[order[first + i]] for i in micro] for micro in plan)
                yield [collate(own, pad_token_id, samples.block_size) for own in rows]
        finally:
            samples.close()

    return Loader(steps())


class Loader(Generic[Item]):
    """Runs an iterator in a thread, `depth` items ahead. Its exceptions are raised here; `close` ends the thread."""

    def __init__(self, items: Iterator[Item], depth: int = 4):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(items, self._queue, self._stop), name="dstrain-loader", daemon=True
        )
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> "Loader[Item]":
        return self

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        with phase("data"):
            kind, value = self._queue.get()
        if kind == "item":
            return value
        self._stop.set()
        raise value

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Loader[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(items: Iterator, out: queue.Queue, stop: threading.Event) -> None:
    def put(entry: tuple) -> None:
        while not stop.is_set():
            try:
                out.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    try:
        for item in items:
            put(("item", item))
            if stop.is_set():
                return
        put(("error", StopIteration()))
    except Exception as error:  # noqa: BLE001 - whatever it is, the consumer raises it
        put(("error", error))
    finally:
        if isinstance(items, Generator):
            items.close()


def eval_batches(
    samples: Samples,
    *,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    max_batches: int | None = None,
    pad_token_id: int = 0,
) -> Iterator[list[MicroBatch]]:
    """The samples in order, once, in whole global batches; each item as in `build_loader`.

    The last batch is filled up with copies of the last sample that carry no loss, so every rank gets as many.
    """
    plan = step_plan(global_batch, micro_batch, dp_rank, dp_size)
    num_batches = -(-len(samples) // global_batch)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)

    def sample(position: int) -> dict[str, np.ndarray]:
        row = samples[min(position, len(samples) - 1)]
        return row if position < len(samples) else row | {"labels": np.full_like(row["labels"], IGNORE)}

    for first in range(0, num_batches * global_batch, global_batch):
        rows = ([sample(first + i) for i in micro] for micro in plan)
        yield [collate(own, pad_token_id, samples.block_size) for own in rows]
