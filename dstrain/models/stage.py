"""One pipeline stage: the model's own forward, with the parameters of the other stages taken out.

The forward of a stage is the whole model's. Layers of other stages hand through what they get; at the first layer of
the stage the tensors received from the stage before replace whatever came; at the first layer of the next stage the
forward is left, with the tensors that this layer would have got. So positions, masks, scales, rotary tables and
whatever else the model does around its layers stay its own code, run once in the right place.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dstrain.models.pipeline import PipelinePlan
from dstrain.models.pipeline_graph import Leaf, get, put

Stub = tuple[nn.Module, str, torch.Size]


class _StageEndError(Exception):
    """Leaves the model's forward after the last layer of the stage."""


class Stage(nn.Module):
    """`model` as stage `index` of `plan`. The model given is pruned in place.

    run(carried, **inputs): carried is what the stage before returned (empty for the first); returns a tuple of
    tensors for the next stage, or the model's own output from the last. Parameters keep the model's own names behind
    `model.`.
    """

    def __init__(self, model: nn.Module, plan: PipelinePlan, index: int):
        super().__init__()
        self.model, self.plan, self.index = model, plan, index
        self.first, self.end = plan.bounds[index], plan.bounds[index + 1]
        self.is_last = index == plan.num_stages - 1
        self._carried: tuple[Tensor, ...] = ()
        self._sent: tuple[Tensor, ...] = ()
        self._echoes: list[Tensor] = []
        self._running = False
        self._size = (0, 0)
        self._stubs = prune(model, plan.needs[index])
        _disable_cache(model)
        self._hook_layers()

    def _hook_layers(self) -> None:
        graph = self.plan.graph
        layers = self.model.get_submodule(graph.layers)
        assert isinstance(layers, nn.ModuleList)
        for i, layer in enumerate(layers):
            if i >= self.end:
                layer.forward, layer.compile = partial(self._leave, i), _nothing
            elif i < self.first:
                layer.forward, layer.compile = partial(self._pass_through, i), _nothing
            else:
                layer.compile = partial(_compile_forward, layer)
                for echo in graph.echoes[i]:
                    module, leaf, _ = echo.places[0]
                    self.model.get_submodule(module).register_forward_hook(partial(self._record, leaf))
        if self.first:
            layers[self.first].register_forward_pre_hook(self._receive, with_kwargs=True, prepend=True)

    def _receive(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._running:
            return None  # a recomputation in the backward pass: its inputs are the saved ones
        tree: Any = [list(args), kwargs]
        for slot, tensor in zip(self.plan.graph.slots[self.first], self._carried, strict=False):
            tree = put(tree, slot.path, tensor)
        return tuple(tree[0]), tree[1]

    def _leave(self, i: int, *args: Any, **kwargs: Any) -> None:
        slots = tuple(get([args, kwargs], slot.path) for slot in self.plan.graph.slots[i])
        self._sent = (*slots, *self._received_echoes(), *self._echoes)
        raise _StageEndError

    def _received_echoes(self) -> tuple[Tensor, ...]:
        return self._carried[len(self.plan.graph.slots[self.first]) :] if self.first else ()

    def _record(self, leaf: int, _module: nn.Module, _args: tuple, output: Any) -> None:
        if self._running:
            self._echoes.append([t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)][leaf])

    def _pass_through(self, i: int, *_args: Any, **_kwargs: Any) -> Any:
        """The output of a foreign layer: right in form, and replaced before it is read."""
        graph, name = self.plan.graph, f"{self.plan.graph.layers}.{i}"
        if not self.is_last:
            return self._fill(graph.outputs[i], name, {})
        start = sum(len(e) for e in graph.echoes[:i])
        echoes: dict[tuple[str, int], Tensor] = {}
        templates: dict[str, Any] = {}
        for echo, tensor in zip(graph.echoes[i], self._received_echoes()[start:], strict=False):
            for module, leaf, output in echo.places:
                echoes[module, leaf], templates[module] = tensor, output
        for module in templates.keys() - {name}:
            echoing = self.model.get_submodule(module)
            echoing.forward = partial(self._fill, templates[module], module, echoes)
            echoing()  # its hooks hand the tensor to whoever collects it
            del echoing.forward
        return self._fill(graph.outputs[i], name, echoes)

    def _fill(self, template: Any, module: str, echoes: dict[tuple[str, int], Tensor]) -> Any:
        """`template` with tensors in place of its leaves: zeros, or the echo that belongs there."""
        device, count = self._device(), -1

        def tensor(leaf: Any) -> Any:
            nonlocal count
            if not isinstance(leaf, Leaf):
                return leaf
            count += 1
            return echoes[module, count] if (module, count) in echoes else leaf.zeros(*self._size, device)

        return pytree.tree_map(tensor, template, is_leaf=lambda x: isinstance(x, Leaf))

    def _device(self) -> torch.device:
        return self._carried[0].device if self._carried else torch.device("cpu")

    def _refresh_stubs(self) -> None:
        """Plain tensors do not follow `model.to(...)`: they take device and type of what was received."""
        if not self._stubs or not self._carried:
            return
        device = self._device()
        dtype = next((t.dtype for t in self._carried if t.is_floating_point()), None)
        module, name, _ = self._stubs[0]
        stub = getattr(module, name)
        if stub.device == device and stub.dtype == dtype:
            return
        for module, name, shape in self._stubs:
            setattr(module, name, _stub(shape, dtype, device))

    def run(self, carried: Sequence[Tensor] = (), **inputs: Tensor) -> Any:
        self._carried, self._sent, self._echoes = tuple(carried), (), []
        self._size = (inputs["input_ids"].shape[0], inputs["input_ids"].shape[1])
        self._refresh_stubs()
        self._running = True
        try:
            return self.model(**inputs)
        except _StageEndError:
            return self._sent
        finally:
            self._running = False
            self._carried, self._sent, self._echoes = (), (), []


def prune(model: nn.Module, own: frozenset[str]) -> list[Stub]:
    """Take out the parameters that are not named in `own`; returns all that were ever taken out.

    Each becomes a plain tensor of zeros of its shape that occupies one element, so that the code around still runs.
    """
    kept = {id(p) for name, p in model.named_parameters() if name in own}
    stubs: list[Stub] = getattr(model, "_foreign_parameters", [])
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in kept:
                del module._parameters[name]
                stubs.append((module, name, parameter.shape))
                setattr(module, name, _stub(parameter.shape, parameter.dtype, torch.device("cpu")))
    model._foreign_parameters = stubs
    return stubs


def _stub(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that occupy one element."""
    zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)
    zeros._is_hf_initialized = True  # Hugging Face's initialisers leave such a tensor alone
    return zeros


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Foreign layers have nothing to compile."""


def _compile_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """`layer.compile` without the layer's hooks: what the pipe hands over changes with every micro-batch."""
    layer.forward = torch.compile(layer.forward, *args, **kwargs)


def _disable_cache(model: nn.Module) -> None:
    """Training never caches keys and values: a cache would be shared between micro-batches and stages."""
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "use_cache"):
            setattr(config, "use_cache", False)  # noqa: B010
