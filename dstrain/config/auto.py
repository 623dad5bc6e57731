"""The value "auto" as Hugging Face users know it: filled with what TrainingArguments would give, or refused."""

from typing import Any

from dstrain.config.facts import RunFacts
from dstrain.config.load import get_value, leaves
from dstrain.config.schema import Problem

_HF = "derived: Hugging Face's default"
# TrainingArguments' defaults in transformers 5.23 (a test reads them there).
_FIXED: dict[str, tuple[Any, str]] = {
    "gradient_clipping": (1.0, f"{_HF} (max_grad_norm)"),
    "optimizer.params.lr": (5e-5, f"{_HF} (learning_rate)"),
    "optimizer.params.betas": ([0.9, 0.999], f"{_HF} (adam_beta1, adam_beta2)"),
    "optimizer.params.eps": (1e-8, f"{_HF} (adam_epsilon)"),
    "optimizer.params.weight_decay": (0.0, f"{_HF} (weight_decay)"),
    "scheduler.params.warmup_min_lr": (0.0, _HF),
    "scheduler.params.warmup_num_steps": (1, f"{_HF} is no warm-up; 1 is the least that DeepSpeed takes"),
}
_REFUSED = {
    "zero_optimization.stage": "DeepSpeed reads it as 0: write 0, 1, 2 or 3",
    "bf16.enabled": "DeepSpeed reads it as false, and dstrain has no flag --bf16: write true or false",
    "fp16.enabled": "DeepSpeed reads it as false, and dstrain has no flag --fp16: write true or false",
}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NEEDS_LENGTH = ("WarmupDecayLR", "WarmupCosineLR")
# Keys whose own vocabulary has the word.
_OWN_WORD = ("zero_optimization.zenflow.", "expert_parallel.", "data_types.keep_in_fp32_modules")


def fill_auto(config: dict[str, Any], facts: RunFacts) -> tuple[list[Problem], dict[str, tuple[Any, str]]]:
    """(problems, repairs) for every "auto"; a repair is dotted key -> (value, origin), the value None drops the key."""
    problems: list[Problem] = []
    repairs: dict[str, tuple[Any, str]] = {}
    for key, value in leaves(config):
        if value != "auto" or key.startswith(_OWN_WORD):
            continue
        if key in _FIXED:
            repairs[key] = _FIXED[key]
        elif key in _REFUSED:
            problems.append((key, f'{key} is "auto": {_REFUSED[key]}'))
        elif key in (*_BATCH, "scheduler.params.total_num_steps"):
            repairs[key] = (None, "")  # solved, as if it were absent
        elif key == "scheduler.params.warmup_max_lr":
            lr = get_value(config, "optimizer.params.lr")
            repairs[key] = (5e-5 if lr in (None, "auto") else lr, "derived: optimizer.params.lr")
        elif key in (widths := _from_width(facts.hidden_size)):
            repairs[key] = widths[key]
        else:
            problems.append((key, f'{key} is "auto", which has no meaning there: write a value or leave it out'))
    length = "scheduler.params.total_num_steps"
    if get_value(config, "scheduler.type") in _NEEDS_LENGTH and get_value(config, length) in (None, "auto"):
        repairs[length] = (facts.total_steps, "derived: the run's length")
    return problems, repairs


def _from_width(hidden_size: int | None) -> dict[str, tuple[Any, str]]:
    """ZeRO's bucket sizes in elements, as `HfTrainerDeepSpeedConfig` derives them from the model's width."""
    reason = f"derived: from the model's width {hidden_size}, as Hugging Face does"
    square = (hidden_size or 0) ** 2
    values = {
        "zero_optimization.reduce_bucket_size": square,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * square),
        "zero_optimization.stage3_param_persistence_threshold": 10 * (hidden_size or 0),
    }
    return {key: (value if hidden_size else None, reason) for key, value in values.items()}
