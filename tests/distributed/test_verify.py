"""The gate passes every kind of parallelism, and finds each silently wrong number when its repair is switched off.

Ranks come from the fork server of forked.py; a patch runs in them before `main`, as if dstrain had not repaired that.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import parse_arguments
from dstrain.errors import ExitCode, UserError
from dstrain.verify import Comparison, Starter, first_difference, report, verify
from tests import forked
from tests.adapters import write_base
from tests.distributed.parity import ADAMW, BF16, LLAMA, MODELS, SGD, SGD_CLIPPED, thinned, zero

Patch = Callable[[], None]
PP2, TP2, SP2 = {"pipeline": {"stages": 2}}, {"tensor_parallel": {"autotp_size": 2}}, {"sequence_parallel_size": 2}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1000}}}


def start_ranks(argv: list[str], world_size: int, folder: Path, patch: Patch | None = None) -> list[int]:
    """Exit codes of forked ranks of train.py."""
    folder.mkdir(exist_ok=True)
    ranks = forked.start(argv, world_size, folder, None if patch is None else partial(_apply, patch))
    forked.finish(ranks, 120)
    return [process.exitcode for process in ranks]


def _apply(patch: Patch, rank: int) -> None:
    patch()


def run_gate(folder: Path, model: dict, config: dict, *flags: str, ranks: int = 2, patch: Patch | None = None):
    """The gate's comparisons, with `patch` in every rank and not in the plain run."""

    def start(argv: list[str], world_size: int) -> int:
        codes = start_ranks(argv, world_size, folder / "ranks", patch)
        if any(codes):
            print((folder / "ranks" / "rank0.err").read_text()[-3000:])
        return max(codes, key=abs)

    starter: Starter = start
    results = verify(parse_arguments(_argv(folder, model, config, *flags)), ranks, starter)
    print(report(results))
    return results


def _argv(folder: Path, model: dict, config: dict, *flags: str) -> list[str]:
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "ds.json").write_text(json.dumps({**config, "train_batch_size": 4}))
    argv = ["--deepspeed_config", str(folder / "ds.json")]
    if "--lora_rank" in flags:  # beside a pretrained model
        argv += ["--model_name_or_path", str(write_base(folder / "base"))]
    else:
        argv += ["--config_name", str(folder / "model.json")]
    return [*argv, *([] if "--block_size" in flags else ["--block_size", "64"]), *flags]


def documents(folder: Path) -> list[str]:
    """Prompts with completions of very different lengths: ranks get different numbers of label tokens."""
    path = folder / "documents.jsonl"
    lines = [{"prompt": f"p {i}", "completion": "word " * (1 + i * i % 13)} for i in range(64)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return ["--train_file", str(path)]


@pytest.mark.parametrize("when", [("--eval_steps", "2"), ("--eval_strategy", "epoch")])
def test_what_evaluations_decide_is_left_out(tmp_path, when):
    """The gate takes its own few steps: nothing ends them early, and no flag is left whose own need was dropped."""
    flags = (*when, "--early_stopping_patience", "1", "--load_best_model_at_end", "--sample_steps", "1")
    started = []

    def start(argv: list[str], world_size: int) -> int:
        started.append(parse_arguments(argv).run)
        return ExitCode.USER_ERROR

    with pytest.raises(UserError, match="the run to verify is refused"):
        verify(parse_arguments(_argv(tmp_path, LLAMA, SGD | zero(1), *flags)), 1, start)
    (run,) = started
    assert (run.eval_steps, run.eval_strategy, run.early_stopping_patience) == (None, "steps", None)
    assert not run.load_best_model_at_end and run.sample_steps is None


EQUAL = {
    "zero2 packed": (LLAMA, ADAMW | zero(2), "--packing", "--label_smoothing_factor", "0.1"),
    "zero3 bf16": (LLAMA, ADAMW | BF16 | WARMUP | zero(3)),
    "pp2": (LLAMA, SGD_CLIPPED | PP2 | zero(1) | {"train_micro_batch_size_per_gpu": 1}),
    "sp2 packed": (MODELS["gemma3"], ADAMW | SP2 | zero(1), "--packing"),
    "lora tp2": (LLAMA, ADAMW | TP2 | zero(1), "--lora_rank", "4"),
}


ROUTER = MODELS["mixtral"] | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
ONE_ROW = {"train_micro_batch_size_per_gpu": 1}  # the load-balancing loss is of a micro-batch
MORE_EQUAL = {
    "tp2": (LLAMA, ADAMW | TP2 | zero(1)),
    "pp2 packed": (LLAMA, SGD | PP2 | zero(1) | ONE_ROW, "--packing"),
    "pp2 dualpipev": (
        LLAMA | {"num_hidden_layers": 4},
        ADAMW | zero(1) | ONE_ROW | {"pipeline": {"stages": 2, "partition": "dualpipev"}},
    ),
    "zero3 router loss": (ROUTER, SGD | zero(3) | ONE_ROW),
    "pp2 router loss": (ROUTER, SGD | PP2 | zero(1) | ONE_ROW),
    "lora zero3 bf16": (LLAMA, ADAMW | BF16 | zero(3), "--lora_rank", "4"),
    "lora 4 bits": (LLAMA, ADAMW | zero(2), "--lora_rank", "4", "--load_in_4bit"),
    "lora pp2": (LLAMA, ADAMW | PP2 | zero(1), "--lora_rank", "4", "--lora_dropout", "0.1"),
    "lora sp2": (LLAMA, SGD | SP2 | zero(1), "--lora_rank", "4", "--lora_target_modules", "q_proj"),
}
EQUAL |= MORE_EQUAL


@pytest.mark.parametrize("name", thinned(list(EQUAL), *(name for name in EQUAL if name not in MORE_EQUAL)))
def test_equal(tmp_path, name):
    model, config, *flags = EQUAL[name]
    results = run_gate(tmp_path, model, config, *(documents(tmp_path) if flags else []), *flags)
    assert first_difference(results) is None
    assert {r.bound for r in results if "resumed" in r.what} == {0.0}
    assert len([r for r in results if r.is_parameter]) >= (21 if "lora" not in name else 4)


# One repair each, switched off.


def replace(owner: Any, name: str, value: Any) -> None:
    """For the life of this process. A repair that has moved since is an error."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, value)


def sum_for_mean_over_sequence_ranks() -> None:
    """The documented loss of Ulysses, below stage 3."""
    from dstrain.parallel import ParallelDims

    replace(ParallelDims, "gradient_ranks", lambda self, zero_stage: self.dp_size * self.sp_size)


def drop_masks() -> None:
    from dstrain.models import sequence

    replace(sequence, "attention_mask", lambda positions, window: None)
    replace(sequence.SequenceParallel, "check", lambda self, engine, head: None)


def draw_weights_in_zero_init() -> None:
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from dstrain.models import build

    def build_model(margs: Any, config: Any, *, seed: int, dtype: Any, zero3_config: Any, device: Any) -> Any:
        torch.manual_seed(seed)
        with deepspeed.zero.Init(config_dict_or_path=zero3_config):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).train()

    replace(build, "build_model", build_model)


def without_rules(*names: str) -> None:
    """For the gate itself too: else it would refuse before it runs."""
    from dstrain.config import resolve

    missing = set(names) - {rule.__name__ for rule in (*resolve.EARLY, *resolve.RULES)}
    assert not missing, missing
    for table in ("EARLY", "RULES"):
        rules = getattr(resolve, table)
        replace(resolve, table, tuple(rule for rule in rules if rule.__name__ not in names))


def absent_clipping_is_off() -> None:
    from dstrain.config import resolve

    complete = resolve._Completion.fill_defaults

    def fill_defaults(self: Any) -> None:
        complete(self)
        if self.origins.get("gradient_clipping") == "default":
            del self.config["gradient_clipping"]

    replace(resolve._Completion, "fill_defaults", fill_defaults)
    off = property(lambda self: self.deepspeed.get("gradient_clipping", 0.0))
    replace(resolve.ResolvedConfig, "gradient_clipping", off)


def mean_of_means() -> None:
    """Every rank divides by its own number of label tokens."""
    import torch.distributed as dist

    from dstrain import engine

    token_loss = engine.token_loss

    def own_mean(*args: Any) -> Any:
        loss, tokens = token_loss(*args)
        everybody = tokens.float()
        dist.all_reduce(everybody)
        return loss * (everybody / dist.get_world_size() / tokens), tokens

    replace(engine, "token_loss", own_mean)


def same_data_on_every_rank() -> None:
    """As accelerate on CPU, where every rank believes it is alone."""
    from dstrain.parallel import ParallelDims

    replace(ParallelDims, "dp_rank", lambda self, rank: 0)


def other_rows_on_the_second_tensor_rank() -> None:
    """Tensor-parallel ranks counted as data ranks, as AutoTP does."""
    from dstrain.data import loader

    collate = loader.collate
    order = -1 if os.environ["RANK"] == "1" else 1
    replace(loader, "collate", lambda rows, *more: collate(rows[::order], *more))


def documents_see_each_other() -> None:
    from dstrain.data import loader

    collate = loader.collate

    def without_positions(rows: list[dict[str, Any]], *more: int) -> dict[str, Any]:
        return collate([{k: v for k, v in row.items() if k != "position_ids"} for row in rows], *more)

    replace(loader, "collate", without_positions)


def forget_schedule() -> None:
    from dstrain.checkpoint import engine_state

    replace(engine_state, "_place_scheduler", lambda scheduler, saved: None)


def forget_moments() -> None:
    from dstrain.checkpoint import manager

    load_snapshot = manager.load_snapshot

    def load_without_moments(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_snapshot(engine, *args, **kwargs)
        for state in engine.optimizer.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].zero_()
        return result

    replace(manager, "load_snapshot", load_without_moments)


def sixteen_bits_at_stage_0() -> None:
    """Not refused, and the checkpoint that dstrain does not write for it is written."""
    from dstrain.checkpoint import state
    from dstrain.checkpoint.layout import Fragment, Shard

    def open_shards(engine: Any, names: dict[int, str], *, changing: bool) -> Any:
        optimizer = engine.optimizer
        for low, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, master in zip(low, masters, strict=True):
                fragments = (Fragment(names[id(p)], 0, 0, p.numel()),)
                yield Shard(master, optimizer.optimizer.state[master], fragments, True)

    without_rules("stage_for_sixteen_bits", "sixteen_bits_at_stage_0")
    replace(state, "open_shards", open_shards)


def alike_adapters() -> None:
    """Not a function of the layer's name."""
    from dstrain.models import adapters

    replace(adapters, "unit_seed", lambda seed, name: seed)


UNCLIPPED = {name: value for name, value in SGD.items() if name != "gradient_clipping"}
STEEP = LLAMA | {"initializer_range": 0.3}  # gradients of a norm above 1
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}

# What is wrong: model, configuration, patch of the ranks, of the gate too, and a number that differs.
WRONG: dict[str, tuple[dict, dict, Patch, bool, str]] = {
    "ulysses gradients": (
        *(LLAMA, SGD | SP2 | zero(1), sum_for_mean_over_sequence_ranks, False),
        "gradient norm of step 1",
    ),
    "ulysses masks": (MODELS["gemma3"], SGD | SP2 | zero(1), drop_masks, False, "loss of step 1"),
    "zero.Init": (LLAMA, SGD | zero(3), draw_weights_in_zero_init, False, "loss of step 1"),
    "autotp clipping": (
        LLAMA,
        SGD_CLIPPED | BF16 | TP2 | zero(0),
        sixteen_bits_at_stage_0,
        True,
        "length of the change",
    ),
    "pipeline clipping": (
        *(LLAMA, SGD_CLIPPED | PP2 | zero(0), functools.partial(without_rules, "pipeline_clipping"), True),
        "loss of step 2",
    ),
    "autocast float16": (
        *(LLAMA, SGD_CLIPPED | AUTOCAST | zero(2), functools.partial(without_rules, "autocast_float16"), True),
        "gradient norm of step 1",
    ),
    "empty step": (LLAMA, ADAMW | BF16 | zero(0), sixteen_bits_at_stage_0, True, "length of the change"),
    "clipping by default": (STEEP, UNCLIPPED | zero(1), absent_clipping_is_off, True, "loss of step 2"),
    "mean of means": (LLAMA, SGD | zero(2), mean_of_means, False, "loss of step 1"),
    "moments": (LLAMA, ADAMW | zero(1), forget_moments, False, "loss, resumed after step 4"),
    "schedule": (LLAMA, ADAMW | WARMUP | zero(1), forget_schedule, False, "learning rate, resumed after step 4"),
    "same data": (LLAMA, SGD | zero(2), same_data_on_every_rank, False, "loss of step 1"),
    "tensor rows": (LLAMA, SGD | TP2 | zero(1), other_rows_on_the_second_tensor_rank, False, "loss of step 1"),
    "packing": (LLAMA, SGD | zero(1), documents_see_each_other, False, "loss of step 1"),
    "adapters": (LLAMA, SGD | zero(1), alike_adapters, False, "gradient norm of step 1"),
}

ONE_RANK = ("zero.Init", "autocast float16", "empty step", "clipping by default", "moments", "schedule", "packing",
            "adapters")  # fmt: skip
FLAGS = {"mean of means": (), "packing": ("--packing",), "adapters": ("--lora_rank", "4")}
SELDOM = ("schedule", "same data", "tensor rows", "packing", "adapters")


@pytest.mark.parametrize("name", thinned(list(WRONG), *(name for name in WRONG if name not in SELDOM)))
def test_found(tmp_path, name, monkeypatch):
    model, config, patch, in_the_gate_too, expected = WRONG[name]
    flags = [*documents(tmp_path), *FLAGS[name]] if name in FLAGS else []
    if in_the_gate_too:
        from dstrain.checkpoint import state
        from dstrain.config import resolve

        for table in ("EARLY", "RULES"):  # put back at the end
            monkeypatch.setattr(resolve, table, getattr(resolve, table))
        monkeypatch.setattr(state, "open_shards", state.open_shards)
        monkeypatch.setattr(resolve._Completion, "fill_defaults", resolve._Completion.fill_defaults)
        monkeypatch.setattr(resolve.ResolvedConfig, "gradient_clipping", resolve.ResolvedConfig.gradient_clipping)
        patch()
    ranks = 1 if name in ONE_RANK else 2
    results = run_gate(tmp_path, model, config, *flags, ranks=ranks, patch=patch)
    differing = [r.what for r in results if not r.equal]
    assert any(what.startswith(expected) for what in differing), differing
    assert first_difference(results).what == differing[0]
    assert differing[0] == expected or not expected.endswith("step 1"), differing


# --verify on train.py


def double_gradients(python_path: str) -> None:
    os.environ["PYTHONPATH"] = python_path


def accept_at_once() -> None:
    from dstrain import verify as gate

    replace(gate, "command", lambda: [sys.executable, "-c", "print('the table')"])


def test_a_difference_ends_every_rank_with_78(tmp_path):
    """Through the real `dstrain verify`: the ranks that it starts take twice the gradient."""
    (tmp_path / "sitecustomize.py").write_text(
        "from dstrain.parallel import ParallelDims\nParallelDims.gradient_ranks = lambda self, _: 2 * self.dp_size\n"
    )
    argv = [*_argv(tmp_path, LLAMA, SGD | zero(1)), "--verify", "--output_dir", str(tmp_path / "run")]
    codes = start_ranks(argv, 2, tmp_path / "ranks", functools.partial(double_gradients, str(tmp_path)))
    said = [line for line in (tmp_path / "ranks/rank0.err").read_text().splitlines() if "dstrain" in line]
    assert codes == [ExitCode.VERIFY_FAILED] * 2, said
    assert len(said) == 1 and said[0].startswith("dstrain: error: verify: gradient norm of step 1 differs"), said
    assert "gradient norm of step 1" in (tmp_path / "ranks/rank0.out").read_text()
    assert not (tmp_path / "run").exists()


def test_equal_numbers_let_the_run_begin(tmp_path):
    argv = [*_argv(tmp_path, LLAMA, SGD | zero(1)), "--verify", "--output_dir", str(tmp_path / "run")]
    assert start_ranks([*argv, "--max_steps", "1"], 2, tmp_path / "ranks", accept_at_once) == [0, 0]
    assert [("the table" in (tmp_path / f"ranks/rank{i}.out").read_text()) for i in (0, 1)] == [True, False]
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_number_that_is_none_differs():
    assert not Comparison("loss", float("nan"), 1.0).equal
