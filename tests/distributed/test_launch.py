"""The launch helper itself: workers return, a hang is ended, nothing is left behind."""

import os

import pytest

from tests import launch


def rank_and_sum(add: float) -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([dist.get_rank() + add])
    dist.all_reduce(value)
    return dist.get_rank(), float(value)


@pytest.mark.parametrize("group", ["gloo", "dstrain"])
def test_workers_return_each_ranks_value(group):
    assert launch.run_workers("tests.distributed.test_launch:rank_and_sum", 2, 1.5, group=group) == [(0, 4.0), (1, 4.0)]


@pytest.mark.parametrize("launcher", launch.LAUNCHERS)
def test_exit_code_and_outputs_of_every_launcher(launcher, tmp_path):
    script = tmp_path / "ends.py"
    script.write_text("import os, sys; print('rank', os.environ.get('RANK', '0')); sys.exit(75)")
    result = launch.run(script, launcher=launcher, ranks=1, cwd=tmp_path)
    assert "rank 0" in result.stdout
    # torchrun and accelerate return 1 for any failure
    assert result.exit_code == (75 if launcher in ("python", "deepspeed") else 1)


def test_a_hang_is_ended_with_its_orphans(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print('started', flush=True); time.sleep(600)\n"
    )
    result = launch.run(script, cwd=tmp_path, timeout_s=3)
    assert result.timed_out and "started" in result.stdout
    with pytest.raises(AssertionError, match="timed out"):
        result.check()


def test_a_run_leaves_no_process_and_no_shared_memory(tmp_path):
    script = tmp_path / "joins.py"
    script.write_text(
        "import os\nfrom dstrain.distributed import init_distributed, leave\n"
        "init_distributed()\nassert os.environ['LOCAL_SIZE'] == '2'\nleave()\n"
    )
    before = set(os.listdir("/dev/shm"))
    launch.run(script, launcher="deepspeed", ranks=2, cwd=tmp_path).check()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if str(launch.PORT) in name]
