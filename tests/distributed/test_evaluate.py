"""`dstrain evaluate` on the checkpoint of a real run, and over ranks."""

import json
import sys

import pytest

from dstrain import cli
from tests import checkpoints as ck
from tests.launch import command_for, run_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two ranks at ZeRO-3."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    return ck.start(folder, ck.config(3), 2).check()


def test_perplexity_is_the_held_out_loss_of_training(run, tmp_path):
    """Training took one global batch of the same text."""
    flags = ["--max_eval_samples", str(ck.GLOBAL_BATCH), "--output", str(tmp_path / "out.json")]
    text = str(run.run_dir.parent / "run_inputs" / "text.txt")
    assert cli.main(["evaluate", str(run.run_dir), "--task", "perplexity", "--data_file", text, *flags]) == 0
    found, trained = json.loads((tmp_path / "out.json").read_text()), run.metrics("eval")[-1]
    assert found["metrics"]["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert found["settings"]["tokens"] == trained["tokens"]
    assert found["settings"]["block_size"] == ck.BLOCK_SIZE


def test_two_ranks_give_the_bits_of_one(run, tmp_path):
    rows = [{"prompt": f"{'and so on ' * (i % 4)}{i}", "completion": " good" if i % 3 else " bad"} for i in range(21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", "classification", "--data_file", tmp_path / "rows.jsonl", "--batch_size", "4"]
    argv = [["evaluate", run.run_dir, *flags, "--output", tmp_path / f"{ranks}.json"] for ranks in (1, 2)]
    argv = [[*map(str, line), "--predictions", str(tmp_path / f"{i}.jsonl")] for i, line in enumerate(argv, 1)]
    assert cli.main(argv[0]) == 0
    head = command_for("torchrun", 2, "-m", ("--no_python", sys.executable))
    result = run_command([*head, "dstrain.cli", *argv[1]]).check()
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert json.loads(result.stdout.splitlines()[-1]) == two
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert (one["metrics"], one["settings"]) == (two["metrics"], two["settings"])
    of_rows = [(tmp_path / f"{ranks}.jsonl").read_text() for ranks in (1, 2)]
    assert of_rows[0] == of_rows[1]
    assert len(of_rows[0].splitlines()) == len(rows)
