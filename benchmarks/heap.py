"""What glibc's heap loses on a CPU: resident memory of real steps against what the planner's trace says is alive.

    OMP_NUM_THREADS=1 python -m benchmarks.heap

A 10 M-parameter Llama in one process without DeepSpeed, each setting in a process of its own: the peak of three steps
above the memory that a step of 8 tokens leaves, less the traced peak. The straight line through the settings is where
`lost_bytes` and `lost_share` of `dstrain/planner/platform_costs.py` come from. The heap is that of a rank
(`dstrain/launch/heap.py`); with `GLIBC_TUNABLES=glibc.malloc.arena_max=8` it is glibc's own. The last line is JSON.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import LLAMA_10M
from dstrain.arguments import ModelArguments
from dstrain.launch.heap import use_own_heap
from dstrain.models.build import build_model
from dstrain.models.config import load_model_config
from dstrain.models.loss import install_fused_loss, token_loss
from dstrain.planner.tracing import Setting, trace_activations

BLOCK_SIZE = 512
# vocabulary, micro-batch, dtype, checkpointing
SETTINGS = ((512, 4, "bfloat16", 0), (512, 8, "bfloat16", 0), (512, 4, "float32", 0), (512, 4, "bfloat16", 1),
            (512, 8, "bfloat16", 1), (32_000, 4, "bfloat16", 0), (32_000, 4, "bfloat16", 1))  # fmt: skip


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def measure(vocab_size: int, micro_batch: int, dtype_name: str, checkpointing: int) -> dict[str, Any]:
    """Of this process, which must be fresh."""
    dtype = getattr(torch, dtype_name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps({**LLAMA_10M, "vocab_size": vocab_size}))
        margs = ModelArguments(config_name=str(path), gradient_checkpointing=bool(checkpointing))
        config = load_model_config(margs)
    setting = Setting(micro_batch, BLOCK_SIZE, dtype, dtype, gradient_checkpointing=bool(checkpointing))
    trace = trace_activations(config, setting).whole(config.num_hidden_layers)
    model = build_model(margs, config, seed=0, dtype=dtype)
    head = install_fused_loss(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(rows: int, tokens: int) -> None:
        ids = torch.zeros((rows, tokens), dtype=torch.int64)
        loss, _ = token_loss(model, head, {"input_ids": ids, "labels": ids})
        loss.backward()

    step(1, 8)  # loads the kernels
    gc.collect()
    gc.freeze()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    for _ in range(3):
        step(micro_batch, BLOCK_SIZE)
    traced = max(trace.forward_peak, trace.backward_peak)
    grown = status_bytes("VmHWM") - before
    return {"setting": [vocab_size, micro_batch, dtype_name, checkpointing], "traced_mib": traced / 2**20,
            "resident_mib": grown / 2**20, "lost_mib": (grown - traced) / 2**20}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows = []
    for setting in SETTINGS:
        command = [sys.executable, "-m", "benchmarks.heap", "--one", json.dumps(setting)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    share, lost = np.polyfit([row["traced_mib"] for row in rows], [row["lost_mib"] for row in rows], 1)
    print(json.dumps({"lost_mib": round(float(lost), 1), "lost_share": round(float(share), 3), "rows": rows}))


if __name__ == "__main__":
    use_own_heap()
    main()
