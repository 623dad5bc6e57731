"""The machine that a session measures on, and what it can do at best: the rate of a matmul, the size of the imports.

    python -m benchmarks.machine OUTPUT.json [DS_CONFIG.json ...]

Also builds DeepSpeed's ops that the named configurations need. A process of its own, so that the runner never holds a
device or a thread pool.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def machine_facts() -> dict[str, Any]:
    """Name of the hardware for files, processor, cores, memory in GiB, devices. Imports nothing heavy."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = re.findall(r"model name\s*: (.*)", cpuinfo)
    kib = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    devices = gpu_names()
    cores = len(os.sched_getaffinity(0))
    short = re.sub(r"[^a-z0-9]", "", devices[0].lower().removeprefix("nvidia ").split(" ")[0]) if devices else ""
    return {
        "hardware": f"{len(devices)}x{short}" if devices else f"{cores}cpu",
        "processor": models[0] if models else platform.machine(),
        "cores": cores,
        "memory_gib": int(kib[1]) / 2**20 if kib else None,
        "devices": devices,
        "platform": platform.platform(),
    }


@cache
def gpu_names() -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def resident_gib() -> float:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def import_all() -> float:
    """Import what a training process imports before it builds a model; GiB that the process then holds."""
    for name in (
        *("torch", "deepspeed", "transformers.models.llama.modeling_llama"),
        *("dstrain.prepare", "dstrain.engine", "dstrain.models.build", "dstrain.data.build"),
    ):
        import_module(name)
    return resident_gib()


def measure() -> dict[str, Any]:
    """imports_gib and matmul_tflops of bfloat16, float16 and float32, those that the device has."""
    imports_gib = import_all()
    import torch

    from dstrain.monitor.devices import measure_matmul_peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {}
    for name in ("bfloat16", "float16", "float32"):
        try:
            with torch.no_grad():
                rates[name] = measure_matmul_peak(device, getattr(torch, name), seconds=0.5).peak_tflops
        except RuntimeError:  # a type that the device does not have
            continue
    return {"imports_gib": imports_gib, "matmul_tflops": rates, "threads": torch.get_num_threads()}


def build_ops_for(configs: Sequence[str]) -> None:
    """What these DeepSpeed JSONs need, so that no case pays minutes of compiling.

    What cannot be built (no libaio, say) is only told: its cases are refused by the run itself, which is their result.
    """
    import torch

    from dstrain.config import load_config
    from dstrain.errors import UserError
    from dstrain.launch.ops import build_ops, required_builders

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for path in configs:
        try:
            build_ops(required_builders(load_config(path), device))
        except UserError as error:
            print(*error.problems, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure()) + "\n")
    build_ops_for(sys.argv[2:])
