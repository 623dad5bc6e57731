"""What tensor parallelism (DeepSpeed's AutoTP) makes of a model: which parameters are shards, and their norm."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dstrain.models.cross_entropy import VocabularyShard


def vocabulary_shard(module: Any) -> VocabularyShard | None:
    """The part of the vocabulary whose rows an output embedding holds; None where it holds all."""
    from deepspeed.module_inject.layers import LinearLayer

    if not isinstance(module, LinearLayer) or module.mp_group is None:
        return None
    sizes, index = module._partition_sizes, module.tp_index
    return VocabularyShard(module.mp_group, sum(sizes[:index]), max(sizes))


def gradient_norm(parameters: Iterable[nn.Parameter], group: Any) -> Tensor:
    """L2 norm of all gradients, fp32 0-d; shards are summed over the tensor-parallel `group` (None: there is none)."""
    parameters = [p for p in parameters if p.grad is not None]
    # [whole parameters, shards]
    squared = torch.zeros(2, device=parameters[0].device)
    for p in parameters:
        squared[int(getattr(p, "tensor_model_parallel", False))] += p.grad.float().square().sum()
    if group is not None:
        dist.all_reduce(squared[1], group=group)
    return squared.sum().sqrt()
