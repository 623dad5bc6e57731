"""Tiny runs through the real trainer, for the tests of checkpoints: one model, one text, any DeepSpeed JSON.

start(folder, config(2), ranks=2)                  # trains STEPS steps, saves after SAVED and at the end
interrupt(folder)                                  # as if it had died after step SAVED
start(folder, config(3), ranks=1)                  # goes on under another layout
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.forked import train
from tests.launch import ROOT, Result

STEPS = 12
SAVED = 10  # far enough that beta^t differs between a product and a power (dstrain/checkpoint/replay.py)
GLOBAL_BATCH = 4
BLOCK_SIZE = 32
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ADAMW = {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SCHEDULE = {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 2}}


def shipped(name: str) -> dict[str, Any]:
    """A file of ds_configs, with a batch and a schedule for a tiny run."""
    values = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    values["train_batch_size"] = GLOBAL_BATCH
    if "gradient_accumulation_steps" in values:
        values["gradient_accumulation_steps"] = 2
    if "scheduler" in values:
        values["scheduler"] = SCHEDULE
    if "optimizer" in values and values["optimizer"]["type"] == "AdamW":
        values["optimizer"] = ADAMW
    return values


def config(stage: int, precision: str = "fp32", **extra: Any) -> dict[str, Any]:
    """A small DeepSpeed JSON; `zero` in extra goes into its zero_optimization block."""
    zero = {"stage": stage, **extra.pop("zero", {})}
    values = {"train_batch_size": GLOBAL_BATCH, "optimizer": ADAMW, "scheduler": SCHEDULE, "zero_optimization": zero}
    if precision != "fp32":
        values[precision] = {"enabled": True}
    return {**values, **extra}


def flags(folder: Path, values: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Write the inputs of a run beside its folder, and name them."""
    inputs = folder.parent / f"{folder.name}_inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    (inputs / "ds.json").write_text(json.dumps(values))
    (inputs / "model.json").write_text(json.dumps({**MODEL, **model}))
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "far", "away", "from", "old", "red", "house"]
    draw = random.Random(1)
    text = "\n".join(" ".join(draw.choice(words) for _ in range(30)) for _ in range(200))
    (inputs / "text.txt").write_text(text)
    text_file = str(inputs / "text.txt")
    return [
        *("--deepspeed_config", str(inputs / "ds.json"), "--config_name", str(inputs / "model.json")),
        *("--tokenizer_name", "bytes", "--train_file", text_file, "--validation_file", text_file),
        *("--block_size", str(BLOCK_SIZE), "--max_eval_batches", "1", "--report_to", "none"),
        *("--max_steps", str(STEPS), "--save_steps", str(SAVED)),
    ]


def start(
    folder: Path,
    values: dict[str, Any],
    ranks: int = 1,
    *more: str,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Train from the beginning, or go on: the same command does both."""
    return train(folder, *flags(folder, values, model or {}), *more, ranks=ranks, **options)


def interrupt(folder: Path, copy_to: Path | None = None) -> Path:
    """The run folder (or a copy of it) as a kill after step SAVED would have left it."""
    target = folder if copy_to is None else Path(shutil.copytree(folder, copy_to))
    shutil.rmtree(target / "checkpoints" / f"step_{STEPS:08d}")
    (target / "checkpoints" / "latest").unlink()
    return target


def state_files(folder: Path, step: int = STEPS) -> dict[str, str]:
    """Name -> sha256 of what a checkpoint holds of weights, moments, counters and random states."""
    manifest = json.loads((folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {name: facts["sha256"] for name, facts in manifest["files"].items()}


def written_by_two_ranks(folder: Path, model: Any, step: int = 3, dtype: str = "float32", **more: Any) -> Path:
    """A checkpoint of `model` as two data-parallel ranks would have written it; more: for its manifest."""
    from dstrain.checkpoint import manifest as mf
    from dstrain.checkpoint.export import model_files
    from dstrain.checkpoint.files import Entry, Key, write_bytes, write_rank
    from dstrain.data.tokenization import build_tokenizer

    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    files: dict[str, Any] = {}
    for rank in range(2):
        entries, shapes = [], {}
        for name, parameter in model.named_parameters():
            flat = parameter.detach().float().reshape(-1)
            half = flat[: len(flat) // 2] if rank == 0 else flat[len(flat) // 2 :]
            entries.append(
                Entry(
                    str(Key("weight", name, 0 if rank == 0 else len(flat) // 2)),
                    half.dtype,
                    tuple(half.shape),
                    lambda half=half: half.contiguous(),
                )
            )
            shapes[name] = tuple(parameter.shape)
        facts = {"shapes": shapes, "scalars": {}, "random": None}
        files.update({name: vars(file) for name, file in write_rank(path, rank, entries, facts).items()})
    (path / "model").mkdir()
    for name, data in model_files(model, build_tokenizer("bytes")).items():
        files[f"model/{name}"] = vars(write_bytes(path / "model" / name, data))
    layout = {"dtype": dtype, "world_size": 2}
    contents = {"step": step, "samples_consumed": 12, "extra": {}, "files": files, "layout": layout}
    mf.write_manifest(path, {**contents, "engine": {"optimizer": "FusedAdam"}, **more})
    return path
