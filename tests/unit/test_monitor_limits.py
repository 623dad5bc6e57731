"""How much memory there is, and what is refused."""

import os
import time

import pytest
import torch

from dstrain.errors import UserError
from dstrain.monitor.limits import Limit, host_limit
from dstrain.planner import forecast
from dstrain.planner.foresight import Foresight, problems_of

MEMINFO = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"  # 8 GiB
GIB = 2**30


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machine_is_the_limit_where_no_group_is(tmp_path):
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user\n"})
    assert host_limit(root) == Limit(8.0, "MemAvailable of /proc/meminfo")


def test_cgroup_v2_counts_caches_as_free(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": str(4 * GIB),
        "sys/fs/cgroup/job/memory.current": str(3 * GIB),
        "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    limit = host_limit(write(tmp_path, files))
    assert limit.gib == 2.0
    assert limit.source.startswith("memory.max of the control group") and limit.source.endswith("job")


def test_cgroup_v1_inside_a_container(tmp_path):
    """The path is the host's and not mounted: the root of the mount is the own group."""
    memory = "sys/fs/cgroup/memory"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/abc\n",
        f"{memory}/memory.limit_in_bytes": str(3 * GIB),
        f"{memory}/memory.usage_in_bytes": str(GIB),
        f"{memory}/memory.stat": "total_inactive_file 0\n",
    }
    assert host_limit(write(tmp_path, files)).gib == 2.0
    write(tmp_path, {f"{memory}/memory.limit_in_bytes": str(2**63 - 4096)})
    assert host_limit(tmp_path).gib == 8.0


FOUND = {
    "device_gib": {"activations": 5.0, "optimizer": 1.0, "total": 6.0},
    "host_gib": {"imports": 1.0, "devices": 12.0, "total": 13.0},
}


def test_what_fits_is_no_problem():
    assert problems_of(FOUND, "a", 2, Limit(12.5, "MemAvailable"), None) == []


def test_a_host_that_is_too_small_is_named_with_the_numbers():
    (problem,) = problems_of(FOUND, "node1", 2, Limit(8.0, "MemAvailable"), None)
    for words in ("needs 12.0 GiB on node1", "2 times 6.0", "activations 5.00", "MemAvailable leaves 8.0 GiB",
                  "lower train_micro_batch_size_per_gpu", "--ignore_memory_limit"):  # fmt: skip
        assert words in problem
    assert "\n" not in problem


@pytest.mark.parametrize(("device_gib", "number"), [(5.0, 1), (7.0, 0)])
def test_a_device_that_is_too_small(device_gib, number):
    problems = problems_of(FOUND, "a", 1, Limit(100.0, "MemAvailable"), Limit(device_gib, "memory of X"))
    assert len(problems) == number


class Said:
    """A forecast that is ready."""

    def __init__(self, device_gib: float):
        host = {"imports": 0.0, "devices": device_gib, "total": device_gib}
        self.found = {"device_gib": {"activations": device_gib, "total": device_gib}, "host_gib": host, "work": {}}

    def result(self):
        return self.found


def foresight(said) -> Foresight:
    return Foresight(said, config=None, resolved=None, flags=None)


def test_a_run_that_cannot_fit_is_refused_and_by_flag_warned_of():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"the run needs .* GiB on "):
        foresight(Said(1e6)).check(cpu, ignore_limit=False)
    warned = foresight(Said(1e6))
    warned.check(cpu, ignore_limit=True)
    assert len(warned.problems) == 1 and warned.prediction["limit_gib"]["host"] < 1e6
    fits = foresight(Said(0.001))
    fits.check(cpu, ignore_limit=False)
    assert fits.problems == [] and fits.prediction["device_gib"]["total"] == 0.001


def test_without_a_forecast_a_run_starts():
    quiet = foresight(forecast.Forecast())
    quiet.check(torch.device("cpu"), ignore_limit=False)
    assert quiet.prediction is None and quiet.describe() is None


def test_a_forecast_is_another_process_that_is_waited_for_no_longer_than_its_patience(monkeypatch):
    assert forecast.start(lambda: {"pid": os.getpid()}).result()["pid"] != os.getpid()
    assert forecast.start(lambda: 1 / 0).result() is None
    monkeypatch.setattr(forecast, "PATIENCE_S", 0.2)
    slow, start = forecast.start(lambda: time.sleep(60) or {}), time.monotonic()
    pid = slow.pid
    assert slow.result() is None
    assert time.monotonic() - start < 5
    assert not os.path.exists(f"/proc/{pid}")  # ended, and waited for
