"""The order of samples: one endless global list, a pure function of (number of samples, seed). NumPy only."""

import numpy as np

_CHUNK = 4096  # positions whose order is computed at once: one call costs about as much as for a single position


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): uint64 -> uint64, every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(*words: int) -> np.ndarray:
    """One uint64 [1] that depends on every one of the whole numbers and on their order."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state + np.array([word & 0xFFFFFFFFFFFFFFFF], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def epoch_order(num_samples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """Entries start..stop of the permutation of range(num_samples) that belongs to (seed, epoch): int64.

    A Feistel network of eight rounds over the next power of four (at least 64, for an even spread), walked until it
    lands inside the range (Black and Rogaway 2002): a bijection that costs memory and time only for the entries asked
    for, and never changes with the version of NumPy, whose own permutations may.
    """
    half = np.uint64(max(3, ((num_samples - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [hash_words(seed, epoch, i) for i in range(8)]
    out = np.arange(start, stop, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        x = out[todo]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (mix(right + key) & mask)
        out[todo] = x = (left << half) | right
        todo = todo[x >= num_samples]
    return out.astype(np.int64)


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
