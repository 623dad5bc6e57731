"""Training under Ray, without Ray: the driver's command, a rank's exit code, and what a rank gets to know."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dstrain.launch.clusters.description import RunDescription
from dstrain.launch.clusters.ray import write
from dstrain.launch.clusters.ray_driver import exit_code_of, run_rank
from dstrain.monitor.metrics import MetricsWriter, append_missing_summary, read_metrics
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
    monkeypatch.setenv("RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_only_a_code_that_a_start_can_mend_is_an_error(alone, tmp_path):
    def run(code: str) -> int:
        words = ["-c", f"import os, sys; assert os.environ['A'] == 'b'; sys.exit({code})"]
        settings = {"words": words, "cwd": str(ROOT), "env": {"A": "b"}, "output_dir": str(tmp_path)}
        return run_rank(settings)

    assert [run(code) for code in ("75", "2")] == [75, 2]
    for code, told in (("1", "1"), ("os.kill(os.getpid(), 9)", "137")):
        with pytest.raises(RuntimeError, match=f"rank 0 ended with {told}"):
            run(code)


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
