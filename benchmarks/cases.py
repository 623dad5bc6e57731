"""What is measured: a `Case` is one way of training one model, and the models that the suites train.

A case says everything: two cases with the same `digest` are the same measurement.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The programs that a case may run, all with the same flags. `dstrain` is the real entry and leaves a run folder; the
# others write one JSON object with the names of metrics.jsonl.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "dstrain": ("dstrain/train.py",),
    "hf_trainer": ("benchmarks/peers/hf_trainer.py",),
    "hf_trainer_liger": ("benchmarks/peers/hf_trainer.py", "--use_liger_kernel"),
    "fsdp2": ("benchmarks/peers/torch_loop.py", "--wrap", "fsdp2"),
    "ddp": ("benchmarks/peers/torch_loop.py", "--wrap", "ddp"),
    "plain": ("benchmarks/peers/torch_loop.py", "--wrap", "none"),
    "loader": ("benchmarks/loader.py",),
}
TITLES = {
    "dstrain": "dstrain",
    "hf_trainer": "Hugging Face Trainer",
    "hf_trainer_liger": "Hugging Face Trainer with liger",
    "fsdp2": "accelerate, FSDP2",
    "ddp": "torch DDP",
    "plain": "plain torch",
    "loader": "loader",
}

_OF_THE_SUITE = ("rounds", "turn", "baseline", "ideal", "series", "after", "timeout_s", "profile")


@dataclass(frozen=True)
class Case:
    """One measurement.

    model: its configuration, as `--config_name` takes it. ds_config: the DeepSpeed JSON (a file's name in `ds_configs/`
    or the object). overrides: `--set` of it. flags: more flags of train.py. `{folder}` in any of them is the case's own
    folder. The first `warmup_steps` of `max_steps` are not counted. Cases with the same `turn` run in turns, `rounds`
    times (A B A B), because machines drift. baseline: the case that this one is compared with; ideal: its step time in
    units of the baseline's if nothing were lost. series: a curve over processes or sequence lengths that this is a
    point of; after: the point before it, which must have ended well. memory_limit_gib: of each process's data
    (`prlimit`), so that memory ends where it should. profile: a second, short run that is traced, for the split of the
    step and the bytes that are sent.
    """

    name: str
    model: Mapping[str, Any]
    ds_config: str | Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    processes: int = 2
    block_size: int = 256
    flags: tuple[str, ...] = ()
    program: str = "dstrain"
    launcher: str = "torchrun"
    max_steps: int = 8
    warmup_steps: int = 3
    rounds: int = 1
    turn: str = ""
    baseline: str | None = None
    ideal: float = 1.0
    series: str = ""
    after: str | None = None
    memory_limit_gib: float | None = None
    timeout_s: float = 240.0
    profile: bool = True

    def __post_init__(self):
        assert self.program in PROGRAMS and 0 < self.warmup_steps < self.max_steps

    @property
    def is_traced(self) -> bool:
        return self.profile and self.program == "dstrain"

    @property
    def digest(self) -> str:
        """Of everything that decides what one run measures: not how often, nor what it is compared with."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OF_THE_SUITE}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def llama(hidden: int, layers: int, heads: int, intermediate: int, vocab: int, **changes: Any) -> dict[str, Any]:
    """The configuration of a Llama; positions for 8,192 tokens, untied unless said otherwise."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 257,
        **changes,
    }


TINY = llama(64, 2, 4, 128, 512)
LLAMA_10M = llama(384, 6, 6, 1024, 512)  # 11 M parameters
LLAMA_10M_32K = llama(384, 6, 6, 1024, 32_000)  # 35 M, of which 25 M are embedding and head
LLAMA_38M = llama(512, 10, 8, 1536, 8192)
DEEP = llama(256, 8, 4, 768, 512)  # 8 layers to cut into stages
LLAMA_125M = llama(768, 12, 12, 2048, 32_000)
LLAMA_350M = llama(1024, 24, 16, 2816, 32_000)
LLAMA_1_3B = llama(2048, 24, 16, 5504, 32_000)
LLAMA_8B = llama(4096, 32, 32, 14_336, 128_256, num_key_value_heads=8, rope_theta=500_000.0)  # Llama 3.1's shape


def deepspeed_json(stage: int, *, batch: int, micro: int, precision: str = "bf16", **blocks: Any) -> dict[str, Any]:
    """A small DeepSpeed JSON: AdamW at a constant rate, clipping at 1."""
    sixteen_bits = {} if precision == "fp32" else {precision: {"enabled": True}}
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **blocks.pop("zero", {})},
        **sixteen_bits,
        **blocks,
    }


@dataclass(frozen=True)
class Suite:
    """Cases in the order in which they run. gpus: devices that they need; 0 runs on CPU ranks."""

    name: str
    what: str
    cases: tuple[Case, ...]
    gpus: int = 0
    names: frozenset[str] = field(init=False)

    def __post_init__(self):
        names = [case.name for case in self.cases]
        assert len(set(names)) == len(names), "two cases share a name"
        object.__setattr__(self, "names", frozenset(names))
        wanted = {name for case in self.cases for name in (case.baseline, case.after) if name}
        assert wanted <= self.names, f"no such case: {wanted - self.names}"
