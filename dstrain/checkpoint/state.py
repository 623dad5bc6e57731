"""From an engine to host memory and back: the tensors of one rank, as entries of its file."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dstrain.checkpoint import engine_state
from dstrain.checkpoint.files import Entry, Key
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


@dataclass
class HostMemory:
    """Buffers that are kept from one snapshot to the next: fresh memory costs five times the copy into it."""

    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    reserving: threading.Thread | None = None

    def copy(self, key: str, source: torch.Tensor) -> torch.Tensor:
        """A copy of a flat tensor that stays as it is until the next snapshot. Pinned when the source is on a GPU."""
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self.buffers[key] = buffer
        return buffer.copy_(source, non_blocking=source.is_cuda)

    def reserve(self, engine: Any) -> None:
        """Begin, in the background, to allocate and touch what the next snapshot will need."""
        if is_swapped(engine):
            return  # looking at the states means reading them
        plan = _Plan()
        take_snapshot(engine, plan)
        self.reserving = threading.Thread(target=self._allocate, args=(plan.sizes,), daemon=True)
        self.reserving.start()

    def _allocate(self, sizes: dict[str, tuple[int, torch.dtype, bool]]) -> None:
        for key, (numel, dtype, pinned) in sizes.items():
            self.buffers[key] = torch.empty(numel, dtype=dtype, pin_memory=pinned).zero_()

    def ready(self) -> None:
        """Wait for `reserve`."""
        if self.reserving is not None:
            self.reserving.join()
            self.reserving = None


class NoMemory(HostMemory):
    """For the last checkpoint of a run: nothing changes any more, so what lies in host memory is written from there."""

    def copy(self, key: str, source: torch.Tensor) -> torch.Tensor:
        return super().copy(key, source) if source.is_cuda else source


@dataclass
class _Plan(HostMemory):
    """Notes what a snapshot copies, and copies nothing."""

    sizes: dict[str, tuple[int, torch.dtype, bool]] = field(default_factory=dict)

    def copy(self, key: str, source: torch.Tensor) -> torch.Tensor:
        self.sizes[key] = (source.numel(), source.dtype, source.is_cuda)
        return source.new_empty(source.shape, device="meta")


def is_swapped(engine: Any) -> bool:
    """Whether the optimizer's states are on NVMe, in memory only one group at a time."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@dataclass(frozen=True)
class Snapshot:
    """What this rank will write."""

    entries: list[Entry]
    facts: dict[str, Any]  # plain JSON: shapes, counters, random states

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

    Costs one copy; host memory: masters and moments of this rank.
    """
    memory.ready()
    where = place(engine)
    named = Named.of(engine.module, where.tp_rank)
    names, optimizer = named.names(), inner_optimizer(engine)
    entries: list[Entry] = []
    facts: dict[str, Any] = {"shapes": {}, "scalars": {}, "random": engine_state.random_states()}

    def add(kind: str, fragment: Fragment, source: torch.Tensor) -> None:
        cut = named.cuts.get(fragment.name)
        key = str(Key(kind, fragment.name, fragment.start, cut.label if cut else ""))
        data = memory.copy(key, source[fragment.offset : fragment.offset + fragment.numel])
        entries.append(Entry(key, data.dtype, tuple(data.shape), lambda: data))

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
    for rest in rest_of(engine.module, named):
        part = _own_part(rest.fragment, where, rest.replicated)
        if is_written_here(rest.fragment.name) and part is not None:
            facts["shapes"][rest.fragment.name] = rest.shape
            add(rest.kind, part, rest.tensor)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Snapshot(entries, facts)


def _problems_with(reader: CheckpointReader, named: Named) -> Iterator[str]:
    stored = set(reader.names())
    for name in named.parameters:
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
