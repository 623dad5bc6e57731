"""Flags that change how a step runs and not its numbers."""

import json

import pytest

from tests.distributed.parity import LLAMA, SGD, Baselines, run, thinned, zero


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Baselines:
    return Baselines(tmp_path_factory.mktemp("one_rank"))


@pytest.mark.exhaustive  # a minute and more each: inductor compiles in every rank
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("mode", ["layer", "whole"])
def test_compile(one_rank, tmp_path, mode, stage):
    compiled = run(tmp_path, LLAMA, SGD | zero(stage), "--compile", mode, ranks=2, timeout_s=280.0)
    compiled.assert_equals(one_rank(LLAMA, SGD))


@pytest.mark.parametrize("config", [zero(2), zero(1) | {"pipeline": {"stages": 2}}])
def test_profile_is_a_trace_of_a_few_steps(one_rank, tmp_path, config):
    """With the split of their time, and what the collectives moved; none of it changes a number."""
    config = SGD | config | {"comms_logger": {"enabled": True, "prof_all": True}}
    run(tmp_path, LLAMA, config, "--profile", ranks=2).assert_equals(one_rank(LLAMA, SGD))
    folder = tmp_path / "run" / "profile"
    names = {event["name"] for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"forward", "backward", "optimizer", "aten::mm"} <= names
    split = json.loads((folder / "split.json").read_text())
    assert sum(split["seconds"].values()) == pytest.approx(split["step_time_s"])
    assert all(split["seconds"][name] > 0 for name in ("data", "forward", "backward", "optimizer", "communication"))
    per_step = json.loads((tmp_path / "run" / "comms.json").read_text())["per_step"]
    assert per_step["send" if "pipeline" in config else "all_reduce"]["bytes"] > 0


def test_samples_on_the_way(one_rank, tmp_path):
    """Texts in metrics.jsonl, from partitioned parameters and with draws; none of it changes a number."""
    flags = ("--sample_steps", "2", "--sample_prompt", "def main")
    found = run(tmp_path, LLAMA, SGD | zero(3), *flags, ranks=2)
    found.assert_equals(one_rank(LLAMA, SGD))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    samples = [line for line in lines if line.get("name") == "sample"]
    assert [line["step"] for line in samples] == list(range(2, len(found.train) + 1, 2))
    assert all(line["text"].startswith("continuing 'def main': ") for line in samples)


@pytest.mark.parametrize("stage", thinned([0, 3], 3))
def test_checkpointed_activations(one_rank, tmp_path, stage):
    run(tmp_path, LLAMA, SGD | zero(stage), "--gradient_checkpointing", ranks=2).assert_equals(one_rank(LLAMA, SGD))


SPLIT = {
    "zero3": zero(3),
    "tp2": zero(1) | {"tensor_parallel": {"autotp_size": 2}},
    "sp2_zero3": zero(3) | {"sequence_parallel_size": 2},
    "pp2": zero(1) | {"pipeline": {"stages": 2}},
}


@pytest.mark.parametrize("name", thinned(["zero3", "sp2_zero3", "pp2"], "sp2_zero3"))
def test_tiled_mlp(one_rank, tmp_path, name):
    """Blocks of 256 tokens in tiles of 64."""
    long = ("--block_size", "256")
    run(tmp_path, LLAMA, SGD | SPLIT[name], "--tiled_mlp", *long, ranks=2).assert_equals(one_rank(LLAMA, SGD, *long))


@pytest.mark.parametrize("name", thinned(list(SPLIT), "zero3"))
def test_smoothed_labels(one_rank, tmp_path, name):
    smoothed = ("--label_smoothing_factor", "0.2")
    parallel = run(tmp_path, LLAMA, SGD | SPLIT[name], *smoothed, ranks=2)
    parallel.assert_equals(one_rank(LLAMA, SGD, *smoothed))
    plain = one_rank(LLAMA, SGD)
    assert parallel.losses[-1] > plain.losses[-1] + 0.1  # smoothing costs in training, and is not in the held-out loss
    assert parallel.eval[-1]["loss"] < parallel.losses[-1]
