"""Step time and memory of two pipeline stages against the whole model on one rank.

    python -m benchmarks.pipeline --rounds 3 --output benchmarks/results/pipeline_2cpu.json

A Llama of 8 layers in fp32, one thread a rank, for 4, 8 and 16 micro-batches a step, in turn. The ideal of p stages and
m micro-batches is the time of one rank, times (m + p - 1) / (m p): the 1F1B schedule and nothing else. The last line is
JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.trainer import run_dstrain
from dstrain.run_folder import environment_facts

STAGES, WARMUP_STEPS, STEPS = 2, 2, 8
MICRO_BATCH, BLOCK_SIZE = 4, 256
MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def run(folder: Path, micro_batches: int, stages: int) -> tuple[float, float]:
    """(median step time in s, peak resident set of the largest rank in GiB)."""
    config: dict[str, Any] = {
        "train_batch_size": micro_batches * MICRO_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    }
    if stages > 1:
        config["pipeline"] = {"stages": stages}
    (folder / "ds.json").write_text(json.dumps(config))
    (folder / "model.json").write_text(json.dumps(MODEL))
    flags = ["--deepspeed_config", folder / "ds.json", "--config_name", folder / "model.json"]
    flags += ["--max_steps", STEPS, "--block_size", BLOCK_SIZE]
    found = run_dstrain(folder, list(map(str, flags)), [], ranks=stages)
    return statistics.median(found["step_time_s"][WARMUP_STEPS:]), found["host_memory_gib"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pipeline_") as folder:
        for micro_batches in (4, 8, 16):
            rounds = []
            for _ in range(args.rounds):
                whole_s, whole_gib = run(Path(folder), micro_batches, 1)
                staged_s, staged_gib = run(Path(folder), micro_batches, STAGES)
                ideal_s = whole_s * (micro_batches + STAGES - 1) / (micro_batches * STAGES)
                rounds.append(
                    {"one_rank_s": whole_s, "staged_s": staged_s, "of_ideal": staged_s / ideal_s}
                    | {"one_rank_gib": whole_gib, "staged_gib": staged_gib}
                )
                print(micro_batches, rounds[-1], flush=True)
            ratio = statistics.median(r["of_ideal"] for r in rounds)
            found[str(micro_batches)] = {"of_ideal": ratio, "rounds": rounds}
    result = {"model": MODEL, "micro_batches": found, **environment_facts()}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({m: round(r["of_ideal"], 3) for m, r in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
