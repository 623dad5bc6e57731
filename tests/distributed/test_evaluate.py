"""`dstrain evaluate` over ranks: every figure, and every row's, is the very one of a single rank."""

import json
import sys

from tests import tiny_model
from tests.checkpoints import written_by_two_ranks
from tests.launch import command_for, run_command


def test_two_ranks_give_the_bits_of_one(tmp_path):
    written_by_two_ranks(tmp_path / "run", tiny_model.build())
    rows = [{"prompt": f"{'and so on ' * (i % 4)}{i}", "completion": " good" if i % 3 else " bad"} for i in range(21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for ranks in (1, 2):
        output, predictions = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.jsonl"
        head = command_for("torchrun", ranks, "-m", ("--no_python", sys.executable))
        flags = ["--task", "classification", "--data_file", tmp_path / "rows.jsonl", "--batch_size", "4"]
        flags += ["--output", output, "--predictions", predictions]
        result = run_command([*head, "dstrain.cli", "evaluate", *map(str, [tmp_path / "run", *flags])]).check()
        told = json.loads(output.read_text())
        assert json.loads(result.stdout.splitlines()[-1]) == told
        assert told["world_size"] == ranks
        found.append((told["metrics"], told["settings"], predictions.read_text()))
    assert found[0] == found[1]
    assert len(found[0][2].splitlines()) == len(rows)
