"""What one micro-batch keeps in memory: the real model, its real forward and backward, on tensors without data.

The model is built at two small depths under PyTorch's `FakeTensorMode`, which knows every operator's output shapes and
computes nothing. A dispatch mode counts the bytes of the storages that are alive. Layers repeat, so that two depths
give any depth: a 70 B model costs what a small one does. The only file that touches these modes.

(`torch.distributed._tools.MemTracker` counts the same way, but cannot be told what operators of data-dependent size
return: the fused loss asks which tokens are labels.)
"""

import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dstrain.adapter import NAME
from dstrain.arguments import ModelArguments
from dstrain.models import cross_entropy
from dstrain.models.adapters import inject
from dstrain.models.build import build_skeleton, save_activations
from dstrain.models.loss import install_fused_loss, token_loss

# Of an adapter beside a weight that is divided along this dimension.
DIVIDED_MATRIX = {0: "lora_B", 1: "lora_A"}
# Blocks from this size on malloc maps for themselves, and gives back (dstrain/launch/heap.py).
MOST_ON_HEAP = 32 * 2**20


@dataclass(frozen=True)
class Trace:
    """Bytes of one micro-batch of one depth; parameters and their gradients are not in it.

    saved: alive between forward and backward, without the loss's own. loss: what the head and the loss hold then (its
    gradients, or logits). forward_peak, backward_peak: the most that is ever alive in either, all of it included.
    small_peak: the most in either of blocks that glibc's malloc takes from its heap.
    Work of both passes: flops of products of matrices and attention; traffic, bytes that the other operators read and
    write; operators, how many were called.
    """

    saved: float
    loss: float
    forward_peak: float
    backward_peak: float
    small_peak: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    operators: float = 0.0

    def __add__(self, other: "Trace") -> "Trace":
        return Trace(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> "Trace":
        return Trace(*(value * factor for value in vars(self).values()))


@dataclass(frozen=True)
class Activations:
    """`Trace` as a function of depth: `whole(layers)`; `layer` is what one more layer adds."""

    outside: Trace
    layer: Trace

    def whole(self, layers: float) -> Trace:
        return self.outside + self.layer * layers


@dataclass(frozen=True)
class Setting:
    """What a trace depends on beside the model. dtype: of parameters; compute: of the matmuls (autocast), or the same.

    tp_size cuts the parameters that transformers' plan cuts. loss: "fused" is dstrain's own; "model" is the model's, as
    other trainers use it. adapter: the settings of adapters (`ModelArguments.adapter`) as JSON.
    """

    micro_batch: int
    seq_len: int
    dtype: torch.dtype
    compute: torch.dtype
    gradient_checkpointing: bool = False
    tiled_mlp: bool = False
    tp_size: int = 1
    loss: str = "fused"
    attn_implementation: str | None = None
    on_cpu: bool = True
    adapter: str | None = None


class _Counter(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, by where they were made."""

    def __init__(self, outside: Iterable[Tensor], most_labels: int, fused_kernel: bool = False):
        super().__init__()
        self.live = {"model": 0, "loss": 0}
        self.small = self.small_peak = 0
        self.peak, self.place = 0, "model"
        self.flops = self.traffic = self.operators = 0.0
        self._left_out = 1.0  # the loss is run on a part of its tokens: its work counts so many times
        self._most_labels, self._fused_kernel = most_labels, fused_kernel
        self._known: dict[int, Any] = {id(storage): storage for t in outside for storage in [t.untyped_storage()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # its size depends on the data
            kept = min(args[0].numel(), self._most_labels)
            self._left_out = args[0].numel() / kept
            out = args[0].new_empty((kept, args[0].ndim), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            self._see(tensor.untyped_storage())
        self._count_work(func, args, kwargs or {}, out, results)
        return out

    def _count_work(self, func: Any, args: tuple, kwargs: dict, out: Any, results: list[Tensor]) -> None:
        times = self._left_out if self.place == "loss" else 1.0
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops += times * counted(*args, **kwargs, out_val=out)
        elif self._fused_kernel and self.place == "loss":
            return  # Liger-Kernel reads and writes its logits once, behind their product
        elif not func.is_view:
            read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.traffic += times * sum(t.numel() * t.element_size() for t in (*read, *results))
        self.operators += times

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size, place = id(storage), storage.nbytes(), self.place
        if key in self._known:
            return
        small = size if size < MOST_ON_HEAP else 0

        def gone(_: Any) -> None:
            self.live[place] -= size
            self.small -= small
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live[place] += size
        self.small += small
        self.peak = max(self.peak, sum(self.live.values()))
        self.small_peak = max(self.small_peak, self.small)

    def restart(self) -> None:
        self.peak = sum(self.live.values())


def trace_activations(config: Any, setting: Setting) -> Activations:
    """Trace `config` (of transformers; not changed) at two depths. Raises what the model's own code raises."""
    start, period = _depths(config.get_text_config())
    shallow = trace_once(of_depth(config, start), setting)
    deep = trace_once(of_depth(config, start + period), setting)
    layer = (deep + shallow * -1.0) * (1.0 / period)
    return Activations(shallow + layer * -float(start), layer)


def _depths(config: Any) -> tuple[int, int]:
    """(layers of the shallow trace, further layers of the deep one): a period of the model's kinds of layers."""
    kinds = list(getattr(config, "layer_types", None) or [])
    total = config.num_hidden_layers
    period = next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), 1) if kinds else 1
    first = int(getattr(config, "first_k_dense_replace", 0) or 0) + 1
    return (min(first, total), period) if first + period <= total else (1, 1)


def of_depth(config: Any, layers: int) -> Any:
    """A copy of a configuration with so many layers."""
    values = config.to_dict()
    text = values if config.get_text_config() is config else values.get("text_config", values)
    name = type(config.get_text_config()).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    text[name] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:layers]
    copy = type(config).from_dict(values)
    copy._attn_implementation = config._attn_implementation
    return copy


def trace_once(config: Any, setting: Setting) -> Trace:
    margs = ModelArguments(
        attn_implementation=setting.attn_implementation,
        gradient_checkpointing=setting.gradient_checkpointing,
        tiled_mlp=setting.tiled_mlp,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_skeleton(margs, config, setting.dtype)
        if setting.adapter:
            with unset_fake_temporarily():  # peft moves what it makes to the meta device in place
                inject(model, json.loads(setting.adapter))
        _materialise(model, setting)
        save_activations(model, margs)
        model.train()
        step = _step(model, setting)
        # Two chunks of the fused loss hold what all of them hold one after the other, and take seconds less.
        vocab_size = config.get_text_config().vocab_size
        chunk = max(cross_entropy.CHUNK_TOKENS, cross_entropy.CHUNK_ELEMENTS // vocab_size)
        counter = _Counter(_tensors(model), 2 * chunk, fused_kernel=not setting.on_cpu)
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda *_: setattr(counter, "place", "loss"))
        if setting.loss == "fused":  # the model's own loss comes after its head
            head.register_forward_hook(lambda *_: setattr(counter, "place", "model"))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        autocast = torch.autocast("cpu", setting.compute, enabled=setting.compute != setting.dtype)
        with counter, autocast, _block_size(setting.on_cpu):
            loss = step()
            saved, forward_peak = dict(counter.live), counter.peak
            counter.restart()
            counter.place = "model"
            loss.backward()
    work = (counter.flops, counter.traffic, counter.operators)
    return Trace(saved["model"], saved["loss"], forward_peak, counter.peak, counter.small_peak, *work)


@contextmanager
def _block_size(on_cpu: bool) -> Iterator[None]:
    """The fused loss takes larger blocks elsewhere than on a CPU, where the fake tensors are."""
    before = cross_entropy.BLOCK_ELEMENTS["cpu"]
    cross_entropy.BLOCK_ELEMENTS["cpu"] = before if on_cpu else cross_entropy.BLOCK_ELEMENTS_ELSEWHERE
    try:
        yield
    finally:
        cross_entropy.BLOCK_ELEMENTS["cpu"] = before


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _step(model: nn.Module, setting: Setting) -> Callable[[], Tensor]:
    """The forward pass of one micro-batch, with its loss."""
    ids = torch.zeros((setting.micro_batch, setting.seq_len), dtype=torch.int64)
    if setting.loss == "model":
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
    head = install_fused_loss(model)
    return lambda: token_loss(model, head, {"input_ids": ids, "labels": ids})[0]


def _materialise(model: nn.Module, setting: Setting) -> None:
    """Fake parameters and buffers in place of meta ones, cut as tensor parallelism cuts them."""
    cuts = dict(tensor_cuts(model)) if setting.tp_size > 1 else {}
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in made:
                shape = list(parameter.shape)
                cut = cuts.get(f"{name}.{key}")
                if cut is not None:
                    shape[cut] = -(-shape[cut] // setting.tp_size)
                values = torch.empty(shape, dtype=setting.dtype)
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[key] = made[id(parameter)]
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def tensor_cuts(model: nn.Module) -> list[tuple[str, int]]:
    """(parameter name, dimension) of what transformers' tensor-parallel plan divides; AutoTP follows it."""
    import re

    from dstrain.models.tensor import _plan

    found = []
    for pattern, style in _plan(model.config).items():
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + "$")
        dimension = {"colwise": 0, "rowwise": 1}.get(re.sub("_.*", "", style))
        if dimension is None:
            continue
        for name, module in model.named_modules():
            if not wanted.match(name.removeprefix(f"{model.base_model_prefix}.")):
                continue
            if hasattr(module, "lora_A"):
                found.append((f"{name}.{DIVIDED_MATRIX[dimension]}.{NAME}.weight", dimension))
                name, module = f"{name}.base_layer", module.get_base_layer()
            if isinstance(module, nn.Linear):
                found.append((f"{name}.weight", dimension))
                if dimension == 0 and module.bias is not None:
                    found.append((f"{name}.bias", 0))
    return found
