"""Made-up results files, so that the report can be tested without a measurement."""

import dataclasses
from typing import Any

from benchmarks.cases import Case
from benchmarks.results_file import SCHEMA
from benchmarks.suites import SUITES

MACHINE = {
    "hardware": "2cpu",
    "processor": "made up",
    "cores": 2,
    "memory_gib": 16.0,
    "devices": [],
    "platform": "Linux",
}
SESSION = {"started": "2026-01-01T00:00:00+00:00", "command": ["python"], "imports_gib": 0.4}
SESSION |= {"matmul_tflops": {"bfloat16": 0.5, "float32": 0.1}, "threads": 1}


def run_of(case: Case, *, step_s: float = 0.5, above_gib: float = 0.6, losses: list[float] | None = None) -> dict:
    """A run that ended well, each step a little slower than the one before it."""
    steps = case.max_steps - case.warmup_steps
    times = [step_s * (1 + 0.01 * i) for i in range(steps)]
    tokens = 8 * case.block_size
    speeds = [tokens / t for t in times]
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    saves = [{"step": case.max_steps, "bytes": 2**28, "stall_s": 0.05, "total_s": 0.5}]
    return {
        "status": "ok",
        "reason": "",
        "seconds": 10.0,
        "disturbance": 0.01,
        "command": ["torchrun", "dstrain/train.py"],
        "session": 0,
        "step_time_s": times,
        "data_time_s": [0.001] * steps,
        "tokens_per_second": speeds,
        "model_tflops_per_second_per_device": [0.2] * steps,
        "mfu": [0.4] * steps,
        "losses": losses or [5.0 - 0.1 * i for i in range(case.max_steps)],
        "tokens_per_step": tokens,
        "peak_device_memory_gib": 0.4 + above_gib,
        "host_memory_gib": 0.4 + above_gib,
        "nvme_gib": 0.0,
        "saves": saves,
        "deepspeed_config": config,
        "zero_stage": 2,
        "data_sha256": "0",
        "precision": "bf16",
        "versions": {"torch": "2.13"},
        "num_parameters": 10_000_000,
        "world": {"world_size": case.processes, "dp_size": case.processes, "tp_size": 1, "pp_size": 1, "sp_size": 1},
        "peak_tflops": 0.5,
        "peak_source": "made up",
        "startup_s": {"total": 9.0},
        "prediction": {
            "device_gib": {"parameters": 0.1, "optimizer": 0.4, "activations": 0.13, "total": 0.63},
            "step_time_s": 0.45,
            "checkpoint_gib": 0.25,
            "nvme_gib": 0.0,
        },
        "measured": {"imports_gib": 0.4, "peak_above_imports_gib": above_gib},
    }


def profile_of() -> dict[str, Any]:
    seconds = {"data": 0.0, "forward": 0.2, "backward": 0.3, "optimizer": 0.1, "communication": 0.1, "other": 0.0}
    return {
        "status": "ok",
        "reason": "",
        "seconds": 9.0,
        "command": [],
        "session": 0,
        "split": {"rank": 0, "steps": 3, "step_time_s": 0.7, "seconds": seconds},
        "comms": {},
        "sent_bytes": {"data": 3.0e7},
        "theory_bytes": {"data": 2.0e7},
    }


def entry_of(case: Case, *runs: dict, profile: dict | None = None) -> dict[str, Any]:
    return {"digest": case.digest, "case": dataclasses.asdict(case), "runs": list(runs), "profile": profile}


def contents_of(suite_name: str, **options: Any) -> dict[str, Any]:
    """Every case of a suite, each round with the same figures, except refused ones."""
    suite = SUITES[suite_name]()
    contents = {"schema": SCHEMA, "suite": suite.name, "what": suite.what, "machine": MACHINE, "sessions": [SESSION]}
    cases = {}
    for case in suite.cases:
        runs = [run_of(case, **options) for _ in range(case.rounds)]
        if "refused" in case.name:
            runs = [{"status": "refused", "reason": "no such stage", "seconds": 2.0, "command": [], "session": 0}]
        cases[case.name] = entry_of(case, *runs, profile=profile_of() if case.profile else None)
    return {**contents, "cases": cases}
