"""The peer: Hugging Face Trainer on the same DeepSpeed JSON, model, tokens and global batch.

    torchrun --nproc_per_node 2 benchmarks/peers/hf_trainer.py --deepspeed_config F --config_name M --block_size 256 \
        --max_steps 20 --output result.json

Reads the very samples that dstrain trains on, in its order, through a plain DataLoader. Writes one JSON object:
step times in seconds, tokens per step over all ranks, peak and import memory in GiB (largest rank), losses.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from dstrain.arguments import DataArguments, ModelArguments
from dstrain.config import load_config
from dstrain.data import build_data, build_tokenizer
from dstrain.data.loader import Order
from dstrain.models.build import build_model, load_model_config
from dstrain.monitor.devices import host_peak_memory_gib


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


class Ordered(Dataset):
    """dstrain's samples in dstrain's order."""

    def __init__(self, samples, seed: int, length: int):
        self.samples, self.order, self.length = samples, Order(len(samples), seed), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.samples[self.order[index]]
        return {name: torch.as_tensor(row[name].astype("int64")) for name in ("input_ids", "labels")}


class Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter() - self.start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--deepspeed_config", "--config_name", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tokenizer_name", default="bytes")
    parser.add_argument("--config_overrides")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    import deepspeed  # noqa: F401  (part of the import baseline, as in dstrain)

    baseline = resident_gib()
    config_json = load_config(args.deepspeed_config)
    world = int(os.environ["WORLD_SIZE"])
    micro = config_json["train_micro_batch_size_per_gpu"]
    accumulation = config_json["train_batch_size"] // (micro * world)
    training = TrainingArguments(
        output_dir="/tmp/dstrain_hf_trainer",
        deepspeed={**config_json, "gradient_accumulation_steps": accumulation},
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=args.max_steps,
        learning_rate=config_json["optimizer"]["params"]["lr"],
        bf16=bool(config_json.get("bf16", {}).get("enabled")),
        max_grad_norm=config_json.get("gradient_clipping", 1.0),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
        disable_tqdm=True,
        dataloader_drop_last=True,
    )
    margs = ModelArguments(config_name=args.config_name, config_overrides=args.config_overrides)
    config = load_model_config(margs)
    tokenizer = build_tokenizer(args.tokenizer_name)
    data = build_data(
        DataArguments(),
        tokenizer,
        seed=42,
        block_size=args.block_size,
        is_main_per_host=training.process_index == 0,
        barrier=lambda: dist.barrier() if dist.is_initialized() else None,
    )
    model = build_model(margs, config, seed=42, dtype=torch.float32)
    clock = Clock()
    samples = Ordered(data.train, 42, config_json["train_batch_size"] * args.max_steps)
    trainer = Trainer(model=model, args=training, train_dataset=samples, callbacks=[clock])
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(samples)
    trainer.train()
    memory = torch.tensor([host_peak_memory_gib(), baseline])
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    if training.process_index == 0:
        tokens = config_json["train_batch_size"] * args.block_size
        result = {
            "step_time_s": clock.times,
            "tokens_per_step": tokens,
            "host_memory_gib": memory[0].item(),
            "import_memory_gib": memory[1].item(),
            "losses": clock.losses,
        }
        Path(args.output).write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # an exit ended in `terminate called without an active exception` once


if __name__ == "__main__":
    main()
