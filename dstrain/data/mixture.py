"""Mixtures: samples of several sources in one order, in which each source keeps its share of the tokens. NumPy only.

The order is weighted fair queueing as a pure function of (samples, weights, seed): a source's samples follow its own
permutation, epoch after epoch; a sample's virtual time is the middle of its tokens in that row, divided by the source's
weight; the mixture is the merge by (virtual time, source). After any number of samples a source is off its exact share
by less than half of the longest sample for every source of the mixture.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.arguments import DataArguments, parse_yaml
from dstrain.data.order import endless_order, hash_words
from dstrain.data.packing import Samples
from dstrain.errors import UserError

_CHUNK = 4096  # samples of a source whose order and running sum are computed at once
_SLICE = 4096  # samples of the mixture that are merged at once, on average
_Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]


class Concatenation(Samples):
    """All samples of one source, then those of the next."""

    def __init__(self, sources: Sequence[Samples]):
        self.sources, self.block_size = sources, sources[0].block_size
        self._ends = np.cumsum([len(source) for source in sources])

    @cached_property
    def token_counts(self) -> np.ndarray:  # type: ignore[override]
        return np.concatenate([source.token_counts for source in self.sources])

    @cached_property
    def label_counts(self) -> np.ndarray:  # type: ignore[override]
        return np.concatenate([source.label_counts for source in self.sources])

    @cached_property
    def num_tokens(self) -> int:
        return sum(source.num_tokens for source in self.sources)

    @cached_property
    def num_label_tokens(self) -> int:
        return sum(source.num_label_tokens for source in self.sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - int(self._ends[which]) + len(self.sources[which])]


class Mixture(Concatenation):
    """The same samples in an order that gives each source its share. weights: one per source, positive, of any sum."""

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float]):
        super().__init__(sources)
        self.weights = weights

    def order(self, seed: int) -> "MixtureOrder":
        return MixtureOrder(self.sources, self.weights, seed)


class MixtureOrder:
    """order[position] -> index of a sample of the `Mixture`, for any position, without what comes before it.

    Virtual time is cut into slices; a slice is merged when one of its positions is asked for.
    """

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float], seed: int):
        firsts = np.cumsum([0, *(len(source) for source in sources)])
        self._sources = [
            _Queue(source, weight, int(hash_words(seed, number)[0]), int(first))
            for number, (source, weight, first) in enumerate(zip(sources, weights, firsts[:-1], strict=True))
        ]
        self._firsts = firsts[1:-1]
        self._slice_time = _SLICE / sum(source.samples_per_time for source in self._sources)
        self._slice = -1
        self._begin = self._end = [0] * len(self._sources)  # samples of each source before and up to the slice's end
        self._position = 0  # of the first of `_items`
        self._items = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        self._load(position)
        return int(self._items[position - self._position])

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples are of each source."""
        self._load(position)
        which = np.searchsorted(self._firsts, self._items[: position - self._position], side="right")
        more = np.bincount(which, minlength=len(self._sources))
        return [begin + int(count) for begin, count in zip(self._begin, more, strict=True)]

    def tokens(self, position: int) -> list[int]:
        """How many tokens of each source the first `position` samples hold."""
        return [source.tokens_before(count) for source, count in zip(self._sources, self.counts(position), strict=True)]

    def _load(self, position: int) -> None:
        if self._position <= position < self._position + len(self._items):
            return
        if position != self._position + len(self._items) or self._slice < 0:
            self._slice = self._slice_of(position) - 1
            self._end = self._counts_at(self._slice + 1)
        while not sum(self._begin) <= position < sum(self._end):
            self._slice += 1
            self._begin, self._end = self._end, self._counts_at(self._slice + 1)
        self._position = sum(self._begin)
        parts = [
            source.between(begin, end) for source, begin, end in zip(self._sources, self._begin, self._end, strict=True)
        ]
        times = np.concatenate([times for _, times in parts])
        self._items = np.concatenate([indices for indices, _ in parts])[np.argsort(times, kind="stable")]

    def _counts_at(self, number: int) -> list[int]:
        """Samples of each source before a slice begins."""
        return [source.count_before(number * self._slice_time) for source in self._sources]

    def _slice_of(self, position: int) -> int:
        """The last slice that begins at or before a position."""
        low, width = position // _SLICE, 1
        while sum(self._counts_at(low)) > position:
            low, width = max(0, low - width), 2 * width
        high, width = low + 1, 1
        while sum(self._counts_at(high)) <= position:
            low, high, width = high, high + width, 2 * width
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._counts_at(middle)) <= position else (low, middle)
        return low


class _Queue:
    """One source's samples in their order, without end, and the virtual time of each.

    first: index in the mixture of the source's sample 0. It is cut into periods: epochs, or as many of them as make
    `_CHUNK` samples. Kept are the running sums of tokens at every `_CHUNK`th sample of the last two periods, as far as
    they were asked for.
    """

    def __init__(self, samples: Samples, weight: float, seed: int, first: int):
        self._counts, self._weight, self._seed, self._first = samples.token_counts, weight, seed, first
        self._num_samples = len(samples)
        epochs = max(1, _CHUNK // len(samples))
        self._period_samples, self._period_tokens = epochs * len(samples), epochs * samples.num_tokens
        self._even = bool((self._counts == self._counts[0]).all())  # then sums are known beforehand
        self._sums: dict[int, list[int]] = {}
        self._chunk_at = (-1, -1)
        self._last_chunk: _Chunk

    @property
    def samples_per_time(self) -> float:
        return self._weight * self._period_samples / self._period_tokens

    def tokens_before(self, number: int) -> int:
        """Tokens of the source's first `number` samples."""
        period, within = divmod(number, self._period_samples)
        _, before, _ = self._chunk(period, within // _CHUNK)
        return period * self._period_tokens + int(before[within % _CHUNK])

    def count_before(self, time: float) -> int:
        """How many samples have a virtual time below `time`."""
        period = int(time * self._weight // self._period_tokens)
        chunk = self._last_chunk_before(period, time)
        _, before, counts = self._chunk(period, chunk)
        within = np.searchsorted(self._times(period, before, counts), time, side="left")
        return period * self._period_samples + chunk * _CHUNK + int(within)

    def between(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples begin..end of the queue: (indices in the mixture, int64; virtual times, float64)."""
        pieces = list(self._pieces(begin, end)) or [(np.empty(0, np.int64), np.empty(0))]
        indices, times = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return indices + self._first, times

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while begin < end:
            period, within = divmod(begin, self._period_samples)
            indices, before, counts = self._chunk(period, within // _CHUNK)
            part = slice(within % _CHUNK, within % _CHUNK + end - begin)
            yield indices[part], self._times(period, before, counts)[part]
            begin += len(indices[part])

    def _times(self, period: int, before: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return (period * self._period_tokens + before + counts / 2) / self._weight

    def _chunk(self, period: int, number: int) -> _Chunk:
        """Indices, tokens of the period before each, and tokens of each, of the samples of one chunk: int64."""
        if self._chunk_at != (period, number):
            indices = self._indices(period, number)
            counts = np.asarray(self._counts[indices], np.int64)
            self._last_chunk = (indices, self._sum(period, number) + np.cumsum(counts) - counts, counts)
            self._chunk_at = (period, number)
        return self._last_chunk

    def _last_chunk_before(self, period: int, time: float) -> int:
        """The chunk in whose samples `time` falls."""
        low, high = 0, -(-self._period_samples // _CHUNK)
        if not self._even:  # sums are not computed beyond what is needed
            sums = self._known_sums(period)
            while len(sums) < high and (period * self._period_tokens + sums[-1]) / self._weight < time:
                self._extend(period, sums)
            high = len(sums)
        while high - low > 1:
            middle = (low + high) // 2
            is_before = (period * self._period_tokens + self._sum(period, middle)) / self._weight < time
            low, high = (middle, high) if is_before else (low, middle)
        return low

    def _sum(self, period: int, number: int) -> int:
        """Tokens of the period before a chunk."""
        if self._even:
            return number * _CHUNK * int(self._counts[0])
        sums = self._known_sums(period)
        while len(sums) <= number:
            self._extend(period, sums)
        return sums[number]

    def _known_sums(self, period: int) -> list[int]:
        if period not in self._sums:
            self._sums = {known: sums for known, sums in self._sums.items() if abs(known - period) == 1} | {period: [0]}
        return self._sums[period]

    def _extend(self, period: int, sums: list[int]) -> None:
        sums.append(sums[-1] + int(self._counts[self._indices(period, len(sums) - 1)].sum()))

    def _indices(self, period: int, number: int) -> np.ndarray:
        begin = period * self._period_samples + number * _CHUNK
        end = min(begin + _CHUNK, (period + 1) * self._period_samples)
        return endless_order(self._num_samples, self._seed, begin, end)


def mixture_parts(dargs: DataArguments) -> list[tuple[DataArguments, float]]:
    """The sources of a mixture as flags of one source each, with their weights; [] where the flags name no mixture.

    Raises UserError for a YAML file that is none.
    """
    files, weights = dargs.train_file, dargs.train_weight
    described = [file for file in files if Path(file).suffix.lower() in (".yaml", ".yml")]
    if described:
        if len(files) > 1 or weights:
            raise UserError(
                f"--train_file {described[0]} describes a mixture, which names files and weights itself: "
                "give it alone, without --train_weight"
            )
        files, weights = _read_mixture(Path(described[0]).expanduser())
    if not weights:
        return []
    return [
        (replace(dargs, train_file=[file], train_weight=[]), weight)
        for file, weight in zip(files, weights, strict=True)
    ]


def _read_mixture(path: Path) -> tuple[list[str], list[float]]:
    """Files and weights of a YAML mixture. Raises UserError with everything that is wrong."""
    try:
        table = parse_yaml(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--train_file {path} cannot be read ({error}): name a YAML file with `sources:`") from None
    sources = table.get("sources") if isinstance(table, dict) else None
    if not isinstance(sources, list) or not sources:
        raise UserError(f"{path} has no list `sources`: write `sources:` and under it `- {{file: a.jsonl, weight: 1}}`")
    problems = [f"{path}: {problem}" for problem in _unknown_names(table, ("sources",))]
    for number, source in enumerate(sources, 1):
        problems += [f"{path}: source {number}: {problem}" for problem in _source_problems(source)]
    if problems:
        raise UserError(problems)
    return [str(path.parent / Path(s["file"]).expanduser()) for s in sources], [float(s["weight"]) for s in sources]


def _source_problems(source: Any) -> list[str]:
    if not isinstance(source, dict):
        return [f"{source!r} is no table: write {{file: a.jsonl, weight: 1}}"]
    problems = _unknown_names(source, ("file", "weight"))
    if not isinstance(source.get("file"), str) or not source["file"]:
        problems.append("it has no `file`: write the path, folder or glob of its text")
    weight = source.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        problems.append(f"`weight` is {weight!r}: write a positive number, the source's share of the tokens")
    return problems


def _unknown_names(table: dict, known: tuple[str, ...]) -> list[str]:
    problems = []
    for name in map(str, table.keys() - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        problems.append(
            f"unknown name {name}: " + (f"did you mean {close[0]}?" if close else f"use {', '.join(known)}")
        )
    return sorted(problems)


def mixture_facts(train: Mixture, seed: int, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON for `run.json`: what the sources' own facts add up to, and each with its share of the first epoch.

    facts: `_facts` of each source. passes: how often the first epoch reads the source.
    """
    order = train.order(seed)
    tokens, counts = order.tokens(len(train)), order.counts(len(train))
    sources = [
        {
            "weight": weight,
            "share_wanted": round(weight / sum(train.weights), 6),
            "share_reached": round(part / sum(tokens), 6),
            "passes": round(count / len(source), 4),
            **own,
        }
        for weight, part, count, source, own in zip(train.weights, tokens, counts, train.sources, facts, strict=True)
    ]
    summed = [name for name in facts[0] if name.startswith("num_")] + ["tokenization_s"]
    return {
        "source": "; ".join(own["source"] for own in facts),
        **{name: sum(own[name] for own in facts) for name in summed},
        "block_size": train.block_size,
        "loss_share": round(train.num_label_tokens / train.num_tokens, 6),
        "tokens_per_sample": round(train.num_tokens / len(train), 2),
        "validation": "; ".join(dict.fromkeys(own["validation"] for own in facts)),
        "sources": sources,
    }
