"""Blocks, rows and packs: what becomes of every token of every document."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.packing import (
    IGNORE,
    BlockSamples,
    PackedSamples,
    RowSamples,
    Subset,
    best_fit_decreasing,
    pack_documents,
)
from dstrain.data.store import count_labels

documents_of = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def store_of(lengths, completions=None, carries_loss=None):
    """A store whose tokens count upwards from 0, so that a token says where it comes from.

    completions: where in each document its completion begins; carries_loss: of each token, instead."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if completions is not None:
        carries_loss = np.concatenate([np.arange(n) >= c for n, c in zip(lengths, completions, strict=True)])
    return SimpleNamespace(
        tokens=np.arange(offsets[-1], dtype=np.uint32),
        offsets=offsets,
        lengths=np.diff(offsets),
        carries_loss=carries_loss,
        is_rows=carries_loss is not None,
    )


def check_counts(samples):
    """token_counts and label_counts are what the samples really hold."""
    for i in range(len(samples)):
        sample = samples[i]
        assert {len(values) for values in sample.values()} == {samples.token_counts[i]}
        assert all(values.dtype == np.int64 for values in sample.values())
        assert samples.label_counts[i] == (sample["labels"][1:] != IGNORE).sum()
        assert len(sample["labels"]) <= samples.block_size
        assert np.isin(sample["labels"], [IGNORE, *sample["input_ids"]]).all()
    assert samples.num_tokens == sum(samples.token_counts)
    assert samples.num_label_tokens == sum(samples.label_counts)


@given(documents_of, st.integers(2, 25), st.data())
def test_blocks_are_the_documents_end_to_end(lengths, block_size, data):
    store = store_of(lengths)
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    samples = BlockSamples(store, np.array(chosen), block_size)
    stream = np.concatenate([store.tokens[store.offsets[d] : store.offsets[d + 1]] for d in chosen])
    check_counts(samples)
    read = np.concatenate([samples[i]["input_ids"] for i in range(len(samples))])
    if len(stream) >= block_size:
        assert read.tolist() == stream[: len(stream) // block_size * block_size].tolist()
    else:
        assert read.tolist() == stream.tolist()
    with pytest.raises(IndexError):
        samples[len(samples)]


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(50, 64))
def test_best_fit_decreasing_is_the_textbook_algorithm(lengths, capacity):
    packs = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    got = np.bincount(packs, weights=lengths, minlength=len(rooms)) if lengths else np.empty(0)
    assert sorted(capacity - got.astype(int)) == sorted(rooms)


@given(documents_of, st.integers(2, 25))
@settings(deadline=None)
def test_packs_hold_every_document_once_and_apart(lengths, block_size):
    store = store_of(lengths)
    samples = PackedSamples(store, pack_documents(store, np.arange(len(lengths)), block_size), block_size, len(lengths))
    check_counts(samples)
    seen = []
    for i in range(len(samples)):
        sample = samples[i]
        ids, starts = sample["input_ids"], np.flatnonzero(sample["position_ids"] == 0)
        assert (sample["labels"][starts] == IGNORE).all()
        assert (np.delete(sample["labels"], starts) != IGNORE).all()
        for piece, positions in zip(
            np.split(ids, starts[1:]), np.split(sample["position_ids"], starts[1:]), strict=True
        ):
            assert len(piece) >= 2
            assert positions.tolist() == list(range(len(piece)))
            assert np.diff(piece).tolist() == [1] * (len(piece) - 1)
            (_document,) = set(np.searchsorted(store.offsets, piece, side="right"))  # one document only
            seen += piece.tolist()
    # Left out: rests of a single token, which have nothing to predict.
    alone = [store.offsets[d + 1] - 1 for d, n in enumerate(lengths) if n % block_size == 1]
    assert sorted([*seen, *alone]) == store.tokens.tolist()


def test_packing_does_not_depend_on_chance():
    lengths = np.random.default_rng(0).integers(2, 300, 5000)
    store = store_of(lengths)
    first, second = (pack_documents(store, np.arange(5000), 256) for _ in range(2))
    assert np.array_equal(first, second)
    filled = PackedSamples(store, first, 256, 5000).num_tokens / ((first[-1, 0] + 1) * 256)
    assert filled > 0.97


def test_rows_learn_completions_only():
    # document:      prompt 3, completion 2 | no prompt | longer than the block | completion beyond the block
    store = store_of([5, 3, 9, 8], completions=[3, 0, 2, 7])
    samples = RowSamples(store, np.arange(4), block_size=6)
    check_counts(samples)
    assert [samples[i]["labels"].tolist() for i in range(len(samples))] == [
        [IGNORE, IGNORE, IGNORE, 3, 4],
        [IGNORE, 6, 7],
        [IGNORE, IGNORE, 10, 11, 12, 13],
    ]
    assert samples.num_cut == 1
    assert samples.num_without_loss == 1
    assert samples.label_counts.tolist() == [2, 2, 4]


def test_packed_rows_learn_completions_only():
    store = store_of([5, 3, 9, 8], completions=[3, 0, 2, 7])
    samples = PackedSamples(store, pack_documents(store, np.arange(4), 8), 8, 4)
    check_counts(samples)
    rows = {tuple(samples[i]["input_ids"]): samples[i]["labels"].tolist() for i in range(len(samples))}
    assert rows == {
        (0, 1, 2, 3, 4, 5, 6, 7): [IGNORE, IGNORE, IGNORE, 3, 4, IGNORE, 6, 7],
        tuple(range(8, 16)): [IGNORE, IGNORE, *range(10, 16)],
        tuple(range(17, 25)): [IGNORE] * 7 + [24],
    }
    assert (samples.num_cut, samples.num_without_loss) == (1, 0)


@given(documents_of, st.integers(2, 25), st.booleans(), st.booleans(), st.data())
def test_labels_are_what_carries_loss(lengths, block_size, packing, keep_end, data):
    """Of any mask: in each row the tokens that carry loss, but for its first; rows without are left out."""
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))))
    store = store_of(lengths, carries_loss=mask)
    chosen = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    if packing:
        samples = PackedSamples(store, pack_documents(store, chosen, block_size, keep_end), block_size, len(chosen))
    else:
        samples = RowSamples(store, chosen, block_size, keep_end)
    check_counts(samples)
    rows = [range(store.offsets[d], store.offsets[d + 1]) for d in chosen]
    rows = [row[-block_size:] if keep_end else row[:block_size] for row in rows]
    expected = [[t for t in row[1:] if mask[t]] for row in rows]
    labels = [samples[i]["labels"] for i in range(len(samples))]
    assert sorted(t for row in labels for t in row[row != IGNORE]) == sorted(t for row in expected for t in row)
    assert samples.num_without_loss == sum(not row for row in expected)
    is_cut = [store.lengths[d] > block_size and bool(row) for d, row in zip(chosen, expected, strict=True)]
    assert samples.num_cut == sum(is_cut)


def test_labels_are_counted_in_parts(monkeypatch):
    """Rows whose mask is counted a few tokens at a time, some longer than that."""
    monkeypatch.setattr("dstrain.data.store._COUNT_TOKENS", 7)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 500)
    store = store_of(lengths, carries_loss=rng.random(lengths.sum()) < 0.3)
    chosen = np.flatnonzero(rng.random(500) < 0.5)
    counts = count_labels(store, store.offsets[chosen], lengths[chosen])
    assert counts.tolist() == [store.carries_loss[store.offsets[d] + 1 : store.offsets[d + 1]].sum() for d in chosen]


def test_subset():
    samples = BlockSamples(store_of([100]), np.array([0]), 10)
    part = Subset(samples, np.array([7, 2]))
    check_counts(part)
    assert part[0]["input_ids"][0] == 70
