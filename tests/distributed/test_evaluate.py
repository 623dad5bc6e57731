"""`dstrain evaluate` over ranks: every figure, and every row's, is the very one of a single rank."""

import json
import sys

from dstrain import cli
from tests import tiny_model
from tests.checkpoints import written_by_two_ranks
from tests.launch import command_for, run_command


def test_two_ranks_give_the_bits_of_one(tmp_path):
    written_by_two_ranks(tmp_path / "run", tiny_model.build())
    rows = [{"prompt": f"{'and so on ' * (i % 4)}{i}", "completion": " good" if i % 3 else " bad"} for i in range(21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", "classification", "--data_file", tmp_path / "rows.jsonl", "--batch_size", "4"]
    argv = [["evaluate", tmp_path / "run", *flags, "--output", tmp_path / f"{ranks}.json"] for ranks in (1, 2)]
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
