"""What every peer shares with dstrain: the flags, the samples in their order, the initial weights, the result."""

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import resident_gib
from dstrain.arguments import DataArguments, ModelArguments
from dstrain.config import load_config
from dstrain.data import build_data, build_tokenizer
from dstrain.models.build import build_model, load_model_config
from dstrain.models.flops import flops_per_token, num_parameters
from dstrain.monitor.devices import find_peak, peak_memory_gib

SEED = 42  # dstrain's default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_flags(description: str, *own: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for name in ("--deepspeed_config", "--config_name", "--output"):
        parser.add_argument(name, required=True)
    for name in ("--block_size", "--max_steps", "--warmup_steps"):
        parser.add_argument(name, type=int, required=True)
    for name, options in own:
        parser.add_argument(name, **options)
    return parser.parse_args()


@dataclass
class Job:
    """One peer's work: sizes from the DeepSpeed JSON, the samples, the model. Needs the process group, if any."""

    args: argparse.Namespace
    device: torch.device
    imports_gib: float = field(default_factory=resident_gib)

    def __post_init__(self):
        config = self.config = load_config(self.args.deepspeed_config)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.global_batch = config["train_batch_size"]
        self.micro_batch = config["train_micro_batch_size_per_gpu"]
        self.accumulation = self.global_batch // (self.micro_batch * self.world)
        self.precision = next((n for n in ("bf16", "fp16") if config.get(n, {}).get("enabled")), "fp32")
        self.adam = config["optimizer"]["params"]
        self.clipping = config.get("gradient_clipping", 1.0)

    def data(self) -> Any:
        """The built-in corpus as dstrain cuts it."""
        return build_data(
            DataArguments(),
            build_tokenizer("bytes"),
            seed=SEED,
            block_size=self.args.block_size,
            is_main_per_host=self.rank == 0,
            barrier=lambda: dist.barrier() if dist.is_initialized() else None,
        )

    def model(self, dtype: torch.dtype) -> Any:
        """The weights that dstrain starts from: a function of the seed and their names."""
        margs = ModelArguments(config_name=self.args.config_name)
        model = build_model(margs, load_model_config(margs), seed=SEED, dtype=dtype, device=self.device)
        self.flops = flops_per_token(model, self.args.block_size)
        self.num_parameters = num_parameters(model)
        return model

    def finish(self, times_s: list[float], data_s: list[float], losses: list[float]) -> None:
        """Write the result on rank zero, with the names of metrics.jsonl. A collective."""
        device_gib, host_gib = peak_memory_gib(self.device)
        peaks = torch.tensor([device_gib, host_gib, self.imports_gib], dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        device_gib, host_gib, imports_gib = peaks.tolist()
        with torch.no_grad():
            peak = find_peak(self.device, DTYPES[self.precision])
        tokens = self.global_batch * self.args.block_size
        counted = slice(self.args.warmup_steps, None)
        speeds = [tokens / seconds for seconds in times_s[counted]]
        tflops = [speed * self.flops / self.world / 1e12 for speed in speeds]
        result = {
            "step_time_s": times_s[counted],
            "data_time_s": data_s[counted],
            "tokens_per_second": speeds,
            "model_tflops_per_second_per_device": tflops,
            "mfu": [x / peak.peak_tflops for x in tflops],
            **vars(peak),
            "losses": losses,
            "tokens_per_step": tokens,
            "num_parameters": self.num_parameters,
            "precision": self.precision,
            "host_memory_gib": host_gib,
            "peak_device_memory_gib": device_gib,
            "imports_gib": imports_gib,
            "nvme_gib": 0.0,
            "saves": [],
            "world": {"world_size": self.world},
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
        }
        if self.rank == 0:
            Path(self.args.output).write_text(json.dumps(result))
        if dist.is_initialized():
            dist.barrier()


class Clock:
    """Seconds of each step, with the wait for the device in it."""

    def __init__(self, device: torch.device):
        self.device, self.times_s, self.data_s = device, [], []
        self.start = self.ready = 0.0

    def begin(self) -> None:
        self.start = self.ready = time.perf_counter()

    def data_is_there(self) -> None:
        self.ready = time.perf_counter()

    def end(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.times_s.append(time.perf_counter() - self.start)
        self.data_s.append(self.ready - self.start)


def local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())
