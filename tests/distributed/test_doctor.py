"""`dstrain doctor`, and what `dstrain launch` asks before a start, over hosts of namespaces (tests/cluster.py)."""

import json
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from dstrain.launch.ops import extensions_root
from tests.cluster import Cluster, build_cluster, why_not

ENV = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(extensions_root())}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with build_cluster(tmp_path_factory.mktemp("doctor")) as cluster:
        (cluster.folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in ENV.items()))
        cluster.hostfile()
        yield cluster


def start(cluster: Cluster, *words: str) -> tuple[int, str, str, float]:
    """`dstrain ...` on node1: exit code, stdout, stderr, seconds."""
    began = time.monotonic()
    env = {**ENV, "DS_ENV_FILE": str(cluster.folder / "deepspeed_env"), "COLUMNS": "150"}
    done = cluster.run("node1", ["python", "-m", "dstrain.cli", *words], env=env, timeout_s=60)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def doctor(cluster: Cluster, hostfile: Path, *words: str) -> tuple[int, str, str, float]:
    folder = str(cluster.folder / "runs" / "a")
    return start(cluster, "doctor", "--hostfile", str(hostfile), "--output_dir", folder, *words)


def launch(cluster: Cluster, hostfile: Path) -> tuple[int, str, str, float]:
    """A start, which must not get as far as DeepSpeed's launcher."""
    head = ["launch", "--", "deepspeed", "--hostfile", str(hostfile), "dstrain/train.py"]
    flags = ["--deepspeed_config", "ds_configs/zero2.json", "--config_name", "examples/llama_10m.json"]
    return start(cluster, *head, *flags, "--output_dir", str(cluster.folder / "runs" / "a"))


@contextmanager
def without_package(cluster: Cluster, host: str, name: str) -> Iterator[None]:
    """On one host, in the shared environment."""
    info = Path(str(metadata.distribution(name).locate_file("")), metadata.distribution(name)._path.name)  # type: ignore[attr-defined]
    empty = cluster.folder / "empty"
    empty.mkdir(exist_ok=True)
    assert cluster.run(host, ["mount", "--bind", str(empty), str(info)]).returncode == 0
    yield
    assert cluster.run(host, ["umount", str(info)]).returncode == 0


@contextmanager
def full_disk(cluster: Cluster, host: str, folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    assert cluster.run(host, ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]).returncode == 0
    yield
    assert cluster.run(host, ["umount", str(folder)]).returncode == 0


@contextmanager
def refused_key(cluster: Cluster, host: str) -> Iterator[None]:
    move = "mv /etc/ssh/{} /etc/ssh/{}"
    assert cluster.run(host, ["sh", "-c", move.format("authorized_keys", "away")]).returncode == 0
    yield
    assert cluster.run(host, ["sh", "-c", move.format("away", "authorized_keys")]).returncode == 0


@pytest.mark.distributed
def test_faults_of_one_host_are_named_by_doctor_and_by_the_start(cluster):
    hostfile, unknown = cluster.folder / "hostfile", cluster.folder / "unknown"
    unknown.write_text(hostfile.read_text() + "node9 slots=1\n")
    runs = cluster.folder / "runs"
    lines = [
        "error: node2: its Python lacks tokenizers: run `pip install",
        f"error: node2: --output_dir {runs}/a is on a full disk (1 MiB free of 1 MiB): make room",
        "error: node9: is not a known name: correct the hostfile",
    ]
    with without_package(cluster, "node2", "tokenizers"), full_disk(cluster, "node2", runs):
        found = [doctor(cluster, unknown), launch(cluster, unknown)]
    with refused_key(cluster, "node2"):
        found.append(launch(cluster, hostfile))
    apart = f"error: node2: --output_dir {runs}/a is not the folder that node1 has"
    expected = [[*lines, apart], lines, ["error: node2: refuses this user's key: ssh-copy-id node2"]]
    for (code, _, stderr, seconds), wanted in zip(found, expected, strict=True):
        assert code == 2 and seconds < 30, stderr
        assert not [line for line in wanted if line not in stderr], stderr
        assert "Traceback" not in stderr and len([line for line in stderr.splitlines() if "error:" in line]) <= 5
    assert not (runs / "a").exists()


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_hosts_that_are_well(cluster):
    code, stdout, stderr, _ = doctor(cluster, cluster.folder / "hostfile", "--json")
    found = json.loads(stdout)
    assert code == 0, stderr
    assert list(found["hosts"]) == ["node1", "node2"] and found["output_dir_is_shared"]
    assert [problem["check"] for problem in found["problems"] if problem["level"] == "error"] == []
    (link,) = found["links"]
    assert link["bytes_per_s"] > 1e7 and link["round_trip_s"] < 0.1 and abs(link["clock_s"]) < 0.1
    code, stdout, stderr, _ = doctor(cluster, cluster.folder / "hostfile")
    assert code == 0 and "node1 and node2" in stdout and "shared" in stdout, stdout + stderr
    assert not list(cluster.folder.rglob(".dstrain-doctor*"))


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_traps_of_a_network(cluster):
    """A slow cable, the name that Debian gives to 127.0.1.1, a cut cable."""
    hostfile = cluster.folder / "hostfile"
    hosts = cluster.run("node2", ["cat", "/etc/hosts"]).stdout
    write = ["sh", "-c", 'printf %s "$0" > /etc/hosts']
    cluster.limit("node2", "100mbit")
    cluster.run("node2", [*write, hosts.replace(cluster.address("node2"), "127.0.1.1")])
    code, _, stderr, _ = doctor(cluster, hostfile)
    cluster.run("node2", [*write, hosts])
    cluster.run("node2", ["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert code == 2 and "node2: its own name node2 is 127.0.1.1 there" in stderr, stderr
    assert "warning: node1 and node2: 1" in stderr and "MB/s" in stderr, stderr
    cluster.cut("node2")
    code, _, stderr, seconds = doctor(cluster, hostfile)
    cluster.mend("node2")
    assert code == 2 and seconds < 30 and "node2: does not answer" in stderr, stderr


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_a_run_folder_of_each_host_is_no_shared_one(cluster):
    words = ["doctor", "--hostfile", str(cluster.folder / "hostfile"), "--output_dir", "/mnt/runs/a", "--json"]
    code, stdout, stderr, _ = start(cluster, *words)
    assert code == 2 and "node2: --output_dir /mnt/runs/a is not the folder that node1 has" in stderr
    assert json.loads(stdout)["output_dir_is_shared"] is False


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_ops_are_built_on_every_host(cluster):
    words = ["--build", "--deepspeed_config", "ds_configs/zero2.json"]
    code, _, stderr, _ = doctor(cluster, cluster.folder / "hostfile", *words)
    assert code == 0, stderr
    for name in cluster.names:
        assert f"{name}: 2 ops ready (deepspeed_shm_comm, fused_adam)" in stderr


def plain(cluster: Cluster, line: str, *flags: str) -> tuple[int, str, float]:
    """`deepspeed --hostfile` without `dstrain launch`, on node1: exit code, stderr, seconds until it says `line`."""
    head = ["timeout", "100", "deepspeed", "--hostfile", str(cluster.folder / "hostfile"), "dstrain/train.py"]
    words = ["--deepspeed_config", "ds_configs/zero2.json", "--config_name", "examples/llama_10m.json"]
    words += ["--block_size", "128", "--output_dir", str(cluster.folder / "runs" / "b"), *flags]
    env = {**ENV, "DS_ENV_FILE": str(cluster.folder / "deepspeed_env")}
    began, said, stderr = time.monotonic(), math.inf, ""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(cluster.command("node1", [*head, *words], env), text=True, **quiet) as start:
        for written in start.stderr:
            stderr += written
            said = min(said, time.monotonic() - began) if line in written else said
    print(f"{line}\n{said:.1f} s, {start.returncode} after {time.monotonic() - began:.1f} s")
    return start.returncode, stderr, said


@contextmanager
def unknown_host(cluster: Cluster, host: str) -> Iterator[None]:
    hostfile = cluster.folder / "hostfile"
    known = hostfile.read_text()
    hostfile.write_text(known.replace(host, "node9"))
    yield
    hostfile.write_text(known)


@contextmanager
def without_deepspeed(cluster: Cluster, host: str) -> Iterator[None]:
    """So that its launcher cannot start there either."""
    with without_package(cluster, host, "deepspeed"), full_disk(cluster, host, Path(deepspeed_folder())):
        yield


def deepspeed_folder() -> str:
    return str(metadata.distribution("deepspeed").locate_file("deepspeed"))


_GONE = "dstrain: error: {}: what was started there has ended before the ranks met"
# The fault of node2 -> what the runner returns, and the line. pdsh -S returns the greatest code of its hosts, so ssh's
# own 255 hides the 2 of rank 0.
PLAIN = {
    "refused_key": (refused_key, 255, _GONE.format("node2")),
    "unknown_host": (unknown_host, 255, _GONE.format("node9")),
    "no_deepspeed": (without_deepspeed, 2, _GONE.format("node2")),
    "no_tokenizers": (
        partial(without_package, name="tokenizers"),
        2,
        "node2: dstrain: error: this Python lacks tokenizers: run",
    ),
}


@pytest.mark.distributed
@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", PLAIN)
def test_a_plain_start_names_the_fault_of_one_host(cluster, fault):
    if reason := why_not("pdsh"):
        pytest.skip(reason)
    strike, expected, line = PLAIN[fault]
    with strike(cluster, "node2"):
        code, stderr, said_s = plain(cluster, line)
    assert code == expected and said_s < 30, stderr
    assert "Traceback" not in stderr or fault == "no_deepspeed"
    assert not (cluster.folder / "runs" / "b").exists()


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_a_plain_start_names_a_full_disk(cluster):
    """Of node2's own, where its copy of the tokenized data belongs."""
    if reason := why_not("pdsh"):
        pytest.skip(reason)
    environment, cache, text = (cluster.folder / name for name in ("deepspeed_env", "cache", "text.txt"))
    known = environment.read_text()
    environment.write_text(known + f"XDG_CACHE_HOME={cache}\n")
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(100_000)))  # 3 MB
    line = f"node2: dstrain: error: the data cache {cache}/dstrain cannot be written"
    with full_disk(cluster, "node2", cache):
        code, stderr, said_s = plain(cluster, line, "--train_file", str(text))
    environment.write_text(known)
    assert code == 2 and said_s < 30 and "Traceback" not in stderr, stderr
    assert not (cluster.folder / "runs" / "b").exists()
