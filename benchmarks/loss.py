"""Time and memory of the fused linear cross entropy against plain torch, in turn; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/loss.py
    OMP_NUM_THREADS=2 python benchmarks/loss.py --tokens 4096 --vocab_size 32000 --width 384 --dtype bfloat16 --rounds 7

Time: median of the ratios of neighbouring runs. Memory: how far the resident set's peak rises above the inputs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dstrain.models.cross_entropy import linear_cross_entropy


def plain(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), target, reduction="sum")


def fused(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, None, target)


LOSSES = {"plain": plain, "fused": fused}


def make_inputs(args: argparse.Namespace) -> list[torch.Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.width).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocab_size, args.width)).to(dtype).requires_grad_()
    return [hidden, weight, torch.randint(0, args.vocab_size, (args.tokens,))]


def step(name: str, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """(seconds of forward and backward, mean loss)"""
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    loss = LOSSES[name](hidden, weight, target) / len(target)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def status_gib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**20


def extra_gib(name: str, args: argparse.Namespace) -> float:
    """Peak above the inputs, in a process of its own; a small step first, so that loading kernels does not count."""
    command = [sys.executable, __file__, "--memory_of", name, "--rounds", "1"]
    for key in ("tokens", "vocab_size", "width", "dtype"):
        command += [f"--{key}", str(getattr(args, key))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(name: str, args: argparse.Namespace) -> float:
    small = argparse.Namespace(**{**vars(args), "tokens": 64, "vocab_size": 256})
    step(name, *make_inputs(small))
    inputs = make_inputs(args)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_gib("VmRSS")
    step(name, *inputs)
    return status_gib("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory_of", choices=tuple(LOSSES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return
    inputs = make_inputs(args)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    values: dict[str, float] = {}
    for _ in range(args.rounds + 1):
        for name in LOSSES:
            time_s, values[name] = step(name, *inputs)
            seconds[name].append(time_s)
    pairs = list(zip(seconds["plain"][1:], seconds["fused"][1:], strict=True))  # the first round warms up
    memory = {name: extra_gib(name, args) for name in LOSSES}
    result = {
        "setting": {k: getattr(args, k) for k in ("tokens", "vocab_size", "width", "dtype", "rounds")},
        "threads": torch.get_num_threads(),
        "loss": values,
        "seconds": {name: round(statistics.median(s[1:]), 4) for name, s in seconds.items()},
        "time_ratio": round(statistics.median(f / p for p, f in pairs), 3),
        "extra_gib": {name: round(gib, 3) for name, gib in memory.items()},
        "memory_ratio": round(memory["fused"] / memory["plain"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
