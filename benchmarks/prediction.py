"""What the planner says against what runs use: memory above the imports, seconds of a step; the last line is JSON.

    python -m benchmarks.prediction --output benchmarks/results/prediction.json
    python -m benchmarks.prediction --cases "zero2.*512" --max_steps 6

A 10 M-parameter Llama, blocks of 512, 2 CPU ranks with one thread each, vocabularies of 512 and 32,000, under every
file of ds_configs/ that runs on two CPU ranks, and with checkpointing and fp32. Every case goes through torchrun and
the real train.py, whose run.json has both sides. With --output, cases that the file holds already are not run again.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.trainer import BLOCK_SIZE, MODEL, RANKS, ROOT, start

VOCABULARIES = (512, 32_000)
# Not here: another model (moe), four ranks (pp2_dp2), a CPU with fp16 (zero1_fp16), libaio (nvme).
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu", "zero3_offload_cpu", "zero3_torch_autocast",
           "pp2_zero1", "tp2_zero1", "tp2_zero2", "sp2_zero1", "sp2_zero3")  # fmt: skip
FP32 = ("--set", "bf16.enabled=false")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "zero2_checkpointing": ("zero2", ("--gradient_checkpointing",)),
    "zero3_checkpointing": ("zero3", ("--gradient_checkpointing",)),
    "zero1_fp32": ("zero1", FP32),
    "zero2_fp32": ("zero2", FP32),
    "zero3_fp32": ("zero3", FP32),
    "zero2_accumulation": ("zero2", ("--set", "gradient_accumulation_steps=4")),
}


def cases() -> dict[str, tuple[str, int, tuple[str, ...]]]:
    """name -> (file of ds_configs/, vocabulary, further flags)"""
    plain = {name: (name, ()) for name in CONFIGS}
    return {
        f"{name}_v{vocab_size}": (config, vocab_size, flags)
        for vocab_size in VOCABULARIES
        for name, (config, flags) in {**plain, **VARIANTS}.items()
    }


def measure(config: str, vocab_size: int, flags: tuple[str, ...], max_steps: int) -> dict[str, Any]:
    """Run one case and take both sides from its run.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.json").write_text(json.dumps({**MODEL, "vocab_size": vocab_size}))
        start(
            "dstrain/train.py",
            *("--deepspeed_config", str(ROOT / "ds_configs" / f"{config}.json")),
            *("--config_name", str(folder / "model.json"), "--block_size", str(BLOCK_SIZE)),
            *("--max_steps", str(max_steps), "--max_eval_batches", "1", "--save_steps", "0", "--report_to", "none"),
            *("--output_dir", str(folder / "run"), *flags),
        )
        run = json.loads((folder / "run" / "run.json").read_text())
    predicted, measured = run["prediction"], run["measured"]
    pairs = {
        "memory_gib": (predicted["device_gib"]["total"], measured["peak_above_imports_gib"]),
        "step_time_s": (predicted["step_time_s"], measured["step_time_s"]),
        "checkpoint_gib": (predicted["checkpoint_gib"], measured["checkpoint_gib"]),
    }
    result: dict[str, Any] = {"prediction": predicted, "measured": measured, "startup_s": run["startup_s"]}
    for what, (said, found) in pairs.items():
        result[what] = {"predicted": said, "measured": found, "error": said / found - 1}
    return result


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Median and worst size of the relative errors."""
    summary: dict[str, Any] = {"num_cases": len(found)}
    for what in ("memory_gib", "step_time_s", "checkpoint_gib"):
        errors = [abs(case[what]["error"]) for case in found.values()]
        summary[what] = {"median_error": statistics.median(errors), "worst_error": max(errors)}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=".*", help="run the cases whose names this pattern finds")
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--output", help="JSON of all pairs, added to")
    args = parser.parse_args()
    output = Path(args.output) if args.output else None
    found = json.loads(output.read_text())["cases"] if output and output.exists() else {}
    for name, (config, vocab_size, flags) in cases().items():
        if name in found or not re.search(args.cases, name):
            continue
        found[name] = case = measure(config, vocab_size, flags, args.max_steps)
        memory, seconds = case["memory_gib"], case["step_time_s"]
        print(
            f"{name:28} {memory['predicted']:.3f} for {memory['measured']:.3f} GiB ({memory['error']:+.1%}), "
            f"{seconds['predicted']:.2f} for {seconds['measured']:.2f} s ({seconds['error']:+.1%})",
            flush=True,
        )
        if output:
            host = {"cpus": os.cpu_count(), "platform": platform.platform()}
            contents = {"summary": summarise(found), "ranks": RANKS, "host": host, "command": sys.argv, "cases": found}
            output.write_text(json.dumps(contents, indent=1) + "\n")
    if not found:
        raise SystemExit(f"no case matches {args.cases}")
    print(json.dumps(summarise(found)))


if __name__ == "__main__":
    main()
