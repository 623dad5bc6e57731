"""Initial weights as a function of (seed, parameter name), one unit of the model at a time.

Every unit (a decoder layer, the embedding, the head, ...) is allocated, initialised by the model's own code with a
generator seeded from the unit's module names, cast, and, under ZeRO-3, partitioned before the next is allocated. So the
weights are the same bits at every stage and world size, and no rank ever holds the whole model.
"""

import copy
import hashlib
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from dstrain.models.units import Places, Unit, allocate, parameters_on_meta, units


def unit_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and a full module name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _initializers(model: nn.Module) -> dict[int, Callable[[nn.Module], None]]:
    """Module id -> the `_init_weights` of the innermost pretrained model around it, as `initialize_weights` has it."""
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


class _Constructed:
    """Parameters that a model initialises nowhere but in its constructors: few, in few types (apertus, openai-gpt)."""

    SMALL = 2**20

    def __init__(self, model: PreTrainedModel, seed: int):
        self.model, self.seed = model, seed
        self.small: dict[str, nn.Parameter] = {}
        self.all: dict[str, nn.Parameter] = {}

    def get(self, name: str, numel: int) -> nn.Parameter:
        """The parameter as the usual way of building makes it; only a large one costs the memory of a whole model."""
        if numel <= self.SMALL:
            if not self.small:
                with parameters_on_meta(above=self.SMALL):
                    self.small = self._parameters()
            return self.small[name]
        if not self.all:
            self.all = self._parameters()
        return self.all[name]

    def _parameters(self) -> dict[str, nn.Parameter]:
        torch.default_generator.manual_seed(unit_seed(self.seed, ""))
        usual = type(self.model)(copy.deepcopy(self.model.config))
        return dict(usual.named_parameters(remove_duplicate=False))


def initialise(model: PreTrainedModel, seed: int, dtype: torch.dtype, partition: Callable[[Unit], None] | None) -> None:
    """Give a model with parameters on the meta device its initial weights on the CPU, in `dtype`.

    partition: under ZeRO-3, partitions a unit whose weights are final, before the next is allocated. torch's generator
    is left as it was. A tied parameter takes the weights of its first place.
    """
    places, initializers, constructed = Places(model), _initializers(model), _Constructed(model, seed)
    done: list[nn.Parameter] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]), initialization.guard_torch_init_functions():
        for unit in units(model):
            fresh = allocate(unit, torch.float32)
            for new in fresh:
                if new.parameter.is_floating_point():
                    new.parameter.fill_(torch.nan)
            _fill(unit, seed, initializers)
            for new in fresh:
                parameter = new.parameter
                if parameter.is_floating_point() and parameter.isnan().any():
                    parameter.copy_(constructed.get(new.name, parameter.numel()))
                # Hugging Face's init functions leave flagged parameters alone: a later unit's ancestors do not touch
                # this one again.
                parameter._is_hf_initialized = True
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
                places.replace(new.old, parameter)
                done.append(parameter)
            if partition is not None:
                partition(unit)
    for parameter in done:
        del parameter._is_hf_initialized
