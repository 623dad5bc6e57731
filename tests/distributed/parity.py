"""Whole runs of `dstrain.train.main` in forked ranks, and the comparison of their numbers with one plain rank.

single = run(folder, LLAMA, SGD)
parallel = run(folder, LLAMA, SGD | {"tensor_parallel": {"autotp_size": 2}}, ranks=2)
parallel.assert_equals(single)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import forked

STEPS = 20
SGD = {
    "train_batch_size": 8,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
}
SGD_CLIPPED = SGD | {"gradient_clipping": 0.5}
ADAMW = SGD | {
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
}
BF16 = {"bf16": {"enabled": True}}


def thinned(cases: Sequence[Any], *kept: Any) -> list[Any]:
    """All cases of a matrix; those not in `kept` are run by `pytest -m exhaustive` and `tests.parallel_matrix` only."""
    assert set(kept) <= set(cases), f"{set(kept) - set(cases)} are no cases"
    rest = pytest.mark.exhaustive
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*t, marks=() if case in kept else rest) for case, t in zip(cases, tuples, strict=True)]


CLIPPED_AND_ADAMW = thinned(
    [(optimizer, stage) for optimizer in ("clipped", "adamw") for stage in range(4)],
    ("adamw", 3),
)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


_SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"model_type": "llama", **_SIZES, **_HEADS}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_tied": LLAMA | {"tie_word_embeddings": True},
    "llama_one_kv_head": LLAMA | {"num_key_value_heads": 1},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma3": LLAMA
    | {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3_full": LLAMA
    | {"model_type": "gemma3_text", "head_dim": 32, "layer_types": ["full_attention", "full_attention"]},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": LLAMA
    | {"model_type": "qwen3_moe", "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 64, "mlp_only_layers": [], "decoder_sparse_step": 1},
}


_FOUR_LAYERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 4},
    "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
MICRO = {"train_micro_batch_size_per_gpu": 2}


def deep(name: str) -> dict[str, Any]:
    """A model with four layers."""
    return MODELS[name] | _FOUR_LAYERS.get(name, {"num_hidden_layers": 4})


@dataclass(frozen=True)
class Run:
    """What one run left. stderr: of rank 0."""

    exit_code: int
    stderr: str
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.train]

    def errors_against(self, other: "Run") -> dict[str, float]:
        """Largest relative difference of each number over the steps."""
        assert len(self.train) == len(other.train) > 0
        names = ("loss", "grad_norm", "tokens", "tokens_processed")
        errors = {n: max(_relative(a[n], b[n]) for a, b in zip(self.train, other.train, strict=True)) for n in names}
        errors["eval_loss"] = max(_relative(a["loss"], b["loss"]) for a, b in zip(self.eval, other.eval, strict=True))
        return errors

    def assert_equals(self, other: "Run", tolerance: float = 1e-5, norm_tolerance: float | None = None) -> None:
        errors = self.errors_against(other)
        norm = errors.pop("grad_norm")
        assert errors["tokens"] == errors["tokens_processed"] == 0, errors
        assert max(errors.values()) <= tolerance, errors
        assert norm <= (norm_tolerance or 10 * tolerance), norm


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def run(
    folder: Path, model: dict[str, Any], config: dict[str, Any], *flags: str, ranks: int = 1, timeout_s: float = 120.0
) -> Run:
    """Train in `ranks` processes; `folder` is the run's own, and made new. Fails when a rank does."""
    result = start(folder, model, config, *flags, ranks=ranks, timeout_s=timeout_s)
    assert result.exit_code == 0, f"exit code {result.exit_code}\n{result.stderr[-6000:]}"
    return result


class Baselines:
    """One-rank runs at ZeRO-1, each started once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, Run] = {}

    def __call__(self, model: dict[str, Any], config: dict[str, Any], *flags: str) -> Run:
        key = json.dumps([model, config, flags])
        if key not in self.runs:
            self.runs[key] = run(self.folder / str(len(self.runs)), model, config | zero(1), *flags)
        return self.runs[key]


def start(
    folder: Path, model: dict[str, Any], config: dict[str, Any], *flags: str, ranks: int = 1, timeout_s: float = 120.0
) -> Run:
    """As `run`, but a failure is only reported."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "ds.json").write_text(json.dumps(config))
    argv = ["--deepspeed_config", str(folder / "ds.json"), "--config_name", str(folder / "model.json")]
    argv += ["--overwrite_output_dir", "--report_to", "none", "--max_steps", str(STEPS), "--max_eval_batches", "2"]
    if "--block_size" not in flags:
        argv += ["--block_size", "64"]
    result = forked.train(folder / "run", *argv, *flags, ranks=ranks, timeout_s=timeout_s)
    lines = result.metrics() if (folder / "run" / "metrics.jsonl").exists() else []
    return Run(
        result.exit_code,
        result.stderr,
        [line for line in lines if line["kind"] == "train"],
        [line for line in lines if line["kind"] == "eval"],
    )
