"""Tokens/s of tokenizing, packing and loading the built-in corpus in one process, from a cache that is empty.

    python benchmarks/loader.py --deepspeed_config ds_configs/zero0.json --config_name examples/llama_10m.json \
        --block_size 512 --max_steps 8 --warmup_steps 3 --output result.json

As `loader` of `benchmarks.run` it is repeated with what else the suite records. The loading is that of training: a
thread ahead, micro-batches as tensors; only the training is missing. The byte-level tokenizer is the one that comes
with dstrain.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import resident_gib
from benchmarks.peers.common import SEED, parse_flags
from dstrain.arguments import DataArguments
from dstrain.data import build_data, build_loader, build_tokenizer
from dstrain.monitor.devices import host_peak_memory_gib

BATCH, STEPS, ROUNDS = 16, 50, 5


def load(samples: Any, seed: int) -> float:
    """Tokens/s of `STEPS` batches of `BATCH` samples."""
    options = {"global_batch": BATCH, "micro_batch": BATCH, "dp_rank": 0, "dp_size": 1}
    with build_loader(samples, seed=seed, **options) as loader:
        next(loader)  # the thread has started
        begin, tokens = time.perf_counter(), 0
        for _ in range(STEPS):
            tokens += sum(batch["input_ids"].numel() for batch in next(loader))
        return tokens / (time.perf_counter() - begin)


def main() -> None:
    args = parse_flags(__doc__)
    imports_gib = resident_gib()
    rates: dict[str, list[float]] = {name: [] for name in ("tokenize", "pack", "load blocks", "load packed")}
    for round_ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="loader_") as cache:
            common: dict[str, Any] = {
                "seed": SEED + round_,
                "block_size": args.block_size,
                "is_main_per_host": True,
                "barrier": lambda: None,
                "cache_dir": cache,
            }
            blocks = build_data(DataArguments(), build_tokenizer("bytes"), **common)
            num_tokens = blocks.train.num_tokens + (blocks.validation.num_tokens if blocks.validation else 0)
            rates["tokenize"].append(num_tokens / blocks.facts["tokenization_s"])
            begin = time.perf_counter()  # the tokens are in the cache by now
            packed = build_data(DataArguments(packing=True), build_tokenizer("bytes"), **common)
            rates["pack"].append(num_tokens / (time.perf_counter() - begin))
            rates["load blocks"].append(load(blocks.train, SEED))
            rates["load packed"].append(load(packed.train, SEED))
    result = {
        "rates": rates,
        "num_tokens": num_tokens,
        "data_sha256": blocks.sha256,
        "host_memory_gib": host_peak_memory_gib(),
        "imports_gib": imports_gib,
    }
    Path(args.output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
