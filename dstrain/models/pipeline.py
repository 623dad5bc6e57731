"""Any Hugging Face causal LM as pipeline stages: where to cut, and what each stage holds.

    plan = plan_pipeline(model_on_meta, num_stages=2)
    stage = Stage(model, plan, index=0)        # dstrain/models/stage.py: the model's own forward, pruned

The plan comes from one run of the model's own forward on tensors without data (pipeline_probe.py), never from a table
of models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from dstrain.errors import UserError
from dstrain.models.pipeline_graph import LayerGraph, Leaf, NotAChainError
from dstrain.models.pipeline_probe import probe_layers


@dataclass(frozen=True)
class PipelinePlan:
    """Where the layers are cut and which parameters each stage needs.

    bounds: stage k holds layers bounds[k] .. bounds[k + 1] - 1. needs[k]: names of the parameters of stage k (a name is
    the first one of a tied parameter). tied: parameter name -> the stages that hold a copy of it, where several do.
    """

    graph: LayerGraph
    bounds: tuple[int, ...]
    needs: tuple[frozenset[str], ...]

    @property
    def num_stages(self) -> int:
        return len(self.needs)

    def received(self, stage: int) -> tuple[Leaf, ...]:
        """What stage gets from the one before it: the inputs of its first layer, then what is left for the end."""
        if stage == 0:
            return ()
        first = self.bounds[stage]
        echoes = [echo.leaf for layer in self.graph.echoes[:first] for echo in layer]
        return (*(slot.leaf for slot in self.graph.slots[first]), *echoes)

    @property
    def tied(self) -> dict[str, tuple[int, ...]]:
        holders: dict[str, list[int]] = {}
        for stage, names in enumerate(self.needs):
            for name in names:
                holders.setdefault(name, []).append(stage)
        return {name: tuple(stages) for name, stages in sorted(holders.items()) if len(stages) > 1}


def _segments(model: nn.Module, graph: LayerGraph) -> list[set[str]]:
    """Parameters of every layer's segment. What no segment reads stays with its layer, or with the last one."""
    segments = [set(needs) for needs in graph.needs]
    segments[0] |= graph.before
    for name, _ in model.named_parameters():
        owner = graph.num_layers - 1
        if name.startswith(f"{graph.layers}."):
            owner = int(name.removeprefix(f"{graph.layers}.").split(".")[0])
        if not any(name in segment for segment in segments):
            segments[owner].add(name)
    return segments


def _cut(costs: list[list[tuple[float, int]]], allowed: list[bool], num_stages: int) -> tuple[int, ...]:
    """Bounds with the least largest cost of a stage; empty if there are none. costs[a][b]: of layers a .. b - 1."""
    n = len(allowed)
    best: list[dict[int, tuple[tuple[float, int], tuple[int, ...]]]] = [{0: ((0, 0), (0,))}]
    for _ in range(num_stages):
        ends: dict[int, tuple[tuple[float, int], tuple[int, ...]]] = {}
        for start, (cost, bounds) in best[-1].items():
            for end in range(start + 1, n + 1):
                if end < n and not allowed[end]:
                    continue
                candidate = (max(cost, costs[start][end]), (*bounds, end))
                if end not in ends or candidate < ends[end]:
                    ends[end] = candidate
        best.append(ends)
    return best[-1][n][1] if n in best[-1] else ()


def plan_pipeline(model: nn.Module, num_stages: int, inputs: Mapping[str, Tensor] | None = None) -> PipelinePlan:
    """Cut `model` (on any device, best on meta: no memory) into `num_stages`; see `plan_stages`.

    Raises UserError if the model is no chain of layers.
    """
    try:
        return plan_stages(model, probe_layers(model, inputs), num_stages)
    except NotAChainError as reason:
        raise UserError(
            f"pipeline.stages: {type(model).__name__} cannot be cut into {num_stages} stages: {reason}; "
            "use ZeRO instead (remove the pipeline block)"
        ) from None


def plan_stages(model: nn.Module, graph: LayerGraph, num_stages: int) -> PipelinePlan:
    """The best balanced stages: first by time (matrix products, the head's among them), then by memory (parameters, the
    embedding's among them). Raises NotAChainError if there are none."""
    n = graph.num_layers
    if num_stages > n:
        raise NotAChainError(f"it has only {n} layers")
    allowed = [not any(made < cut <= read for made, read in graph.leaks) for cut in range(n)]
    segments, size = _segments(model, graph), {name: p.numel() for name, p in model.named_parameters()}

    def cost(start: int, end: int) -> tuple[float, int]:
        names: set[str] = set().union(*segments[start:end])
        return sum(graph.flops[start:end]), sum(size[name] for name in names)

    costs = [[cost(a, b) if b > a else (0, 0) for b in range(n + 1)] for a in range(n)]
    bounds = _cut(costs, allowed, num_stages)
    if not bounds:
        made, read = min(graph.leaks, key=lambda leak: leak[0] - leak[1])
        raise NotAChainError(f"layer {read} reads what layer {made} made, around the layers between")
    needs = [frozenset(set().union(*segments[a:b])) for a, b in pairwise(bounds)]
    return PipelinePlan(graph, bounds, tuple(needs))
