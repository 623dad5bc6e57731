"""Runs over hosts with ssh servers, networks, process tables and disks of their own (tests/cluster.py)."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.launch.ops import extensions_root
from tests.cluster import Cluster, build_cluster, why_not
from tests.launch import TINY_LLAMA, Result, run
from tests.tiny_model import save

STEPS = 4
# What a user has set on the first host. The data cache is on each host's own disk.
SET = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_EXTENSIONS_DIR": str(extensions_root()),
    "XDG_CACHE_HOME": "/mnt/cache",
}
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := why_not("pdsh"):
        pytest.skip(reason)
    with build_cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        (cluster.folder / "model.json").write_text(json.dumps(TINY_LLAMA))
        (cluster.folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
        cluster.hostfile()
        write_env = ["python", "-m", "dstrain.cli", "env", "--hostfile", str(cluster.folder / "hostfile")]
        done = cluster.run("node1", write_env, env=SET | env_file(cluster))
        assert done.returncode == 0, done.stderr
        yield cluster


def env_file(cluster: Cluster) -> dict[str, str]:
    """DeepSpeed's name for the place of `.deepspeed_env`, so that the tests leave none in the checkout."""
    return {"DS_ENV_FILE": str(cluster.folder / "deepspeed_env")}


def flags(cluster: Cluster, run_name: str, *, batch: int = 4, **changes: str) -> list[str]:
    named = {
        "deepspeed_config": "ds_configs/zero2.json",
        "config_name": str(cluster.folder / "model.json"),
        "train_file": str(cluster.folder / "text.txt"),
        "block_size": "32",
        "max_steps": str(STEPS),
        "max_eval_batches": "2",
        "report_to": "none",
        "output_dir": str(cluster.folder / run_name),
    } | changes
    more = ["--set", "bf16.enabled=false", "--set", f"train_batch_size={batch}"]
    return [*more, *(word for name, value in named.items() if value for word in (f"--{name}", value))]


def deepspeed(cluster: Cluster, words: list[str], *launcher: str, hostfile: Path | None = None) -> tuple[int, str]:
    """`deepspeed --hostfile`, started on node1, as a user with nothing but `.deepspeed_env` starts it."""
    head = ["deepspeed", "--hostfile", str(hostfile or cluster.folder / "hostfile"), *launcher, "dstrain/train.py"]
    env = {"DS_ACCELERATOR": "cpu", **env_file(cluster), **(ROOT_MAY if launcher else {})}
    done = cluster.run("node1", [*head, *words], env=env, timeout_s=120)
    return done.returncode, done.stdout + done.stderr


def losses(folder: Path, world_size: int = 2) -> list[float]:
    """Of a run that had so many ranks."""
    result = Result([], 0, "", "", folder, 0.0)
    assert result.run_json()["world"]["world_size"] == world_size
    return [line["loss"] for line in result.metrics() if line["kind"] in ("train", "eval")]


@pytest.fixture(scope="module")
def one_host(cluster) -> Iterator[list[float]]:
    """Losses of two ranks on one host; the run goes on beside the first test that asks for them."""
    found: list[Result] = []
    words, own = flags(cluster, "one_host"), {name: SET[name] for name in SET if name != "XDG_CACHE_HOME"}
    thread = threading.Thread(target=lambda: found.append(run("dstrain/train.py", *words, **TWO_RANKS, env=own)))
    thread.start()

    def wait() -> list[float]:
        thread.join()
        found[0].check()
        return losses(cluster.folder / "one_host")

    yield wait
    thread.join()


TWO_RANKS = {"launcher": "torchrun", "ranks": 2}


def test_two_hosts_over_pdsh_are_two_ranks_on_one(cluster, one_host):
    code, output = deepspeed(cluster, flags(cluster, "pdsh"))
    assert code == 0, output[-3000:]
    assert losses(cluster.folder / "pdsh") == one_host() and len(one_host()) == STEPS + 1
    # `.deepspeed_env` has reached the ranks: each host tokenized into the place that it names, on its own disk
    for name in cluster.names:
        assert list((cluster.folder / f"{name}.disk" / "cache").rglob("tokens.bin")), name


@pytest.mark.exhaustive
def test_open_mpi(cluster, one_host):
    if reason := why_not("mpirun"):
        pytest.skip(reason)
    code, output = deepspeed(cluster, flags(cluster, "mpi"), "--launcher", "openmpi")
    assert code == 0, output[-3000:]
    assert losses(cluster.folder / "mpi") == one_host()


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_on_every_host(cluster, one_host, launcher):
    words, at = flags(cluster, launcher), cluster.address("node1")

    def start(rank: int) -> None:
        heads = {
            "torchrun": "torchrun --nnodes 2 --nproc_per_node 1 --rdzv-backend c10d --rdzv-id hosts "
            f"--rdzv-endpoint {at}:29400",
            "accelerate": f"accelerate launch --num_machines 2 --num_processes 2 --machine_rank {rank} "
            f"--main_process_ip {at} --main_process_port 29500 --mixed_precision no --use_deepspeed "
            "--deepspeed_config_file ds_configs/zero2.json --deepspeed_multinode_launcher standard",
        }
        head = heads[launcher].split()
        env = SET | {"HF_HOME": str(cluster.folder / "hf")}
        done[rank] = cluster.run(cluster.names[rank], [*head, "dstrain/train.py", *words], env=env, timeout_s=150)

    done = [None, None]
    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ended.returncode for ended in done] == [0, 0], "\n".join(ended.stderr[-2000:] for ended in done)
    assert losses(cluster.folder / launcher) == one_host()


@pytest.mark.exhaustive
def test_accelerate_by_its_default_starts_each_host_alone_and_is_refused(cluster):
    """accelerate 1.15 runs `deepspeed --hostfile None` on each machine, and appends its environment to a file."""
    head = "accelerate launch --num_machines 2 --num_processes 2 --machine_rank 0 --main_process_ip 127.0.0.1"
    more = "--mixed_precision no --use_deepspeed --deepspeed_config_file ds_configs/zero2.json dstrain/train.py"
    env = SET | {
        "HF_HOME": str(cluster.folder / "hf"),
        "DS_ENV_FILE": str(cluster.folder / "theirs"),
        "X_TOKEN": "hidden",
    }
    done = cluster.run("node1", [*head.split(), *more.split(), *flags(cluster, "never")], env=env, timeout_s=100)
    assert done.returncode and "add --deepspeed_multinode_launcher standard" in done.stderr, done.stderr[-2000:]
    assert "X_TOKEN=hidden" in (cluster.folder / "theirs").read_text()


@pytest.mark.exhaustive
def test_hosts_of_different_size(cluster):
    """node2 has ranks 1 and 2, whose local ranks deepspeed 0.19.8 numbers 1 and 0: the second is the host's first."""
    uneven = cluster.folder / "uneven"
    uneven.write_text("node1 slots=1\nnode2 slots=2\n")
    code, output = deepspeed(cluster, flags(cluster, "three", batch=6), hostfile=uneven)
    assert code == 0, output[-3000:]
    run("dstrain/train.py", *flags(cluster, "plain", batch=6)).check()
    assert losses(cluster.folder / "three", 3) == pytest.approx(losses(cluster.folder / "plain", 1), rel=1e-5)


@pytest.mark.exhaustive
def test_a_run_folder_of_each_host_is_refused_before_anything_is_written(cluster):
    code, output = deepspeed(cluster, flags(cluster, "", output_dir="/mnt/run"))
    assert code == 2, output[-3000:]
    assert "--output_dir /mnt/run is not the same folder on node2 as on node1" in output and "Traceback" not in output
    left = [path for name in cluster.names for path in (cluster.folder / f"{name}.disk").iterdir()]
    assert {path.name for path in left} <= {"cache"}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flag", "name", "text", "words"),
    [
        ("config_name", "model.json", None, "node2: /mnt/model.json does not exist"),
        ("deepspeed_config", "ds.json", None, "node2: /mnt/ds.json: no such file"),
        (
            "deepspeed_config",
            "ds.json",
            ("3e-4", "4e-4"),
            "node1 and node2 differ in DeepSpeed configuration (optimizer",
        ),
        (
            "config_name",
            "model.json",
            ('"num_hidden_layers": 2', '"num_hidden_layers": 1'),
            "differ in model (num_hidden",
        ),
        ("train_file", "text.txt", ("7 times 7", "7 times 8"), "node1 and node2 have different training data"),
    ],
    ids=["no_model", "no_json", "other_json", "other_model", "other_text"],
)
def test_copies_that_differ_are_refused_on_all_hosts(cluster, flag, name, text, words):
    source = {"ds.json": Path("ds_configs/zero2.json")}.get(name, cluster.folder / name).read_text()
    (cluster.folder / "node1.disk" / name).write_text(source)
    other = cluster.folder / "node2.disk" / name
    if text:
        other.write_text(source.replace(*text))
    try:
        code, output = deepspeed(cluster, flags(cluster, "never", **{flag: f"/mnt/{name}"}))
    finally:
        other.unlink(missing_ok=True)
        (cluster.folder / "node1.disk" / name).unlink()
    assert code == 2 and words in output and "Traceback" not in output, output[-3000:]
    assert not (cluster.folder / "never").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.5, "node1 and node2 differ in model weights"),
        (0.0, "node1 and node2 differ in model.safetensors of /mnt/model: copy the model anew"),
    ],
)
def test_other_weights_on_one_host_are_refused(cluster, share, words):
    """The second half of a file, which samples find, and its last byte, which they do not."""
    folders = [save(cluster.folder / f"{name}.disk" / "model") for name in cluster.names]
    weights = folders[1] / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    changed = max(1, int(share * len(whole)))
    whole[-changed:] = bytes(byte ^ 1 for byte in whole[-changed:])
    weights.write_bytes(whole)
    changes = {"config_name": "", "model_name_or_path": "/mnt/model"}
    code, output = deepspeed(cluster, flags(cluster, "never", **changes))
    for folder in folders:
        shutil.rmtree(folder)
    assert code == 2 and words in output, output[-3000:]
