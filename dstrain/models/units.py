"""A model as a row of units (a decoder layer, the embedding, the head, ...) that are made one after the other.

So no rank ever needs room for more than its own part and one unit.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


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

    def tensor_names(self) -> Iterator[str]:
        """Full names of the parameters and buffers in this unit."""
        for full_name, module in self.modules:
            for name in (*module._parameters, *module._buffers):
                yield join(full_name, name)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _post_order(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield from _post_order(join(name, child_name), child)
    yield name, module


def units(model: nn.Module) -> Iterator[Unit]:
    """Split a model into the members of its outermost module lists, and one unit for each module outside of them."""

    def walk(name: str, module: nn.Module, ancestors: list[tuple[str, nn.Module]]) -> Iterator[Unit]:
        above = [(name, module), *ancestors]
        for child_name, child in module.named_children():
            full_name = join(name, child_name)
            if isinstance(module, nn.ModuleList) or not any(True for _ in child.children()):
                yield Unit(full_name, list(_post_order(full_name, child)), above)
            else:
                yield from walk(full_name, child, above)
        yield Unit(name, [(name, module)], ancestors)

    yield from walk("", model, [])


class Places:
    """Every place of each parameter, so that tied parameters stay one object when they are replaced."""

    def __init__(self, model: nn.Module):
        self._of: dict[int, list[tuple[nn.Module, str]]] = {}
        self._kept: list[nn.Parameter] = []  # alive, so that no new parameter can take an id of `_of`
        self.first_name: dict[str, str] = {}  # full name -> the first full name of the same parameter
        first: dict[int, str] = {}
        for full_name, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._kept.append(parameter)
                    self._of.setdefault(id(parameter), []).append((module, name))
                    self.first_name[join(full_name, name)] = first.setdefault(id(parameter), join(full_name, name))

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put `new` wherever `old` is used."""
        for owner, name in self._of.pop(id(old)):
            owner._parameters[name] = new


def return_freed_memory() -> None:
    """Give freed pages back to the system: what comes next is of other sizes than what was freed."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


@dataclass(frozen=True)
class Fresh:
    """A parameter of a unit that has just got memory; until `settle`, at its first place only."""

    name: str
    owner: nn.Module
    attribute: str
    old: nn.Parameter

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]


def allocate(unit: Unit, dtype: torch.dtype | None = None) -> list[Fresh]:
    """Replace each meta parameter of the unit by an empty one on the CPU, floating ones in `dtype` (or as they are).

    Other places of a tied parameter keep the meta one, so that initialising a tied head does not touch the embedding.
    """
    fresh: dict[int, Fresh] = {}
    for full_name, module in unit.modules:
        for name, old in module._parameters.items():
            if old is not None and old.is_meta and id(old) not in fresh:
                wanted = dtype if dtype is not None and old.is_floating_point() else old.dtype
                new = torch.empty(old.shape, dtype=wanted)
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
                module._parameters[name].__dict__.update(old.__dict__)
                fresh[id(old)] = Fresh(join(full_name, name), module, name, old)
    return list(fresh.values())


@contextmanager
def parameters_on_meta(*, above: int = 0) -> Iterator[None]:
    """Inside, parameters of more than `above` elements lose their data as soon as a module registers them."""

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or parameter.numel() <= above:
            return None
        meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        meta.__dict__.update(parameter.__dict__)
        return meta

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
