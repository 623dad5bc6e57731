"""Which configuration to choose: every stage, offload, degree, micro-batch and checkpointing that the rules allow, its
memory and its time, ranked."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dstrain.arguments import ModelArguments
from dstrain.config import ResolvedConfig, RunFacts, resolve_config
from dstrain.errors import UserError
from dstrain.models.pipeline_graph import NotAChainError
from dstrain.models.sequence import check_sequence_parallel
from dstrain.models.tensor import partition_config
from dstrain.planner.hardware import Device
from dstrain.planner.memory import DTYPES, Flags, Needs, predict_memory, setting_of
from dstrain.planner.pace import MOST_LAYER_ELEMENTS, sample_of, seconds_of_sample
from dstrain.planner.platform_costs import Platform, platform_for
from dstrain.planner.shape import ModelShape
from dstrain.planner.step_time import promised, seconds_of, work_of
from dstrain.planner.tracing import Activations, Setting, trace_activations, trace_once

# Of a device's memory: the rest is for what a prediction cannot know.
USABLE = 0.95
MOST_MICRO_BATCH = 64
LONG_SEQUENCE = 8192


@dataclass(frozen=True)
class Cluster:
    """Where the run would be."""

    hosts: int
    devices_per_host: int
    device: Device

    @property
    def world_size(self) -> int:
        return self.hosts * self.devices_per_host


@dataclass(frozen=True)
class Choice:
    """One way of running. offload: what is on the CPU: "", "optimizer" or "optimizer+parameters"."""

    stage: int
    offload: str
    tp_size: int
    pp_size: int
    sp_size: int
    gradient_checkpointing: bool
    micro_batch: int = 1

    def __str__(self) -> str:
        degrees = (("TP", self.tp_size), ("PP", self.pp_size), ("SP", self.sp_size))
        words = [f"ZeRO-{self.stage}", *(f"{name}{size}" for name, size in degrees if size > 1)]
        words += [f"{self.offload} on CPU"] if self.offload else []
        words += ["checkpointing"] if self.gradient_checkpointing else []
        return " ".join([*words, f"micro-batch {self.micro_batch}"])

    def deepspeed(self, global_batch: int, precision: str) -> dict[str, Any]:
        """The DeepSpeed JSON, in the style of ds_configs/."""
        zero: dict[str, Any] = {"stage": self.stage}
        for block in ("optimizer", "parameters"):
            if block in self.offload:
                zero["offload_" + {"optimizer": "optimizer", "parameters": "param"}[block]] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_batch_size": global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": "auto",
                    "warmup_num_steps": "auto",  # a run of any length takes it
                    "warmup_type": "linear",
                    "cos_min_ratio": 0.1,
                },
            },
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        config["zero_optimization"] = zero
        if self.tp_size > 1:
            config["tensor_parallel"] = {"autotp_size": self.tp_size}
        if self.pp_size > 1:
            config["pipeline"] = {"stages": self.pp_size}
        if self.sp_size > 1:
            config["sequence_parallel_size"] = self.sp_size
        return config


@dataclass(frozen=True)
class Option:
    """A choice with what it needs. reason: why it cannot be used, or None."""

    choice: Choice
    needs: Needs | None = None
    step_time_s: float | None = None
    tokens_per_second: float | None = None
    reason: str | None = None
    resolved: ResolvedConfig | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.needs.to_json() if self.needs else {}
        return {
            "choice": str(self.choice),
            **vars(self.choice),
            **found,
            "step_time_s": self.step_time_s,
            "tokens_per_second": self.tokens_per_second,
            "reason": self.reason,
        }


def _rank(option: Option) -> tuple:
    """What fits, fastest first; of what is equally fast within a hundredth, what needs least."""
    rate = round(100 * math.log(option.tokens_per_second)) if option.tokens_per_second else 0
    return option.reason is not None, -rate, option.needs.device["total"] if option.needs else 0.0, str(option.choice)


class Planner:
    """One model on one cluster. Traces are kept: two of each kind give every micro-batch and sequence part."""

    def __init__(self, config: Any, margs: ModelArguments, cluster: Cluster, flags: Flags, precision: str = "bf16"):
        self.config, self.margs, self.cluster, self.flags, self.precision = config, margs, cluster, flags, precision
        self.shape = ModelShape(config, margs)
        self.platform: Platform = platform_for(cluster.device.kind)
        self._traces: dict[Setting, Activations] = {}
        if cluster.device.kind == "cpu":
            self.cluster = replace(cluster, device=self._at_its_pace(cluster.device))

    def _at_its_pace(self, device: Device) -> Device:
        """This machine with the pace of one of the model's own layers, where that is small enough to try."""
        if self.shape.parts()[0].layer > MOST_LAYER_ELEMENTS:
            return device
        dtype = DTYPES[self.precision]
        setting = Setting(1, self.flags.block_size, dtype, dtype, attn_implementation=self.flags.attn_implementation)
        sample = sample_of(self.config, setting)
        trace = trace_once(*sample)
        rates = promised(device, self.precision, trace.flops, trace.traffic, trace.operators)
        return replace(device, pace=seconds_of_sample(*sample) / rates)

    def trace(self, setting: Setting) -> Activations:
        """By the number of tokens from two traces: all that a micro-batch keeps grows with it by a straight line.
        Attention's work grows with the block and is divided with its heads, so a part of a sequence counts alike."""
        one, two = (self._trace(replace(setting, micro_batch=n, seq_len=self.flags.block_size)) for n in (1, 2))
        tokens = setting.micro_batch * setting.seq_len / self.flags.block_size
        by_token = Activations(two.outside + one.outside * -1.0, two.layer + one.layer * -1.0)
        return Activations(one.outside + by_token.outside * (tokens - 1), one.layer + by_token.layer * (tokens - 1))

    def _trace(self, setting: Setting) -> Activations:
        if setting not in self._traces:
            self._traces[setting] = trace_activations(self.config, setting)
        return self._traces[setting]

    def resolve(self, deepspeed: dict[str, Any], flags: Flags, source: str = "the plan") -> ResolvedConfig:
        """The configuration in this cluster. Raises UserError."""
        facts = RunFacts(
            source=source,
            gradient_checkpointing=flags.gradient_checkpointing,
            adapters=flags.adapter is not None,
            load_in_4bit=self.margs.load_in_4bit,
        )
        resolved = resolve_config(deepspeed, world_size=self.cluster.world_size, facts=facts)
        check_sequence_parallel(self.config, resolved.parallel)
        return resolved.with_facts(
            device=self.cluster.device.kind,
            device_supports_fp16=True,
            device_supports_bf16=True,
            hidden_size=self.config.get_text_config().hidden_size,
            partition_config=partition_config(self.config, resolved),
            total_steps=1000,
        )

    def predict(self, resolved: ResolvedConfig, flags: Flags) -> tuple[Needs, float, float]:
        """(needs, seconds of a step, tokens per second)"""
        needs = predict_memory(self.shape, self.trace, resolved, flags, self.platform, self.cluster.devices_per_host)
        activations = self.trace(setting_of(resolved, flags, self.platform.on_cpu))
        work = work_of(self.shape, activations, resolved, flags.block_size)
        seconds = seconds_of(work, self.cluster.device, self.cluster.hosts, self.cluster.devices_per_host)
        return needs, seconds, resolved.global_batch * flags.block_size / seconds

    def option(self, choice: Choice, global_batch: int) -> Option:
        """What a choice needs, or why it cannot be."""
        flags = replace(self.flags, gradient_checkpointing=choice.gradient_checkpointing)
        try:
            resolved = self.resolve(choice.deepspeed(global_batch, self.precision), flags)
            needs, seconds, rate = self.predict(resolved, flags)
        except (UserError, NotAChainError) as error:
            return Option(choice, reason=str(error).splitlines()[0].removeprefix("the plan: "))
        return Option(choice, needs, seconds, rate, self.what_does_not_fit(needs), resolved)

    def what_does_not_fit(self, needs: Needs) -> str | None:
        device = self.cluster.device
        on_host = self.cluster.devices_per_host * device.host_gib_per_device
        on_host = device.memory_gib if device.kind == "cpu" else on_host
        if device.kind != "cpu" and needs.device["total"] > USABLE * device.memory_gib:
            return f"needs {needs.device['total']:.1f} GiB a device, and {device.name} has {device.memory_gib:.1f}"
        if needs.host["total"] > on_host:
            return f"needs {needs.host['total']:.1f} GiB on a host, and there are {on_host:.1f}"
        return None

    def options(self, global_batch: int) -> list[Option]:
        """For each way of running the largest micro-batch that fits, or the smallest where none does. Best first."""
        found = []
        for choice in self.choices():
            replicas = self.cluster.world_size // (choice.tp_size * choice.pp_size * choice.sp_size)
            found.append(self._largest(choice, global_batch, replicas))
        return sorted(found, key=_rank)

    def _largest(self, choice: Choice, global_batch: int, replicas: int) -> Option:
        if global_batch % replicas:
            return Option(choice, reason=f"{global_batch} samples a step cannot be split over {replicas} replicas")
        own = global_batch // replicas
        # A pipeline wants several micro-batches in flight.
        sizes = [n for n in range(1, min(own, MOST_MICRO_BATCH) + 1) if own % n == 0 and n & (n - 1) == 0]
        if choice.pp_size > 1:
            sizes = [n for n in sizes if own // n >= choice.pp_size] or sizes[:1]
        best = self.option(replace(choice, micro_batch=sizes[0]), global_batch)
        for size in sizes[1:]:
            larger = self.option(replace(choice, micro_batch=size), global_batch)
            if larger.reason or (larger.tokens_per_second or 0) <= (best.tokens_per_second or 0):
                break
            best = larger
        return best

    def choices(self) -> Iterator[Choice]:
        """All that makes sense: tensor and sequence parallelism within a host, a pipeline at stage 1."""
        heads = self.config.get_text_config().num_attention_heads
        stages = [(0, "")] if self.precision == "fp32" else []
        stages += [(1, ""), (2, ""), (3, ""), (2, "optimizer"), (3, "optimizer"), (3, "optimizer+parameters")]
        for (stage, offload), checkpointing in itertools.product(stages, (False, True)):
            plain = Choice(stage, offload, 1, 1, 1, checkpointing)
            yield plain
            for size in self._degrees(self.cluster.devices_per_host):
                if heads % size == 0 and not offload and stage < 3:
                    yield replace(plain, tp_size=size)
                if heads % size == 0 and self.flags.block_size >= LONG_SEQUENCE and stage in (1, 3):
                    yield replace(plain, sp_size=size)
            for size in self._degrees(self.cluster.world_size):
                if stage == 1 and not offload and size <= self.shape.num_layers:
                    yield replace(plain, pp_size=size)

    def _degrees(self, most: int) -> list[int]:
        return [n for n in (2, 4, 8) if n <= most and self.cluster.world_size % n == 0]
