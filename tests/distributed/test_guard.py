"""A number that is not a number, in real runs: the run ends with 77, spoils nothing, and says where it came from."""

import pytest

from tests import faults
from tests.distributed import parity

FLAGS = ("--max_steps", "6", "--save_steps", "2")


def test_all_ranks_stop_and_name_the_one_and_no_checkpoint_is_spoiled(tmp_path):
    config = faults.CONFIG | parity.zero(2)
    with faults.start(tmp_path, "nan@4:1", *FLAGS, ranks=2, config=config) as bad:
        assert bad.wait() == [77, 77], bad.stderr(0)
    (summary,) = bad.metrics("summary")
    assert summary["exit_code"] == 77 and summary["reason"].startswith("step 4: the loss is nan")
    assert "rank 1: samples" in summary["reason"] and "rank 0: samples" not in summary["reason"]
    assert bad.events("non_finite") == [summary["reason"]]
    assert summary["reason"] in bad.stderr(0)
    assert [p.name for p in (bad.folder / "checkpoints").glob("step_*")] == ["step_00000002"]
    with faults.start(tmp_path, "", *FLAGS, ranks=2, config=config) as resumed:
        assert resumed.wait() == [0, 0]
    assert [line["step"] for line in resumed.metrics("train")] == [1, 2, 3, 4, 5, 6]


OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True},
}
PIPELINE = {"pipeline": {"stages": 2}}


@pytest.mark.parametrize("optimizer", parity.thinned(list(OPTIMIZERS), "AdamW"))
def test_a_batch_is_left_out_the_same_way_everywhere(tmp_path, optimizer):
    """DeepSpeed leaves it out at ZeRO 1-3, dstrain at ZeRO-0, also in a pipeline, whose last rank has the loss.

    Weights, moments and the schedule stay as they were: the steps after it are equal.
    """
    config = faults.CONFIG | {
        "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
    }
    curves = []
    for name, more, ranks in (
        ("zero0", {}, 1),
        ("zero3", parity.zero(3), 1),
        ("pipeline0", PIPELINE, 2),
        ("pipeline1", PIPELINE | parity.zero(1), 2),
    ):
        fault, flags = f"nan@3:{ranks - 1}", (*FLAGS, "--skip_nonfinite", "1")
        with faults.start(tmp_path / name, fault, *flags, ranks=ranks, config=config | more) as run:
            assert run.wait() == [0] * ranks, run.stderr(0)
        lines = run.metrics("train")
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert len(run.events("skipped_step")) == 1
        (text,) = run.events("non_finite")
        assert text.startswith(f"step 3: the loss is nan: batch 1 of 1 left out. rank {ranks - 1}: samples")
        curves.append([line[number] for line in lines for number in ("loss", "grad_norm", "learning_rate")])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
