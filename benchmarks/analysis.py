"""What is said about measurements: medians with their spread, ratios, the knee, goodput, regressions. Pure."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A further worker pays while it brings at least this share of what the first one does.
PAYS = 0.5
# Below this, two medians of a quiet machine differ by themselves.
LEAST_NOISE = 0.02
# A run beside which others used more than this share of the cores says less than one that had them alone.
DISTURBED = 0.05
# Steps between two saves, for a goodput that can be compared between cases.
SAVE_EVERY = 100


@dataclass(frozen=True)
class Spread:
    """median, lowest and highest of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        assert values, "nothing was measured"
        return cls(statistics.median(values), min(values), max(values))

    @property
    def relative(self) -> float:
        """Half the range in units of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def middle(values: Sequence[float]) -> Spread:
    """Median and quartiles of the steps of one run: a step in which the machine did something else is no spread."""
    if len(values) < 4:
        return Spread.of(values)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio_in_turns(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of measurements taken in turns: each round's own ratio, so that what drifts over rounds falls out."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=False)])


def marginal_gains(speed: Mapping[int, float]) -> dict[int, float]:
    """Workers -> what each worker beyond the number before brings, in units of what one of the first brings."""
    workers = sorted(speed)
    one = speed[workers[0]] / workers[0]
    return {b: (speed[b] - speed[a]) / (b - a) / one for a, b in itertools.pairwise(workers)}


def knee(speed: Mapping[int, float], pays: float = PAYS) -> int:
    """The number of workers beyond which more of them stop paying.

    speed: workers -> tokens/s of all of them. The largest number up to which every further worker brings at least
    `pays` of what one worker brings at the smallest number.
    """
    best = min(speed)
    for workers, gain in marginal_gains(speed).items():
        if gain < pays:
            break
        best = workers
    return best


def goodput(step_time_s: float, stall_s: float, steps: int = SAVE_EVERY) -> float:
    """Share of the time that trains, with one save every `steps` steps that stands still for `stall_s`."""
    return steps * step_time_s / (steps * step_time_s + stall_s)


def goodput_of_run(step_times_s: Sequence[float], stalls_s: Sequence[float]) -> float:
    """The same, seen: what the steps would take at their fastest quarter, of all the time that steps and stalls took.

    A save's background slows the steps beside it down; its stall is no step.
    """
    undisturbed = statistics.quantiles(step_times_s, n=4, method="inclusive")[0]
    return min(1.0, len(step_times_s) * undisturbed / (sum(step_times_s) + sum(stalls_s)))


def relative_error(predicted: float, measured: float) -> float:
    """Signed: 0.1 is predicted 10 % too high."""
    return predicted / measured - 1


def worst(errors: Sequence[float]) -> float:
    return max(errors, key=abs)


@dataclass(frozen=True)
class Change:
    """A quantity against a baseline; `regressed` when it is worse by more than both sides' noise."""

    ratio: float
    noise: float
    regressed: bool


def compare(now: Spread, before: Spread, *, higher_is_better: bool) -> Change:
    """now and before: of the same quantity; the noise is the sum of both relative spreads, at least `LEAST_NOISE`."""
    ratio, noise = now.median / before.median, max(LEAST_NOISE, now.relative + before.relative)
    worse = 1 / ratio if higher_is_better else ratio
    return Change(ratio, noise, worse > 1 + noise)


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (speed, memory) to which no other is at least as fast and as small, slowest first."""
    kept = [
        name
        for name, (speed, memory) in points.items()
        if not any(s >= speed and m <= memory and (s, m) != (speed, memory) for s, m in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])
