"""Step times over slow networks, against the plan's: two hosts of namespaces, `tc` bounds what they send.

    python -m tests.measure_network unlimited 1gbit 100mbit
    python -m tests.measure_network 1gbit --cases ZeRO-3 PP2

Needs root, namespaces and the kernel's tbf (`tests/cluster.py`). Prints a JSON line for each run, and a table.
"""

import argparse
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
_PLAIN: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage}": {**_BATCH, **_OPTIMIZER, "zero_optimization": {"stage": stage, **more}}
    for stage, more in _STAGES.items()
}
_HPZ = {**_STAGES[3], "stage": 3, "zero_hpz_partition_size": 2}
# Name -> (ranks of a host, configuration).
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (1, config) for name, config in _PLAIN.items()},
    "PP2": (1, {**_PLAIN["ZeRO-1"], "pipeline": {"stages": 2}}),
    "TP2 over hosts": (1, {**_PLAIN["ZeRO-1"], "tensor_parallel": {"autotp_size": 2}}),
    "TP2 in each host": (2, {**_PLAIN["ZeRO-1"], "tensor_parallel": {"autotp_size": 2}}),
    "ZeRO-3, 2 ranks a host": (2, _PLAIN["ZeRO-3"]),
    "ZeRO-3 with hpZ, 2 ranks a host": (2, {**_PLAIN["ZeRO-3"], "zero_optimization": _HPZ}),
}


def write_inputs(folder: Path) -> None:
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    for name, (_, config) in CASES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def predict(folder: str, hostfile: str, cases: list[str]) -> None:
    """On one of the hosts: a JSON line for each of the cases, of the network as `dstrain plan --hostfile` finds it."""
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
    for name in cases:
        slots = CASES[name][0]
        planner = Planner(load_model_config(margs), margs, Machines(len(hosts), slots, device), flags, "fp32")
        resolved = planner.resolve(load_config(f"{folder}/{name}.json"), flags, name)
        activations = planner.trace(setting_of(resolved, flags, on_cpu=True))
        work = work_of(planner.shape, activations, resolved, BLOCK_SIZE)
        print(
            json.dumps(
                {
                    "case": name,
                    "network_mb_per_s": device.network / 1e6,
                    "latency_ms": 1e3 * device.network_latency,
                    "predicted_s": seconds_of(work, planner.cluster.device, len(hosts), slots),
                    "predicted_on_the_way_s": sum(travel_seconds(work, planner.cluster.device, len(hosts), slots)),
                    "predicted_mb": sum(group.over_network(slots) for group in work.travel) / 1e6,
                    "travel": [asdict(group) for group in work.travel],
                }
            )
        )


def train(folder: str, host: str, rate: str, cases: list[str]) -> None:
    """On each of the hosts, as its ranks: one case after another, in forks that need not import anything."""
    import tests.preload  # noqa: F401
    from dstrain.train import main

    for case in cases:
        flags = ["--deepspeed_config", f"{folder}/{case}.json", "--config_name", f"{folder}/model.json"]
        flags += ["--train_file", f"{folder}/text.txt", "--block_size", str(BLOCK_SIZE), "--max_steps", str(STEPS)]
        flags += ["--save_steps", "0", "--max_eval_batches", "1", "--report_to", "none"]
        slots = CASES[case][0]
        children = []
        for local_rank in range(slots):
            children.append(os.fork())
            if not children[-1]:
                rank = int(host) * slots + local_rank
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), MASTER_PORT="29500")
                os.environ.update(WORLD_SIZE=str(2 * slots), LOCAL_WORLD_SIZE=str(slots))
                os._exit(main([*flags, "--output_dir", f"{folder}/{case}-{rate}"]))
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert not any(codes), f"{case} at {rate}"


def measure(hosts: Cluster, folder: Path, rate: str, cases: list[str]) -> Iterator[dict[str, float]]:
    """Train the cases: of each the median step, and what node1 sent in one."""
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": hosts.names[0]}
    env["TORCH_EXTENSIONS_DIR"] = str(extensions_root())
    words = [str(BIN / "python"), "-m", "tests.measure_network", "--train", str(folder)]
    ranks = [
        subprocess.Popen(hosts.command(name, [*words, str(host), rate, *cases], env), stdout=subprocess.DEVNULL)
        for host, name in enumerate(hosts.names)
    ]
    for case in cases:
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


def main(rates: list[str], cases: list[str]) -> None:
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
            asks = [str(BIN / "python"), "-m", "tests.measure_network", "--predict", str(folder), str(hostfile), *cases]
            plans = hosts.run("node1", asks, env={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
            assert plans.returncode == 0, plans.stderr
            for line, measured in zip(plans.stdout.splitlines(), measure(hosts, folder, rate, cases), strict=True):
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
        predict(*sys.argv[2:4], sys.argv[4:])
    elif sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:5], sys.argv[5:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("rates", nargs="*", default=["unlimited", "1gbit", "100mbit"], help="as tc takes them")
        parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
        main(**vars(parser.parse_args()))
