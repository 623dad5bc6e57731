"""What train.py does with the planner: predict at the start, refuse what cannot fit, compare at the end."""

import json
import os
import socket
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from dstrain import distributed
from dstrain.arguments import Arguments, ModelArguments
from dstrain.config import ResolvedConfig
from dstrain.errors import UserError
from dstrain.models.build import model_class_of
from dstrain.monitor.limits import Limit, device_limit, host_limit, resident_gib
from dstrain.parallel import Launch
from dstrain.planner import forecast

WARMUP_STEPS = 2
Lines = Sequence[dict[str, Any]]


@dataclass
class Foresight:
    """Of one run. `prediction` is run.json's; None where there was no time for one, or the model cannot be traced."""

    forecast: forecast.Forecast
    config: Any
    resolved: ResolvedConfig
    flags: Any  # Flags
    prediction: dict[str, Any] | None = None
    work: dict[str, Any] = field(default_factory=dict)
    imports_gib: float = 0.0
    problems: list[str] = field(default_factory=list)  # that --ignore_memory_limit overruled

    def check(self, device: Any, *, ignore_limit: bool) -> None:
        """Before the model is built: does it fit? A collective. Raises UserError on every rank where it does not."""
        found = self.forecast.result()
        self.imports_gib, *_ = distributed.max_over_ranks([resident_gib()])
        host, own = host_limit(), device_limit(device)
        rows = distributed.gather_objects((socket.gethostname(), host, own, found))
        found = rows[0][-1]
        if found is None:
            return
        self.work = found.pop("work")
        ranks: dict[str, int] = {}
        for name, *_ in rows:
            ranks[name] = ranks.get(name, 0) + 1
        problems = []
        for name, host, own, _ in rows:
            problems += problems_of(found, name, ranks[name], host, own)
        least = min((row[1] for row in rows), key=lambda limit: limit.gib)
        device_gib = least.gib if own is None else min(row[2].gib for row in rows)
        self.prediction = {**found, "limit_gib": {"device": device_gib, "host": least.gib}}
        problems = sorted(set(problems))
        if problems and not ignore_limit:
            raise UserError(problems)
        self.problems = problems

    def expect(self, device: Any, flops_per_second: float, tokens: int) -> None:
        """Once the device's rate is known: how long a step of so many tokens takes. On every rank at once, as a step
        runs, so that what they share is shared."""
        if self.prediction is None:
            return
        from dstrain.planner.hardware import device_here
        from dstrain.planner.step_time import Work, promised, seconds_of

        sample = self.work.pop("sample")
        work = Work.from_json(self.work)
        here = device_here(device, work.precision, flops_per_second)
        if here is not None and sample is not None and (seconds := self._seconds_of_sample()):
            here = replace(here, pace=seconds / promised(here, work.precision, **sample))
        if here is not None:
            seconds = seconds_of(work, here)
            self.prediction |= {"step_time_s": seconds, "tokens_per_second": tokens / seconds}

    def _seconds_of_sample(self) -> float | None:
        from dstrain.planner.memory import setting_of
        from dstrain.planner.pace import sample_of, seconds_of_sample

        try:
            return seconds_of_sample(*sample_of(self.config, setting_of(self.resolved, self.flags, on_cpu=True)))
        # Whatever a model's own code raises on a sample of made-up weights is no reason not to train it.
        except Exception:  # noqa: BLE001
            return None

    def describe(self) -> str | None:
        """One line for the start of a run."""
        if self.prediction is None:
            return None
        device, host = self.prediction["device_gib"], self.prediction["host_gib"]
        seconds = self.prediction["step_time_s"]
        text = f"expected: {device['total']:.2f} GiB a device ({describe_parts(device)}), "
        text += f"{host['total']:.2f} GiB a host, {self.prediction['checkpoint_gib']:.2f} GiB a checkpoint"
        return text + (f", {seconds:.2f} s a step" if seconds else "")

    def compare(
        self, device: Any, train_lines: Lines, checkpoint_bytes: int | None, swapped_bytes: int
    ) -> dict[str, Any]:
        """run.json's `measured`, at the end of a run. swapped_bytes: of this rank, on NVMe. A collective."""
        from dstrain.monitor.devices import GIB, peak_memory_gib

        device_gib, host_gib = distributed.max_over_ranks(list(peak_memory_gib(device)))
        on_nvme: Counter[str] = Counter()
        for host, size in distributed.gather_objects((socket.gethostname(), swapped_bytes)):
            on_nvme[host] += size
        times = [line["step_time_s"] for line in train_lines]
        times = times[WARMUP_STEPS:] or times
        return {
            "peak_device_memory_gib": device_gib,
            "host_memory_gib": host_gib,
            "imports_gib": self.imports_gib,
            "peak_above_imports_gib": host_gib - self.imports_gib,
            "step_time_s": statistics.median(times) if times else None,
            "checkpoint_gib": None if checkpoint_bytes is None else checkpoint_bytes / GIB,
            "nvme_gib": max(on_nvme.values()) / GIB,
        }

    def describe_comparison(self, measured: dict[str, Any], on_cpu: bool) -> str | None:
        """One line for the end of a run."""
        if self.prediction is None:
            return None
        used = measured["peak_above_imports_gib" if on_cpu else "peak_device_memory_gib"]
        parts = self.prediction["device_gib"]
        # An accelerator's own figure is what its tensors take.
        said = parts["total"] - (0.0 if on_cpu else parts["allocator"] + parts["runtime"])
        text = f"predicted and measured: {said:.2f} and {used:.2f} GiB a device ({said / used - 1:+.0%})"
        seconds, took = self.prediction["step_time_s"], measured["step_time_s"]
        if seconds and took:
            text += f", {seconds:.2f} and {took:.2f} s a step ({seconds / took - 1:+.0%})"
        return text


def describe_parts(parts: dict[str, float]) -> str:
    """The largest parts that together are most of the total, largest first."""
    ordered = sorted(((size, name) for name, size in parts.items() if name != "total"), reverse=True)
    return ", ".join(f"{name} {size:.2f}" for size, name in ordered[:4] if size > 0)


def problems_of(found: dict[str, Any], name: str, ranks: int, host: Limit, own: Limit | None) -> list[str]:
    """What does not fit on one host. host: what its ranks may still take, their imports being there already."""
    device = found["device_gib"]
    advice = "lower train_micro_batch_size_per_gpu or --block_size, add --gradient_checkpointing, raise "
    advice += "zero_optimization.stage, use more devices, or say --ignore_memory_limit to try it"
    problems = []
    if own is not None and device["total"] > own.gib:
        problems.append(
            f"the run needs {device['total']:.1f} GiB on a device ({describe_parts(device)}), and the {own.source} is "
            f"{own.gib:.1f} GiB: {advice}"
        )
    needed = found["host_gib"]["total"] - found["host_gib"]["imports"]
    if needed > host.gib:
        each = f"{ranks} times {device['total']:.1f} for its ranks: {describe_parts(device)}"
        problems.append(
            f"the run needs {needed:.1f} GiB on {name} ({each if own is None else describe_parts(found['host_gib'])}), "
            f"and {host.source} leaves {host.gib:.1f} GiB: {advice}"
        )
    return problems


def foresee(args: Arguments, config: Any, resolved: ResolvedConfig, block_size: int) -> Foresight:
    """Begin to predict, on rank 0, in a process of its own. Before anything touches an accelerator."""
    adapter = args.model.adapter
    if adapter:
        import_module("peft")
    # What building the model and its engine imports is the libraries', not the model's: it is counted as such.
    model_class_of(config)
    if resolved.zero_stage:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # and with it torch._dynamo: 45 MiB more
    flags = _flags(args, block_size, json.dumps(adapter) if adapter else None)
    launch, quiet = Launch.from_environment(), forecast.Forecast()
    if not launch.is_main:
        return Foresight(quiet, config, resolved, flags)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or launch.world_size)
    billions = rough_billions(config.get_text_config())
    begun = forecast.start(lambda: predict_run(args.model, config, resolved, flags, ranks), billions)
    return Foresight(begun, config, resolved, flags)


def _flags(args: Arguments, block_size: int, adapter: str | None) -> Any:
    from dstrain.planner.memory import Flags

    return Flags(
        block_size=block_size,
        gradient_checkpointing=args.model.gradient_checkpointing,
        tiled_mlp=args.model.tiled_mlp,
        attn_implementation=args.model.attn_implementation,
        # Without --max_steps the length is not known yet: it is taken to be long.
        saves_on_the_way=args.run.save_steps > 0 and not 0 < args.run.max_steps <= args.run.save_steps,
        adapter=adapter,
    )


def rough_billions(config: Any) -> float:
    """Parameters of a dense decoder of this width and depth, in billions: how patient to be."""
    layers = getattr(config, "num_hidden_layers", None) or 1  # a few model types name it otherwise
    return (12 * layers * config.hidden_size + 2 * config.vocab_size) * config.hidden_size / 1e9


def predict_run(
    margs: ModelArguments, config: Any, resolved: ResolvedConfig, flags: Any, ranks_per_host: int
) -> dict[str, Any]:
    """run.json's `prediction` without limits and times, and the `work` of a step and of the sample that shows a CPU's
    pace."""
    from dstrain.planner.memory import predict_memory, setting_of
    from dstrain.planner.pace import MOST_LAYER_ELEMENTS, sample_of
    from dstrain.planner.platform_costs import platform_for
    from dstrain.planner.shape import ModelShape
    from dstrain.planner.step_time import work_of
    from dstrain.planner.tracing import trace_activations, trace_once

    shape = ModelShape(config, margs)
    platform = platform_for(resolved.facts.device)
    setting = setting_of(resolved, flags, platform.on_cpu)
    activations = trace_activations(config, setting)
    needs = predict_memory(shape, lambda _: activations, resolved, flags, platform, ranks_per_host)
    sample = None
    if platform.on_cpu and shape.parts()[0].layer <= MOST_LAYER_ELEMENTS:
        trace = trace_once(*sample_of(config, setting))
        sample = {name: getattr(trace, name) for name in ("flops", "traffic", "operators")}
    work = {**work_of(shape, activations, resolved, flags.block_size).to_json(), "sample": sample}
    return {**needs.to_json(), "step_time_s": None, "tokens_per_second": None, "work": work}
