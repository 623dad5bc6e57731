"""One configuration in its world, as the rules read it; and what a rule may answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dstrain.config.facts import RunFacts
from dstrain.config.load import get_value
from dstrain.config.reading import autocast_dtype, class_of, offload_device, precision
from dstrain.config.schema_types import OptimizerClass, canonical_optimizer
from dstrain.parallel import ParallelDims


@dataclass(frozen=True)
class Repair:
    """A value that dstrain writes for the user; `reason` becomes its origin."""

    key: str
    value: Any
    reason: str


class UnknownValueError(Exception):
    """A rule asked for a value that is wrong already: it cannot answer, and the user is told of the value itself."""


@dataclass(frozen=True)
class Case:
    """One configuration in its world, for the rules to read.

    grid is None where a wrong degree leaves it unknown; `unknown` names the dotted keys whose values were wrong.
    """

    config: dict[str, Any]
    grid: ParallelDims | None
    facts: RunFacts
    unknown: frozenset[str] = frozenset()

    def get(self, key: str, default: Any = None) -> Any:
        self.require(key)
        return get_value(self.config, key, default)

    def require(self, *keys: str) -> None:
        """Raises UnknownValueError where one of the keys, or a block around it, was wrong."""
        for key in keys:
            parts = key.split(".")
            if any(".".join(parts[: depth + 1]) in self.unknown for depth in range(len(parts))):
                raise UnknownValueError(key)

    @property
    def dims(self) -> ParallelDims:
        if self.grid is None:
            raise UnknownValueError("degrees")
        return self.grid

    @property
    def stage(self) -> int:
        return self.get("zero_optimization.stage") or 0

    @property
    def precision(self) -> str:
        self.require("bf16.enabled", "fp16.enabled")
        return precision(self.config)

    @property
    def autocast(self) -> str | None:
        self.require("torch_autocast.enabled", "torch_autocast.dtype")
        return autocast_dtype(self.config)

    @property
    def clipping(self) -> bool:
        return bool(self.get("gradient_clipping", 1.0))

    @property
    def offload_optimizer(self) -> str | None:
        self.require("zero_optimization.offload_optimizer.device")
        return offload_device(self.config, "offload_optimizer")

    @property
    def offload_param(self) -> str | None:
        self.require("zero_optimization.offload_param.device")
        return offload_device(self.config, "offload_param")

    @property
    def optimizer(self) -> str:
        """The optimizer's name as DeepSpeed knows it, "" where the JSON has none."""
        return canonical_optimizer(self.get("optimizer.type") or "") or ""

    @property
    def optimizer_class(self) -> OptimizerClass | None:
        self.require("optimizer.type", "zero_optimization.offload_optimizer.device", "optimizer.params.torch_adam")
        return class_of(self.config)

    @property
    def pipeline(self) -> bool:
        return self.dims.pp_size > 1


Rule = Callable[[Case], Iterator[str | Repair]]
