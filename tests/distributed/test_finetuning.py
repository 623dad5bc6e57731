"""Early stopping, and the best checkpoint: on a text that is learnt by heart, so that the held-out loss turns."""

import json

import pytest
from safetensors.torch import load_file

from dstrain.checkpoint.export import export
from tests import forked
from tests.distributed.parity import ADAMW, LLAMA, zero
from tests.launch import Result


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Result, list[str]]:
    folder = tmp_path_factory.mktemp("finetuning")
    (folder / "model.json").write_text(json.dumps(LLAMA))
    config = ADAMW | zero(2) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    (folder / "ds.json").write_text(json.dumps(config))
    (folder / "train.txt").write_text("".join(f"{i} and {i} is {i + i}. " for i in range(60)))
    (folder / "held_out.txt").write_text("".join(f"{i} less {i - 7} are seven, " for i in range(100, 160)))
    flags = ["--deepspeed_config", f"{folder}/ds.json", "--config_name", f"{folder}/model.json", "--block_size", "32"]
    flags += ["--train_file", f"{folder}/train.txt", "--validation_file", f"{folder}/held_out.txt"]
    flags += ["--eval_strategy", "epoch", "--early_stopping_patience", "3", "--load_best_model_at_end"]
    flags += ["--num_train_epochs", "40", "--save_steps", "2", "--save_total_limit", "1", "--report_to", "none"]
    result = forked.train(folder / "run", *flags, "--export", "auto", ranks=2)
    return result.check(), flags


def test_stops_after_as_many_worse_evaluations(stopped):
    result, _ = stopped
    evaluations = result.metrics("eval")
    losses = [line["loss"] for line in evaluations]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3
    (summary,) = result.metrics("summary")
    assert summary["exit_code"] == 0 and summary["steps"] == evaluations[-1]["step"]
    named = {line["name"]: line["text"] for line in result.metrics("event")}
    assert f"at step {evaluations[best]['step']}" in named["early_stop"]
    assert named["best"].startswith(f"step {evaluations[best]['step']} ")
    # 2 ranks, 8 blocks a step: an evaluation after each pass over the blocks
    per_epoch = result.run_json()["data"]["num_samples"] / 8
    assert [line["step"] for line in evaluations] == [-int(-per_epoch * i // 1) for i in range(1, len(losses) + 1)]


def test_the_best_is_kept_and_exported(stopped, tmp_path):
    result, _ = stopped
    losses = {line["loss"]: line["step"] for line in result.metrics("eval")}
    best = losses[min(losses)]
    last = result.metrics("summary")[0]["steps"]
    checkpoints = result.run_dir / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step_*")) == [f"step_{best:08d}", f"step_{last:08d}"]
    exported = load_file(result.run_dir / "export" / "model.safetensors")
    for step, same in ((best, True), (last, False)):
        export(checkpoints / f"step_{step:08d}", tmp_path / str(step))
        weights = load_file(tmp_path / str(step) / "model.safetensors")
        assert all(weights[name].equal(exported[name]) for name in weights) == same


def test_started_again_it_has_had_enough(stopped):
    result, flags = stopped
    before = result.metrics("train")
    again = forked.train(result.run_dir, *flags, ranks=2).check()
    assert again.metrics("train") == before
