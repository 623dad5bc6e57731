"""`dstrain postmortem`: from the files of every kind of end to its cause."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from dstrain.cli import main
from dstrain.monitor.cgroup import MemoryGroup
from dstrain.monitor.metrics import MetricsWriter, median_fields
from dstrain.resilience import postmortem
from dstrain.resilience.recorder import Recorder

HANG = """--- 2026-01-01 00:00:00: no progress for 9 s in step 4
this rank: step 4, for 9.0 s
last completed step 3: {}

Thread 0x1 (most recent call first):
  File "other.py", line 1 in watch

Thread 0x2 (most recent call first):
  File "distributed_c10d.py", line 3252 in all_reduce
  File "engine.py", line 90 in train_batch
"""


@pytest.fixture
def build(tmp_path):
    def make(exit_code: int | None, reason: str = "", host: str = socket.gethostname()):
        (tmp_path / "logs").mkdir()
        (tmp_path / "run.json").write_text(json.dumps({"total_steps": 10}))
        for rank in range(2):
            ring = Recorder(tmp_path / "logs", rank, host=host)
            for step in (1, 2, 3):
                common = {"step_time_s": 0.5, "ids": [7, 8], "skipped": step == 3 and exit_code == 77}
                ring.write(step=step, loss=float("nan") if step == 3 and exit_code == 77 else 2.5, **common)
            ring.close()
        writer = MetricsWriter(tmp_path)
        writer.write("event", step=3, name="loss_spike", text="loss 9 at a median of 2")
        if exit_code is not None:
            writer.write("summary", exit_code=exit_code, reason=reason, steps=3, **median_fields([]))
        writer.close()
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("code", "reason", "verdict", "advice"),
    [
        (0, "finished", "it finished", "Nothing to do"),
        (1, "RuntimeError: x", "it crashed", "goes on from its newest checkpoint"),
        (2, "a.json cannot be read", "the user's mistake", "Mend"),
        (2, "checkpoints has 0.1 GiB free, the checkpoint needs 0.2 GiB", "the disk was full", "Mend"),
        (75, "stopped after saving: the stop file", "stopped on request", "same command again"),
        (76, "no progress for 9 s", "no progress", "See the stacks"),
        (77, "step 3: the loss is nan", "not a number", "--skip_nonfinite"),
        (137, "ended by SIGKILL", "it ended by signal 9", "newest checkpoint"),
    ],
)
def test_every_end_has_its_verdict(build, code, reason, verdict, advice, monkeypatch):
    monkeypatch.setattr(postmortem, "_kernel_log", list)
    page = postmortem.examine(build(code, reason)).write()
    assert verdict in page and advice in page and f"reason     {reason}" in page
    assert "progress   step 3 of 10" in page and "rank 1 (process" in page and "samples [7, 8]" in page
    assert ("loss nan" in page and "(left out)" in page) == (code == 77)
    assert "loss_spike: loss 9" in page and "no checkpoint" in page
    assert page.count("\n") < 40


def test_a_kill_for_memory_is_known_from_the_kernel(build, monkeypatch):
    line = f"[1.0] Out of memory: Killed process {os.getpid()} (python) total-vm:99kB, anon-rss:98kB"
    monkeypatch.setattr(postmortem, "_kernel_log", lambda: [line])
    monkeypatch.setattr(postmortem, "_is_this_run", lambda pid, opened: False)
    page = postmortem.examine(build(None)).write()
    assert "killed because memory ran out" in page and "anon-rss:98kB" in page and "exit code  none written" in page
    assert "MiB at their last step" in page


def test_a_kill_for_memory_is_known_from_the_control_group(build, monkeypatch):
    """Where the kernel's log may not be read, as in most containers."""
    monkeypatch.setattr(postmortem, "_kernel_log", list)
    monkeypatch.setattr(postmortem, "_is_this_run", lambda pid, opened: False)
    folder = build(None)
    for rank, kills in ((0, 3), (1, 3)):
        Recorder(folder / "logs", rank, host=socket.gethostname(), memory_group="/g", oom_kills=kills).close()
    for now, group, known in ((4, "/g", True), (3, "/g", False), (4, "/other", False)):
        found = MemoryGroup(Path(group), None, "memory.max", 0, oom_kills=now)
        monkeypatch.setattr(postmortem, "memory_group", lambda found=found: found)
        assert ("has killed 1 processes for memory since the start" in postmortem.examine(folder).write()) == known


def test_another_hosts_processes_are_not_looked_for_here(build, monkeypatch):
    line = f"Memory cgroup out of memory: Killed process {os.getpid()} (python)"
    monkeypatch.setattr(postmortem, "_kernel_log", lambda: [line])
    page = postmortem.examine(build(None, host="elsewhere")).write()
    assert "it was killed" in page and "memory ran out" not in page


def test_a_run_under_way(build, monkeypatch):
    monkeypatch.setattr(postmortem, "_kernel_log", list)
    page = postmortem.examine(build(None)).write()  # the rings were written by this very process
    assert "it is still running" in page


def test_where_each_rank_hung(build, monkeypatch):
    monkeypatch.setattr(postmortem, "_kernel_log", list)
    folder = build(76, "no progress")
    (folder / "logs" / "hang_rank_0.txt").write_text(HANG)
    page = postmortem.examine(folder).write()
    assert 'hang_rank_0.txt: step 4, for 9.0 s, in File "distributed_c10d.py", line 3252 in all_reduce < File' in page


def test_the_command(build, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(postmortem, "_kernel_log", list)
    folder = build(75, "stopped after saving: signal SIGTERM")
    assert main(["postmortem", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 75 and len(report["ranks"]) == 2 and report["step"] == 3
    assert main(["postmortem", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_codes_of_launchers():
    from dstrain.launch.supervise import true_code

    assert [true_code(code) for code in (0, 1, 75, 137, -signal.SIGKILL, 247, 241)] == [0, 1, 75, 137, 137, 137, 143]
