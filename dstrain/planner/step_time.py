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
class Work:
    """What one step asks of the busiest rank. flops of matrix products; traffic in bytes of the other operators of the
    model; operators: how many are started; update_traffic: bytes that the optimizer reads and writes, on the host where
    it is offloaded; host_traffic: bytes to and from the host. sent: bytes that a rank sends to its replicas; within: to
    the ranks that share its samples; messages: collectives, each with its latency. bubble: (m + p - 1) / m."""

    precision: str
    flops: float
    traffic: float
    operators: float
    update_traffic: float
    update_on_host: bool
    host_traffic: float
    sent: float
    within: float
    messages: float
    bubble: float

    def to_json(self) -> dict:
        return asdict(self)


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
        + (2 * width * part.held / divided_by * micro_batches if resolved.offload_param else 0.0),
        sent=_sent(resolved, part.elements * width, part.held * width, ranks, micro_batches),
        within=_sent_within(shape, resolved, part.num_layers, block_size, width) * micro_batches,
        messages=_messages(shape, resolved, part.num_layers) * micro_batches,
        bubble=(micro_batches + dims.pp_size - 1) / micro_batches,
    )


def _sent(resolved: ResolvedConfig, trained: float, held: float, ranks: int, micro_batches: int) -> float:
    """Of gradients and parameters, by the ring: (n - 1) / n of the whole for each half of an all-reduce. trained, held:
    bytes of the parameters that get gradients, and of all."""
    ring, gathered = trained * (ranks - 1) / ranks, held * (ranks - 1) / ranks
    stage = resolved.zero_stage
    if stage == 3:  # gathered in both passes, gradients scattered, for every micro-batch
        return (2 * gathered + ring) * micro_batches
    if stage == 2:  # DeepSpeed reduces its buckets by all-reduce, for every micro-batch; then gathers
        return 2 * ring * micro_batches + ring
    return 2 * ring + (ring if stage else 0.0)


def _sent_within(shape: ModelShape, resolved: ResolvedConfig, num_layers: int, block_size: int, width: float) -> float:
    """Of hidden states, for one micro-batch of one rank, in both passes."""
    dims = resolved.parallel
    hidden = resolved.micro_batch * block_size * shape.config.get_text_config().hidden_size * width / dims.sp_size
    sent = 0.0
    if dims.tp_size > 1:  # an all-reduce behind attention and one behind the MLP, and their mirrors
        sent += num_layers * 4 * 2 * hidden * (dims.tp_size - 1) / dims.tp_size
    if dims.sp_size > 1:  # queries, keys, values there and the result back, and their mirrors
        sent += num_layers * 8 * hidden * (dims.sp_size - 1) / dims.sp_size
    if dims.pp_size > 1:
        sent += 2 * hidden
    return sent


def _messages(shape: ModelShape, resolved: ResolvedConfig, num_layers: int) -> float:
    """Collectives of one micro-batch."""
    dims, count = resolved.parallel, 0.0
    if resolved.zero_stage == 3 and dims.dp_size * dims.sp_size > 1:  # matrices are gathered one by one, in both passes
        count += 2.0 * sum(size > PERSISTENCE for size in shape.sizes.values())
    if dims.tp_size > 1:
        count += 4.0 * num_layers
    if dims.sp_size > 1:
        count += 8.0 * num_layers
    return count + (4.0 if dims.pp_size > 1 else 0.0)


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
    travel = work.sent / (device.link if hosts == 1 else device.network) + work.within / device.link
    travel += work.messages * device.latency
    seconds = compute * work.bubble + work.update_traffic / rate + work.host_traffic / device.host_link + travel
    return seconds * (SUSTAINED_ON_CPU if device.kind == "cpu" else 1.0)
