"""What a save costs: dstrain's background save, DeepSpeed's own synchronous one, and `dd` on the same disk, in turn.

    python -m benchmarks.checkpoint --rounds 5 --output benchmarks/results/checkpoint_2cpu_DATE.json

One rank, a Llama of about 38 M parameters under ZeRO-2 in bf16 (masters and two moments: 12 bytes a parameter).
stall_s: how long training stands still, in `save` and before the next optimizer step, which waits for the copy to host
memory; DeepSpeed's: to the end of its call, which flushes nothing (`flushed`: and fsync of its files). step_*: a whole
training step, without and with a save under way. mb_per_s: bytes over the time until they are committed, with copy,
sha256 and fsync for dstrain, `conv=fsync` for dd: one, three at a time (as many as dstrain writes files), and three
with O_DIRECT (as dstrain writes). The source of dd is a cached file of random bytes. hash: sha256 alone, all files at
once. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import dstrain
from dstrain.arguments import ModelArguments
from dstrain.checkpoint.files import THREADS
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


def dd(folder: Path, num_bytes: int, processes: int = 1, *more: str) -> float:
    """Seconds that `processes` of dd take to bring so many bytes to the disk, from a file that is cached."""
    source = folder / "source"
    if not source.exists():
        source.write_bytes(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy().tobytes())
    targets = [folder / f"target{i}" for i in range(processes)]
    count = ["bs=4M", f"count={num_bytes // processes}", "iflag=count_bytes", "conv=fsync", *more]
    begin = time.perf_counter()
    running = [subprocess.Popen(["dd", f"if={source}", f"of={t}", *count], stderr=subprocess.DEVNULL) for t in targets]
    assert [process.wait() for process in running] == [0] * processes
    seconds = time.perf_counter() - begin
    for target in targets:
        target.unlink()
    return seconds


def sync_files(folder: Path) -> float:
    """Seconds until what lies in `folder` is on the disk."""
    begin = time.perf_counter()
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - begin


def hash_files(paths: list[Path]) -> float:
    """Seconds of sha256 alone over files that are cached, side by side as the ranks' files are hashed."""
    data = [path.read_bytes() for path in paths]
    begin = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as hashers:
        list(hashers.map(lambda content: hashlib.sha256(content).digest(), data))
    return time.perf_counter() - begin


def one_round(folder: Path, step: int, engine: Any, batches: Any, manager: CheckpointManager) -> dict[str, float]:
    """Each of them once, one after the other."""
    begin = time.perf_counter()
    engine.train_batch(batches)
    alone_s = time.perf_counter() - begin
    begin = time.perf_counter()
    manager.save(TrainState(2 * step - 1, step), {})
    saved = time.perf_counter()
    engine.train_batch(batches)
    beside_s = time.perf_counter() - saved
    manager.wait()
    (stats,) = manager.finished()
    stall_s = stats.stall_s
    manager.save(TrainState(2 * step, step), {})
    manager.wait()
    (stats,) = manager.finished()
    total_s = stats.total_s
    begin = time.perf_counter()
    engine.deepspeed.save_checkpoint(str(folder / "theirs"), tag=f"{step}")
    deepspeed_s = time.perf_counter() - begin
    flush_s = sync_files(folder / "theirs")
    shutil.rmtree(folder / "theirs")
    plain_s, three_s = dd(folder, stats.bytes), dd(folder, stats.bytes, 3)
    direct_s = dd(folder, stats.bytes // 3 // 4096 * 4096 * 3, 3, "oflag=direct")
    hash_s = hash_files([*manager.path_of(2 * step).glob("rank_*")])
    return {
        "stall_s": stall_s,
        "step_alone_s": alone_s,
        "step_beside_a_save_s": beside_s,
        "deepspeed_stall_s": deepspeed_s,
        "deepspeed_flushed_s": deepspeed_s + flush_s,
        "stall_ratio": stall_s / deepspeed_s,
        "bytes": stats.bytes,
        "mb_per_s": stats.bytes / 1e6 / total_s,
        "hash_mb_per_s": stats.bytes / 1e6 / hash_s,
        "dd_mb_per_s": stats.bytes / 1e6 / plain_s,
        "three_dd_mb_per_s": stats.bytes / 1e6 / three_s,
        "three_direct_dd_mb_per_s": stats.bytes / 1e6 / direct_s,
        "throughput_ratio": plain_s / total_s,
        "throughput_ratio_three_dd": three_s / total_s,
        "throughput_ratio_three_direct_dd": direct_s / total_s,
    }


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
            rounds.append(one_round(folder, step, engine, batches, manager))
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
