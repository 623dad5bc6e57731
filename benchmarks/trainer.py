"""dstrain and Hugging Face Trainer in turn: same DeepSpeed JSON, model, tokens, global batch, ranks.

    python -m benchmarks.trainer --vocab_size 512 --rounds 3 --output benchmarks/results/trainer_512.json

A 10 M-parameter Llama under ZeRO-2 in bf16 on 2 CPU ranks, 4,096 tokens a rank and step. Prints the ratio of tokens per
second, round by round and its median, and of the peak memory above the libraries' own (the largest rank's VmHWM minus
what the imports of the peer hold). `--dstrain_flags "--compile"` adds flags to dstrain's side only. The last line is
JSON.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}
MODEL = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
RANKS, BLOCK_SIZE, WARMUP_STEPS = 2, 512, 3


def start(script: str, *flags: str, ranks: int = RANKS) -> None:
    """Through torchrun, one thread a rank. Ends the program when a rank fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*torchrun, str(ROOT / script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def run_dstrain(folder: Path, flags: list[str], extra: list[str], ranks: int = RANKS) -> dict[str, Any]:
    out = folder / "run"
    start(
        "dstrain/train.py",
        *flags,
        *("--output_dir", str(out), "--overwrite_output_dir", "--report_to", "none"),
        *("--max_eval_batches", "1", "--save_steps", "0", *extra),
        ranks=ranks,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    return {
        "step_time_s": [line["step_time_s"] for line in train],
        "host_memory_gib": train[-1]["host_memory_gib"],
        "losses": [line["loss"] for line in train],
    }


def run_trainer(folder: Path, flags: list[str]) -> dict[str, Any]:
    out = folder / "trainer.json"
    start("benchmarks/peers/hf_trainer.py", *flags, "--warmup_steps", "1", "--output", str(out))
    return json.loads(out.read_text())


def median_step_s(result: dict[str, Any]) -> float:
    return statistics.median(result["step_time_s"][WARMUP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=15)
    parser.add_argument("--dstrain_flags", default="")
    parser.add_argument("--output")
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
        (folder / "model.json").write_text(json.dumps({**MODEL, "vocab_size": args.vocab_size}))
        flags = ["--deepspeed_config", str(folder / "ds.json"), "--config_name", str(folder / "model.json")]
        flags += ["--block_size", str(BLOCK_SIZE), "--max_steps", str(args.max_steps)]
        for i in range(args.rounds):
            ours, theirs = run_dstrain(folder, flags, args.dstrain_flags.split()), run_trainer(folder, flags)
            imports = theirs["imports_gib"]
            rounds.append(
                {
                    "speed_ratio": median_step_s(theirs) / median_step_s(ours),
                    "memory_ratio": (ours["host_memory_gib"] - imports) / (theirs["host_memory_gib"] - imports),
                    "dstrain": ours,
                    "trainer": theirs,
                }
            )
            print(f"round {i + 1}: {rounds[-1]['speed_ratio']:.2f} x the tokens/s, ", end="")
            print(f"{rounds[-1]['memory_ratio']:.2f} of the memory above imports", flush=True)
    summary = {
        "vocab_size": args.vocab_size,
        "dstrain_flags": args.dstrain_flags,
        "median_speed_ratio": statistics.median(r["speed_ratio"] for r in rounds),
        "median_memory_ratio": statistics.median(r["memory_ratio"] for r in rounds),
        "command": sys.argv,
        "host": {"cpus": os.cpu_count(), "platform": platform.platform()},
    }
    if args.output:
        Path(args.output).write_text(json.dumps({**summary, "rounds": rounds}, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
