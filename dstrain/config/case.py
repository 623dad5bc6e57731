"""One configuration in its world, as the rules read it; and what a rule may answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dstrain.config.batch import Batch
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


@dataclass(frozen=True)
class Case:
    """One configuration in its world, for the rules to read."""

    config: dict[str, Any]
    dims: ParallelDims
    facts: RunFacts
    batch: Batch

    def get(self, key: str, default: Any = None) -> Any:
        return get_value(self.config, key, default)

    @property
    def stage(self) -> int:
        return self.get("zero_optimization.stage") or 0

    @property
    def precision(self) -> str:
        return precision(self.config)

    @property
    def autocast(self) -> str | None:
        return autocast_dtype(self.config)

    @property
    def clipping(self) -> bool:
        return bool(self.get("gradient_clipping", 1.0))

    @property
    def offload_optimizer(self) -> str | None:
        return offload_device(self.config, "offload_optimizer")

    @property
    def offload_param(self) -> str | None:
        return offload_device(self.config, "offload_param")

    @property
    def optimizer(self) -> str:
        """The optimizer's name as DeepSpeed knows it, "" where the JSON has none."""
        return canonical_optimizer(self.get("optimizer.type") or "") or ""

    @property
    def optimizer_class(self) -> OptimizerClass | None:
        return class_of(self.config)

    @property
    def pipeline(self) -> bool:
        return self.dims.pp_size > 1


Rule = Callable[[Case], Iterator[str | Repair]]
