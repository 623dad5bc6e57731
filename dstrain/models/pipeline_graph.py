"""What the layers of a model exchange: the result of a probe, and ways into the nested arguments of a layer."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


class NotAChainError(Exception):
    """The model's layers cannot be cut into a pipeline; the message says why, for the end of a sentence.

    unused: the list of layers that was tried does not run at all.
    """

    def __init__(self, reason: str, unused: bool = False):
        super().__init__(reason)
        self.unused = unused


@dataclass(frozen=True)
class Leaf:
    """A tensor inside a layer's output, by shape: "B" batch, "S" length, "BS" their product, or a number."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def zeros(self, batch: int, length: int, device: torch.device) -> Tensor:
        sizes = {"B": batch, "S": length, "BS": batch * length}
        shape = [sizes[n] if isinstance(n, str) else n for n in self.shape]
        return torch.zeros((), dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class Slot:
    """A tensor that a layer gets from the layers before it: where in (args, kwargs), and its form."""

    path: Path
    leaf: Leaf


@dataclass(frozen=True)
class Echo:
    """A tensor that a module inside a layer leaves for the end of the model (router logits of a MoE layer)."""

    leaf: Leaf
    places: tuple[tuple[str, int, Any], ...]  # module that returns it, index among its tensors, its output as Leaf-s


@dataclass
class LayerGraph:
    """What the probe found. slots[i]: what layer i gets from earlier layers.

    needs[i]: names of the parameters that work between the input of layer i and that of layer i + 1 (or the end).
    outputs[i]: output of layer i with a Leaf for each tensor. echoes[i]: tensors layer i leaves for the end.
    flops[i]: matrix products of the forward between the input of layer i and that of layer i + 1, in the probe.
    leaks: (i, j): layer j reads what layer i made, around the layers between.
    """

    layers: str
    num_layers: int
    slots: list[tuple[Slot, ...]] = field(default_factory=list)
    needs: list[frozenset[str]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    echoes: list[tuple[Echo, ...]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    leaks: set[tuple[int, int]] = field(default_factory=set)
    before: frozenset[str] = frozenset()  # parameters that work before the first layer


def tensors(tree: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """Every tensor in nested dicts, lists and tuples, with the keys that lead to it."""
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, MutableMapping):
        return [found for key, value in tree.items() for found in tensors(value, (*path, key))]
    if isinstance(tree, list | tuple):
        return [found for i, value in enumerate(tree) for found in tensors(value, (*path, i))]
    return []


def put(tree: Any, path: Path, value: Any) -> Any:
    """`tree` with `value` at `path`: dicts and lists are changed in place (layers share them), tuples rebuilt."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(tree, MutableMapping):
        tree[key] = put(tree.get(key), rest, value)
        return tree
    items = list(tree or ())
    items += [None] * (key + 1 - len(items))
    items[key] = put(items[key], rest, value)
    if isinstance(tree, list):
        tree[:] = items
        return tree
    return tuple(items)


def get(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree
