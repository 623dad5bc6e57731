"""Training under Ray, without Ray: the driver's command, a rank's exit code, and what a rank gets to know."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from dstrain.launch.clusters import ray_driver
from dstrain.launch.clusters.description import RunDescription
from dstrain.launch.clusters.ray import write
from dstrain.launch.clusters.ray_driver import _agree, exit_code_of, run_rank
from dstrain.launch.worlds import usable_worlds
from dstrain.monitor.metrics import MetricsWriter, append_missing_summary, read_metrics
from tests.distributed import parity
from tests.launch import ROOT
from tests.unit.test_doors import imports, modules


def test_ray_is_imported_by_the_driver_alone():
    """It is an extra."""
    importers = {path.name for path in modules() for name, _ in imports(path) if name.split(".")[0] == "ray"}
    assert importers == {"ray_driver.py"}


def test_the_driver_gets_ranks_restarts_and_resources():
    run = RunDescription(
        "dstrain/train.py", ("--seed", "7"), "outputs", "run", num_nodes=3, num_procs_per_node=2, env=(("A", "b c"),)
    )
    written = write(run)
    assert written.trains and not written.supervised
    words = ["--num_workers", "6", "--max_restarts", "3", "--cpus_per_worker", "1", "--gpus_per_worker", "1", "--env"]
    assert written.command[3:] == (*words, "A=b c", "--", "dstrain/train.py", "--seed", "7")


@pytest.fixture
def alone(monkeypatch):
    """Ray's process group, of one."""
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_only_a_code_that_a_start_can_mend_is_an_error(alone, tmp_path):
    def run(code: str) -> int:
        words = ["-c", f"import os, sys; assert os.environ['A'] == 'b'; sys.exit({code})"]
        settings = {"words": words, "cwd": str(ROOT), "env": {"A": "b"}, "output_dir": str(tmp_path)}
        return run_rank(settings | {"num_workers": 1})

    assert [run(code) for code in ("75", "2")] == [75, 2]
    for code, told in (("1", "1"), ("os.kill(os.getpid(), 9)", "137")):
        timer = mock.patch.object(ray_driver.threading, "Timer")
        with timer as ends_itself, pytest.raises(RuntimeError, match=f"rank 0 ended with {told}"):
            run(code)
        assert ends_itself.mock_calls[-1] == mock.call().start()  # a worker that Ray cannot reach


def test_workers_that_degrees_and_batch_cannot_use_stay_idle(tmp_path):
    """Four of seven workers train with 8 samples a step in halves; a run that has not begun waits for all."""
    run, config = tmp_path / "run", tmp_path / "ds.json"
    run.mkdir()
    config.write_text(json.dumps(parity.ADAMW | parity.zero(1) | {"tensor_parallel": {"autotp_size": 2}}))
    flags = ["--deepspeed_config", str(config), "--config_name", "m.json", "--output_dir", str(run)]
    settings = {"words": ["train.py", *flags], "num_workers": 8}
    with mock.patch.object(ray_driver.time, "sleep", side_effect=TimeoutError), pytest.raises(TimeoutError):
        _agree(run, settings, 7)
    (run / "run.json").write_text(json.dumps({"identity": {"global_batch": 8}}))
    assert [_agree(run, settings, workers)[1] for workers in (8, 7, 3)] == [8, 4, 2]
    assert next(usable_worlds(flags, run, range(1, 9))) == 2
    assert list(usable_worlds(["--of_another_script", "1"], run, [3, 1])) == [3, 1]


def test_a_rank_is_told_of_its_workers_end(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('{tmp_path}/told').touch(), os._exit(0)))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    words = [sys.executable, "-m", "dstrain.launch.clusters.ray_rank", "-c", code]
    between = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert between.stdout is not None and between.stdout.readline() == "ready\n"
    os.kill(between.pid, signal.SIGKILL)
    between.wait()
    assert between.stdout.read() == "" and Path(tmp_path, "told").exists()


def test_the_code_of_a_failed_job_is_the_runs_own(tmp_path):
    assert exit_code_of(tmp_path) == 1
    writer = MetricsWriter(tmp_path)
    writer.write("event", step=0, name="notice", text="")
    assert exit_code_of(tmp_path) == 1 and read_metrics(tmp_path)[-1]["kind"] == "summary"
    writer.write("event", step=0, name="notice", text="")
    writer.close()
    append_missing_summary(tmp_path, 76, "hung")
    assert exit_code_of(tmp_path) == 76
