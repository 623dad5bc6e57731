"""One DeepSpeed JSON + the world it runs in -> what `deepspeed.initialize` gets, with the origin of every value."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dstrain.config import batch as batching
from dstrain.config.auto import fill_auto
from dstrain.config.case import Case, UnknownValueError
from dstrain.config.facts import NO_FACTS, RunFacts
from dstrain.config.load import apply_overrides, get_value, leaves, parse_override, remove_value, set_value, without
from dstrain.config.reading import autocast_dtype, class_of, offload_device, precision
from dstrain.config.rules import EARLY, RULES, check_rules
from dstrain.config.schema import check_schema, meant, whole_numbers
from dstrain.config.schema_keys import DUALPIPEV
from dstrain.errors import UserError
from dstrain.parallel import ParallelDims, PipePlacement

# No line of DeepSpeed's own progress report: dstrain writes the metrics. Its pipeline engine takes a remainder with
# this number, so that null is a TypeError there once a monitor is on (deepspeed 0.19.8, runtime/pipe/engine.py:684).
STEPS_PER_PRINT_NEVER = 2**31 - 1


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration that is complete and without contradiction.

    deepspeed: the dict for `deepspeed.initialize`; every value that dstrain relies on is explicit in it. Its
    `train_batch_size` counts as DeepSpeed does, where tensor-parallel ranks are data ranks: use `global_batch`.
    origins: dotted key -> "user", "--set", "default" (DeepSpeed's), or "derived: why".
    notices: one sentence for each value of the user's that was replaced; to be told at the start of a run.
    """

    deepspeed: dict[str, Any]
    origins: dict[str, str]
    parallel: ParallelDims
    batch: batching.Batch
    facts: RunFacts
    request: "_Request" = field(repr=False)
    notices: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over the whole world."""
        return self.batch.global_batch

    @property
    def micro_batch(self) -> int:
        """Samples of one data-parallel rank in one forward pass."""
        return self.batch.micro_batch

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.batch.gradient_accumulation_steps

    @property
    def zero_stage(self) -> int:
        return self.deepspeed["zero_optimization"]["stage"]

    @property
    def precision(self) -> str:
        """Type of the parameters in the forward pass: "fp32", "bf16" or "fp16"."""
        return precision(self.deepspeed)

    @property
    def autocast_dtype(self) -> str | None:
        """ "bfloat16" or "float16" where torch.autocast is on."""
        return autocast_dtype(self.deepspeed)

    @property
    def optimizer_type(self) -> str:
        return self.deepspeed["optimizer"]["type"]

    @property
    def scheduler_type(self) -> str | None:
        return get_value(self.deepspeed, "scheduler.type")

    @property
    def dualpipev(self) -> bool:
        """Whether the pipeline runs DualPipeV, with two stages a rank, instead of 1F1B with one."""
        return self.parallel.pp_size > 1 and get_value(self.deepspeed, "pipeline.partition") == DUALPIPEV

    @property
    def placement(self) -> PipePlacement:
        return PipePlacement(self.parallel.pp_size, self.dualpipev)

    @property
    def gradient_clipping(self) -> float:
        """Largest norm of the gradient; 0.0 is no clipping."""
        return float(self.deepspeed["gradient_clipping"])

    @property
    def offload_optimizer(self) -> str | None:
        """ "cpu", "nvme" or None."""
        return offload_device(self.deepspeed, "offload_optimizer")

    @property
    def offload_param(self) -> str | None:
        """ "cpu", "nvme" or None."""
        return offload_device(self.deepspeed, "offload_param")

    def with_facts(self, **facts: Any) -> "ResolvedConfig":
        """The same request resolved again with more known about the run. Raises UserError."""
        return self.request.resolve(dataclasses.replace(self.facts, **facts))

    def with_total_steps(self, total_steps: int) -> "ResolvedConfig":
        """Schedule lengths that the user left open, filled in from the run's length in optimizer steps."""
        return self.with_facts(total_steps=total_steps)

    def compare_effective(self, effective: dict[str, Any]) -> list[str]:
        """One line per difference between what was asked and what the engine has (see `read_effective`)."""
        from dstrain.config.effective import compare

        return compare(self.deepspeed, effective)


@dataclass(frozen=True)
class _Request:
    """What `resolve_config` was asked, to be asked again when more is known."""

    config: dict[str, Any]
    world_size: int
    overrides: tuple[str, ...]
    stored_global_batch: int | None

    def resolve(self, facts: RunFacts) -> ResolvedConfig:
        return resolve_config(
            self.config,
            world_size=self.world_size,
            overrides=self.overrides,
            facts=facts,
            stored_global_batch=self.stored_global_batch,
        )


def resolve_config(
    config: dict[str, Any],
    *,
    world_size: int,
    overrides: Sequence[str] = (),
    facts: RunFacts = NO_FACTS,
    stored_global_batch: int | None = None,
) -> ResolvedConfig:
    """Check and complete a DeepSpeed configuration for `world_size` processes.

    stored_global_batch: samples per step of the run that is resumed; the batch is cut anew around it.
    Raises UserError with every problem: unknown keys, wrong values, contradictions, batches that do not divide.
    """
    request = _Request(config, world_size, tuple(overrides), stored_global_batch)
    resolved = apply_overrides(config, overrides)
    changed = [parse_override(override)[0] for override in overrides]
    origins = {
        key: "--set" if any(f"{key}.".startswith(f"{start}.") for start in changed) else "user"
        for key, _ in leaves(resolved)
    }

    wrong = check_schema(resolved)
    resolved = without(resolved, {key for key, _ in wrong})
    unfilled, fillings = fill_auto(resolved, facts)
    resolved = without(resolved, {key for key, _ in unfilled})
    problems = [message for _, message in (*wrong, *unfilled)]
    unknown = frozenset().union(*(meant(key) for key, _ in (*wrong, *unfilled)))

    completion = _Completion(whole_numbers(resolved), origins, problems)
    completion.note(([], fillings))
    resolved = completion.config
    dims, batch = _world(resolved, world_size, unknown, problems, stored_global_batch, facts.max_micro_batch)
    if dims and batch:
        completion.fill_batch(batch, dims)
    case = Case(resolved, dims, facts, unknown)
    completion.note(check_rules(case, EARLY))
    completion.fill_defaults()
    completion.note(check_rules(case, RULES))
    if problems:
        raise UserError(_one_line(f"{facts.source}: {problem}") for problem in problems)
    assert dims is not None and batch is not None, "no problem, and yet no batch"
    return ResolvedConfig(resolved, origins, dims, batch, facts, request, tuple(completion.notices))


def _one_line(text: str) -> str:
    """Keys and values are the user's: a line break in one must not break a message."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


_DEGREES = ("tensor_parallel.autotp_size", "pipeline.stages", "sequence_parallel_size")
_BATCH = (batching.GLOBAL, batching.MICRO, batching.ACCUMULATION)


def _world(
    config: dict[str, Any],
    world_size: int,
    unknown: frozenset[str],
    problems: list[str],
    stored_global_batch: int | None,
    max_micro_batch: int | None,
) -> tuple[ParallelDims | None, batching.Batch | None]:
    """The rank grid and the batch, or None for what wrong values leave unknown; adds to `problems`."""
    known = Case(config, None, NO_FACTS, unknown)
    try:
        tp_size, pp_size, sp_size = (known.get(key) or 1 for key in _DEGREES)
        dims = ParallelDims(world_size, tp_size=tp_size, pp_size=pp_size, sp_size=sp_size)
    except (UserError, UnknownValueError) as error:
        problems += getattr(error, "problems", [])
        return None, None
    try:
        given = [known.get(key) for key in _BATCH]
        options = {"stored_global_batch": stored_global_batch, "max_micro_batch": max_micro_batch}
        return dims, batching.solve_batch(*given, dp_size=dims.dp_size, **options)
    except (UserError, UnknownValueError) as error:
        problems += getattr(error, "problems", [])
        return dims, None


@dataclass
class _Completion:
    """The configuration while it is being completed; `config` and `origins` change in place."""

    config: dict[str, Any]
    origins: dict[str, str]
    problems: list[str]
    notices: list[str] = field(default_factory=list)
    # Absent, and yet a value that a repair changes.
    _default: ClassVar[dict[str, Any]] = {"zero_optimization.stage": 0}

    def set(self, key: str, value: Any, origin: str) -> None:
        set_value(self.config, key, value)
        self.origins[key] = origin

    def note(self, outcome: tuple[list[str], dict[str, tuple[Any, str]]]) -> None:
        """Take over (problems, {key: (value, reason)}); the value None drops the key."""
        problems, repairs = outcome
        self.problems += problems
        for key, (value, reason) in repairs.items():
            if value is None:
                remove_value(self.config, key)
                self.origins.pop(key, None)
            else:
                before = get_value(self.config, key, self._default.get(key))
                if before not in (None, "auto", value):
                    self.notices.append(f"{key} {before} was replaced by {value}: {reason.removeprefix('derived: ')}")
                self.set(key, value, reason)

    def fill_batch(self, batch: batching.Batch, dims: ParallelDims) -> None:
        """All three numbers, as DeepSpeed counts them: it has no mpu yet that would take AutoTP's ranks away."""
        counted = batch.global_batch * dims.tp_size
        values = dict(zip(_BATCH, (counted, batch.micro_batch, batch.gradient_accumulation_steps), strict=True))
        for key, value in values.items():
            origin = batch.origins.get(key, self.origins.get(key, "user"))
            if key == batching.GLOBAL and dims.tp_size > 1:
                origin = f"derived: {batch.global_batch} x {dims.tp_size}, since AutoTP counts its ranks as data ranks"
            self.set(key, value, origin)

    def fill_defaults(self) -> None:
        """Make explicit what dstrain relies on."""
        defaults: list[tuple[str, Any, str]] = [
            ("zero_optimization.stage", 0, "default"),
            ("gradient_clipping", 1.0, "default"),
            ("steps_per_print", STEPS_PER_PRINT_NEVER, "derived: dstrain writes the metrics itself"),
        ]
        low_precision_master = [
            get_value(self.config, key)
            for key in ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads")
        ]
        if (get_value(self.config, "zero_optimization.stage") or 0) > 0 and not any(low_precision_master):
            defaults.append(
                ("data_types.grad_accum_dtype", "fp32", "derived: gradients accumulate in fp32 where DeepSpeed can")
            )
        cls = class_of(self.config)
        if cls:
            own_rates = get_value(self.config, "optimizer.type").lower() == "muon"
            defaults += [
                (f"optimizer.params.{name}", cls.params[name].default, "default")
                for name in ("lr", "weight_decay")
                if not (own_rates and name == "lr")
            ]
        for key, value, origin in defaults:
            if get_value(self.config, key) is None:
                self.set(key, value, origin)
