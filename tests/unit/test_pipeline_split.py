"""Stages of a pipeline: what they hold, what they compute, what is refused."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from dstrain.arguments import ModelArguments
from dstrain.errors import UserError
from dstrain.models.build import build_model
from dstrain.models.pipeline import plan_pipeline, plan_stages
from dstrain.models.pipeline_build import build_stage
from dstrain.models.pipeline_module import pack, unpack
from dstrain.models.pipeline_probe import probe_layers
from dstrain.models.stage import Stage
from tests.architectures import model_types, tiny_config, tiny_inputs, tiny_model
from tests.sweep_architectures import compare, run_stages


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gemma3_text", "qwen3", "mixtral", "qwen3_moe", "gpt_neox", "bloom"]
)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_give_the_whole_models_loss_and_gradients(model_type, num_stages):
    meta = tiny_model(model_type, device="meta")
    assert max(compare(tiny_model(model_type), plan_pipeline(meta, num_stages), tiny_inputs(model_type))) <= 1e-5


@pytest.mark.parametrize(
    "model_type", [t for t in model_types() if "moe" in t or t in ("mixtral", "jetmoe", "gpt_oss")]
)
def test_router_logits_need_no_copies_of_routers(model_type):
    plan = plan_pipeline(tiny_model(model_type, device="meta"), 2)
    assert not any("layers." in name for name in plan.tied), plan.tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_holds_only_its_own_weights(tied):
    config = tiny_config("llama")
    config.tie_word_embeddings = tied
    arguments = ModelArguments(config_name="unused")
    whole = dict(build_model(arguments, config, seed=3, dtype=torch.float32).named_parameters())
    held = []
    for index in range(2):
        stage = build_stage(arguments, config, index=index, num_stages=2, seed=3, dtype=torch.float32)
        own = dict(stage.model.named_parameters())
        for name, parameter in own.items():
            assert torch.equal(parameter, whole[name]), name
        assert not any(p.is_meta for p in stage.parameters())
        held.append(set(own))
    assert held[0] | held[1] == set(whole)
    assert held[0] & held[1] == ({"model.embed_tokens.weight"} if tied else set())
    assert "lm_head.weight" not in held[0]


def test_a_pretrained_stage_reads_only_its_own_weights(shared_data):
    stories = str(shared_data / "models" / "stories15M-hf-bf16")
    arguments = ModelArguments(model_name_or_path=stories)
    whole = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)
    names = dict(whole.named_parameters())
    held = set()
    for index in range(3):
        stage = build_stage(arguments, whole.config, index=index, num_stages=3, seed=0, dtype=torch.bfloat16)
        for name, parameter in stage.model.named_parameters():
            assert torch.equal(parameter, names[name]), name
            held.add(name)
        assert type(stage.model) is type(whole)
    assert held == set(names)


def test_the_head_counts_in_the_balance():
    config = tiny_config("llama")
    config.vocab_size = 4096
    with torch.device("meta"):
        plan = plan_pipeline(AutoModelForCausalLM.from_config(config), 2)
    assert plan.bounds == (0, 3, 4)


def test_compiled_layers_give_the_same_loss():
    """The engine compiles every layer of the list, also those of other stages."""
    inputs = tiny_inputs("llama")
    plan = plan_pipeline(tiny_model("llama", device="meta"), 2)
    losses = []
    for compiled in (False, True):
        stages = [Stage(tiny_model("llama"), plan, k) for k in range(2)]
        for layer in [layer for stage in stages for layer in stage.model.model.layers] if compiled else []:
            layer.compile(backend="aot_eager")
        losses.append(run_stages(stages, inputs).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_no_chain_is_refused_with_the_reason():
    with pytest.raises(UserError, match="around the layers between; use ZeRO instead"):
        plan_pipeline(tiny_model("xlm", device="meta"), 2)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(UserError, match="it has only 4 layers"):
        plan_pipeline(tiny_model("llama", device="meta"), 5)


def test_probe_leaves_the_model_as_it_was():
    model = tiny_model("mixtral")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    probe_layers(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(isinstance(hook, partial) for hook in hooks)  # Hugging Face's own recorders stay


def test_router_logits_reach_the_end():
    graph = probe_layers(tiny_model("mixtral", device="meta"))
    assert [len(echoes) for echoes in graph.echoes] == [1, 1, 1, 0]
    assert plan_stages(tiny_model("mixtral", device="meta"), graph, 2).received(1)[1].shape == ("BS", 4)


def test_keys_and_values_that_layers_share_travel():
    graph = probe_layers(tiny_model("gemma4_text", device="meta"))
    assert [len(slots) for slots in graph.slots] == [0, 3, 5, 5]
    meta = tiny_model("gemma4_text", device="meta")
    assert max(compare(tiny_model("gemma4_text"), plan_stages(meta, graph, 4), tiny_inputs("gemma4_text"))) <= 1e-5


def test_pack_is_undone_by_unpack_with_gradients():
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    logits = torch.randn(6, 2, requires_grad=True)
    packed = pack((hidden, torch.arange(5), logits, torch.tensor([True, False])))
    received = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in packed)
    out = unpack(received)
    assert [t.dtype for t in out] == [torch.bfloat16, torch.int64, torch.float32, torch.bool]
    assert torch.equal(out[0], hidden) and torch.equal(out[2], logits) and out[3].tolist() == [True, False]
    (out[0].float().sum() * 2 + out[2].sum()).backward()
    torch.autograd.backward(packed[0], received[0].grad)
    assert hidden.grad.unique().tolist() == [2.0] and logits.grad.unique().tolist() == [1.0]
