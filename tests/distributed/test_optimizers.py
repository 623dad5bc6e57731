"""Every optimizer that 0.19.8 has on a CPU: two ranks at a ZeRO stage give the curve of one rank."""

from typing import Any

import pytest

from tests.distributed.parity import MODELS, SGD, run, thinned, zero

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"type": "Adam", "params": {"lr": 1e-3}},
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "Adagrad": {"type": "Adagrad", "params": {"lr": 3e-3}},  # at 1e-2 the norms of late steps multiply any rounding
    "Lion": {"type": "Lion", "params": {"lr": 1e-4, "weight_decay": 0.1}},
    "Muon": {"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9}},
    "SGD": {"type": "SGD", "params": {"lr": 0.03, "momentum": 0.9}},
}
CASES = [
    *((name, stage, False) for name in ("Adam", "AdamW", "SGD") for stage in (1, 2, 3)),
    ("Adagrad", 0, False),
    ("Muon", 0, False),
    *((name, stage, True) for name in ("AdamW", "Adagrad", "Lion") for stage in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "stage", "offloaded"), thinned(CASES, ("Adagrad", 0, False), ("SGD", 3, False)))
def test_two_ranks_equal_one(name, stage, offloaded, tmp_path):
    more = OFFLOAD if offloaded else {}
    config = SGD | {"optimizer": OPTIMIZERS[name]}
    one = run(tmp_path / "one", MODELS["llama_tied"], config | zero(1 if offloaded else 0, **more))
    run(tmp_path / "two", MODELS["llama_tied"], config | zero(stage, **more), ranks=2).assert_equals(one)
    assert one.losses[-1] < one.losses[0]
