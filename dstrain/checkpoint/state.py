"""From an engine to host memory and back: the tensors of one rank, as entries of its file."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dstrain.checkpoint import engine_state
from dstrain.checkpoint.blocks import Image, bytes_of, copy_all
from dstrain.checkpoint.files import Entry, Key, rank_file
from dstrain.checkpoint.layout import (
    Fragment,
    Named,
    Place,
    Rest,
    inner_optimizer,
    open_shards,
    partition_size,
    place,
    rest_of,
)
from dstrain.checkpoint.replay import replay_steps
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.errors import UserError
from dstrain.parallel import Launch


@dataclass
class HostMemory:
    """Images of this rank's files, kept from one snapshot to the next: fresh memory costs five times the copy into it.

    Bounded by what this rank writes (under Adam 12 bytes for each of its parameters), and a segment for each file.
    lazily: masters and moments may be copied while the next forward and backward pass run. Whoever says so calls
    `settle` before they change.
    """

    lazily: bool = False
    images: dict[str, Image] = field(default_factory=dict)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    reserving: threading.Thread | None = None
    copying: threading.Thread | None = None
    waited_s: float = 0.0  # for the copies of the present snapshot, in `settle`

    def begin(self) -> None:
        """A new snapshot takes the place of the one before."""
        self.ready()
        self.settle()
        self.waited_s = 0.0
        for image in self.images.values():
            image.bytes = 0

    def add(self, file: str, source: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """Put a flat tensor behind what `file` holds so far; copied by `copy`, pinned when it is on a GPU."""
        data = bytes_of(source)
        for target in self.images.setdefault(file, Image(pinned=source.is_cuda)).take(data.numel()):
            self.pairs.append((target, data[: target.numel()]))
            data = data[target.numel() :]
        return None

    def copy(self) -> None:
        """Do what `add` promised, while its tensors are still what they were."""
        copy_all(self.pairs)
        self.pairs.clear()

    def copy_lazily(self) -> None:
        """Begin to do it."""
        if not self.lazily or any(source.is_cuda for _, source in self.pairs):
            self.copy()
            return
        pairs, self.pairs = self.pairs, []
        self.copying = threading.Thread(target=copy_all, args=(pairs,), name="checkpoint-copy", daemon=True)
        self.copying.start()

    def settle(self) -> None:
        """Wait until it is done. Costs nothing when it is."""
        if self.copying is not None:
            began = time.perf_counter()
            self.copying.join()
            self.copying = None
            self.waited_s += time.perf_counter() - began

    def reserve(self, engine: Any) -> None:
        """Begin, in the background, to allocate and touch what the next snapshot will need."""
        if is_swapped(engine) or self.images:
            return  # looking at swapped states means reading them; images that exist may be on their way to the disk
        plan = _Plan()
        take_snapshot(engine, plan)
        self.reserving = threading.Thread(target=self._allocate, args=(plan.sizes,), daemon=True)
        self.reserving.start()

    def _allocate(self, sizes: Mapping[tuple[str, bool], int]) -> None:
        for (file, pinned), num_bytes in sizes.items():
            for piece in self.images.setdefault(file, Image(pinned)).take(num_bytes):
                piece.zero_()

    def ready(self) -> None:
        """Wait for `reserve`."""
        if self.reserving is not None:
            self.reserving.join()
            self.reserving = None


class NoMemory(HostMemory):
    """For the last checkpoint of a run: nothing changes any more, so it is written from where it lies."""

    def add(self, file: str, source: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        return lambda: source


@dataclass
class _Plan(HostMemory):
    """Notes what a snapshot copies, and copies nothing."""

    sizes: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def add(self, file: str, source: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        self.sizes[file, source.is_cuda] += source.numel() * source.element_size()
        return None


def is_swapped(engine: Any) -> bool:
    """Whether the optimizer's states are on NVMe, in memory only one group at a time."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@dataclass(frozen=True)
class Snapshot:
    """What this rank will write."""

    entries: list[Entry]
    facts: dict[str, Any]  # plain JSON: shapes, counters, random states
    images: dict[str, Image]  # file -> its bytes, once `copying` has ended
    copying: threading.Thread | None = None

    @property
    def bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def _own_part(fragment: Fragment, where: Place, replicated: bool) -> Fragment | None:
    """The elements that this rank writes: all, or its share of what every data-parallel rank holds."""
    if not replicated:
        return fragment
    begin = fragment.numel * where.replica // where.num_replicas
    end = fragment.numel * (where.replica + 1) // where.num_replicas
    if begin == end:
        return None
    return Fragment(fragment.name, fragment.start + begin, fragment.offset + begin, end - begin)


@torch.no_grad()
def take_snapshot(engine: Any, memory: HostMemory) -> Snapshot:
    """Copy this rank's share of weights, optimizer state and random states to the host. No collective.

    Costs one copy, of masters and moments as lazily as `memory` allows; host memory: masters and moments of this rank.
    """
    memory.begin()
    where, rank = place(engine), Launch.from_environment().rank
    named = Named.of(engine.module, where.tp_rank)
    names, optimizer = named.names(), inner_optimizer(engine)
    entries: list[Entry] = []
    facts: dict[str, Any] = {"shapes": {}, "scalars": {}, "random": engine_state.random_states()}

    def add(kind: str, fragment: Fragment, source: torch.Tensor) -> None:
        cut = named.cuts.get(fragment.name)
        key = str(Key(kind, fragment.name, fragment.start, cut.label if cut else ""))
        own = source[fragment.offset : fragment.offset + fragment.numel]
        data = memory.add(rank_file(rank, kind, own.dtype), own)
        entries.append(Entry(key, own.dtype, tuple(own.shape), data))

    def is_written_here(name: str) -> bool:
        if name in named.cuts or where.tp_rank == 0:
            return True
        # Of what is not cut, tensor-parallel ranks hold copies; but ZeRO-3 may have divided it over them too.
        return partition_size(named.parameters.get(name)) > where.num_replicas

    for shard in open_shards(engine, names, changing=False):
        scalars = engine_state.scalars_of(shard.state, shard.weights)
        tensors = {"weight": shard.weights}
        for key, value in shard.state.items():
            if key not in scalars:
                tensors[engine_state.common_kind(optimizer, key)] = value
        for fragment in shard.fragments:
            part = _own_part(fragment, where, shard.replicated)
            if not is_written_here(fragment.name) or part is None:
                continue
            facts["shapes"][fragment.name] = named.shape(fragment.name)
            facts["scalars"][fragment.name] = scalars
            for kind, tensor in tensors.items():
                add(kind, part, tensor.view(-1))
        if is_swapped(engine):
            memory.copy()  # the next shard takes its place
    memory.copy_lazily()
    for rest in rest_of(engine.module, named):  # a forward pass may change a buffer
        part = _own_part(rest.fragment, where, rest.replicated)
        if is_written_here(rest.fragment.name) and part is not None:
            facts["shapes"][rest.fragment.name] = rest.shape
            add(rest.kind, part, rest.tensor)
    memory.copy()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Snapshot(entries, facts, memory.images, memory.copying)


def _problems_with(reader: CheckpointReader, named: Named) -> Iterator[str]:
    stored = set(reader.names())
    for name in named.stored:
        if name not in stored:
            yield f"{reader.folder} holds no parameter {name}: it is a checkpoint of another model"
        elif reader.shapes[name] != named.shape(name):
            yield f"{reader.folder}: {name} has shape {list(reader.shapes[name])}, the model {list(named.shape(name))}"


@torch.no_grad()
def load_snapshot(engine: Any, reader: CheckpointReader) -> None:
    """Fill this rank's weights and optimizer state, of whatever layout, from a checkpoint of any layout. A collective.

    Raises UserError for a checkpoint of another model or optimizer.
    """
    named = Named.of(engine.module, place(engine).tp_rank)
    problems = list(_problems_with(reader, named))
    if problems:
        raise UserError(problems[:5])
    optimizer, steps = inner_optimizer(engine), 0
    for shard in open_shards(engine, named.names(), changing=True):
        kinds = sorted({kind for fragment in shard.fragments for kind in reader.kinds.get(fragment.name, ())})
        targets = {"weight": shard.weights}
        for kind in kinds:
            targets[kind] = _state_tensor(optimizer, shard.state, kind, shard.weights)
        for fragment in shard.fragments:
            for kind, target in targets.items():
                _read(reader, named, kind, fragment, target.view(-1))
        if shard.fragments:
            scalars = reader.scalars[shard.fragments[0].name]
            engine_state.restore_scalars(optimizer, shard.state, scalars)
            steps = max(steps, scalars.get("step", 0))
    replay_steps(optimizer, steps)
    for rest in rest_of(engine.module, named):
        _load_rest(reader, named, rest)


def _state_tensor(optimizer: Any, state: dict[str, Any], kind: str, weights: torch.Tensor) -> torch.Tensor:
    """The optimizer's tensor for a stored kind of state, made as the optimizer's first step would make it."""
    key = engine_state.own_key(optimizer, kind)
    if not isinstance(state.get(key), torch.Tensor):
        state[key] = torch.zeros_like(weights, dtype=engine_state.state_dtype(optimizer, weights))
    return state[key]


def _read(reader: CheckpointReader, named: Named, kind: str, fragment: Fragment, target: torch.Tensor) -> None:
    """Read one fragment, through the host when the target is on a device."""
    out = target[fragment.offset : fragment.offset + fragment.numel]
    cut = named.cuts.get(fragment.name)
    if out.device.type == "cpu":
        reader.read(kind, fragment.name, fragment.start, out, cut)
    else:
        host = torch.empty(out.shape, dtype=out.dtype)
        reader.read(kind, fragment.name, fragment.start, host, cut)
        out.copy_(host)


def _load_rest(reader: CheckpointReader, named: Named, rest: Rest) -> None:
    if rest.kind == "weight" or rest.fragment.name in reader.names("buffer"):
        _read(reader, named, rest.kind, rest.fragment, rest.tensor)
