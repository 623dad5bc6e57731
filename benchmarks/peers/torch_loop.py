"""The peers without DeepSpeed: a loop in plain torch, alone, under DDP, or under FSDP2 as accelerate prepares it.

    torchrun --nproc_per_node 2 benchmarks/peers/torch_loop.py --wrap ddp --deepspeed_config F --config_name M \
        --block_size 256 --max_steps 8 --warmup_steps 3 --output result.json

Batch, micro-batch, AdamW's parameters, clipping and precision are those of the DeepSpeed JSON. In 16 bits the
optimizer steps fp32 masters, as DeepSpeed's does. accelerate 1.15 takes its FSDP plugin with GPUs only (`state.py`), so
its `fsdp2_prepare_model` is called here, on a CPU too.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.common import DTYPES, SEED, Clock, Job, local_device, parse_flags
from dstrain.data import build_loader

WRAPS = ("none", "ddp", "fsdp2")


class Masters:
    """AdamW over fp32 copies of 16-bit parameters; over the parameters themselves where they are fp32."""

    def __init__(self, parameters: list[torch.nn.Parameter], adam: dict[str, Any]):
        self.parameters = parameters
        self.copies = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        self.adamw = torch.optim.AdamW(self.copies, fused=True, **adam)

    def step(self, clipping: float) -> None:
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            if copy is not parameter:
                copy.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, clipping)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for parameter, copy in zip(self.parameters, self.copies, strict=True):
                if copy is not parameter:
                    parameter.copy_(copy)


def shard(model: torch.nn.Module, job: Job) -> torch.nn.Module:
    """FSDP2 as `accelerate launch --fsdp_version 2` prepares it; parameters stay gathered between forward and backward
    pass, which is ZeRO-2."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=False,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    mixed = "no" if job.precision == "fp32" else job.precision
    if mixed != "no":
        plugin.set_mixed_precision(mixed)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=mixed,
        is_main_process=job.rank == 0,
        device=job.device,
    )
    return fsdp2_prepare_model(accelerator, model)


def main() -> None:
    args = parse_flags(__doc__, ("--wrap", {"choices": WRAPS, "required": True}))
    device = local_device()
    job = Job(args, device)
    if args.wrap != "none":
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    data = job.data()
    sharded = args.wrap == "fsdp2"
    model = job.model(torch.float32 if sharded else DTYPES[job.precision])
    if args.wrap == "ddp":
        model = DistributedDataParallel(model)
    elif sharded:
        model = shard(model, job)
    optimizer = Masters(list(model.parameters()), job.adam)
    clock, losses = Clock(device), []
    loader = build_loader(
        data.train,
        seed=SEED,
        global_batch=job.global_batch,
        micro_batch=job.micro_batch,
        dp_rank=job.rank,
        dp_size=job.world,
    )
    with loader:
        for _ in range(args.max_steps):
            clock.begin()
            batches = next(loader)
            clock.data_is_there()
            losses.append(step(model, optimizer, batches, job))
            clock.end()
    job.finish(clock.times_s, clock.data_s, losses)
    os._exit(0)  # gloo's threads end some processes with `terminate called without an active exception`


def step(model: torch.nn.Module, optimizer: Masters, batches: list[dict[str, torch.Tensor]], job: Job) -> float:
    """One optimizer step; the loss of the global batch before it. Blocks are full: means of means are the mean."""
    loss_sum = torch.zeros((), device=job.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        unreduced = nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with unreduced:
            batch = {name: tensor.to(job.device, non_blocking=True) for name, tensor in batch.items()}
            loss = model(**batch, use_cache=False).loss / len(batches)
            loss.backward()
        loss_sum += loss.detach()
    optimizer.step(job.clipping)
    if dist.is_initialized():
        dist.all_reduce(loss_sum)
    return loss_sum.item() / job.world


if __name__ == "__main__":
    main()
