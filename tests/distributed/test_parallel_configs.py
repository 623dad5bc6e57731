"""Every shipped configuration of tensor and sequence parallelism, and of mixtures, gives the numbers of one rank."""

import json

import pytest

from tests.distributed.parity import LLAMA, MODELS, run
from tests.launch import ROOT

FILES = {path.stem: path for kind in ("tp", "sp", "moe") for path in (ROOT / "ds_configs").glob(f"{kind}*.json")}


def test_all_files_are_here():
    assert sorted(FILES) == ["moe_zero3", "sp2_zero1", "sp2_zero3", "tp2_zero1", "tp2_zero2"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_equals_one_rank(tmp_path, name):
    config = json.loads(FILES[name].read_text())
    plain = {k: v for k, v in config.items() if k not in ("tensor_parallel", "sequence_parallel_size")}
    model = MODELS["qwen3_moe"] if name.startswith("moe") else LLAMA
    single = run(tmp_path / "one", model, plain | {"zero_optimization": {"stage": 1}})
    run(tmp_path / "two", model, config, ranks=2).assert_equals(single, 2e-2)
