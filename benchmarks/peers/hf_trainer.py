"""The peer: Hugging Face Trainer on the same DeepSpeed JSON, model, initial weights, tokens and global batch.

    torchrun --nproc_per_node 2 benchmarks/peers/hf_trainer.py --deepspeed_config F --config_name M --block_size 256 \
        --max_steps 8 --warmup_steps 3 --output result.json

Reads the very samples that dstrain trains on, in its order, through Trainer's own DataLoader. `--use_liger_kernel` is
Trainer's own switch; dstrain takes liger's fused loss wherever it is installed.
"""

import os

import deepspeed  # noqa: F401  (part of what is imported before a model is built, as in dstrain)
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.common import SEED, Clock, Job, local_device, parse_flags
from dstrain.data.order import Order


class Ordered(Dataset):
    """dstrain's samples in dstrain's order."""

    def __init__(self, samples, seed: int, length: int):
        self.samples, self.order, self.length = samples, Order(len(samples), seed), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.samples[self.order[index]]
        return {name: torch.as_tensor(row[name].astype("int64")) for name in ("input_ids", "labels")}


class Watch(TrainerCallback):
    """Times a step alone: neither the loading before it nor the logging after it, which favours Trainer a little."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.end()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def training_arguments(job: Job) -> TrainingArguments:
    on_gpu = job.device.type == "cuda"
    return TrainingArguments(
        output_dir=f"{job.args.output}.trainer",
        deepspeed={**job.config, "gradient_accumulation_steps": job.accumulation},
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.args.max_steps,
        learning_rate=job.adam["lr"],
        weight_decay=job.adam.get("weight_decay", 0.0),
        lr_scheduler_type="constant",
        bf16=job.precision == "bf16",
        fp16=job.precision == "fp16",
        max_grad_norm=job.clipping,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not on_gpu,
        ddp_backend=None if on_gpu else "gloo",
        use_liger_kernel=job.args.use_liger_kernel,
        disable_tqdm=True,
        dataloader_drop_last=True,
    )


def main() -> None:
    job = Job(parse_flags(__doc__, ("--use_liger_kernel", {"action": "store_true"})), local_device())
    training = training_arguments(job)
    data = job.data()
    watch = Watch(Clock(job.device))
    samples = Ordered(data.train, SEED, job.global_batch * job.args.max_steps)
    trainer = Trainer(model=job.model(torch.float32), args=training, train_dataset=samples, callbacks=[watch])
    trainer._get_train_sampler = lambda *_: SequentialSampler(samples)
    trainer.train()
    job.finish(watch.clock.times_s, watch.clock.data_s, watch.losses)
    os._exit(0)  # an exit ended in `terminate called without an active exception` once


if __name__ == "__main__":
    main()
