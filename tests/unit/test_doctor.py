"""What the doctor makes of facts; over real hosts: tests/distributed/test_doctor.py."""

import copy
import json
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dstrain.errors import UserError
from dstrain.launch.asking import module_command
from dstrain.launch.doctor import cli, devices, peer, preflight, probe
from dstrain.launch.doctor.network import Link, measure_links, rounds
from dstrain.launch.doctor.verdicts import (
    compare,
    judge_host,
    judge_links,
    judge_names,
    judge_port,
    judge_sharing,
    merge,
)
from dstrain.launch.hosts import Answer, Host

GPU = {
    "name": "NVIDIA H100",
    "memory_gib": 79.1,
    "free_gib": 79.0,
    "uncorrected_errors": 0,
    "throttled": [],
    "processes": [],
}
DISK = {"path": "/runs/a", "free_gib": 100.0, "size_gib": 200.0, "problem": None, "token": None}
WELL = {
    "versions": {"python": "3.12.3", "torch": "2.13.0"},
    "missing": [],
    "code": "0123456789ab",
    "commit": "abc",
    "cpu": {"cores": 8, "model": "Xeon", "flags": []},
    "gpus": [],
    "gpu_problem": None,
    "memory": {"free_gib": 30.0},
    "shm": {"path": "/dev/shm", "free_gib": 16.0, "size_gib": 16.0},
    "disks": {"output_dir": DISK, "temp": dict(DISK)},
    "network": {
        "name": "node1",
        "gloo": "10.0.0.1",
        "nccl": ["eth0"],
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
        "wanted": {"GLOO_SOCKET_IFNAME": None, "NCCL_SOCKET_IFNAME": None},
    },
    "port_free": True,
    "limits": {"NOFILE": 65536, "MEMLOCK": None},
    "left": {"processes": [], "segments": [], "segments_gib": 0.0},
    "ops": {"folder": "/x", "builders": ["A"], "unbuilt": [], "problems": [], "stale_locks": []},
}


def with_(path: str, value: object) -> dict:
    """The facts of a host that is well, but for one: `disks.temp.free_gib`."""
    facts = copy.deepcopy(WELL)
    *way, last = path.split(".")
    place = facts
    for name in way:
        place = place[name]
    place[last] = value
    return facts


def test_a_host_that_is_well():
    assert judge_host("node1", 8, WELL) == [] and judge_names("node1", WELL) == []
    assert judge_host("node1", None, with_("gpus", [GPU])) == []
    assert compare({"node1": WELL, "node2": WELL}) == [] and compare({}) == []


@pytest.mark.parametrize(
    ("path", "value", "level", "words"),
    [
        ("missing", ["tokenizers"], "error", "its Python lacks tokenizers: run `pip install -e .`"),
        ("cpu.cores", 2, "warning", "slots=4 on 2 cores"),
        ("gpus", [GPU], "error", "slots=4, but it has 1 GPUs: write slots=1"),
        ("gpus", [{**GPU, "uncorrected_errors": 3}] * 4, "error", "had 3 uncorrected memory errors"),
        ("gpus", [{**GPU, "throttled": ["too hot"]}] * 4, "warning", "slowed down (too hot)"),
        ("gpus", [{**GPU, "processes": [7]}] * 4, "warning", "in use by process 7"),
        ("gpu_problem", "the GPUs do not answer (x)", "error", "do not answer"),
        ("gpu_problem", "there are GPUs, but no nvidia-ml-py", "warning", "nvidia-ml-py"),
        ("memory.free_gib", 1.0, "error", "1.0 GiB of memory free for 4 ranks"),
        ("shm.free_gib", 0.0625, "error", "/dev/shm has 64 MiB free of 16.0 GiB, and 4 ranks need 264 MiB"),
        ("disks.output_dir.free_gib", 0.01, "error", "is on a full disk (10 MiB free of 200.0 GiB): make room"),
        ("disks.temp.free_gib", 0.01, "error", "the folder for temporary files /runs/a is on a full disk"),
        ("disks.output_dir.free_gib", 2.0, "warning", "has 2.0 GiB free: a checkpoint takes"),
        ("disks.output_dir.problem", "Read-only file system", "error", "cannot be written (Read-only file system)"),
        ("limits.NOFILE", 256, "warning", "may open only 256 files"),
        ("left.processes", [11, 12], "warning", "`kill 11 12`"),
        ("left.segments", ["/dev/shm/torch_1"], "warning", "`rm /dev/shm/torch_1`"),
        ("ops.problems", ["no libaio"], "error", "no libaio"),
        ("ops.unbuilt", ["CPUAdamBuilder"], "warning", "ops CPUAdam are not built"),
        ("ops.stale_locks", ["/x/lock"], "warning", "dead builds left /x/lock"),
    ],
)
def test_each_fault_of_a_host_is_a_line(path, value, level, words):
    found = judge_host("node1", 4, with_(path, value))
    assert found and {problem.level for problem in found} == {level}
    assert all(str(problem).startswith("node1: ") for problem in found)
    assert words in str(found[0])


def test_few_locked_pages_matter_to_nvme_only():
    facts = with_("limits.MEMLOCK", 2**23)
    assert judge_host("node1", 4, facts) == []
    facts["disks"]["nvme_path"] = DISK
    assert "lock only 8 MiB" in str(judge_host("node1", 4, facts)[0])


def test_little_shared_memory_of_a_gpu_host_is_a_warning():
    facts = with_("shm.free_gib", 0.0625) | {"gpus": [GPU]}
    (problem,) = judge_host("node1", 1, facts)
    assert problem.level == "warning" and "--shm-size" in problem.text


@pytest.mark.parametrize(
    ("path", "value", "level", "words"),
    [
        ("versions.torch", "2.11.0", "error", "node2: torch 2.11.0, elsewhere 2.13.0: pip install torch==2.13.0"),
        ("versions.python", "3.11.1", "error", "node2: python 3.11.1, elsewhere 3.12.3: install the same Python"),
        ("code", "feed", "error", "node2: other sources of dstrain (feed, elsewhere 0123456789ab)"),
        ("gpus", [GPU], "warning", "node2: other devices than the rest"),
    ],
)
def test_what_differs_is_named_by_host(path, value, level, words):
    facts = {"node1": WELL, "node2": with_(path, value), "node3": WELL}
    (problem,) = compare(facts)
    assert problem.level == level and words in str(problem)


def test_a_package_that_is_not_there_is_named_once():
    facts = with_("versions.torch", None) | {"missing": ["torch"]}
    assert compare({"node1": WELL, "node2": facts, "node3": WELL}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gloo": "127.0.1.1"}, "its own name node1 is 127.0.1.1 there, so no other host could reach its ranks"),
        ({"gloo": None}, "its own name node1 has no address there"),
        ({"gloo": None, "wanted": {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": None}}, "is no interface of it"),
        ({"nccl": [], "wanted": {"GLOO_SOCKET_IFNAME": None, "NCCL_SOCKET_IFNAME": "ib"}}, "matches none"),
    ],
)
def test_an_address_that_others_cannot_reach(changes, words):
    (problem,) = judge_names("node1", WELL | {"network": WELL["network"] | changes})
    assert problem.level == "error" and words in problem.text and "eth0" in problem.text


def test_a_taken_port_of_the_first_host():
    assert judge_port("node1", WELL, 29500) == []
    (problem,) = judge_port("node1", with_("port_free", False), 29500)
    assert str(problem).startswith("node1: port 29500 is taken")


def test_what_hosts_have_in_common_is_one_line():
    facts = with_("disks.temp.free_gib", 0.01)
    problems = [problem for host in ("a", "b") for problem in judge_host(host, 1, facts)]
    (line,) = map(str, merge([*problems]))
    assert line.startswith("a, b: the folder for temporary files")


def test_run_folders_that_are_not_one():
    assert judge_sharing({"a": ["a", "b"], "b": ["a", "b"]}, "a", "/runs") == []
    (problem,) = judge_sharing({"a": ["a"], "b": ["b"], "c": ["a"]}, "a", "/runs")
    assert str(problem).startswith("b: --output_dir /runs is not the folder that a has")


def test_links_that_are_broken_slow_or_late():
    fast = [Link((f"n{i}", "n0"), 1e9, 1e-4, 0.0) for i in range(3)]
    assert judge_links(fast) == [] and judge_links([]) == []
    broken = Link(("a", "b"), 0.0, 0.0, 0.0, "no TCP connection to 10.0.0.2 (timed out)")
    (problem,) = judge_links([*fast, broken])
    assert problem.level == "error" and "a and b: no TCP connection to 10.0.0.2 (timed out): open" in str(problem)
    assert judge_links([*fast, Link(("a", "b"), 4e8, 1e-4, 0.0)]) == []
    (problem,) = judge_links([*fast, Link(("a", "b"), 2e8, 1e-4, 0.0)])
    assert problem.level == "warning" and "200 MB/s, where the fastest pair has 1000: look" in problem.text
    (problem,) = judge_links([Link(("a", "b"), 1.2e7, 1e-4, 0.0)])
    assert "12 MB/s" in problem.text
    (problem,) = judge_links([Link(("a", "b"), 1e9, 1e-4, -7.25)])
    assert "clocks differ by 7.2 s" in problem.text


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_rounds_hold_each_pair_once_and_no_host_twice(number):
    names = [f"n{i}" for i in range(number)]
    found = list(rounds(names))
    assert sorted(tuple(sorted(pair)) for pairs in found for pair in pairs) == [
        (a, b) for i, a in enumerate(names) for b in names[i + 1 :]
    ]
    for pairs in found:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)


def test_a_link_is_measured_over_the_loopback():
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=peer.serve, args=(server,), daemon=True).start()
    found = peer.measure("127.0.0.1", server.getsockname()[1])
    assert found["sent"] > 1e6 and found["received"] > 1e6
    assert 0 < found["round_trip_s"] < 1 and abs(found["clock_s"]) < 1
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    assert peer.measure("127.0.0.1", port) == {"problem": "Connection refused"}
    assert measure_links(["node1"]) == []


def test_this_machine_describes_itself(tmp_path):
    facts = probe.describe(output_dir=str(tmp_path / "runs" / "a"), leave_token=True, port=0)
    json.dumps(facts)
    assert (
        facts["versions"]["torch"] and facts["missing"] == [] and facts["cpu"]["cores"] == len(os.sched_getaffinity(0))
    )
    token = facts["disks"]["output_dir"]["token"]
    assert facts["network"]["interfaces"]["lo"] == "127.0.0.1" and facts["memory"]["free_gib"] > 0
    assert not [problem for problem in judge_host("here", 1, facts) if problem.level == "error"]
    assert probe.seen({"a": token}) == ["a"]
    assert [str(path) for path in tmp_path.iterdir()] == [token]
    assert probe.describe(output_dir=str(tmp_path), leave_token=True)["disks"]["output_dir"]["token"] != token


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    assert probe._try_to_write(Path("/proc/self"), keep=False)["problem"]
    assert probe._try_to_write(tmp_path / "new" / "a", keep=False) == {"problem": None, "token": None}
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        assert not probe._is_free(server.getsockname()[1])


class Nvml:
    """nvidia-ml-py as far as the doctor uses it: one GPU that is hot and has no ECC."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, broken: bool = False):
        self.broken = broken

    def nvmlInit(self):  # noqa: N802
        if self.broken:
            raise self.NVMLError("Driver/library version mismatch")

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=80 * 2**30, free=2**30)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):  # noqa: N802
        return 0x40 | 0x1

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, counter):  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return "NVIDIA L40S"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return [SimpleNamespace(pid=4)]


def test_gpus_are_asked_through_nvml(tmp_path, monkeypatch):
    (gpu,), problem = devices.gpus(Nvml())
    assert gpu == {**gpu, "name": "NVIDIA L40S", "memory_gib": 80, "free_gib": 1, "uncorrected_errors": 0}
    assert gpu["throttled"] == ["much too hot"] and gpu["processes"] == [4] and problem is None
    assert devices.gpus(Nvml(broken=True)) == ([], None)  # a library without a card
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(devices, "_DRIVER", tmp_path)
    assert "do not answer (Driver/library version mismatch)" in str(devices.gpus(Nvml(broken=True))[1])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer("n", -1, "", "", "n refuses this user's key: ssh-copy-id n"), "n: refuses this user's key"),
        (
            Answer("n", 1, "", "x\nNo module named dstrain"),
            "n: dstrain does not run there (No module named dstrain): put",
        ),
    ],
)
def test_a_host_without_an_answer(answer, words):
    problem = preflight.why_no_answer(answer)
    assert problem is not None and words in str(problem)
    well = Answer("n", 0, 'Welcome to n!\n{"seen": []}\n', "")
    assert preflight.why_no_answer(well) is None and preflight.last_json(well) == {"seen": []}


def test_ranks_environment_is_that_of_deepspeeds_launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").write_text("GLOO_SOCKET_IFNAME=eth1\nHF_TOKEN=secret\n")
    environment = {
        "DS_ENV_FILE": str(tmp_path / "env"),
        "NCCL_SOCKET_IFNAME": "ib0",
        "TMPDIR": "/x",
        "PYTHONPATH": "/p",
    }
    text = " ".join(module_command("dstrain.launch.doctor.probe", environment=environment))
    assert (
        "GLOO_SOCKET_IFNAME=eth1" in text and "NCCL_SOCKET_IFNAME=ib0" in text and f"PYTHONPATH={tmp_path}:/p" in text
    )
    assert "secret" not in text and "TMPDIR" not in text


def test_only_a_start_over_several_hosts_is_asked_about(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "preflight", lambda hosts, folder: asked.append(hosts) or ["node2: is full"])
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_text("localhost slots=2\n")
    there.write_text("localhost slots=1\n203.0.113.7 slots=1\n")
    for words in (
        ["torchrun", "train.py", "--hostfile", str(there)],
        ["deepspeed", "--num_gpus", "2", "dstrain/train.py"],
        ["deepspeed", "--hostfile", str(here), "dstrain/train.py"],
    ):
        preflight.check_start(words, tmp_path)
    assert asked == []
    with pytest.raises(UserError, match="node2: is full"):
        preflight.check_start(["deepspeed", f"--hostfile={there}", "dstrain/train.py"], tmp_path)
    assert asked == [[Host("localhost", 1), Host("203.0.113.7", 1)]]


def test_degrees_are_held_against_the_slots():
    deepspeed = {"train_micro_batch_size_per_gpu": 1, "pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}}
    deepspeed |= {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    assert cli._degrees(deepspeed, [Host("a", 1), Host("b", 1)]) == []
    (problem, *_) = cli._degrees(deepspeed, [Host("a", 2), Host("b", 1)])
    assert problem.level == "error" and "3" in problem.text


def test_the_nvme_folder_is_that_of_the_offload():
    offload = {"device": "nvme", "nvme_path": "/nvme"}
    assert cli._nvme_path({"zero_optimization": {"offload_param": offload}}) == "/nvme"
    assert cli._nvme_path({"zero_optimization": {"offload_param": {**offload, "device": "cpu"}}}) is None
    assert cli._nvme_path(None) is None
