import math

import pytest

from dstrain.best import Best


@pytest.mark.parametrize(
    ("losses", "threshold", "best", "stops_after"),
    [
        ([3.0, 2.0, 1.0, 0.5], 0.0, 4, None),
        ([3.0, 2.0, 2.5, 2.4, 1.0], 0.0, 2, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 0.0, 4, 6),
        ([3.0, 2.95, 2.9, 2.85], 0.1, 3, 3),  # each lower, none by enough
        ([math.nan, 3.0, math.nan, 2.0], 0.0, 4, None),
        ([2.0, math.nan, math.nan], 0.0, 1, 3),
    ],
)
def test_patience_and_the_best(losses, threshold, best, stops_after):
    found, restored = Best(2, threshold), Best(2, threshold)
    stopped = None
    for step, loss in enumerate(losses, 1):
        restored.load_state_dict(found.state_dict())  # every evaluation as if the run had been resumed before it
        found = restored
        found.note(step, loss)
        if found.is_enough:
            stopped = step
            break
    assert (found.step, stopped) == (best, stops_after)


def test_without_patience_nothing_stops():
    best = Best()
    for step in range(50):
        best.note(step, 1.0 + step)
    assert not best.is_enough and best.step == 0
