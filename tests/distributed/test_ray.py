"""Ray Train with two real CPU workers: one is killed, and the run goes on where it stood.

python -m tests.distributed.test_ray            # the figures of docs/clusters/ray.md, a JSON line for each fault
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dstrain.launch.ops import extensions_root
from tests import faults, forked, host_faults, launch, ray_faults
from tests.cluster import why_not
from tests.launch import BIN, ROOT

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray: pip install -e .[ray]"),
]
STEPS, KILL_AT, SAVE_STEPS = 250, 60, 50
FLAGS = ("--save_steps", str(SAVE_STEPS), "--max_steps")


@contextmanager
def under_ray(folder: Path, *more: str, steps: int = STEPS) -> Iterator[tuple[subprocess.Popen, str]]:
    """`dstrain launch --to ray` with a cluster of its own, and the mark of all that it starts."""
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets may have 107 letters
    mark = uuid.uuid4().hex
    own = {"RAY_TMPDIR": short, "HOME": short, "RAY_USAGE_STATS_ENABLED": "0", launch._MARK: mark}
    env = launch.environment(TORCH_EXTENSIONS_DIR=str(extensions_root()), **own)
    command = [str(BIN / "dstrain"), "launch", "--to", "ray", "--num_procs_per_node", "2", "--use_cpu"]
    with open(folder / "driver.log", "w") as log:
        driver = subprocess.Popen(
            [*command, "--", "dstrain/train.py", *faults.flags(folder), *FLAGS, str(steps), *more],
            cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield driver, mark
    finally:
        launch.kill_marked(mark)
        driver.wait()
        shutil.rmtree(short, ignore_errors=True)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines_of(folder) if line["kind"] == "train"), default=0)


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if line["kind"] == "summary"]


def has_gone_on(folder: Path) -> bool:
    """Whether a start has made a step from a checkpoint."""
    lines = lines_of(folder)
    resumed = [i for i, line in enumerate(lines) if line.get("name") == "resume"]
    return bool(resumed) and any(line["kind"] == "train" for line in lines[resumed[-1] :])


def wait_until(true: Callable[[], Any], driver: subprocess.Popen, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert driver.poll() is None and time.monotonic() < deadline, f"exit code {driver.poll()}"
        time.sleep(0.02)


def rank_1(mark: str) -> int:
    """The process of train.py."""
    for pid in launch.marked_processes(mark):
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"RANK=1" in environ and any(word.endswith(b"train.py") for word in words[:3]):
            return pid
    raise AssertionError("no rank 1")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def recover(folder: Path, fault: str) -> dict[str, Any]:
    """Kill rank 1 (`rank`) or its Ray worker (`worker`) behind step KILL_AT; what came of it, in seconds and steps."""
    folder.mkdir(parents=True, exist_ok=True)
    with under_ray(folder) as (driver, mark):
        wait_until(lambda: last_step(folder) >= KILL_AT, driver)
        rank = rank_1(mark)
        os.kill(rank if fault == "rank" else parent(parent(rank)), signal.SIGKILL)
        killed, before = time.monotonic(), last_step(folder)
        wait_until(lambda: summaries(folder), driver)
        noticed, first_end = time.monotonic() - killed, summaries(folder)[-1]["exit_code"]
        reached = last_step(folder)
        wait_until(lambda: has_gone_on(folder), driver)
        again = time.monotonic() - killed
        exit_code = driver.wait(300)
        left = len([pid for pid in launch.marked_processes(mark) if pid != os.getpid()])
    (resume,) = [line for line in lines_of(folder) if line.get("name") == "resume"]
    found = {"fault": fault, "killed_at": before, "noticed_s": noticed, "first_end": first_end}
    found |= {"next_step_s": again, "steps_lost": reached - resume["step"], "exit_code": exit_code, "left": left}
    return found


def curve(folder: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(folder) if line["kind"] == "train"]


def whole(folder: Path) -> list[tuple]:
    """Never interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    forked.train(folder / "run", *faults.flags(folder), *FLAGS, str(STEPS), ranks=2).check()
    return curve(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["worker", "rank"])
def test_a_killed_worker_is_started_again_and_the_run_goes_on(fault, tmp_path):
    found = recover(tmp_path / "ray", fault)
    assert found["exit_code"] == 0 and found["noticed_s"] < 60 and found["steps_lost"] < SAVE_STEPS
    assert curve(tmp_path / "ray") == whole(tmp_path / "whole")


@pytest.mark.timeout(600)
def test_codes_that_no_start_can_mend_end_the_job(tmp_path):
    with under_ray(tmp_path, "--validation_file", str(tmp_path / "nothing.txt")) as (driver, _):
        assert driver.wait(300) == 2
    log = (tmp_path / "driver.log").read_text()
    assert log.count("nothing.txt") >= 1 and log.count("Started training worker group of size 2") == 1


@pytest.mark.timeout(600)
def test_a_signal_to_the_driver_is_an_agreed_stop(tmp_path):
    with under_ray(tmp_path, steps=100_000) as (driver, _):
        wait_until(lambda: last_step(tmp_path) >= 3, driver)
        driver.terminate()
        assert driver.wait(300) == 75
    assert lines_of(tmp_path)[-1]["exit_code"] == 75


@pytest.mark.timeout(600)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("fault", ray_faults.FAULTS)
def test_every_fault_on_a_cluster_of_two_hosts_is_noticed_within_a_minute(fault, tmp_path):
    reference = host_faults.uninterrupted(tmp_path / "reference", host_faults.CONFIG)
    row = ray_faults.measure(fault, tmp_path / "cluster", reference)
    assert row.good, row


@pytest.mark.timeout(600)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_host_that_comes_back_is_taken_while_the_run_goes_on(tmp_path):
    there = ray_faults.there_and_back(tmp_path)
    assert there.worlds == [2, 1, 2] and there.difference <= 1e-5, there


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        for fault in sys.argv[1:] or ["worker", "rank"]:
            print(json.dumps(recover(Path(name, fault), fault)), flush=True)
        expected = whole(Path(name, "whole"))
        for fault in sys.argv[1:] or ["worker", "rank"]:
            print(json.dumps({"fault": fault, "same_curve": curve(Path(name, fault)) == expected}), flush=True)


if __name__ == "__main__":
    main()
