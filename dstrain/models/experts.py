"""Mixtures of experts under ZeRO-3."""

from torch import nn


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that send tokens to experts, found by their structure.

    Experts are a list of modules whose name says so, or parameters of three dimensions (transformers 5 fuses a layer's
    experts into one); a convolution's weight has three as well, so the module must not be a torch layer.
    """
    return [module for module in model.modules() if any(_is_experts(*child) for child in module.named_children())]


def _is_experts(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return "expert" in name
    if type(module).__module__.startswith("torch."):
        return False
    return any(len(getattr(p, "ds_shape", p.shape)) == 3 for p in module.parameters(recurse=False))


def gather_expert_blocks_whole(model: nn.Module) -> int:
    """Let ZeRO-3 gather each expert block at once: which experts get tokens differs from rank to rank, and a gather
    that only some ranks take part in never ends. Before deepspeed.initialize. Returns the number of blocks.
    """
    from deepspeed.utils import set_z3_leaf_module

    blocks = expert_blocks(model)
    for block in blocks:
        set_z3_leaf_module(block, True)
    return len(blocks)
