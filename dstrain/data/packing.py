"""Samples: how the tokens of documents become the rows of a batch. Pure functions of a token store; numpy only."""

from typing import Protocol

import numpy as np

from dstrain.data.store import TokenStore

IGNORE = -100


class Samples(Protocol):
    """A fixed list of samples.

    `samples[i]` is a dict of int64 arrays of one length n <= block_size: `input_ids`, `labels` (not shifted, as in
    Hugging Face; -100: no loss), and `position_ids` where several documents share the sample.
    `num_tokens` is the sum of all n; `num_label_tokens` counts what a next-token loss counts (labels[1:] != -100).
    """

    block_size: int
    num_tokens: int
    num_label_tokens: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class BlockSamples:
    """Documents laid end to end and cut every `block_size` tokens, as Hugging Face's `run_clm.py` does.

    The rest shorter than a block is dropped, unless it is all there is. Blocks are arithmetic: no index is stored.
    documents: int64 [m], which documents of the store, in order.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, block_size: int):
        self.store, self.documents, self.block_size = store, documents, block_size
        self._ends = np.cumsum(store.lengths[documents])
        total = int(self._ends[-1]) if len(documents) else 0
        self._length = min(total, block_size)
        self._count = total // block_size if total >= block_size else int(total > 0)
        self.num_tokens = self._count * self._length
        self.num_label_tokens = self._count * (self._length - 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        input_ids = np.empty(self._length, np.int64)
        filled, position = 0, index * self._length
        which = int(np.searchsorted(self._ends, position, side="right"))
        while filled < self._length:
            document = self.documents[which]
            begin = self.store.offsets[document] + position - (self._ends[which] - self.store.lengths[document])
            take = min(self._length - filled, int(self._ends[which]) - position)
            input_ids[filled : filled + take] = self.store.tokens[begin : begin + take]
            filled, position, which = filled + take, position + take, which + 1
        return {"input_ids": input_ids, "labels": input_ids.copy()}
