"""The process group: how this process was started, seeds, and the few collectives that dstrain needs."""

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dstrain.parallel import Launch, free_port

# Until the first step: one rank may tokenise for a long time while the others wait. The lifeline notices the dead.
START_TIMEOUT = timedelta(hours=2)


def init_distributed(timeout: timedelta = START_TIMEOUT) -> Launch:
    """Join the process group (gloo on CPU, NCCL on NVIDIA) through DeepSpeed, so that it uses the same one.

    A process started by plain `python` becomes a group of one. The timeout acts on every collective of the default
    group, until `set_timeouts`.
    """
    import deepspeed
    from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

    launch = Launch.from_environment()
    if "RANK" not in os.environ:
        os.environ.update({name.upper(): str(value) for name, value in asdict(launch).items()})
        if launch.world_size == 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        os.environ.setdefault("MASTER_PORT", str(TORCH_DISTRIBUTED_DEFAULT_PORT))
    if not dist.is_initialized():
        use_own_programs()
        deepspeed.init_distributed(timeout=timeout, verbose=False, auto_mpi_discovery=False)
        _unlink_shared_buffer(launch)
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    return launch


def use_own_programs() -> None:
    """Put this environment's programs first on this process's PATH.

    PyTorch compiles DeepSpeed's ops with whichever `ninja` comes first, and one of another version starts them anew.
    """
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = own + os.pathsep + path


def _unlink_shared_buffer(launch: Launch) -> None:
    """Let the kernel free this rank's all-reduce buffer when the rank ends.

    DeepSpeed's shm_comm (`shm_initialize`, 0.19.8) leaves 66 MiB per port and rank in /dev/shm for ever. Once every
    rank has mapped it, nobody needs its name.
    """
    barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{launch.rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def device() -> torch.device:
    """Where this rank computes."""
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.device(name if name == "cpu" else f"{name}:{Launch.from_environment().local_rank}")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch: what dropout draws from. Data and weights have their own pure functions."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _reduce(values: Sequence[float], op) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise maximum over all ranks; a collective."""
    return _reduce(values, dist.ReduceOp.MAX)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum over all ranks; a collective."""
    return _reduce(values, dist.ReduceOp.SUM)


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, on every rank, by pickle. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def new_host_group() -> Any:
    """A group of all ranks whose collectives run on the host (gloo) beside the training's; None for one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=START_TIMEOUT)


def set_timeouts(seconds: float) -> None:
    """Let every collective of every group fail after so many seconds.

    DeepSpeed's `new_group` (deepspeed/comm/torch.py, 0.19.8) passes no timeout, so its groups have PyTorch's 30 minutes
    (10 on NCCL). PyTorch has no public call for groups that exist (2.13): `_set_pg_timeout` is what DeviceMesh uses.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def leave() -> None:
    """Wait for all ranks, then destroy the process group, if there is one.

    A launcher that sees the first rank end with anything but 0 ends the others: they should have nothing left to do.
    """
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
