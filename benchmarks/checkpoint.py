"""What a save costs: dstrain's background save, DeepSpeed's own synchronous one, and `dd` on the same disk, in turn.

    python -m benchmarks.checkpoint --rounds 5 --output benchmarks/results/checkpoint_2cpu.json

One rank, a Llama of about 38 M parameters under ZeRO-2 in bf16 (masters and two moments: 12 bytes a parameter).
stall_s: how long training stands still. mb_per_s: bytes over the time until they are on the disk, with sha256 and fsync
for dstrain, `conv=fsync` for dd; DeepSpeed flushes nothing. The last line is JSON.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import dstrain
from dstrain.arguments import ModelArguments
from dstrain.checkpoint.manager import CheckpointManager, TrainState
from dstrain.run_folder import environment_facts

CONFIG = {
    "train_batch_size": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}
MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}


def build(folder: Path) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    (folder / "model.json").write_text(json.dumps(MODEL))
    margs = ModelArguments(config_name=str(folder / "model.json"))
    dstrain.init_distributed()
    resolved = dstrain.resolve_config(CONFIG, world_size=1).with_total_steps(1000)
    model = dstrain.build_model(margs, dstrain.load_model_config(margs), seed=1, dtype=torch.bfloat16)
    engine = dstrain.build_engine(model, resolved)
    ids = torch.randint(0, MODEL["vocab_size"], (resolved.micro_batch, 32))
    return engine, [{"input_ids": ids, "labels": ids}] * resolved.gradient_accumulation_steps


def dd(folder: Path, num_bytes: int) -> float:
    """Seconds that dd takes to bring as many bytes to the disk, from a file that is cached."""
    source, target = folder / "source", folder / "target"
    if not source.exists():
        source.write_bytes(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy().tobytes())
    begin = time.perf_counter()
    subprocess.run(["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync"], check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=Path.cwd()) as name:
        folder = Path(name)
        engine, batches = build(folder)
        manager = CheckpointManager(
            folder / "ours", engine.deepspeed, save_steps=1, save_total_limit=1, background=True
        )
        engine.train_batch(batches)
        manager.finished()  # readies the memory, as the train loop does after its first step
        manager.memory.ready()
        for step in range(1, args.rounds + 2):
            engine.train_batch(batches)
            begin = time.perf_counter()
            manager.save(TrainState(step, step), {})
            stall_s = time.perf_counter() - begin
            manager.wait()
            total_s = time.perf_counter() - begin
            (stats,) = manager.finished()
            begin = time.perf_counter()
            engine.deepspeed.save_checkpoint(str(folder / "theirs"), tag=f"{step}")
            deepspeed_s = time.perf_counter() - begin
            shutil.rmtree(folder / "theirs")
            dd_s = dd(folder, stats.bytes)
            rounds.append(
                {"stall_s": stall_s, "deepspeed_stall_s": deepspeed_s, "stall_ratio": stall_s / deepspeed_s}
                | {
                    "bytes": stats.bytes,
                    "mb_per_s": stats.bytes / 1e6 / total_s,
                    "dd_mb_per_s": stats.bytes / 1e6 / dd_s,
                }
                | {"throughput_ratio": dd_s / total_s}
            )
            print({key: round(value, 3) for key, value in rounds[-1].items()}, flush=True)
    rounds = rounds[1:]  # the first one makes folders and caches
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    if args.output:
        facts = {"medians": medians, "model": MODEL, "deepspeed": CONFIG, "rounds": rounds, **environment_facts()}
        args.output.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(medians))
    return 0


if __name__ == "__main__":
    sys.exit(main())
