"""How many parameters each rank holds before ZeRO divides them: the real model on the meta device, cut as the run cuts
it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dstrain.arguments import ModelArguments
from dstrain.engine import decoder_layers
from dstrain.errors import UserError
from dstrain.models.adapters import inject, lora_layers, trained
from dstrain.models.build import build_skeleton
from dstrain.models.pipeline import plan_stages
from dstrain.models.pipeline_probe import probe_layers
from dstrain.models.quantized import BYTES_PER_WEIGHT, to_quantize
from dstrain.parallel import PipePlacement
from dstrain.planner.tracing import DIVIDED_MATRIX, tensor_cuts

WHOLE = PipePlacement(pp_size=1)


@dataclass(frozen=True)
class Part:
    """What one pipeline rank (without a pipeline: every rank) holds, in elements, after tensor parallelism.

    sizes: of each parameter that is trained. frozen: of each that is not; quantized: likewise, of those in 4 bits.
    layer: of one decoder layer, the largest. first, last: has the embedding, has the head.
    """

    sizes: tuple[int, ...]
    layer: int
    num_layers: int
    first: bool
    last: bool
    frozen: tuple[int, ...] = ()
    quantized: tuple[int, ...] = ()

    @cached_property
    def elements(self) -> int:
        """That are trained: they have gradients, masters and moments."""
        return sum(self.sizes)

    @cached_property
    def held(self) -> int:
        return sum(self.sizes) + sum(self.frozen) + sum(self.quantized)

    def held_bytes(self, width: float) -> float:
        """Of all. width: bytes of a parameter that is not quantized."""
        return width * (self.held - sum(self.quantized)) + BYTES_PER_WEIGHT * sum(self.quantized)

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """Of each parameter as it is stored, where two weights in 4 bits are one element: what DeepSpeed counts."""
        return (*self.sizes, *self.frozen, *(size // 2 for size in self.quantized))

    @cached_property
    def largest_trained(self) -> int:
        return max(self.sizes)


class ModelShape:
    """The sizes of a model, from its configuration. Costs no memory for its weights, and a second for 80 layers."""

    def __init__(self, config: Any, margs: ModelArguments):
        self.config = config
        self.model = build_skeleton(margs, config, torch.bfloat16)
        self.adapter = margs.adapter
        self.quantized = {f"{name}.weight" for name in to_quantize(self.model)} if margs.load_in_4bit else set()
        self._parts: dict[tuple[PipePlacement, int], list[Part]] = {}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameter name -> elements; a tied one has one name."""
        return {name: p.numel() for name, p in self.model.named_parameters()}

    @cached_property
    def adapters(self) -> list[tuple[str, str, int]]:
        """(name of the weight beside which it is, lora_A or lora_B, elements) of each matrix of an adapter."""
        if self.adapter is None:
            return []
        adapted = copy.deepcopy(self.model)
        inject(adapted, self.adapter)
        return [
            (f"{name}.weight", matrix, p.numel())
            for name, m in lora_layers(adapted)
            for matrix in ("lora_A", "lora_B")
            for p in trained(getattr(m, matrix))
        ]

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes.values()) + sum(size for *_, size in self.adapters)

    @property
    def num_trained(self) -> int:
        return sum(size for *_, size in self.adapters) or self.num_parameters

    @cached_property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model))

    @cached_property
    def _graph(self) -> Any:
        return probe_layers(self.model, None)

    @cached_property
    def _cuts(self) -> dict[str, int]:
        """Name of a parameter that tensor parallelism divides -> along which dimension."""
        return dict(tensor_cuts(self.model))

    @cached_property
    def num_divided(self) -> int:
        """Matrices that tensor parallelism divides, the head among them."""
        return sum(name.endswith(".weight") for name in self._cuts)

    def parts(self, placement: PipePlacement = WHOLE, tp_size: int = 1) -> list[Part]:
        """One per pipeline rank.

        Raises NotAChainError for a model that cannot be cut so, UserError for a stage that would have nothing to train.
        """
        key = (placement, tp_size)
        if key not in self._parts:
            self._parts[key] = self._cut(*key)
        return self._parts[key]

    def _cut(self, placement: PipePlacement, tp_size: int) -> list[Part]:
        sizes = self._cut_sizes(tp_size)
        names = [frozenset(sizes)]
        bounds: tuple[int, ...] = (0, self.num_layers)
        if placement.pp_size > 1:
            plan = plan_stages(self.model, self._graph, placement.num_stages)
            names, bounds = list(plan.needs), plan.bounds
        layer, last = self._largest_layer(sizes), len(names) - 1
        found = []
        for rank in range(placement.pp_size):
            stages = placement.stages(rank)
            held = frozenset[str]().union(*(names[k] for k in stages))
            whole = tuple(sizes[name] for name in held - self.quantized)
            own = tuple(
                -(-size // tp_size) if DIVIDED_MATRIX.get(self._cuts.get(name, -1)) == matrix else size
                for name, matrix, size in self.adapters
                if name in held
            )
            if self.adapter and not own:
                raise UserError("a pipeline stage has no layer with an adapter")
            found.append(
                Part(
                    sizes=own or whole,
                    frozen=whole if self.adapter else (),
                    quantized=tuple(sizes[name] for name in held & self.quantized),
                    layer=layer,
                    num_layers=sum(bounds[k + 1] - bounds[k] for k in stages),
                    first=0 in stages,
                    last=last in stages,
                )
            )
        return found

    def _cut_sizes(self, tp_size: int) -> Mapping[str, int]:
        if tp_size == 1:
            return self.sizes
        return {name: -(-size // tp_size) if name in self._cuts else size for name, size in self.sizes.items()}

    def _largest_layer(self, sizes: Mapping[str, int]) -> int:
        layers = decoder_layers(self.model)
        prefix = next(name for name, module in self.model.named_modules() if module is layers)
        totals: dict[str, int] = {}
        for name, size in sizes.items():
            if name.startswith(f"{prefix}."):
                index = name.removeprefix(f"{prefix}.").split(".")[0]
                totals[index] = totals.get(index, 0) + size
        return max(totals.values(), default=0)


def embedding_elements(model: nn.Module) -> int:
    """Elements of the output embedding: what ZeRO-3 gathers for the loss."""
    head = model.get_output_embeddings()
    return head.weight.numel() if head is not None else 0
