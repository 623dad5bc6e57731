"""`dstrain launch`: what is started again, what is not, and the exit code that comes out.

Most starts here are a script that leaves behind what a run would, so a case costs a second; the last one is real.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import faults, launch

# One line of plan.jsonl per start: steps to make, the summary to write or null, and how to end.
FAKE_RUN = """
import json, os, signal, sys, time
from pathlib import Path
from dstrain.resilience.recorder import Recorder
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
plan = folder / "plan.jsonl"
start, *rest = plan.read_text().splitlines()
plan.write_text("".join(line + "\\n" for line in rest))
start = json.loads(start)
(folder / "logs").mkdir(exist_ok=True)
if start.get("stray"):
    import subprocess
    stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (folder / "stray").write_text(str(stray.pid))
if start["steps"] is not None:
    ring = Recorder(folder / "logs", 0)
    with open(folder / "metrics.jsonl", "a") as out:
        for step in range(1, start["steps"] + 1):
            ring.write(step=step)
            train = {"step": step, "step_time_s": 1.0, "tokens_per_second": 1.0, "data_time_s": 0.0, "mfu": None}
            train |= {"tokens_per_second_per_device": 1.0, "model_tflops_per_second_per_device": None}
            out.write(json.dumps({"kind": "train", **train}) + "\\n")
        if start.get("wait"):
            wished = []
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda n, _: wished.append(n))
            out.flush()
            (folder / "waiting").touch()
            while not wished or start["wait"] == "forever":
                time.sleep(0.02)
        if start.get("summary") is not None:
            code, reason = start["summary"]
            out.write(json.dumps({"kind": "summary", "exit_code": code, "reason": reason, "steps": 1}) + "\\n")
if start["end"] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(start["end"])
"""


def command(folder: Path, *flags: str) -> list[str]:
    return [str(launch.BIN / "dstrain"), "launch", "--backoff", "0.1", *flags, "--"]


def supervise(folder: Path, *starts: dict, max_restarts: int = 3) -> launch.Result:
    folder.mkdir(exist_ok=True)
    (folder / "plan.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (folder / "fake.py").write_text(FAKE_RUN)
    fake = [sys.executable, str(folder / "fake.py"), "--output_dir", str(folder)]
    return launch.run_command([*command(folder, "--max_restarts", str(max_restarts)), *fake], run_dir=folder)


def start(steps: int | None, end: int | str, summary: tuple[int, str] | None = None, **more) -> dict:
    return {"steps": steps, "end": end, "summary": summary, **more}


def left(folder: Path) -> int:
    """Starts of the plan that were not made."""
    return len((folder / "plan.jsonl").read_text().splitlines())


def test_crashes_and_hangs_are_started_again_until_it_finishes(tmp_path):
    crash, hang, killed = start(3, 1, (1, "crash")), start(2, 1, (76, "hang")), start(1, "kill")
    result = supervise(tmp_path, crash, hang, killed, start(2, 0, (0, "finished"))).check(0)
    assert left(tmp_path) == 0 and result.stderr.count("restart") == 3
    # the summary that the killed start could not write
    assert [row["exit_code"] for row in result.metrics("summary")] == [1, 76, 137, 0]
    notes = [json.loads(line) for line in (tmp_path / "logs" / "restarts.jsonl").read_text().splitlines()]
    assert [(note["exit_code"], note["steps"]) for note in notes] == [(1, 3), (76, 2), (137, 1), (0, 2)]


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (start(3, 1, (77, "nan")), 77),  # torchrun returns 1: the summary knows better
        (start(3, 1, (75, "stopped after saving: the stop file")), 75),
        (start(3, 1, (2, "disk full")), 2),
        (start(None, 2), 2),  # refused before it wrote
        (start(None, 1), 1),  # the same under torchrun
    ],
    ids=["non_finite", "stopped", "disk", "refused", "refused_torchrun"],
)
def test_what_starting_again_cannot_help_ends(first, code, tmp_path):
    supervise(tmp_path, first, start(1, 0, (0, "finished"))).check(code)
    assert left(tmp_path) == 1


def test_a_lost_launcher_is_started_again_and_a_zero_is_not_believed(tmp_path):
    orphan = start(3, 75, (75, "stopped after saving: its launcher has died"))
    silent = start(2, 0)  # the deepspeed runner returns 0 when its node launcher is killed
    supervise(tmp_path, orphan, silent, start(1, 0, (0, "finished"))).check(0)
    assert left(tmp_path) == 0


def test_a_hang_before_anything_was_written_is_started_again(tmp_path):
    supervise(tmp_path, start(None, 76), start(1, 0, (0, "finished"))).check(0)


def test_it_does_not_loop(tmp_path):
    result = supervise(tmp_path, *[start(0, "kill")] * 5, max_restarts=9).check(137)
    assert left(tmp_path) == 3 and "two starts in a row made no step" in result.stderr
    (tmp_path / "logs" / "restarts.jsonl").unlink()
    supervise(tmp_path, *[start(1, 1, (1, "crash"))] * 5, max_restarts=1).check(1)
    assert left(tmp_path) == 3


def test_strays_are_ended(tmp_path):
    result = supervise(tmp_path, start(1, 0, (0, "finished"), stray=True)).check(0)
    assert "outlived their launcher" in result.stderr and result.seconds > 4  # given time to save
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "stray").read_text()), 0)


@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_to_it_is_an_agreed_stop_and_a_second_one_the_end(twice, tmp_path):
    plan = start(1, 75, (75, "stopped after saving: signal SIGTERM"), wait="forever" if twice else "once")
    (tmp_path / "plan.jsonl").write_text(json.dumps(plan) + "\n")
    (tmp_path / "fake.py").write_text(FAKE_RUN)
    fake = [sys.executable, str(tmp_path / "fake.py"), "--output_dir", str(tmp_path)]
    supervisor = subprocess.Popen([*command(tmp_path), *fake], env=launch.environment())
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        supervisor.send_signal(signal.SIGTERM)
        if twice:
            time.sleep(0.6)
            supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(30) == (128 + signal.SIGINT if twice else 75)
    finally:
        supervisor.kill()


def test_mistakes_are_one_line(tmp_path):
    dstrain = str(launch.BIN / "dstrain")
    for words, text in (
        (["launch"], "no command"),
        (["launch", "--", "torchrun", "x.py"], "names neither"),
        (["launch", "--max_restart", "3", "--", "torchrun"], "unrecognized"),
        (["launch", "--", "torchrun", "dstrain/train.py", "--max_step", "3"], "unknown flag --max_step"),
        (["postmortem", str(tmp_path)], "holds no run"),
    ):
        result = launch.run_command([dstrain, *words]).check(2)
        assert text in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_a_killed_rank_under_torchrun_is_restarted_and_finishes(tmp_path):
    """Two steps, then SIGKILL in the third of this start; the second start resumes and finishes."""
    flags = [*faults.flags(tmp_path), "--max_steps", "4", "--save_steps", "1", "--faults=kill@4:1"]
    head = launch.command_for("torchrun", 2, faults.SCRIPT)
    result = launch.run_command([*command(tmp_path), *head, *flags], run_dir=tmp_path / "run").check(0)
    assert result.stderr.count("restart 1 of 3") == 1 and "restart 2" not in result.stderr
    assert [row["step"] for row in result.metrics("train")] == [1, 2, 3, 4]
    assert result.metrics("summary")[-1]["exit_code"] == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_is_stopped_is_killed_and_started_again(launcher, tmp_path):
    """It cannot react to anything: the other rank notices the hang and ends, their launcher kills after 30 s."""
    flags = [
        *faults.flags(tmp_path),
        "--max_steps",
        "4",
        "--save_steps",
        "1",
        "--hang_timeout",
        "3",
        "--faults=stop@4:1",
    ]
    head = launch.command_for(launcher, 2, faults.SCRIPT)
    result = launch.run_command([*command(tmp_path), *head, *flags], run_dir=tmp_path / "run").check(0)
    assert "exit code 76" in result.stderr and "restart 2" not in result.stderr
    assert [row["step"] for row in result.metrics("train")] == [1, 2, 3, 4]


@pytest.mark.exhaustive
def test_it_goes_on_with_fewer_slots_than_before(tmp_path):
    """A slot is lost while the first start trains: the second start reads the hostfile anew."""
    hostfile, run_dir = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("localhost slots=2\n")

    def lose_a_slot() -> None:
        deadline = time.monotonic() + 100
        while not list(run_dir.glob("checkpoints/step_*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        hostfile.write_text("localhost slots=1\n")

    head = [str(launch.BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", "127.0.0.1"]
    flags = [*faults.flags(tmp_path), "--max_steps", "5", "--save_steps", "1", "--faults=kill@4:1"]
    loser = threading.Thread(target=lose_a_slot, daemon=True)
    loser.start()
    result = launch.run_command([*command(tmp_path), *head, str(faults.SCRIPT), *flags], run_dir=run_dir).check(0)
    loser.join()
    assert [row["step"] for row in result.metrics("train")] == [1, 2, 3, 4, 5]
    assert result.run_json()["world"]["world_size"] == 1
    notes = " ".join(event["text"] for event in result.metrics("event"))
    assert "world_size 2 -> 1" in notes and result.metrics("summary")[-1]["exit_code"] == 0
