"""What a run will need, part by part, before it starts: per device, per host, pinned, on NVMe and in a checkpoint.

    needs = predict_memory(shape, trace, resolved, ...)
    needs.device["total"]; needs.host["total"]

A pure function of the model's sizes, its traced activations, the resolved configuration and a few facts about the
machine. The peak of each phase of a step is a sum of parts; the largest phase is the answer, and `parts` are that
phase's. docs/planner.md says what is counted and what is not.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.models.quantized import BYTES_PER_WEIGHT
from dstrain.planner.platform_costs import Platform
from dstrain.planner.shape import ModelShape, Part
from dstrain.planner.states import Case, States, states_of
from dstrain.planner.tracing import MOST_ON_HEAP, Activations, Setting, Trace

GIB = 2.0**30
PARTS = ("parameters", "gathered", "gradients", "optimizer", "activations", "loss", "communication", "checkpoint",
         "allocator", "runtime")  # fmt: skip

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Flags:
    """What train.py's flags and other facts of a run add to its configuration.

    saves_on_the_way: a background checkpoint keeps a copy of masters and moments in host memory. loss: "fused", or
    "model" for a trainer that takes the model's own loss. adapter: settings of adapters, as JSON.
    """

    block_size: int
    gradient_checkpointing: bool = False
    tiled_mlp: bool = False
    attn_implementation: str | None = None
    saves_on_the_way: bool = False
    loss: str = "fused"
    adapter: str | None = None


@dataclass(frozen=True)
class Needs:
    """GiB. device: of the fullest device, by part, with "total". host: of the fullest host, likewise. phase: of a step,
    in which the device is fullest. stage: the pipeline stage that is."""

    device: dict[str, float]
    host: dict[str, float]
    pinned_gib: float
    nvme_gib: float
    checkpoint_gib: float
    phase: str
    stage: int

    def to_json(self) -> dict[str, Any]:
        """The start of run.json's `prediction`."""
        values = asdict(self)
        return {
            "device_gib": values.pop("device"),
            "host_gib": values.pop("host"),
            "pinned_gib": self.pinned_gib,
            "nvme_gib": self.nvme_gib,
            "checkpoint_gib": self.checkpoint_gib,
        }


Tracer = Callable[[Setting], Activations]


def setting_of(resolved: ResolvedConfig, flags: Flags, on_cpu: bool) -> Setting:
    """The micro-batch as one rank computes it."""
    dtype = DTYPES[resolved.precision]
    compute = getattr(torch, resolved.autocast_dtype) if resolved.autocast_dtype else dtype
    return Setting(
        micro_batch=resolved.micro_batch,
        seq_len=-(-flags.block_size // resolved.parallel.sp_size),
        dtype=dtype,
        compute=compute,
        gradient_checkpointing=flags.gradient_checkpointing,
        tiled_mlp=flags.tiled_mlp,
        tp_size=resolved.parallel.tp_size,
        loss=flags.loss,
        attn_implementation=flags.attn_implementation,
        on_cpu=on_cpu,
        adapter=flags.adapter,
    )


def predict_memory(
    shape: ModelShape,
    trace: Tracer,
    resolved: ResolvedConfig,
    flags: Flags,
    platform: Platform,
    ranks_per_host: int,
) -> Needs:
    """The needs of the fullest rank and host. trace: `trace_activations` of this model, or a cache of it.

    Raises NotAChainError for a model that the pipeline cannot cut, and what the model's own code raises.
    """
    dims = resolved.parallel
    setting = setting_of(resolved, flags, platform.on_cpu)
    activations = with_exchanges(trace(setting), setting, dims.sp_size, shape)
    parts = shape.parts(resolved.placement, dims.tp_size)
    found = []
    for stage, part in enumerate(parts):
        case = Case(resolved, part, ranks=dims.dp_size * dims.sp_size, on_cpu=platform.on_cpu)
        states = _with_whole_weights(states_of(case), case, setting)
        # 1F1B; DualPipeV keeps one more than there are ranks, everywhere (arXiv 2412.19437, table 2).
        in_flight = dims.pp_size + 1 if resolved.dualpipev else dims.pp_size - stage
        in_flight = min(in_flight, resolved.gradient_accumulation_steps)
        own = _of_stage(activations, part)
        phases = _phases(states, own, in_flight, saved_copy(case, flags))
        on_heap = (in_flight - 1) * own.saved + own.small_peak
        if platform.keeps_freed:
            phases = _on_one_heap(phases, on_heap)
        name, bytes_by_part = max(phases.items(), key=lambda item: sum(item[1].values()))
        needed = platform.overhead(bytes_by_part, on_heap)
        found.append((sum(needed.values()), stage, name, needed, states, case))
    _, stage, phase, needed, states, case = max(found, key=lambda item: item[0])
    device = _with_total(needed)
    host = _host(device, states, case, platform, ranks_per_host, flags)
    return Needs(
        device=device,
        host=host,
        pinned_gib=states.pinned * ranks_per_host / GIB,
        nvme_gib=states.nvme * ranks_per_host / GIB,
        checkpoint_gib=shape.num_trained * (4.0 + case.moments) / GIB,
        phase=phase,
        stage=stage,
    )


def with_exchanges(activations: Activations, setting: Setting, sp_size: int, shape: ModelShape) -> Activations:
    """Ulysses' exchanges keep three tensors of hidden states more of each layer: 26 MiB in the 6 layers of the suite
    `prediction`'s `sp2_zero3`, by a profile of what PyTorch has allocated."""
    if sp_size == 1:
        return activations
    hidden = shape.config.get_text_config().hidden_size
    size = 3.0 * setting.micro_batch * setting.seq_len * hidden * setting.compute.itemsize
    return replace(activations, layer=activations.layer + Trace(size, 0.0, size, size, size))


def _with_whole_weights(states: States, case: Case, setting: Setting) -> States:
    """A layer in 4 bits makes its weights whole in both passes, with scales in fp32 for each 64 of them, and frees
    them. What ZeRO-3 has gathered for one, packed, bitsandbytes keeps from the forward to the backward pass, or with
    gradient checkpointing within a layer."""
    largest = max(case.part.quantized, default=0)
    extra = (setting.compute.itemsize + 4 / 64) * largest
    if case.resolved.zero_stage == 3:
        kept = sum(case.part.quantized)
        if setting.gradient_checkpointing:
            kept //= case.part.num_layers
        extra += BYTES_PER_WEIGHT * kept
    for name in ("forward", "backward") if extra else ():
        states.phases[name]["gathered"] = states.phases[name].get("gathered", 0.0) + extra
    return states


def _of_stage(activations: Activations, part: Part) -> Trace:
    """What a stage keeps: its layers, and the embedding's and the head's where it has them."""
    whole = activations.layer * part.num_layers
    outside = activations.outside
    if part.last:
        return whole + outside
    # Without a head: nothing of the loss, and in either peak only what a layer needs.
    transient = max(0.0, outside.backward_peak - outside.saved - outside.loss)
    peak = outside.saved + min(transient, activations.layer.saved)
    return whole + Trace(outside.saved, 0.0, outside.saved, peak, small_peak=min(peak, outside.small_peak))


def _phases(states: States, stage: Trace, in_flight: int, copy: float) -> dict[str, dict[str, float]]:
    """phase -> part -> bytes. Other micro-batches in flight keep what they saved."""
    others = (in_flight - 1) * stage.saved
    live = {
        "forward": {"activations": others + stage.forward_peak - stage.loss, "loss": stage.loss},
        "backward": {"activations": others + stage.backward_peak - stage.loss, "loss": stage.loss},
    }
    phases: dict[str, dict[str, float]] = {}
    for name, extra in states.phases.items():
        phase = dict.fromkeys(PARTS, 0.0)
        for source in (states.base, extra, live.get(name, {}), {"checkpoint": copy}):
            for part, size in source.items():
                phase[part] += size
        phases[name] = phase
    return phases


def _on_one_heap(phases: dict[str, dict[str, float]], on_heap: float) -> dict[str, dict[str, float]]:
    """What the passes free of small blocks stays with the heap, in holes too small for the flat buffers of the phases
    behind them: these come on top, and one after the other, unless they are so large that malloc maps them for
    themselves. Single gradients fit into the holes. on_heap: the most that the passes have in small blocks."""
    passes = {name: phases[name] for name in ("forward", "backward")}
    later = {name: dict(phase) for name, phase in phases.items() if name not in passes}
    gathered = max(phase["gathered"] for phase in passes.values())
    lasting = min(phase["communication"] for phase in phases.values())
    buffers = [phase["communication"] - lasting for phase in later.values()]
    for phase in later.values():
        phase["activations"] += on_heap
        phase["gathered"] = max(phase["gathered"], gathered)
        if max(buffers) < 2 * MOST_ON_HEAP:  # a phase has a buffer and a copy of it
            phase["communication"] = lasting + sum(buffers)
    return passes | later


def saved_copy(case: Case, flags: Flags) -> float:
    """Bytes of masters and moments that a rank copies for a checkpoint in the background (checkpoint/state.py)."""
    if not flags.saves_on_the_way or not case.on_cpu:
        return 0.0
    return (4.0 + case.moments) * case.share


def _with_total(bytes_by_part: dict[str, float]) -> dict[str, float]:
    parts = {name: size / GIB for name, size in bytes_by_part.items()}
    return {**parts, "total": sum(parts.values())}


def _host(
    device: dict[str, float], states: States, case: Case, platform: Platform, ranks: int, flags: Flags
) -> dict[str, float]:
    """Of one host. On a CPU, its ranks' devices are in it."""
    host = {"imports": ranks * platform.imports_gib}
    if platform.on_cpu:
        host["devices"] = ranks * device["total"]
        host["shared"] = ranks * platform.shared_gib
    else:
        host |= {name: ranks * size / GIB for name, size in states.host.items()}
        copy = (4.0 + case.moments) * case.share if flags.saves_on_the_way else 0.0
        host["checkpoint"] = ranks * copy / GIB
    return {**host, "total": sum(host.values())}
