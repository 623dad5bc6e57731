"""Which ops a configuration needs, and the locks of builds that died."""

import json
import subprocess
import sys
import time

import pytest

from dstrain.launch import ops
from tests.launch import ROOT, environment

ADAMW, CPU_ADAM, SHM = "FusedAdamBuilder", "CPUAdamBuilder", "ShareMemCommBuilder"
AIO = ["PinMemoryBuilder", "AsyncIOBuilder"]


def config(optimizer="AdamW", params=None, **zero):
    return {"optimizer": {"type": optimizer, "params": params or {}}, "zero_optimization": zero}


CPU = {"device": "cpu"}
NVME = {"device": "nvme"}


@pytest.mark.parametrize(
    ("given", "device", "builders"),
    [
        (config(), "cpu", [SHM, ADAMW]),
        (config(), "cuda", [ADAMW]),
        (config(stage=2, offload_optimizer=CPU), "cpu", [SHM, CPU_ADAM]),
        (config(params={"torch_adam": True}), "cpu", [SHM]),
        (config("SGD"), "cpu", [SHM]),
        (config("SGD"), "cuda", []),
        (config("Adagrad"), "cpu", [SHM]),
        (config("Adagrad", stage=1, offload_optimizer=CPU), "cpu", [SHM, "CPUAdagradBuilder"]),
        (config("Lion", stage=1, offload_optimizer=CPU), "cpu", [SHM, "CPULionBuilder"]),
        (config("Lion"), "cuda", ["FusedLionBuilder"]),
        (config("Lion"), "cpu", [SHM]),  # DeepSpeed has none there: the configuration's rules refuse it
        (config(stage=3, offload_optimizer=NVME), "cpu", [SHM, CPU_ADAM, *AIO]),
        (config(stage=3, offload_param=NVME), "cpu", [SHM, ADAMW, *AIO]),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": None}}, "cpu", [SHM, ADAMW]),
    ],
)
def test_required_builders(given, device, builders):
    assert ops.required_builders(given, device) == builders


def test_every_shipped_configuration_needs_known_builders():
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(files) >= 9
    for path in files:
        for device, known in (("cpu", ops.CPU_BUILDERS), ("cuda", ops.CUDA_BUILDERS)):
            assert set(ops.required_builders(json.loads(path.read_text()), device)) <= known.keys()


def test_the_builders_are_deepspeeds():
    """An upgrade that renames one, or brings a CPU op, must be seen."""
    from deepspeed.ops.op_builder import cpu

    there = {name for name in vars(cpu) if name.endswith("Builder")}
    assert there - {"CCLCommBuilder", "NotImplementedBuilder", "CPUOpBuilder"} == ops.CPU_BUILDERS.keys()


@pytest.fixture
def builder_process(tmp_path):
    """A process that holds `op/lock` open as `torch.utils.file_baton.FileBaton` does while it builds."""
    (tmp_path / "op").mkdir()
    code = (
        "import sys, time\nfrom torch.utils.file_baton import FileBaton\n"
        f"baton = FileBaton({str(tmp_path / 'op' / 'lock')!r})\nassert baton.try_acquire()\n"
        "print('building', flush=True)\ntime.sleep(120)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_live_builders_lock_stays_and_a_dead_ones_goes(tmp_path, builder_process):
    lock, said = tmp_path / "op" / "lock", []
    assert ops.lock_holder(lock) == builder_process.pid
    assert ops.remove_stale_locks(tmp_path, said.append) == []
    assert lock.exists()
    builder_process.kill()
    builder_process.wait()
    assert ops.remove_stale_locks(tmp_path, said.append) == [lock]
    assert not lock.exists()
    assert said == [f"removed {lock}: the build that left it is gone"]


def test_on_a_file_system_of_many_hosts_a_lock_must_be_old(tmp_path, monkeypatch):
    (tmp_path / "op").mkdir()
    lock = tmp_path / "op" / "lock"
    lock.touch()
    monkeypatch.setattr(ops, "_is_shared_between_hosts", lambda path: True)
    assert ops.remove_stale_locks(tmp_path) == []
    monkeypatch.setattr(time, "time", lambda: lock.stat().st_mtime + 3600)
    assert ops.remove_stale_locks(tmp_path) == [lock]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ops.missing_for_builds(["FusedAdamBuilder"]) == [
        "no C++ compiler (no-such-compiler) to build DeepSpeed's ops: apt-get install g++"
    ]


def test_the_compilers_own_line_is_shown():
    output = "ninja: Entering\n[1/2] c++ a.cpp\na.cpp:3:1: fatal error: libaio.h: No such file\nninja: build stopped\n"
    assert ops._last_error(output) == "a.cpp:3:1: fatal error: libaio.h: No such file"


def test_a_wrong_file_is_one_line(capsys, tmp_path):
    assert ops.main(["--deepspeed_config", str(tmp_path / "none.json")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
