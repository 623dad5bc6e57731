"""The planner at work: a run's memory is what was said, what cannot fit is refused, and a written plan trains."""

import json

import pytest

from dstrain.cli import main
from dstrain.config import load_config
from tests.launch import ROOT, train

LLAMA = str(ROOT / "examples" / "llama_10m.json")


def test_a_run_uses_what_was_predicted(tmp_path):
    """The largest rank's peak above its imports, against the sum of parts that was printed at the start."""
    flags = ("--deepspeed_config", "ds_configs/zero2.json", "--config_name", LLAMA, "--block_size", 512)
    flags += ("--max_steps", 4, "--max_eval_batches", 1, "--report_to", "none")
    result = train(tmp_path / "run", *flags, launcher="torchrun", ranks=2).check()
    run = result.run_json()
    predicted, measured = run["prediction"], run["measured"]
    parts = predicted["device_gib"]
    assert parts["total"] == pytest.approx(sum(size for name, size in parts.items() if name != "total"))
    assert parts["total"] == pytest.approx(measured["peak_above_imports_gib"], rel=0.1)
    assert predicted["checkpoint_gib"] == pytest.approx(measured["checkpoint_gib"], rel=0.02)
    assert 0 < predicted["step_time_s"] < 100 and measured["step_time_s"] > 0
    assert "expected: " in result.stdout and "predicted and measured: " in result.stdout


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path):
    """70 B parameters in the memory of any machine that runs tests; nothing is built and nothing written."""
    flags = ("--deepspeed_config", "ds_configs/zero1.json", "--config_name", str(ROOT / "examples" / "llama_70b.json"))
    result = train(tmp_path / "run", *flags, "--block_size", 128, "--max_steps", 1).check(2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("dstrain: error:")]
    assert "the run needs " in line and "GiB on " in line and "--ignore_memory_limit" in line
    assert not (tmp_path / "run").exists()
    assert result.seconds < 60


def test_a_written_plan_is_checked_and_trains(tmp_path, capsys):
    written = tmp_path / "plan.json"
    plan = ["plan", "--config_name", LLAMA, "--block_size", "64", "--device", "cpu", "--global_batch", "4"]
    assert main([*plan, "--write", str(written), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = answer["best"]
    assert best["reason"] is None and best["device_gib"]["total"] > 0
    assert main(["config", "check", str(written)]) == 0
    assert load_config(written)["train_batch_size"] == 4
    flags = ("--deepspeed_config", written, "--config_name", LLAMA, "--block_size", 64, "--max_steps", 2)
    flags += ("--max_eval_batches", 1, "--report_to", "none")
    flags += ("--gradient_checkpointing",) * best["gradient_checkpointing"]
    assert len(train(tmp_path / "run", *flags).check().losses()) == 2
