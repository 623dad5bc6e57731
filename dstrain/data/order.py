"""The order of samples: one endless global list, a pure function of (number of samples, seed). NumPy only."""

from typing import Protocol

import numpy as np

_ROUNDS = 8
_CHUNK = 4096  # positions whose order is computed at once: one call costs about as much as for a single position


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): uint64 -> uint64, every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """One uint64 that depends on every one of the whole numbers and on their order: [1], or [n] where a word is [n]."""
    state = np.zeros(1, np.uint64)
    for word in words:
        word = np.array([word & 0xFFFFFFFFFFFFFFFF], np.uint64) if isinstance(word, int) else word.astype(np.uint64)
        state = mix(state + word + np.uint64(0x9E3779B97F4A7C15))
    return state


def epoch_order(num_samples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """Entries start..stop of the permutation of range(num_samples) that belongs to (seed, epoch): int64."""
    keys = [hash_words(seed, epoch, i) for i in range(_ROUNDS)]
    return _permuted(np.arange(start, stop, dtype=np.uint64), num_samples, keys)


def endless_order(num_samples: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Entries start..stop of the permutations of all epochs, one behind the other: int64. Fast also for tiny ones."""
    epochs, within = np.divmod(np.arange(start, stop), num_samples)
    first = int(epochs[0])
    distinct = np.arange(first, int(epochs[-1]) + 1)
    keys = [hash_words(seed, distinct, i)[epochs - first if len(distinct) > 1 else [0]] for i in range(_ROUNDS)]
    return _permuted(within.astype(np.uint64), num_samples, keys)


def _permuted(positions: np.ndarray, num_samples: int, keys: list[np.ndarray]) -> np.ndarray:
    """Where a keyed permutation of range(num_samples) puts the positions. keys: uint64 [1], or one for each position.

    A Feistel network of eight rounds over the next power of four (at least 64, for an even spread), walked until it
    lands inside the range (Black and Rogaway 2002): a bijection that costs memory and time only for the entries asked
    for, and never changes with the version of NumPy, whose own permutations may.
    """
    half = np.uint64(max(3, ((num_samples - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = positions.copy()
    todo = np.arange(len(out))
    while len(todo):
        x = out[todo]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (mix(right + (key if len(key) == 1 else key[todo])) & mask)
        out[todo] = x = (left << half) | right
        todo = todo[x >= num_samples]
    return out.astype(np.int64)


class SampleOrder(Protocol):
    """order[position] -> index of a sample, for every position from 0 on."""

    def __getitem__(self, position: int) -> int: ...


class Order:
    """order[position] -> index of a sample: epoch after epoch, each with its own permutation, without a gap."""

    def __init__(self, num_samples: int, seed: int):
        assert num_samples > 0, "no samples"
        self.num_samples, self.seed = num_samples, seed
        self._chunk_at = (-1, -1)
        self._chunk = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        start = offset - offset % _CHUNK
        if self._chunk_at != (epoch, start):
            stop = min(start + _CHUNK, self.num_samples)
            self._chunk = epoch_order(self.num_samples, self.seed, epoch, start, stop)
            self._chunk_at = (epoch, start)
        return int(self._chunk[offset - start])
