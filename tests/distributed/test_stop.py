"""The agreed stop in real runs: all ranks end after the same step with 75, and the next start goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

from dstrain.resilience.exits import LAUNCHER_DIED
from tests import faults, launch

FLAGS = ("--max_steps", "8", "--save_steps", "0")


def curve(run: faults.FaultyRun) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in run.metrics("train")]


def test_a_signal_to_one_rank_stops_all_and_the_next_start_goes_on(tmp_path):
    with faults.start(tmp_path / "whole", "", *FLAGS, ranks=2) as whole:
        assert whole.wait() == [0, 0]
    with faults.start(tmp_path / "stopped", "USR1@3:1", *FLAGS, ranks=2) as stopped:
        assert stopped.wait() == [75, 75], stopped.stderr(0)
    (summary,) = stopped.metrics("summary")
    assert summary["exit_code"] == 75 and "SIGUSR1" in summary["reason"]
    assert stopped.events("stop") == ["signal SIGUSR1"]
    assert 3 <= summary["steps"] <= 5  # known to all one step later
    assert [p.name for p in (stopped.folder / "checkpoints").glob("step_*")] == [f"step_{summary['steps']:08d}"]
    with faults.start(tmp_path / "stopped", "", *FLAGS, ranks=2) as resumed:
        assert resumed.wait() == [0, 0], resumed.stderr(0)
    assert curve(resumed) == curve(whole)
    assert resumed.metrics("eval") == whole.metrics("eval")


def test_a_stop_file_in_a_pipeline(tmp_path):
    config = faults.CONFIG | {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}}
    flags = ("--max_steps", "5000", "--save_steps", "0")
    with faults.start(tmp_path, "", *flags, ranks=2, config=config) as run:
        run.wait_for_step(3)
        (run.folder / "stop").touch()
        assert run.wait() == [75, 75], run.stderr(0)
    assert run.events("stop") == ["the stop file"]
    assert not (run.folder / "stop").exists()


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path):
    flags = (*FLAGS, "--eval_steps", "4")
    with faults.start(tmp_path, "evalTERM@4:0", *flags) as stopped:
        assert stopped.wait() == [75], stopped.stderr(0)
    assert not stopped.metrics("eval")
    with faults.start(tmp_path, "", *flags) as resumed:
        assert resumed.wait() == [0], resumed.stderr(0)
    assert [line["step"] for line in resumed.metrics("eval")] == [4, 8]


def test_max_time(tmp_path):
    with faults.start(tmp_path, "", "--max_steps", "100000", "--save_steps", "0", "--max_time", "3") as run:
        assert run.wait() == [75], run.stderr(0)
    assert run.events("stop") == ["--max_time is over"]


def test_ranks_do_not_outlive_the_deepspeed_runner(tmp_path):
    """The runner dies of a signal and tells nobody: its ranks save and end."""
    head = launch.command_for("deepspeed", 1, faults.SCRIPT)
    flags = [*faults.flags(tmp_path), "--max_steps", "100000", "--save_steps", "0"]
    mark = f"orphan{os.getpid()}"
    env = launch.environment() | {launch._MARK: mark}
    with open(tmp_path / "out", "wb") as out:
        runner = subprocess.Popen([*head, *flags], env=env, cwd=launch.ROOT, stdout=out, stderr=out)
    run = faults.FaultyRun(tmp_path, [])
    try:
        run.wait_for_step(2)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        deadline = time.monotonic() + 30
        while launch.marked_processes(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not launch.marked_processes(mark)
    finally:
        runner.kill()
        launch.kill_marked(mark)
    (summary,) = run.metrics("summary")
    assert summary["exit_code"] == 75 and LAUNCHER_DIED in summary["reason"]
    assert list(Path(run.folder, "checkpoints").glob(f"step_{summary['steps']:08d}/manifest.json"))
