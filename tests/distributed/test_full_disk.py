"""A checkpoint without room on the disk ends the run with one line, or is left out by `--ignore_full_disk`."""

import shutil
from functools import partial

import pytest

from tests import checkpoints as ck
from tests import forked


def full_at(call: int, rank: int) -> None:
    """The disk has no room when a checkpoint asks for the `call`-th time."""
    from dstrain.checkpoint import manager

    real, calls = shutil.disk_usage, iter(range(1, 100))

    def disk_usage(path):
        found = real(path)
        return found._replace(free=0) if next(calls) == call else found

    manager.shutil.disk_usage = disk_usage


@pytest.mark.parametrize(("flags", "exit_code", "saved"), [((), 2, [2]), (("--ignore_full_disk",), 0, [2, 6])])
def test_second_of_three_checkpoints(flags, exit_code, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "STEPS", 6)
    monkeypatch.setattr(ck, "SAVED", 2)
    run = tmp_path / "run"
    argv = [*ck.flags(run, ck.config(2), {}), *flags]
    processes = forked.start(["--output_dir", str(run), *argv], 2, tmp_path, partial(full_at, 2))
    assert forked.finish(processes, 60)
    err = (tmp_path / "rank0.err").read_text()
    assert [process.exitcode for process in processes] == [exit_code] * 2, err
    assert "has 0.00 GiB free and the checkpoint needs" in (err if exit_code else (run / "metrics.jsonl").read_text())
    assert [int(path.name[-8:]) for path in sorted((run / "checkpoints").glob("step_*"))] == saved
