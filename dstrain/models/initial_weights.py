"""Initial weights as a function of (seed, parameter name), one unit of the model at a time.

Every unit (a decoder layer, the embedding, the head, ...) is allocated, initialised by the model's own code with a
generator seeded from the unit's module names, cast, and, under ZeRO-3, partitioned before the next is allocated. So the
weights are the same bits at every stage and world size, and no rank ever holds the whole model.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Unit:
    """Modules whose parameters are made together, in the order in which Hugging Face initialises them."""

    name: str
    modules: list[tuple[str, nn.Module]]  # children before parents
    ancestors: list[tuple[str, nn.Module]]  # nearest first; they may initialise parameters of this unit

    def parameters(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """(owner, attribute, parameter) of each parameter in this unit."""
        for _, module in self.modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, parameter


def _post_order(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield from _post_order(f"{name}.{child_name}".lstrip("."), child)
    yield name, module


def units(model: nn.Module) -> Iterator[Unit]:
    """Split a model into the members of its outermost module lists, and one unit for each module outside of them."""

    def walk(name: str, module: nn.Module, ancestors: list[tuple[str, nn.Module]]) -> Iterator[Unit]:
        above = [(name, module), *ancestors]
        for child_name, child in module.named_children():
            full_name = f"{name}.{child_name}".lstrip(".")
            if isinstance(module, nn.ModuleList) or not any(True for _ in child.children()):
                yield Unit(full_name, list(_post_order(full_name, child)), above)
            else:
                yield from walk(full_name, child, above)
        yield Unit(name, [(name, module)], ancestors)

    yield from walk("", model, [])


def unit_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and a full module name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


class _Places:
    """Every place of each parameter, so that tied parameters stay one object when they are replaced."""

    def __init__(self, model: nn.Module):
        self.of: dict[int, list[tuple[nn.Module, str]]] = {}
        for _, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.of.setdefault(id(parameter), []).append((module, name))

    def allocate(self, unit: Unit) -> None:
        """Replace each meta parameter of the unit by an empty fp32 one on the CPU, wherever it is used."""
        for _, _, parameter in list(unit.parameters()):
            if not parameter.is_meta:
                continue
            dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
            real = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
            real.__dict__.update(parameter.__dict__)
            for owner, name in self.of.pop(id(parameter)):
                owner._parameters[name] = real


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


def initialise(model: nn.Module, seed: int, dtype: torch.dtype, finish_unit: Callable[[Unit], None]) -> None:
    """Give a model with parameters on the meta device its initial weights on the CPU, in `dtype`.

    finish_unit is called with each unit as soon as its weights are final; it may partition them. torch's generator is
    left as it was. A tied parameter takes the weights of its first place.
    """
    from transformers import initialization

    places, initializers = _Places(model), _initializers(model)
    done: list[nn.Parameter] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]), initialization.guard_torch_init_functions():
        for unit in units(model):
            places.allocate(unit)
            for name, module in unit.modules:
                torch.manual_seed(unit_seed(seed, name))
                initializers[id(module)](module)
            for name, module in unit.ancestors:
                torch.manual_seed(unit_seed(seed, f"{name}:{unit.name}"))
                initializers[id(module)](module)
            for _, _, parameter in unit.parameters():
                if not hasattr(parameter, "_is_hf_initialized"):
                    # Hugging Face's init functions leave flagged parameters alone: a later unit's ancestors do not
                    # touch this one again.
                    parameter._is_hf_initialized = True
                    done.append(parameter)
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.to(dtype)
            finish_unit(unit)
    for parameter in done:
        del parameter._is_hf_initialized
