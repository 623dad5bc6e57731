"""Initial weights as a function of (seed, parameter name), one unit of the model at a time.

Every unit (a decoder layer, the embedding, the head, ...) is allocated, initialised by the model's own code with a
generator seeded from the unit's module names, cast, and, under ZeRO-3, partitioned before the next is allocated. So the
weights are the same bits at every stage and world size, and no rank ever holds the whole model.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from dstrain.models.units import Places, Unit, units


def unit_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and a full module name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _initializers(model: nn.Module) -> dict[int, Callable[[nn.Module], None]]:
    """Module id -> the `_init_weights` of the innermost pretrained model around it, as `initialize_weights` has it."""
    from transformers import PreTrainedModel

    chosen: dict[int, Callable[[nn.Module], None]] = {}

    def walk(module: nn.Module, function: Callable[[nn.Module], None]) -> None:
        function = module._init_weights if isinstance(module, PreTrainedModel) else function
        chosen[id(module)] = function
        for child in module.children():
            walk(child, function)

    walk(model, model._init_weights)
    return chosen


def _fill(unit: Unit, seed: int, initializers: dict[int, Callable[[nn.Module], None]]) -> None:
    """Run the model's own initialisation on a unit, and on what contains it."""
    seeds = [(module, name) for name, module in unit.modules]
    seeds += [(module, f"{name}:{unit.name}") for name, module in unit.ancestors]
    for module, name in seeds:
        torch.default_generator.manual_seed(unit_seed(seed, name))
        initializers[id(module)](module)


def initialise(
    model: nn.Module,
    seed: int,
    dtype: torch.dtype,
    partition: Callable[[Unit], None] | None,
    build_whole: Callable[[], nn.Module],
) -> None:
    """Give a model with parameters on the meta device its initial weights on the CPU, in `dtype`.

    partition: under ZeRO-3, partitions a unit whose weights are final, before the next is allocated. build_whole: makes
    the same model in the usual way; called only for a model that initialises parameters nowhere but in its constructors
    (openai-gpt, xlm), which then exists whole for a while. torch's generator is left as it was. A tied parameter takes
    the weights of its first place.
    """
    from transformers import initialization

    places, initializers = Places(model), _initializers(model)
    whole: dict[str, nn.Parameter] = {}
    done: list[nn.Parameter] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]), initialization.guard_torch_init_functions():
        for unit in units(model):
            fresh = places.allocate(unit, torch.float32)
            for parameter in fresh.values():
                if parameter.is_floating_point():
                    parameter.fill_(torch.nan)
            _fill(unit, seed, initializers)
            for name, parameter in fresh.items():
                if parameter.is_floating_point() and parameter.isnan().any():
                    if not whole:
                        torch.default_generator.manual_seed(unit_seed(seed, ""))
                        whole = dict(build_whole().named_parameters(remove_duplicate=False))
                    parameter.copy_(whole[name])
                # Hugging Face's init functions leave flagged parameters alone: a later unit's ancestors do not touch
                # this one again.
                parameter._is_hf_initialized = True
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            done += fresh.values()
            if partition is not None:
                partition(unit)
    for parameter in done:
        del parameter._is_hf_initialized
