"""Two runs on one host, and two starts in one run folder."""

import subprocess
import time

import pytest

from dstrain.parallel import free_port
from tests import cluster, faults, forked, launch
from tests.distributed.test_starts import ROOT, folder  # noqa: F401  (a fixture)

pytestmark = pytest.mark.exhaustive
FLAGS = ("--max_steps", "60", "--save_steps", "20")


def curve(run: faults.FaultyRun) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in run.metrics("train")]


def test_a_second_start_is_refused_while_the_first_lives(tmp_path):
    """Also one by `dstrain launch`, which must not close the first's metrics; after a SIGKILL it goes on."""
    with faults.start(tmp_path / "whole", "", *FLAGS) as whole:
        assert whole.wait() == [0]
    with faults.start(tmp_path / "run", "hang@30:0", *FLAGS, "--hang_timeout", "600") as first:
        first.wait_for_step(29)
        before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "lock"}
        with faults.start(tmp_path / "run", "", *FLAGS) as second:
            assert second.wait() == [2]
            assert f"is in use by process {first.processes[0].pid} on" in second.stderr(0)
        command = [str(launch.BIN / "dstrain"), "launch", "--", "python", str(launch.TRAIN)]
        supervised = launch.run_command([*command, "--output_dir", str(first.folder)], run_dir=first.folder).check(2)
        assert "is in use by process" in supervised.stderr
        assert {path: path.stat().st_mtime_ns for path in before} == before
        first.processes[0].kill()
        first.wait()
    with faults.start(tmp_path / "run", "", *FLAGS) as third:
        assert third.wait() == [0], third.stderr(0)
    assert curve(third) == curve(whole)


def test_of_two_starts_at_once_one_is_refused(tmp_path, monkeypatch):
    with faults.start(tmp_path / "a", "", *FLAGS) as first:
        monkeypatch.setattr(forked, "PORT", free_port())
        with faults.start(tmp_path / "a", "", *FLAGS) as second:
            assert sorted([*first.wait(), *second.wait()]) == [0, 2]
    assert [line["step"] for line in first.metrics("train")] == list(range(1, 61))
    assert "is in use by" in first.stderr(0) + second.stderr(0)


@pytest.mark.skipif(cluster.why_not() is not None, reason=str(cluster.why_not()))
def test_another_host_of_a_shared_file_system(tmp_path):
    run = tmp_path / "run"
    take = "import sys, pathlib; from dstrain.run_lock import RunLock; lock = RunLock(pathlib.Path(sys.argv[1]))"
    holds = f"{take}; lock.take(); print('held', flush=True); sys.stdin.read()"
    with cluster.build_cluster(tmp_path / "hosts") as hosts:
        command = hosts.command("node1", ["python", "-c", holds, str(run)])
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        asks = ["python", "-c", f"{take}; lock.wait_until_free(0.5)", str(run)]
        refused = hosts.run("node2", asks)
        assert refused.returncode == 1 and "on node1 since" in refused.stderr
        hosts.crash("node1")
        holder.wait()
        assert hosts.run("node2", asks).returncode == 0


@pytest.mark.parametrize("launcher", ["deepspeed --num_gpus 2", "torchrun --nproc_per_node 2"])
def test_two_runs_with_default_ports(launcher, folder, tmp_path):  # noqa: F811
    """torchrun finds a free port; the deepspeed launcher does not, and its second start says what to write."""
    flags = ["--deepspeed_config", "ds_configs/zero2.json", "--set", "bf16.enabled=false"]
    flags += ["--set", "train_batch_size=4", "--config_name", f"{folder}/model.json"]
    flags += ["--train_file", f"{folder}/text.txt", "--block_size", "32", "--save_steps", "0"]
    env = launch.environment()
    first = [
        *launcher.split(),
        "dstrain/train.py",
        *flags,
        "--max_steps",
        "100000",
        "--output_dir",
        str(tmp_path / "first"),
    ]
    process = subprocess.Popen(first, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "first" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        second = [*launcher.split(), "dstrain/train.py", *flags, "--max_steps", "30"]
        result = launch.run_command([*second, "--output_dir", str(tmp_path / "second")], run_dir=tmp_path / "second")
        (tmp_path / "first" / "stop").touch()
        assert process.wait(120) == (1 if launcher.startswith("torchrun") else 75)
    finally:
        process.kill()
    if launcher.startswith("torchrun"):
        losses = [line["loss"] for line in result.check().metrics("train")]
        assert losses == launch.Result([], 0, "", "", tmp_path / "first", 0.0).losses()[:30]
    else:
        errors = [line for line in result.check(2).stderr.splitlines() if line.startswith("dstrain: error")]
        assert len(errors) == 1 and "port 29500" in errors[0] and "Add --master_port" in errors[0]
        assert not (tmp_path / "second").exists()
