"""How long a step takes: the traced work of the real model over the device's rates, the pipeline's bubble, the
optimizer, and what travels between ranks."""

from dataclasses import asdict, dataclass

from dstrain.config import ResolvedConfig
from dstrain.planner.hardware import Device
from dstrain.planner.shape import ModelShape
from dstrain.planner.states import PERSISTENCE
from dstrain.planner.tracing import Activations

# A step on a CPU takes so much longer than its layers at their fastest, and ranks wait for each other: the factor that
# the 58 cases of benchmarks/results/{prediction,cpu}_2cpu_* ask for.
SUSTAINED_ON_CPU = 1.15


@dataclass(frozen=True)
class Travel:
    """What a rank sends in a step around one kind of group. span: from the group's first rank to its last, of the
    run's ranks in their order; sent: in bytes; messages: collectives, each with its latency. stride: from a rank of the
    group to the next, so that so many groups send side by side."""

    span: int
    sent: float
    messages: float
    stride: int = 1

    def over_network(self, devices_per_host: int) -> float:
        """What all groups of this kind send from a host to others, each around a ring: bytes."""
        return self.sent * min(self.stride, devices_per_host) if self.span > devices_per_host else 0.0


@dataclass(frozen=True)
class Work:
    """What one step asks of the busiest rank. flops of matrix products; traffic in bytes of the other operators of the
    model; operators: how many are started; update_traffic: bytes that the optimizer reads and writes, on the host where
    it is offloaded; host_traffic: bytes to and from the host. travel: to other ranks. bubble: (m + p - 1) / m.
    """

    precision: str
    flops: float
    traffic: float
    operators: float
    update_traffic: float
    update_on_host: bool
    host_traffic: float
    travel: tuple[Travel, ...]
    bubble: float

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, contents: dict) -> "Work":
        return cls(**{**contents, "travel": tuple(Travel(**group) for group in contents["travel"])})


def work_of(shape: ModelShape, activations: Activations, resolved: ResolvedConfig, block_size: int) -> Work:
    """Communication volumes: ZeRO (https://arxiv.org/abs/1910.02054, section 7), Megatron-LM for tensor parallelism,
    DeepSpeed-Ulysses for sequences."""
    dims, micro_batches = resolved.parallel, resolved.gradient_accumulation_steps
    parts = shape.parts(resolved.placement, dims.tp_size)
    part = max(parts, key=lambda p: (p.num_layers, p.last))
    trace = activations.layer * part.num_layers
    if part.last:
        trace = trace + activations.outside
    ranks = dims.dp_size * dims.sp_size
    width = 4.0 if resolved.precision == "fp32" else 2.0
    divided_by = ranks if resolved.zero_stage else 1
    share = part.elements / divided_by
    compute = resolved.autocast_dtype or resolved.precision
    return Work(
        precision={"bfloat16": "bf16", "float16": "fp16"}.get(compute, compute),
        flops=trace.flops * micro_batches,
        traffic=trace.traffic * micro_batches,
        operators=trace.operators * micro_batches,
        # Gradients and masters and two moments read, three of them written, parameters written.
        update_traffic=share * (7 * 4.0 + width),
        update_on_host=bool(resolved.offload_optimizer),
        host_traffic=(2 * width * share if resolved.offload_optimizer else 0.0)
        + (2 * part.held_bytes(width) / divided_by * micro_batches if resolved.offload_param else 0.0),
        travel=(
            *_between_replicas(shape, resolved, part.elements * width, part.held_bytes(width)),
            *_between_peers(shape, resolved, part.num_layers, block_size, width),
        ),
        bubble=(micro_batches + dims.pp_size - 1) / micro_batches,
    )


def _between_replicas(shape: ModelShape, resolved: ResolvedConfig, trained: float, held: float) -> list[Travel]:
    """Gradients and parameters, by the ring: (n - 1) / n of the whole for each half of an all-reduce. trained, held:
    bytes of the parameters that get gradients, and of all."""
    dims, micro_batches, stage = resolved.parallel, resolved.gradient_accumulation_steps, resolved.zero_stage
    ranks, span = dims.dp_size * dims.sp_size, dims.world_size // dims.pp_size
    ring, gathered = trained * (ranks - 1) / ranks, held * (ranks - 1) / ranks
    if ranks == 1:
        return []
    if stage < 2:
        return [Travel(span, 2 * ring + (ring if stage else 0.0), 0.0, dims.tp_size)]
    if stage == 2:  # DeepSpeed reduces its buckets by all-reduce, for every micro-batch; then gathers
        return [Travel(span, 2 * ring * micro_batches + ring, 0.0, dims.tp_size)]
    # Gathered in both passes, gradients scattered, for every micro-batch; matrices are gathered one by one. Gloo
    # scatters by an all-reduce (measured: tests/measure_network.py).
    scattered = 2 * ring if resolved.facts.device == "cpu" else ring
    matrices = sum(size > PERSISTENCE for size in shape.sizes.values()) * micro_batches
    near = int(resolved.deepspeed["zero_optimization"].get("zero_hpz_partition_size") or 1)
    if near == 1:
        return [Travel(span, (2 * gathered + scattered) * micro_batches, 2.0 * matrices, dims.tp_size)]
    # ZeRO++: what is gathered after an update stays in a copy nearby, for all later passes of the step.
    again = held * (near - 1) / near * (2 * micro_batches - 1)
    once = matrices / micro_batches
    first = Travel(span, gathered + scattered * micro_batches, once, dims.tp_size)
    return [first, Travel(near, again, 2.0 * matrices - once)]


def _between_peers(
    shape: ModelShape, resolved: ResolvedConfig, num_layers: int, block_size: int, width: float
) -> list[Travel]:
    """Hidden states, to the ranks that share a sample, in both passes."""
    dims, micro_batches = resolved.parallel, resolved.gradient_accumulation_steps
    hidden = resolved.micro_batch * block_size * shape.config.get_text_config().hidden_size * width / dims.sp_size
    hidden *= micro_batches
    travel = []
    if dims.tp_size > 1:  # AutoTP sums the output of each row layer, and the input's gradient of each column layer
        sums = shape.num_divided * num_layers / shape.num_layers
        sent = sums * 2 * hidden * (dims.tp_size - 1) / dims.tp_size
        travel.append(Travel(dims.tp_size, sent, sums * micro_batches))
    if dims.sp_size > 1:  # queries, keys, values there and the result back, and their mirrors
        sent = num_layers * 8 * hidden * (dims.sp_size - 1) / dims.sp_size
        travel.append(Travel(dims.tp_size * dims.sp_size, sent, 8.0 * num_layers * micro_batches, dims.tp_size))
    if dims.pp_size > 1:
        sent = hidden if dims.pp_size == 2 else 2 * hidden  # a stage between two others sends both ways
        travel.append(Travel(dims.world_size, sent, 4.0 * micro_batches, dims.world_size // dims.pp_size))
    return travel


def promised(device: Device, precision: str, flops: float, traffic: float, operators: float) -> float:
    """Seconds by the device's rates. A GPU works while the next operators are started, a CPU does one after another."""
    seconds = flops / device.flops(precision) + traffic / (device.bandwidth * device.streaming)
    launches = operators * device.operator_s
    return seconds + launches if device.kind == "cpu" else max(seconds, launches)


def seconds_of(work: Work, device: Device, hosts: int = 1, devices_per_host: int = 1) -> float:
    """Seconds of a step on such devices. Nothing is taken to overlap but a GPU's work and the start of its kernels."""
    compute = device.pace * promised(device, work.precision, work.flops, work.traffic, work.operators)
    rate = device.bandwidth * device.streaming
    if work.update_on_host and device.kind != "cpu":
        rate = device.host_bandwidth / devices_per_host
    here = compute * work.bubble + work.update_traffic / rate + work.host_traffic / device.host_link
    near, far = travel_seconds(work, device, hosts, devices_per_host)
    return (here + near) * (SUSTAINED_ON_CPU if device.kind == "cpu" else 1.0) + far


def travel_seconds(work: Work, device: Device, hosts: int = 1, devices_per_host: int = 1) -> tuple[float, float]:
    """Of these, those on the way to ranks of the same host, and of other hosts. Ranks are laid out host by host, so a
    group that spans more ranks than a host has goes at the pace of the network."""
    near = far = 0.0
    for group in work.travel:
        if hosts > 1 and group.span > devices_per_host:
            sent = group.over_network(devices_per_host) if device.shares_network else group.sent
            far += sent / device.network + group.messages * device.network_latency
        else:
            near += group.sent / device.link + group.messages * device.latency
    return near, far
