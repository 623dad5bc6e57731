"""What a model's layers exchange, found by running its own forward once on tensors without data.

Every tensor of the run carries a mark: the parameters it was made from and the segments (before the first layer, layer
0, layer 1, ...) that worked on it. At the input of each layer, whatever an earlier layer made is noted and replaced by
a fresh tensor, so that a mark found later in the wrong segment is a path around the pipe. From the marks follow,
without any table of models: which tensors travel from layer to layer, which parameters each layer's segment needs (tied
heads and inputs that later layers read from the embedding too), and whether the model is a chain at all.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dstrain.models.pipeline_graph import Echo, LayerGraph, Leaf, NotAChainError, Slot, put, tensors

# Sizes of the probe's input: numbers that seldom are a model's own, so that a shape tells what its dimensions are.
PROBE_BATCH, PROBE_LENGTH = 3, 11
# A model whose control flow needs values is run on real tensors: in full if small, else with constant weights that
# occupy one element each.
_REAL_PROBE_MAX_PARAMETERS = 50_000_000


def find_layers(model: nn.Module) -> list[str]:
    """Names of lists that may be the decoder's layers, best first: those of the pipeline plan, then the largest."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    planned = getattr(model.config.get_text_config(), "base_model_pp_plan", None) or {}

    def rank(name: str) -> tuple[bool, int]:
        return name.rsplit(".", 1)[-1] in planned, sum(p.numel() for p in outer[name].parameters())

    if not outer:
        raise NotAChainError("it has no list of layers")
    return sorted(outer, key=rank, reverse=True)


class _Marks(TorchDispatchMode):
    """Carries a bit mask along with every storage; `segment` is the bit of the part of the model that runs now."""

    def __init__(self):
        super().__init__()
        self.masks: dict[int, int] = {}
        self.kept: list[Any] = []  # storages stay alive, so that an address names one storage only
        self.segment = 0
        self.crossing: set[int] = set()  # storages of earlier segments that this one read
        self.flops: dict[int, float] = {}  # multiplications and additions of matrix products, by segment

    def set(self, tensor: Tensor, mask: int) -> None:
        storage = tensor.untyped_storage()
        self.kept.append(storage)
        self.masks[storage._cdata] = mask

    def get(self, tensor: Tensor) -> int:
        return self.masks.get(self.address(tensor), 0)

    @staticmethod
    def address(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops[self.segment] = self.flops.get(self.segment, 0) + count(*args, **kwargs, out_val=output)
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mask = 0
        for tensor in inputs:
            found = self.get(tensor)
            mask |= found
            if found and not found & self.segment:
                self.crossing.add(self.address(tensor))
        if mask:
            mask |= self.segment
            read = {self.address(t) for t in inputs}  # a view is what it is a view of
            made = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and self.address(t) not in read]
            for tensor in made + _written(func, args, kwargs):
                self.set(tensor, self.get(tensor) | mask)
        return output


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Arguments that an in-place operator changes."""
    if not func._schema.is_mutable:
        return []
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return written


class _Probe:
    """One marked run of `model`: hooks on the layers keep the books."""

    def __init__(self, model: nn.Module, layers: str):
        self.model, self.marks = model, _Marks()
        self.modules = model.get_submodule(layers)
        self.graph = LayerGraph(layers, len(self.modules))
        self.names: list[str] = []
        self.next = 0
        # For each layer: storage and shape of a tensor -> the modules that returned it, innermost first.
        self.made: list[dict[tuple, list[tuple[str, int, Any]]]] = [{} for _ in self.modules]

    def segment(self, i: int) -> int:
        """The bit of layer i's segment; -1 is the part before the first layer."""
        return 1 << (len(self.names) + 1 + i)

    def close_segment(self, leaves: list[Tensor]) -> None:
        """Layer `next` - 1 ends with these tensors: note the parameters and the earlier layers they were made from."""
        i, mask = self.next - 1, 0
        for leaf in leaves:
            mask |= self.marks.get(leaf)
        needs = frozenset(name for bit, name in enumerate(self.names) if mask >> bit & 1)
        if i < 0:
            self.graph.before = needs
            return
        self.graph.needs.append(needs)
        self.graph.leaks |= {(j, i) for j in range(i) if mask & self.segment(j)}

    def enter(self, i: int, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if i != self.next:
            raise NotAChainError(f"layer {i} runs where layer {self.next} was expected")
        if not torch.is_grad_enabled():
            raise NotAChainError("some of its layers run where autograd does not see them")
        found = tensors([list(args), kwargs])
        made_by_layers = self.segment(0) * ((1 << i) - 1)
        carried = [(path, leaf) for path, leaf in found if self.marks.get(leaf) & made_by_layers]
        if i and not carried:
            raise NotAChainError(f"layer {i} does not read what layer {i - 1} made")
        self.close_segment([leaf for _, leaf in (carried if i else found)])
        self.graph.slots.append(tuple(Slot(path, _leaf(leaf)) for path, leaf in carried))
        tree: Any = [list(args), kwargs]
        self.next += 1
        self.marks.segment = self.segment(i)
        for path, leaf in carried:
            fresh = leaf.detach().clone()
            self.marks.set(fresh, self.segment(i))
            tree = put(tree, path, fresh)
        self.marks.crossing.clear()
        if self.next == self.graph.num_layers:
            self.forget_parameters()
        return tuple(tree[0]), tree[1]

    def forget_parameters(self) -> None:
        """What modules of earlier layers returned can be sent: its readers at the end need no more parameters."""
        for i, made in enumerate(self.made):
            for address, _ in made:
                self.marks.masks[address] = self.segment(i)

    def left(self, i: int, name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
        """A module inside layer i returned: its tensors may be read at the end of the model."""
        if self.next - 1 != i:
            return
        described = pytree.tree_map(_describe, output)
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        for index, leaf in enumerate(leaves):
            if self.marks.get(leaf):  # only a marked storage stays alive: the address of another may be used again
                key = (self.marks.address(leaf), tuple(leaf.shape))
                self.made[i].setdefault(key, []).append((name, index, described))

    def leave(self, i: int, _module: nn.Module, _args: tuple, output: Any) -> None:
        self.graph.outputs.append(pytree.tree_map(_describe, output))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for i, layer in enumerate(self.modules):
            handles.append(layer.register_forward_pre_hook(partial(self.enter, i), with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(self.leave, i)))
            for name, module in layer.named_modules():
                full = f"{self.graph.layers}.{i}.{name}".rstrip(".")
                handles.append(module.register_forward_hook(partial(self.left, i, full), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, output: Any) -> LayerGraph:
        """Close the last segment with what a training loss reads: the logits and a MoE model's auxiliary loss."""
        if self.next != len(self.modules):
            raise NotAChainError(f"only {self.next} of its {len(self.modules)} layers run", unused=self.next == 0)
        results = [output[key] for key in ("logits", "aux_loss") if isinstance(output.get(key), Tensor)]
        self.close_segment(results)
        last = self.graph.num_layers - 1
        echoes: list[tuple[Echo, ...]] = [() for _ in self.modules]
        for i in [made for made, read in self.graph.leaks if read == last]:
            crossing = {a for a in self.marks.crossing if self.marks.masks[a] & self.segment(i)}
            made = {key: places for key, places in self.made[i].items() if key[0] in crossing}
            if crossing and {address for address, _ in made} == crossing:
                echoes[i] = tuple(_echo(places) for places in made.values())  # in the order they were made
                self.graph.leaks.discard((i, last))
        self.graph.echoes = echoes
        self.graph.flops = [self.marks.flops.get(self.segment(i), 0.0) for i in range(self.graph.num_layers)]
        self.graph.flops[0] += self.marks.flops.get(self.segment(-1), 0.0)
        return self.graph

    def run(self, weights: dict[str, Tensor], inputs: Mapping[str, Tensor]) -> LayerGraph:
        self.names = [name for name, _ in self.model.named_parameters()]
        for bit, name in enumerate(self.names):
            self.marks.set(weights[name], 1 << bit)
        self.marks.segment = self.segment(-1)
        with self.hooks(), self.marks:
            output = functional_call(self.model, weights, kwargs=dict(inputs))
        return self.finish(output)


def _echo(places: list[tuple[str, int, Any]]) -> Echo:
    _, index, output = places[0]
    return Echo([leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Leaf)][index], tuple(places))


def _describe(value: Any) -> Leaf | None:
    return _leaf(value) if isinstance(value, Tensor) else None


def _leaf(tensor: Tensor) -> Leaf:
    names = {PROBE_BATCH: "B", PROBE_LENGTH: "S", PROBE_BATCH * PROBE_LENGTH: "BS"}
    return Leaf(tuple(names.get(n, n) for n in tensor.shape), tensor.dtype)


def _fake_weight(p: Tensor) -> Tensor:
    return torch.empty(p.shape, dtype=p.dtype, device="cpu").requires_grad_(p.is_floating_point())


def _real_weight(constant: bool, p: Tensor) -> Tensor:
    if not p.is_floating_point():
        return torch.zeros(p.shape, dtype=p.dtype)
    weight = torch.full((), 0.01).to(p.dtype).expand(p.shape) if constant else torch.full(p.shape, 0.01).to(p.dtype)
    return weight.requires_grad_(True)


def _run(model: nn.Module, layers: str, make: Callable[[Tensor], Tensor], inputs: Mapping | None) -> LayerGraph:
    weights = {name: make(p) for name, p in model.named_parameters()}
    # Tables that are computed, not trained, may be on the meta device as well: they influence no mark.
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            weights[name] = torch.ones(buffer.shape, dtype=buffer.dtype)
    if inputs is None:
        inputs = {"input_ids": torch.ones(PROBE_BATCH, PROBE_LENGTH, dtype=torch.int64)}
    return _Probe(model, layers).run(weights, inputs)


def probe_layers(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> LayerGraph:
    """Run `model` (on any device, also meta) once, as in training, on tensors without data; follow what flows where.

    inputs: keyword arguments for models that need more than `input_ids` [3, 11].
    Raises NotAChainError with the reason. The model is left as it was.
    """
    was_training = model.training
    model.train()
    try:
        reasons = []
        for layers in find_layers(model):
            try:
                return _run_fake_or_real(model, layers, inputs)
            except NotAChainError as reason:
                reasons.append(reason)
                if not reason.unused:
                    break  # this is the decoder; other lists (a vision tower's) may be unused
        raise reasons[0] if reasons[-1].unused else reasons[-1]
    finally:
        model.train(was_training)


def _run_fake_or_real(model: nn.Module, layers: str, inputs: Mapping[str, Tensor] | None) -> LayerGraph:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _fakeable_experts(model):
            return _run(model, layers, _fake_weight, inputs)
    except NotAChainError:
        raise
    except Exception:  # noqa: BLE001 - the model asks for values; then it gets some
        constant = sum(p.numel() for p in model.parameters()) > _REAL_PROBE_MAX_PARAMETERS
        return _run(model, layers, partial(_real_weight, constant), inputs)


@contextmanager
def _fakeable_experts(model: nn.Module) -> Iterator[None]:
    """Experts by batched matmul while the probe runs: the only implementation whose shapes do not depend on values."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    chosen = {key: getattr(c, "_experts_implementation_internal", None) for key, c in configs.items()}
    for key, config in configs.items():
        if chosen[key] is not None:
            config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        for key, config in configs.items():
            if chosen[key] is not None:
                config._experts_implementation_internal = chosen[key]
