"""What DeepSpeed's optimizer wrappers allocate, and when: one function a wrapper, read from deepspeed 0.19.8.

Sizes are in bytes of one rank. `base` lives from the first step on; each phase adds to it what lives only then. The
files: runtime/engine.py (stage 0), runtime/bf16_optimizer.py, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py.
"""

from dataclasses import dataclass, field

from dstrain.config import ResolvedConfig
from dstrain.config.load import get_value
from dstrain.planner.shape import Part
from dstrain.planner.tracing import MOST_ON_HEAP

# Elements; DeepSpeed's defaults (runtime/zero/config.py and runtime/constants.py).
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000
SUB_GROUP = 1_000_000_000
PERSISTENCE = 100_000
NVME_BUFFER, NVME_PARAM_BUFFERS, NVME_OPTIMIZER_BUFFERS = 100_000_000, 5, 4
MIN_AIO_BYTES = 2**20  # what is smaller stays in memory (runtime/swap_tensor/utils.py)
# Tensors of the parameter's size that an optimizer keeps, by its name in the JSON.
_MOMENTS = {"sgd": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "muon": 1, "adafactor": 1}


@dataclass
class States:
    """base, phases[name]: part -> bytes on the device. host, pinned, nvme: bytes of this rank outside of it."""

    base: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    pinned: float = 0.0
    nvme: float = 0.0


@dataclass(frozen=True)
class Case:
    """One rank's part of a model under one configuration.

    ranks: over which ZeRO divides. backward: activations alive when the backward pass begins, and so on (`Trace`), of
    all micro-batches in flight. on_cpu: the device is the host: empty buffers take no memory until they are touched,
    and gloo copies what it gathers.
    """

    resolved: ResolvedConfig
    part: Part
    ranks: int
    on_cpu: bool

    @property
    def elements(self) -> int:
        return self.part.elements

    @property
    def parameters(self) -> float:
        """Bytes of all parameters, trained or not."""
        return float(self.part.held_bytes(self.width))

    @property
    def width(self) -> int:
        """Bytes of one parameter."""
        return 4 if self.resolved.precision == "fp32" else 2

    @property
    def reduced_width(self) -> int:
        """Bytes of one gradient as it is reduced (`communication_data_type` of runtime/engine.py)."""
        names = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
        deepspeed = self.resolved.deepspeed
        if self.resolved.parallel.sp_size > 1:
            return names[get_value(deepspeed, "seq_parallel_communication_data_type") or "fp32"]
        if self.resolved.autocast_dtype:
            return 2
        named = get_value(deepspeed, "communication_data_type")
        return names[named] if named else self.width

    @property
    def share(self) -> float:
        return self.elements / self.ranks

    @property
    def accumulates(self) -> bool:
        return self.resolved.gradient_accumulation_steps > 1

    @property
    def moments(self) -> float:
        """Bytes of optimizer state of one parameter."""
        kind = self.resolved.optimizer_type.lower()
        count = _MOMENTS.get(kind, 2)
        if kind == "sgd" and get_value(self.resolved.deepspeed, "optimizer.params.momentum"):
            count = 1
        return 4.0 * count

    def zero(self, key: str, default: float) -> float:
        value = get_value(self.resolved.deepspeed, f"zero_optimization.{key}")
        return default if value is None or isinstance(value, str) else value

    def swapped(self, width: float, sizes: tuple[int, ...]) -> float:
        """Bytes of this rank's part of what has so many bytes a parameter and is large enough for a disk."""
        shares = (width * size / self.ranks for size in sizes)
        return sum(share for share in shares if share >= MIN_AIO_BYTES)

    def bucket(self, touched: float) -> float:
        """Elements of the reduce bucket: allocated whole, though a CPU's kernel gives only the pages in use."""
        size = self.zero("reduce_bucket_size", REDUCE_BUCKET)
        return min(size, touched) if self.on_cpu else size


def states_of(case: Case) -> States:
    """By the wrapper that DeepSpeed chooses (`_configure_zero_optimizer`, `_configure_bf16_optimizer`)."""
    resolved = case.resolved
    if resolved.zero_stage == 0:
        return _plain(case)
    if resolved.zero_stage == 3:
        return _stage3(case)
    in_fp32 = get_value(resolved.deepspeed, "data_types.grad_accum_dtype") == "fp32"
    if resolved.zero_stage == 1 and resolved.precision == "bf16" and in_fp32 and not resolved.offload_optimizer:
        return _bf16_optimizer(case)
    return _stage12(case)


def _plain(case: Case) -> States:
    """Stage 0 in fp32: gradients stay in `.grad`; `allreduce_bucket` copies them flat, `MEMORY_OPT_ALLREDUCE_SIZE` at a
    time."""
    gradients = float(case.width * case.elements)
    flat = case.width * min(case.elements, REDUCE_BUCKET + case.part.largest_trained)
    return States(
        base={"parameters": case.parameters, "optimizer": case.moments * case.elements},
        phases={
            "forward": {"gradients": gradients if case.accumulates else 0.0},
            "backward": {"gradients": gradients if case.accumulates else 0.0},
            "backward_end": {"gradients": gradients},
            "reduce": {"gradients": gradients, "communication": flat},
            "step": {"gradients": gradients},
        },
    )


def _bf16_optimizer(case: Case) -> States:
    """bf16 at stage 1 with sums in fp32: whole gradients in fp32 on every rank. A group's gradients are one flat
    tensor, so that no bucket limits the copy that is reduced (`allreduce_bucket`): fp32, then bf16."""
    return States(
        base={
            "parameters": case.parameters,
            "gradients": 4.0 * case.elements,
            "optimizer": (4.0 + case.moments) * case.share,
        },
        phases={
            "forward": {},
            "backward": {},
            "backward_end": {},
            "reduce": {"communication": 6.0 * case.elements},
            "step": {"communication": _gloo(case, 2.0 * case.elements)},
        },
    )


def _stage12(case: Case) -> States:
    """Stage 1 in fp32 or fp16, stage 2: a bucket that is reduced through a flat copy of it, and this rank's part."""
    stage2, width = case.resolved.zero_stage == 2, case.width
    whole = float(width * case.elements)
    touched = width * case.bucket(case.elements)
    buffers = 2 if get_value(case.resolved.deepspeed, "zero_optimization.overlap_comm") is True else 1
    bucket = 0.0 if case.on_cpu else touched * buffers
    own = 4.0 * case.share  # this rank's gradients, in fp32
    kept = (own if stage2 else whole) if case.accumulates else 0.0
    result = States(base={"parameters": case.parameters}, phases={})
    optimizer = (4.0 + case.moments) * case.share
    copy = case.reduced_width * min(case.elements, case.zero("reduce_bucket_size", REDUCE_BUCKET))
    if case.reduced_width != width:
        copy += width / case.reduced_width * copy
    before = whole if not stage2 and not case.on_cpu else 0.0  # on stage 1 gradients move into the bucket at the end
    result.phases = {
        "forward": {"gradients": kept, "communication": bucket},
        "backward": {"gradients": kept, "communication": bucket},
        "backward_end": {"gradients": own + before, "communication": touched * buffers + copy},
        "step": {"gradients": own + (own if width == 4 else 0.0), "communication": _gloo(case, whole)},
    }
    if case.resolved.offload_optimizer:
        _offload(case, result, optimizer + own + width * case.share + width * case.part.largest_trained)
        result.base["communication"] = width * float(case.part.largest_trained)
        if not stage2 or case.accumulates is False:
            result.phases["step"]["gradients"] = own if stage2 else whole
    else:
        result.base["optimizer"] = optimizer
    return result


def _stage3(case: Case) -> States:
    """Stage 3: a part of everything, and what is gathered: a module's parameters and those that are fetched ahead."""
    width, own, held, largest = case.width, 4.0 * case.share, sum(case.part.stored), max(case.part.stored)
    each = case.parameters / held
    live = case.zero("stage3_max_live_parameters", MAX_LIVE)
    prefetch = min(case.zero("stage3_prefetch_bucket_size", PREFETCH_BUCKET), held)
    gathered = each * min(held, largest + prefetch, live + largest)
    if not case.on_cpu:  # gathered on a stream of its own, whose memory no other stream gets
        gathered = max(gathered, each * min(held, live))
    elif width * largest < MOST_ON_HEAP:  # it comes and goes in both passes, each time to a new place
        gathered += 2 * width * largest
    # Gradients go into a bucket, in the dtype in which they are reduced; `reduce_scatter_coalesced` sorts them by rank
    # into a copy of it, and what a rank receives becomes fp32.
    bucket_of = case.reduced_width * case.bucket(case.elements)
    copy = case.reduced_width * min(case.elements, case.zero("reduce_bucket_size", REDUCE_BUCKET))
    received = 4.0 * case.bucket(case.elements) / case.ranks if case.reduced_width < 4 else 0.0
    received = max(received, _gloo(case, copy))
    # gloo gathers into a tensor of its own; a small one stays with the heap of the thread that did it.
    gathers = _gloo(case, each * prefetch)
    result = States(base={"communication": bucket_of + (gathers if gathers < MOST_ON_HEAP else 0.0)})
    parameters = case.parameters / case.ranks
    if case.resolved.offload_param:
        _place(case, result, case.resolved.offload_param, "parameters", parameters, NVME_PARAM_BUFFERS)
    else:
        result.base["parameters"] = parameters
    # Without offload, masters of fp32 parameters are the parameters themselves.
    masters = 0.0 if width == 4 and not case.resolved.offload_optimizer else 4.0
    optimizer = (masters + case.moments) * case.share
    if case.resolved.offload_optimizer:
        _offload(case, result, optimizer + 2 * own)
    else:
        result.base["optimizer"] = optimizer
        result.base["gradients"] = own
    step = 0.0 if case.resolved.offload_optimizer else 4.0 * min(case.share, SUB_GROUP)
    # On an accelerator gradients are reduced on another stream while the backward pass goes on: the largest waits, and
    # what the reduction allocates is that stream's.
    waiting = 0.0 if case.on_cpu else width * float(case.part.largest_trained)
    other = 0.0 if case.on_cpu else copy + received
    result.phases |= {
        "forward": {"gathered": gathered, "communication": other},
        "backward": {"gathered": gathered, "communication": other, "gradients": waiting},
        "backward_end": {"gathered": gathered, "communication": copy + received},
        "step": {"gradients": step, "communication": gathers},
    }
    return result


def _gloo(case: Case, size: float) -> float:
    """gloo gathers into a flat tensor of its own (torch ProcessGroupGloo::allgather); NCCL in place."""
    return size if case.on_cpu and case.ranks > 1 else 0.0


def _offload(case: Case, result: States, size: float) -> None:
    _place(case, result, case.resolved.offload_optimizer, "optimizer", size, NVME_OPTIMIZER_BUFFERS)


def _place(case: Case, result: States, device: str | None, name: str, size: float, buffers: int) -> None:
    """Put `size` bytes of states on the host or the disk. On a CPU the host's memory is the device's."""
    block = "offload_optimizer" if name == "optimizer" else "offload_param"
    if device == "nvme" and name == "optimizer":
        states = (4.0 + case.moments) * case.share  # one flat tensor each
        result.nvme += states + case.swapped(4.0, case.part.sizes)  # and gradients
        size = case.zero(f"{block}.buffer_count", buffers) * case.share * 4.0
        save = {"checkpoint": states + 4.0 * case.share}  # the last checkpoint has them in memory, and a buffer
        if case.on_cpu:
            result.phases["save"] = save
        else:
            result.host |= save
    elif device == "nvme":
        result.nvme += case.swapped(case.width, case.part.sizes + case.part.frozen)
        # Made whole, however small the model (swap_tensor/partitioned_param_swapper.py).
        size = case.zero(f"{block}.buffer_count", buffers) * case.zero(f"{block}.buffer_size", NVME_BUFFER) * case.width
    where = result.base if case.on_cpu else result.host
    where[name] = where.get(name, 0.0) + size
    if device == "nvme" or get_value(case.resolved.deepspeed, f"zero_optimization.{block}.pin_memory"):
        result.pinned += size
