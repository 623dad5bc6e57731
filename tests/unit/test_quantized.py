"""A base in 4 bits without a run: Hugging Face's own weights, what is counted and predicted, what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import dstrain.adapter
from dstrain.adapter import is_base_in_4bit
from dstrain.arguments import ModelArguments, parse_arguments
from dstrain.checkpoint.manager import _check_base
from dstrain.config import resolve_config
from dstrain.errors import UserError
from dstrain.models.adapters import adapter_identity
from dstrain.models.build import build_model, load_model_config
from dstrain.models.flops import flops_per_token, num_parameters
from dstrain.models.pipeline_build import build_stage
from dstrain.models.quantized import check_quantizable, quantized, round_to_4bit, size_of
from dstrain.planner.shape import ModelShape
from dstrain.planner.states import Case
from tests.adapters import load_plain, logits, plain_base_in_4bit, write_base

pytest.importorskip("peft")
functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each kind of linear layer."""
    gpt2 = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=64)).save_pretrained(gpt2)
    return {"llama": str(write_base(tmp_path_factory.mktemp("llama"))), "gpt2": str(gpt2)}


@pytest.fixture
def margs(bases):
    return ModelArguments(model_name_or_path=bases["llama"], lora_rank=4, load_in_4bit=True)


def build(margs, **options):
    return build_model(margs, load_model_config(margs), seed=1, **{"dtype": torch.float32, **options})


def weights(model):
    """Name -> (packed) values, without what adapters put into names."""
    parameters = ((name.replace("base_layer.", ""), p) for name, p in model.named_parameters())
    return {name.removeprefix("base_model.model."): p for name, p in parameters if "lora_" not in name}


def dequantized(parameter):
    return functional.dequantize_4bit(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_weights_are_those_of_hugging_face(bases, margs, family):
    own = weights(build(replace(margs, model_name_or_path=bases[family])))
    peers = weights(plain_base_in_4bit(bases[family]))
    assert own.keys() == peers.keys()
    in_4bit = [name for name, p in own.items() if size_of(p)]
    assert len(in_4bit) == {"llama": 2 * 7, "gpt2": 2 * 4}[family]
    for name, parameter in own.items():
        assert not parameter.requires_grad and torch.equal(parameter, peers[name])
        if name in in_4bit:
            assert parameter.dtype == torch.uint8 and parameter.numel() == size_of(parameter) // 2
            assert torch.equal(dequantized(parameter), dequantized(peers[name]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_base_has_the_weights_that_were_trained_beside(bases, margs, family):
    margs = replace(margs, model_name_or_path=bases[family])
    plain = load_plain(bases[family])
    before = logits(plain)
    round_to_4bit(plain, torch.float32)
    assert (logits(plain) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain), logits(build(margs)), rtol=1e-5, atol=1e-6)  # new adapters add nothing
    half = load_plain(bases[family])
    round_to_4bit(half, torch.bfloat16)
    layers = {name: p for name, p in weights(build(margs, dtype=torch.bfloat16)).items() if size_of(p)}
    for name, parameter in layers.items():
        value = dequantized(parameter).float()
        assert torch.equal(half.get_parameter(name), value.T if family == "gpt2" else value)


def test_a_pass_without_gradients_leaves_the_weights_as_they_are(margs):
    """bitsandbytes 0.50 has a kernel for processors with AVX512-BF16 that packs them anew, with scales in bf16."""
    model = build(margs)
    before = {name: p.clone() for name, p in weights(model).items()}
    logits(model)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    model.train()(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bitsandbytes_keeps_what_zero3_gathered():
    """From the forward to the backward pass: the planner counts it (docs/adapters.md)."""
    layer = quantized(nn.Linear(64, 64), torch.float32, torch.device("cpu"))
    gathered = StorageWeakRef(layer.weight.untyped_storage())
    output = layer(torch.ones(1, 64, requires_grad=True))
    layer.weight.data = torch.empty(0, dtype=torch.uint8)  # as DeepSpeed releases a parameter
    assert not gathered.expired()
    output.sum().backward()
    del output
    assert gathered.expired()


def test_what_a_stage_quantizes_is_its_own(margs):
    whole, stages = weights(build(margs)), {}
    config = load_model_config(margs)
    for index in range(2):
        stage = build_stage(margs, config, index=index, num_stages=2, seed=1, dtype=torch.float32)
        assert sum(size_of(p) is not None for p in stage.model.parameters()) == 7
        stages |= weights(stage.model)
    assert stages.keys() == whole.keys() and all(torch.equal(stages[name], p) for name, p in whole.items())


def test_experts_in_one_tensor_are_refused():
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        experts = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))
        dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    check_quantizable(dense)
    with pytest.raises(UserError, match="most weights of MixtralForCausalLM are those of experts"):
        check_quantizable(experts)


def test_weights_are_counted_not_bytes(margs):
    plain, own = build(replace(margs, load_in_4bit=False)), build(margs)
    for trainable in (False, True):
        assert num_parameters(own, trainable=trainable) == num_parameters(plain, trainable=trainable)
    assert flops_per_token(own, 8) == flops_per_token(plain, 8)


def test_the_prediction_counts_the_bytes(margs):
    own = build(margs, dtype=torch.bfloat16)
    tensors = []
    for parameter in own.parameters():
        tensors.append(parameter)
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.state2.absmax]
    held = sum(t.numel() * t.element_size() for t in tensors)
    deepspeed = {"train_batch_size": 4, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}}
    resolved = resolve_config({**deepspeed, "zero_optimization": {"stage": 2}}, world_size=1)
    shape = ModelShape(load_model_config(margs), margs)
    (part,) = shape.parts()
    assert Case(resolved, part, ranks=1, on_cpu=True).parameters == pytest.approx(held, rel=0.01)
    assert part.held == shape.num_parameters == num_parameters(own)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--load_in_4bit is for the model beside adapters.*: add --lora_rank"),
        (("--lora_rank", "4", "--config_name", "c"), "--model_name_or_path and --config_name are both given"),
    ],
)
def test_contradictions_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse_arguments(["--model_name_or_path", "m", "--load_in_4bit", *flags])


def test_without_bitsandbytes_one_line_says_so(monkeypatch):
    monkeypatch.setattr(dstrain.adapter, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UserError) as refusal:
        parse_arguments(["--model_name_or_path", "m", "--lora_rank", "4", "--load_in_4bit"])
    expected = "--load_in_4bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
    assert refusal.value.problems == [expected]


def test_a_checkpoint_says_what_its_adapters_were_beside(margs):
    in_4bit, plain = (
        {"identity": adapter_identity(replace(margs, load_in_4bit=value)), "arguments": {"model_name_or_path": "m"}}
        for value in (True, False)
    )
    assert [is_base_in_4bit(facts["identity"]) for facts in (in_4bit, plain)] == [True, False]
    path = SimpleNamespace()
    _check_base(path, in_4bit, in_4bit)
    _check_base(path, plain, plain)
    with pytest.raises(UserError, match="holds adapters of a model in 4 bits: add --load_in_4bit"):
        _check_base(path, in_4bit, plain)
    with pytest.raises(UserError, match="that is not in 4 bits: leave out --load_in_4bit"):
        _check_base(path, plain, in_4bit)
