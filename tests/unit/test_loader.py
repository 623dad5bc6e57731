"""The order of samples is one global list; ranks, micro-batches and restarts only divide it."""

import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.loader import Loader, build_loader, collate, eval_batches, num_tokens
from dstrain.data.order import Order, epoch_order
from dstrain.data.packing import IGNORE, Samples

GOLDEN_10 = [6, 0, 1, 3, 9, 4, 2, 7, 5, 8]
GOLDEN_MILLION = [482563, 938659, 377440, 139347, 910560, 417479, 198488, 467891, 293828, 580921]


class Numbered(Samples):
    """Sample i holds the number i, in all of its tokens; lengths differ when asked for."""

    def __init__(self, count: int, ragged: bool = False):
        self.block_size = 4
        self.token_counts = np.array([1 + i % 4 if ragged else 4 for i in range(count)])
        self.label_counts = self.token_counts - 1

    def __getitem__(self, index):
        ids = np.full(self.token_counts[index], index)
        return {"input_ids": ids, "labels": ids.copy()}


def step_ids(samples, steps, *, consumed=0, global_batch, micro_batch, dp_size, seed=7):
    """[steps][global_batch] sample numbers, put together from all ranks in the order of the contract."""
    ranks = []
    for rank in range(dp_size):
        with build_loader(
            samples,
            seed=seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=dp_size,
            samples_consumed=consumed,
        ) as loader:
            ranks.append(list(islice(loader, steps)))
    return [
        [int(i) for k in range(len(ranks[0][s])) for rank in ranks for i in rank[s][k]["input_ids"][:, 0]]
        for s in range(steps)
    ]


@given(st.integers(1, 700), st.integers(0, 2**32), st.integers(0, 5))
def test_epoch_order_is_a_permutation(count, seed, epoch):
    assert sorted(epoch_order(count, seed, epoch, 0, count)) == list(range(count))


@given(st.integers(1, 10**12), st.integers(0, 10**6), st.data())
@settings(max_examples=50)
def test_epoch_order_of_a_part_needs_no_whole(count, seed, data):
    start = data.draw(st.integers(0, count - 1))
    part = epoch_order(count, seed, 3, start, min(start + 5, count))
    single = [epoch_order(count, seed, 3, i, i + 1)[0] for i in range(start, min(start + 5, count))]
    assert part.tolist() == single
    assert (part >= 0).all()
    assert (part < count).all()


def test_order_never_changes():
    """Runs that began with an older version resume in the same order: these numbers may never change."""
    assert epoch_order(10, 42, 0, 0, 10).tolist() == GOLDEN_10
    assert epoch_order(10**6, 42, 1, 999_990, 1_000_000).tolist() == GOLDEN_MILLION


def test_every_order_is_about_as_likely():
    seen = {}
    for seed in range(1500):
        order = tuple(epoch_order(4, seed, 0, 0, 4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    expected = 1500 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < 49.7  # 23 degrees of freedom: exceeded once in a thousand


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_order(1000, seed, epoch, 0, 1000) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.02
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


@given(
    st.integers(1, 60),
    st.sampled_from([(8, 1), (8, 2), (8, 4), (8, 8), (4, 2), (2, 1), (2, 4), (1, 1), (1, 8)]),
    st.integers(0, 200),
)
@settings(max_examples=40, deadline=None)
def test_any_division_reads_the_same_global_order(count, division, consumed):
    micro_batch, dp_size = division
    global_batch = 16 if micro_batch * dp_size <= 16 else micro_batch * dp_size
    got = step_ids(
        Numbered(count), 3, consumed=consumed, global_batch=global_batch, micro_batch=micro_batch, dp_size=dp_size
    )
    order = Order(count, 7)
    expected = [[order[consumed + s * global_batch + i] for i in range(global_batch)] for s in range(3)]
    assert got == expected


def test_an_epoch_shows_every_sample_once_and_the_next_goes_on_inside_a_step():
    steps = step_ids(Numbered(10), 5, global_batch=4, micro_batch=2, dp_size=2)
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == list(range(10))
    assert sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_fewer_samples_than_a_global_batch():
    (step,) = step_ids(Numbered(3), 1, global_batch=8, micro_batch=2, dp_size=1)
    assert sorted(step[:3]) == sorted(step[3:6]) == [0, 1, 2]
    assert len(step) == 8


def test_resume_is_immediate_and_exact():
    samples = Numbered(1_000_000)
    whole = step_ids(samples, 6, consumed=10**12, global_batch=8, micro_batch=2, dp_size=2)
    began = time.perf_counter()
    later = step_ids(samples, 2, consumed=10**12 + 4 * 8, global_batch=8, micro_batch=4, dp_size=1)
    assert later == whole[4:]
    assert time.perf_counter() - began < 1.0


def test_padding_and_masks():
    rows = [{"input_ids": np.arange(n), "labels": np.arange(n)} for n in (2, 4)]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[0, 1, 9, 9], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[0, 1, IGNORE, IGNORE], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert num_tokens(batch) == 6
    even = collate(rows[1:] * 2, pad_token_id=9)
    assert "attention_mask" not in even
    assert num_tokens(even) == 8


def test_padding_of_packed_rows_stands_in_position_ids():
    rows = [
        {"input_ids": np.arange(n), "labels": np.arange(n), "position_ids": np.array(p)}
        for n, p in ((5, [0, 1, 0, 1, 2]), (2, [0, 1]))
    ]
    batch = collate(rows, pad_token_id=9)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert num_tokens(batch) == 7
    for block_size, length in ((4, 5), (8, 8), (100, 64)):
        filled = collate(rows, pad_token_id=9, block_size=block_size)
        assert filled["input_ids"].shape == (2, length) and set(filled["labels"][0, 5:].tolist()) <= {IGNORE}
        assert num_tokens(filled) == 7


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)])
def test_evaluation_reads_everything_once_on_any_number_of_ranks(dp_size, micro_batch):
    samples = Numbered(19, ragged=True)
    per_rank = [
        list(eval_batches(samples, global_batch=8, micro_batch=micro_batch, dp_rank=r, dp_size=dp_size))
        for r in range(dp_size)
    ]
    assert {len(batches) for batches in per_rank} == {3}
    assert {len(batch) for batches in per_rank for batch in batches} == {8 // (micro_batch * dp_size)}
    labels = [b["labels"] for batches in per_rank for batch in batches for b in batch]
    tokens = torch.cat([row[row != IGNORE] for tensor in labels for row in tensor])
    assert tokens.bincount(minlength=19).tolist() == samples.token_counts.tolist()


def test_evaluation_can_be_cut_short():
    batches = list(eval_batches(Numbered(50), global_batch=4, micro_batch=4, dp_rank=0, dp_size=1, max_batches=2))
    assert [b["input_ids"][:, 0].tolist() for (b,) in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_thread_ends_with_close_and_with_the_last_reference():
    def endless():
        while True:
            yield []

    before = threading.active_count()
    loader = Loader(endless())
    next(loader)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)
    dropped = Loader(endless())
    thread = dropped._thread
    del dropped
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_an_error_in_the_thread_is_raised_to_the_consumer():
    def items():
        yield [1]
        raise RuntimeError("broken sample")

    loader = Loader(items())
    assert next(loader) == [1]
    with pytest.raises(RuntimeError, match="broken sample"):
        next(loader)
    loader.close()


def test_a_finite_source_ends():
    assert list(Loader(iter([[1], [2]]))) == [[1], [2]]


class SlowToRead(Numbered):
    def __getitem__(self, index):
        time.sleep(0.0002)
        return super().__getitem__(index)


def test_the_consumer_does_not_wait():
    """Once its thread is ahead, a step of 10 ms does not wait for the 3 ms that its samples take to read."""
    with build_loader(SlowToRead(10_000), seed=1, global_batch=16, micro_batch=8, dp_rank=0, dp_size=1) as loader:
        next(loader)
        waits = []
        for _ in range(50):
            time.sleep(0.01)
            began = time.perf_counter()
            next(loader)
            waits.append(time.perf_counter() - began)
    assert sorted(waits)[25] < 0.001
