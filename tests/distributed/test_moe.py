"""Mixtures of experts give the numbers of one rank under every ZeRO stage, and what DeepSpeed gathers as one."""

import pytest

from tests.distributed.parity import ADAMW, BF16, MODELS, SGD, Baselines, run, thinned, zero

# the load-balancing loss is not linear in the tokens: the same micro-batches on both sides
MICRO4 = {"train_micro_batch_size_per_gpu": 4}
ROUTER_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Baselines:
    return Baselines(tmp_path_factory.mktemp("one_rank"))


@pytest.mark.parametrize("stage", thinned([0, 1, 2, 3], 3))
@pytest.mark.parametrize("model", thinned(["mixtral", "qwen3_moe"], "mixtral"))
def test_data_parallel(one_rank, tmp_path, model, stage):
    run(tmp_path, MODELS[model], SGD | zero(stage), ranks=2).assert_equals(one_rank(MODELS[model], SGD))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("model", thinned(["mixtral", "qwen3_moe"], "qwen3_moe"))
def test_router_loss(one_rank, tmp_path, model, stage):
    model = MODELS[model] | ROUTER_LOSS
    parallel = run(tmp_path, model, SGD | MICRO4 | zero(stage), ranks=2)
    parallel.assert_equals(one_rank(model, SGD | MICRO4))
    without = one_rank(model | {"output_router_logits": False}, SGD | MICRO4)
    assert parallel.losses[0] > without.losses[0] + 0.1  # the loss really is in it


@pytest.mark.parametrize("stage", thinned([1, 2, 3], 2))
def test_adamw_in_bf16_with_the_optimizer_on_the_cpu(one_rank, tmp_path, stage):
    offload = zero(stage, offload_optimizer={"device": "cpu"})
    cpu_adam = ADAMW | BF16 | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}}
    model = MODELS["mixtral"]
    run(tmp_path, model, cpu_adam | offload, ranks=2).assert_equals(one_rank(model, ADAMW | BF16), 2e-2)


def test_experts_are_found_by_structure():
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from dstrain.models.experts import expert_blocks

    counts = {}
    for name, values in MODELS.items():
        values = dict(values)
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        with torch.device("meta"):
            blocks = expert_blocks(AutoModelForCausalLM.from_config(config))
        counts[name] = {type(block).__name__: len(blocks) for block in blocks}
    assert counts.pop("mixtral") == {"MixtralSparseMoeBlock": 2}
    assert counts.pop("qwen3_moe") == {"Qwen3MoeSparseMoeBlock": 2}
    assert not any(counts.values())
