"""The planner's arithmetic: what may never grow, what DeepSpeed's wrappers hold, and two published figures."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.arguments import ModelArguments
from dstrain.config import RunFacts, resolve_config
from dstrain.models.config import load_model_config
from dstrain.parallel import PipePlacement
from dstrain.planner.hardware import DEVICES
from dstrain.planner.memory import Flags, Needs, predict_memory
from dstrain.planner.platform_costs import CPU, CUDA
from dstrain.planner.shape import ModelShape
from dstrain.planner.strategy import Cluster, Planner
from dstrain.planner.tracing import Activations, Setting, Trace, trace_activations
from tests.launch import ROOT

# What a trace gives, made up: the arithmetic must hold for any.
TRACE = Activations(Trace(3e6, 2e6, 9e6, 11e6), Trace(4e6, 0.0, 4e6, 4e6))


@cache
def planner_of(name: str, overrides: str | None = None) -> tuple[object, ModelArguments, ModelShape]:
    margs = ModelArguments(config_name=str(ROOT / "examples" / f"{name}.json"), config_overrides=overrides)
    config = load_model_config(margs)
    return config, margs, ModelShape(config, margs)


def predict(world_size: int = 2, on_cpu: bool = True, trace=lambda _: TRACE, block_size: int = 512, **changes) -> Needs:
    _, _, shape = planner_of("llama_10m")
    deepspeed = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        **changes,
    }
    facts = RunFacts(device="cpu" if on_cpu else "cuda", device_supports_bf16=True, hidden_size=384, total_steps=10)
    resolved = resolve_config(deepspeed, world_size=world_size, facts=facts)
    return predict_memory(shape, trace, resolved, Flags(block_size), CPU if on_cpu else CUDA, world_size)


def zero(stage: int, **keys) -> dict:
    return {"zero_optimization": {"stage": stage, **keys}}


@settings(max_examples=40)
@given(ranks=st.integers(1, 64), stage=st.sampled_from([1, 2, 3]), on_cpu=st.booleans())
def test_more_ranks_never_need_more_a_device(ranks, stage, on_cpu):
    less = predict(2 * ranks, on_cpu, **zero(stage)).device["total"]
    assert less <= predict(ranks, on_cpu, **zero(stage)).device["total"] * (1 + 1e-9) or ranks == 1


@settings(max_examples=20)
@given(ranks=st.integers(2, 64))
def test_what_a_stage_divides_is_less(ranks):
    one, two, three = (predict(ranks, **zero(stage)).device for stage in (1, 2, 3))
    assert one["optimizer"] == pytest.approx(two["optimizer"]) == pytest.approx(three["optimizer"])
    assert two["gradients"] <= one["gradients"]
    assert three["parameters"] == pytest.approx(two["parameters"] / ranks)


def test_wrappers_hold_what_their_source_allocates():
    """Bytes a parameter over two ranks, from deepspeed 0.19.8's constructors (see planner/states.py)."""
    elements = planner_of("llama_10m")[2].num_parameters
    assert elements == 10_721_664
    per_parameter = lambda needs, part: needs.device[part] * 2**30 / elements  # noqa: E731
    bf16_optimizer = predict(**zero(1))
    assert per_parameter(bf16_optimizer, "parameters") == 2
    assert per_parameter(bf16_optimizer, "gradients") == 4  # whole, in fp32
    assert per_parameter(bf16_optimizer, "optimizer") == (4 + 8) / 2
    stage3 = predict(**zero(3))
    assert per_parameter(stage3, "parameters") == 2 / 2
    assert per_parameter(stage3, "optimizer") == (4 + 8) / 2
    sgd = predict(optimizer={"type": "SGD", "params": {"lr": 1e-3}}, **zero(2))
    assert per_parameter(sgd, "optimizer") == 4 / 2  # masters alone
    plain = predict(bf16={"enabled": False}, **zero(0))
    assert per_parameter(plain, "optimizer") == 8  # no masters: the parameters are fp32
    assert bf16_optimizer.checkpoint_gib * 2**30 == 12 * elements


def test_offload_moves_states_to_the_host():
    """On an accelerator they leave the device; on a CPU device and host are one."""
    plain = predict(on_cpu=False, **zero(2))
    offloaded = predict(on_cpu=False, **zero(2, offload_optimizer={"device": "cpu"}))
    assert offloaded.device["optimizer"] == 0 < plain.device["optimizer"]
    assert offloaded.host["optimizer"] > 2 * plain.device["optimizer"]  # of both ranks, with gradients
    nvme = predict(on_cpu=False, **zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}))
    assert nvme.nvme_gib > 0 and predict(**zero(3)).nvme_gib == 0


def test_buckets_are_whole_on_an_accelerator_and_touched_on_a_cpu():
    assert predict(on_cpu=False, **zero(2)).device["communication"] >= 2 * 500_000_000 / 2**30
    assert predict(on_cpu=True, **zero(2)).device["communication"] < 0.1
    small = predict(on_cpu=False, **zero(2, reduce_bucket_size=1_000_000)).device["communication"]
    assert small < 0.01


def test_the_first_pipeline_stage_keeps_most_micro_batches():
    needs = predict(3, gradient_accumulation_steps=8, pipeline={"stages": 3}, **zero(1))
    one = predict(3, gradient_accumulation_steps=1, pipeline={"stages": 3}, **zero(1))
    assert needs.stage == 0  # three micro-batches of its two layers, and the embedding
    assert needs.device["activations"] > 1.5 * one.device["activations"]


def test_activations_come_from_the_model_itself():
    """Saved bytes of the fake trace against those that autograd really keeps, of the real model on real tensors."""
    from dstrain.models.build import build_model
    from dstrain.models.loss import install_fused_loss, token_loss

    overrides = "num_hidden_layers=3,vocab_size=512"
    config, margs, _ = planner_of("llama_10m", overrides)
    setting = Setting(2, 64, torch.float32, torch.float32)
    trace = trace_activations(config, setting).whole(3)
    model = build_model(margs, config, seed=0, dtype=torch.float32)
    head = install_fused_loss(model)
    ids = torch.zeros((2, 64), dtype=torch.int64)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _loss = token_loss(model, head, {"input_ids": ids, "labels": ids})
    assert sum(kept.values()) == pytest.approx(trace.saved, rel=0.02)


def test_checkpointing_keeps_one_hidden_state_a_layer():
    config, _, _ = planner_of("llama_10m")
    setting = Setting(2, 64, torch.bfloat16, torch.bfloat16, gradient_checkpointing=True)
    assert trace_activations(config, setting).layer.saved == 2 * 64 * 384 * 2


def test_tensor_parallel_shapes_follow_the_plan():
    shape = planner_of("llama_10m")[2]
    (whole,), (half,) = shape.parts(), shape.parts(tp_size=2)
    assert half.layer < 0.51 * whole.layer and half.elements < whole.elements
    assert sum(part.num_layers for part in shape.parts(PipePlacement(3))) == 6


def test_two_stages_a_rank_hold_the_model_once():
    shape = planner_of("llama_10m")[2]
    first, second = shape.parts(PipePlacement(2, folded=True))
    assert first.first and first.last and not (second.first or second.last)
    assert first.num_layers + second.num_layers == 6
    assert first.elements + second.elements == shape.num_parameters  # a tied head is beside its embedding


@pytest.mark.parametrize(
    ("published_gib", "zero_block", "loss", "checkpointing"),
    [
        (99.0, {"stage": 2}, "model", False),
        (16.3, {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "fused", True),
    ],
    ids=["zero2", "zero3_offload_checkpointing_liger"],
)
def test_published_memory_of_llama_3_1_8b_on_8_h200(published_gib, zero_block, loss, checkpointing):
    """Micro-batch 1 of 8,192 tokens in bf16; docs/planner.md lists what is assumed."""
    margs = ModelArguments(config_name=str(ROOT / "examples" / "llama_8b.json"))
    config = load_model_config(margs)
    flags = Flags(8192, gradient_checkpointing=checkpointing, loss=loss)
    planner = Planner(config, margs, Cluster(1, 8, DEVICES["h200"]), flags)
    assert planner.shape.num_parameters == 8_030_261_248
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "bf16": {"enabled": True},
        "zero_optimization": zero_block,
    }
    needs, _, _ = planner.predict(planner.resolve(deepspeed, flags), flags)
    assert needs.device["total"] == pytest.approx(published_gib, rel=0.1)
