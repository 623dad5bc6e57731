"""MLPs computed for a part of a sequence at a time: their activations, the widest of a layer, exist for one tile only.

TiledMLP of Arctic long-sequence training (https://arxiv.org/abs/2506.13996, DeepSpeed's ulysses_sp.py), by torch's own
checkpointing: each tile is computed again in the backward pass, under every ZeRO stage.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dstrain.errors import UserError
from dstrain.models.experts import expert_blocks


def tile_mlps(model: nn.Module) -> int:
    """Let every MLP of a Hugging Face model run in tiles of `hidden_size` tokens. Returns the number of MLPs.

    An MLP is a member of a layer that holds several matrices, takes one tensor and nothing else, and is no mixture of
    experts. Raises UserError for a model without any.
    """
    config: Any = model.config
    tile = config.get_text_config().hidden_size
    mlps = _find_mlps(model)
    if not mlps:
        raise UserError(f"--tiled_mlp finds no MLP in {type(model).__name__}: leave it out")
    for mlp in mlps:
        mlp.forward = partial(_in_tiles, mlp.forward, tile)
    return len(mlps)


def _find_mlps(model: nn.Module) -> list[nn.Module]:
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    mixtures = {id(block) for block in expert_blocks(model)}
    found = {id(child): child for layer in layers for child in layer.children() if id(child) not in mixtures}
    return [child for child in found.values() if _is_mlp(child)]


def _is_mlp(module: nn.Module) -> bool:
    matrices = [p for p in module.parameters() if len(getattr(p, "ds_shape", p.shape)) == 2]
    return len(matrices) >= 2 and len(inspect.signature(module.forward).parameters) == 1


def _in_tiles(forward: Any, tile: int, hidden: Tensor) -> Tensor:
    """hidden [..., length, width] -> the same as `forward(hidden)`."""
    if hidden.shape[-2] <= tile:
        return forward(hidden)
    if torch.is_grad_enabled():
        forward = partial(checkpoint, forward, use_reentrant=False)
    return torch.cat([forward(part.contiguous()) for part in hidden.split(tile, dim=-2)], dim=-2)
