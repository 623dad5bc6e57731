"""What DeepSpeed 0.19.8 does with configurations that dstrain refuses or repairs: docs/deepspeed-facts.md.

A failure here after an upgrade is good news: DeepSpeed has changed, and a rule may go.
"""

import json
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from tests.launch import ROOT, environment

pytestmark = pytest.mark.ops
PACKAGE = Path(deepspeed.__file__).parent


def parse(**config):
    return DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **config})


@pytest.fixture(scope="module")
def facts():
    """Figures of tiny runs, made in a process of their own since they need a process group."""
    script = Path(__file__).with_name("deepspeed_facts.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment(TORCH_COMPILE_DISABLE="1"),  # Muon's five lines, compiled for every shape
        cwd=ROOT,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def losses(figures):
    return [loss for loss, _, _ in figures]


def difference(figures, reference):
    """Largest relative difference of the losses."""
    pairs = zip(losses(figures), losses(reference), strict=True)
    return max(abs(a - b) / b for a, b in pairs)


def test_unknown_keys_are_ignored_at_the_top_and_in_old_blocks():
    parse(trian_batch_size=3, gradient_cliping=1.0)
    for block in ("activation_checkpointing", "checkpoint", "flops_profiler", "data_types", "aio"):
        parse(**{block: {"no_such_key": 1}})
    with pytest.raises(ValueError, match="no_such_key"):
        parse(zero_optimization={"no_such_key": 1})


def test_auto_means_the_default():
    config = parse(zero_optimization={"stage": "auto"}, bf16={"enabled": "auto"}, gradient_clipping="auto")
    assert config.zero_optimization_stage == 0
    assert config.bfloat16_config.enabled is False
    assert config.gradient_clipping == "auto"  # a TypeError at the first step


def test_clipping_is_on_by_default():
    assert parse().gradient_clipping == 1.0


def test_some_keys_have_two_spellings():
    assert parse(zero_optimization={"stage": 3, "prefetch_bucket_size": 20}).zero_config.prefetch_bucket_size == 20
    with pytest.raises(ValueError, match="Extra inputs"):
        parse(zero_optimization={"stage": 3, "stage3_prefetch_bucket_size": 10, "prefetch_bucket_size": 20})


def test_nothing_reads_allgather_partitions():
    uses = [path for path in PACKAGE.rglob("*.py") if "zero_allgather_partitions()" in path.read_text()]
    assert uses == []


def test_sixteen_bits_at_stage_0_take_an_empty_step_first(facts):
    assert difference(facts["AdamW bf16 0"], facts["plain bf16"]) > 0.05
    for stage in (1, 2, 3):
        assert difference(facts[f"AdamW bf16 {stage}"], facts["plain bf16"]) == 0.0
    for stage in (0, 1, 2, 3):
        assert difference(facts[f"AdamW fp32 {stage}"], facts["plain fp32"]) < 1e-5


def test_sums_in_fp32_are_refused_at_stage_0(facts):
    assert "unsupported mix" in facts["bf16 sums in fp32 at stage 0"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_autocast_float16_leaves_the_loss_scale_in_the_norm(facts, stage):
    scaled, right = facts[f"autocast float16 {stage}"][0][1], facts[f"autocast bfloat16 {stage}"][0][1]
    assert scaled / right == pytest.approx(2**16, rel=1e-2)


def test_autocast_float16_at_stage_0_has_no_scale(facts):
    assert difference(facts["autocast float16 0"], facts["plain fp32"]) < 1e-2  # clipped by the right norm


def test_muon_in_fp32_clips_its_update_above_stage_0(facts):
    reference = facts["Muon fp32 0 clipping 0.0"]
    for stage in (1, 2, 3):
        assert difference(facts[f"Muon fp32 {stage} clipping 0.0"], reference) < 1e-4
        clipped = facts[f"Muon fp32 {stage} clipping 0.01"]
        assert difference(clipped, facts["Muon fp32 0 clipping 0.01"]) > 0.05
        assert clipped[0][1] > 2 * facts["AdamW fp32 1"][0][1]  # the same gradient has norm 0.9


def test_muon_in_bf16(facts):
    plain = facts["Muon fp32 0 clipping 0.0"]
    assert difference(facts["Muon bf16 1 clipping 0.0"], plain) < 0.02
    assert difference(facts["Muon bf16 3 clipping 0.0"], plain) < 0.02
    assert difference(facts["Muon bf16 2 clipping 0.0"], plain) > 0.1
    assert difference(facts["Muon bf16 1 clipping 0.01"], facts["Muon fp32 0 clipping 0.01"]) < 0.02


def test_bf16_masters_are_ignored_with_fp32_sums_at_stage_1(facts):
    assert facts["bf16 masters with fp32 sums"] == "torch.float32"
    assert facts["bf16 masters without fp32 sums"] == "torch.bfloat16"


def rates(figures):
    return [rate[0] for _, _, rate in figures]


def test_warmup_decay_ignores_the_optimizers_rate(facts):
    assert max(rates(facts["WarmupDecayLR"])) == pytest.approx(0.001)  # the optimizer says 0.01


def test_the_first_two_steps_of_a_warmup_have_no_rate(facts):
    assert rates(facts["WarmupCosineLR"])[:2] == [0.0, 0.0]
    assert rates(facts["WarmupDecayLR"])[:2] == [0.0, 0.0]
    assert rates(facts["WarmupCosineLR"])[2] == pytest.approx(0.005)  # a warm-up of 1 is one of 2


def test_a_schedule_without_params_fails(facts):
    assert facts["no params"].startswith("TypeError")


def test_torch_schedules_work_at_fp32_stage_0_only(facts):
    assert rates(facts["StepLR 0"])[1] == pytest.approx(1e-3)
    assert "is not an Optimizer" in facts["StepLR 1"]


def test_one_cycle_replaces_the_betas(facts):
    assert facts["OneCycle betas"][1] == 0.99


def test_expert_parallelism_does_not_take_this_transformers_mixtral(facts):
    """AutoEP hands a default to `get` of a registry whose class is transformers' own since 5.23, and takes none."""
    assert facts["AutoEP of Mixtral"].startswith("TypeError in base.py: ")
    assert "get() takes 2 positional arguments but 3 were given" in facts["AutoEP of Mixtral"]
