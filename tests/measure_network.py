"""Step times over slow networks, against the plan's: two hosts of namespaces, a rank each, `tc` bounds what they send.

    python -m tests.measure_network unlimited 1gbit 100mbit

Needs root, namespaces and the kernel's tbf (`tests/cluster.py`). Prints a JSON line for each run, and a table.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstrain.arguments import ModelArguments
from dstrain.config.load import load_config
from dstrain.launch.ops import extensions_root
from tests.cluster import Cluster, build_cluster, why_not
from tests.launch import BIN

MODEL = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BLOCK_SIZE, STEPS, FIRST = 128, 6, 3  # the steps before FIRST warm up
_BATCH = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}
_OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
# Small matrices are gathered too, as large ones are in large models.
_STAGES: dict[int, dict[str, Any]] = {1: {}, 2: {}, 3: {"stage3_param_persistence_threshold": 10000}}
CASES: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage}": {**_BATCH, **_OPTIMIZER, "zero_optimization": {"stage": stage, **more}}
    for stage, more in _STAGES.items()
}
CASES["PP2"] = {**CASES["ZeRO-1"], "pipeline": {"stages": 2}}


def write_inputs(folder: Path) -> None:
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    for name, config in CASES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def predict(folder: str, hostfile: str) -> None:
    """On one of the hosts: a JSON line for each case, of the network as `dstrain plan --hostfile` finds it."""
    from dstrain.launch.doctor.network import measure_links
    from dstrain.launch.hosts import read_hostfile
    from dstrain.models.config import load_model_config
    from dstrain.planner.hardware import find_device
    from dstrain.planner.memory import Flags, setting_of
    from dstrain.planner.network import with_network
    from dstrain.planner.step_time import seconds_of, travel_seconds, work_of
    from dstrain.planner.strategy import Cluster as Machines
    from dstrain.planner.strategy import Planner

    hosts = [host.name for host in read_hostfile(hostfile)]
    device = with_network(find_device("cpu", 2), measure_links(hosts))
    margs, flags = ModelArguments(config_name=f"{folder}/model.json"), Flags(BLOCK_SIZE)
    planner = Planner(load_model_config(margs), margs, Machines(len(hosts), 1, device), flags, "fp32")
    for name in CASES:
        resolved = planner.resolve(load_config(f"{folder}/{name}.json"), flags, name)
        activations = planner.trace(setting_of(resolved, flags, on_cpu=True))
        work = work_of(planner.shape, activations, resolved, BLOCK_SIZE)
        print(
            json.dumps(
                {
                    "case": name,
                    "network_mb_per_s": device.network / 1e6,
                    "latency_ms": 1e3 * device.network_latency,
                    "predicted_s": seconds_of(work, planner.cluster.device, len(hosts), 1),
                    "predicted_on_the_way_s": sum(travel_seconds(work, planner.cluster.device, len(hosts), 1)),
                    "predicted_mb": sum(group.sent for group in work.travel) / 1e6,
                    "travel": [asdict(group) for group in work.travel],
                }
            )
        )


def train(folder: str, rank: str, rate: str) -> None:
    """On each of the hosts, as its rank: one case after another, in a fork that need not import anything."""
    import tests.preload  # noqa: F401
    from dstrain.train import main

    for case in CASES:
        flags = ["--deepspeed_config", f"{folder}/{case}.json", "--config_name", f"{folder}/model.json"]
        flags += ["--train_file", f"{folder}/text.txt", "--block_size", str(BLOCK_SIZE), "--max_steps", str(STEPS)]
        flags += ["--save_steps", "0", "--max_eval_batches", "1", "--report_to", "none"]
        if (child := os.fork()) == 0:
            os.environ.update(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_PORT="29500")
            os._exit(main([*flags, "--output_dir", f"{folder}/{case}-{rate}"]))
        assert os.waitpid(child, 0)[1] == 0, f"{case} at {rate}"


def measure(hosts: Cluster, folder: Path, rate: str) -> Iterator[dict[str, float]]:
    """Train every case, a rank on each host: the median step, and what node1 sent in one."""
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": hosts.names[0]}
    env["TORCH_EXTENSIONS_DIR"] = str(extensions_root())
    words = [str(BIN / "python"), "-m", "tests.measure_network", "--train", str(folder)]
    ranks = [
        subprocess.Popen(hosts.command(name, [*words, str(rank), rate], env), stdout=subprocess.DEVNULL)
        for rank, name in enumerate(hosts.names)
    ]
    for case in CASES:
        metrics = folder / f"{case}-{rate}" / "metrics.jsonl"
        sent: dict[int, int] = {}
        rows: list[dict[str, Any]] = []
        while not rows or rows[-1]["kind"] != "summary":
            assert not any(rank.poll() for rank in ranks), [rank.returncode for rank in ranks]
            time.sleep(0.01)
            rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            sent.setdefault(sum(row["kind"] == "train" for row in rows), _sent_by(hosts.inits["node1"]))
        times = [row["step_time_s"] for row in rows if row["kind"] == "train" and row["step"] >= FIRST]
        first, last = min(step for step in sent if step >= FIRST - 1), max(step for step in sent if step < STEPS)
        yield {"measured_s": statistics.median(times), "measured_mb": (sent[last] - sent[first]) / (last - first) / 1e6}
    assert [rank.wait(60) for rank in ranks] == [0, 0]


def _sent_by(pid: int) -> int:
    """Bytes that the host of this process has sent over eth0."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    return int(next(line for line in lines if "eth0:" in line).split(":")[1].split()[8])


def main(rates: list[str]) -> None:
    if reason := why_not("tc"):
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts are taken down
    rows = []
    with tempfile.TemporaryDirectory() as name, build_cluster(Path(name, "hosts")) as hosts:
        folder = Path(name)
        write_inputs(folder)
        hostfile = hosts.hostfile()
        for rate in rates:
            if rate != "unlimited":
                for host in hosts.names:
                    hosts.limit(host, rate)
            asks = [str(BIN / "python"), "-m", "tests.measure_network", "--predict", str(folder), str(hostfile)]
            plans = hosts.run("node1", asks, env={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
            assert plans.returncode == 0, plans.stderr
            for line, measured in zip(plans.stdout.splitlines(), measure(hosts, folder, rate), strict=True):
                row = {"rate": rate, **json.loads(line), **measured}
                print(json.dumps(row), flush=True)
                rows.append(row)
    print("\n| network | case | MB a step: plan, measured | s a step: plan, measured | s on the way: plan |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['rate']} ({row['network_mb_per_s']:.0f} MB/s) | {row['case']} | {row['predicted_mb']:.1f}, "
            f"{row['measured_mb']:.1f} | {row['predicted_s']:.2f}, {row['measured_s']:.2f} | "
            f"{row['predicted_on_the_way_s']:.2f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--predict"]:
        predict(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:5])
    else:
        main(sys.argv[1:] or ["unlimited", "1gbit", "100mbit"])
