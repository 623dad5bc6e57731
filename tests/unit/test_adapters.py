"""Adapters without a run: flags and files, initial weights, what cannot have one, flops, the prediction of memory."""

import json
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig
from transformers import AutoConfig, AutoModelForCausalLM

import dstrain.adapter
from dstrain.adapter import is_adapter
from dstrain.arguments import ModelArguments, parse_arguments
from dstrain.checkpoint.manager import _check_base
from dstrain.cli import main
from dstrain.config import RunFacts, resolve_config
from dstrain.errors import UserError
from dstrain.models.adapters import weights_sha256
from dstrain.models.build import build_model, load_model_config
from dstrain.models.flops import active_parameters, flops_per_token
from dstrain.models.pipeline_build import build_stage
from dstrain.models.quantized import BYTES_PER_WEIGHT
from dstrain.models.tensor import open_adapters, partition_config
from dstrain.parallel import PipePlacement
from dstrain.planner.foresight import predict_run
from dstrain.planner.hardware import DEVICES
from dstrain.planner.memory import Flags, predict_memory, setting_of
from dstrain.planner.platform_costs import CPU
from dstrain.planner.shape import ModelShape
from dstrain.planner.strategy import Choice, Cluster, Planner
from dstrain.planner.tracing import trace_activations
from tests.adapters import write_base

pytest.importorskip("peft")
MODEL = ("--model_name_or_path", "m")


def parse(*flags: str) -> ModelArguments:
    return parse_arguments([*MODEL, *flags]).model


def test_flags_and_their_defaults():
    assert parse().adapter is None
    assert parse("--lora_rank", "4").adapter == {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    more = ("--lora_alpha", "4", "--lora_dropout", "0.1", "--lora_target_modules", "v", "--lora_target_modules", "q")
    assert parse("--lora_rank", "4", *more).adapter == {
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "target_modules": ["q", "v"],
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((*MODEL, "--lora_alpha", "4"), "--lora_alpha is for adapters: add --lora_rank"),
        ((*MODEL, "--lora_target_modules", "q_proj"), "--lora_target_modules is for adapters: add --lora_rank"),
        (("--config_name", "c", "--lora_rank", "4"), "pretrained model: name it with --model_name_or_path"),
        ((*MODEL, "--lora_rank", "0"), "the smallest value is 1"),
        ((*MODEL, "--lora_rank", "4", "--lora_dropout", "1"), "write a number below 1"),
        ((*MODEL, "--lora_rank", "4", "--peft_config", "x.json"), "--peft_config and --lora_rank are both given"),
        ((*MODEL, "--lora_dropout", "0.1", "--peft_config", "x"), "--peft_config and --lora_dropout are both given"),
        ((*MODEL, "--peft_config", "missing.json"), "missing.json cannot be read"),
        (
            (*MODEL, "--lora_rank", "4", "--lora_target_modules", "all-linear", "--lora_target_modules", "q"),
            "all-linear and names of modules are both given",
        ),
    ],
)
def test_contradictions_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse_arguments(list(flags))


def test_without_peft_one_line_says_so(monkeypatch):
    monkeypatch.setattr(dstrain.adapter, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refusal:
        parse("--lora_rank", "4")
    assert refusal.value.problems == ["adapters need the package peft, which is not installed: pip install peft"]


def test_a_file_that_peft_wrote(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    settings = parse("--peft_config", str(tmp_path / "adapter_config.json")).adapter
    assert settings is not None
    assert {name: settings[name] for name in ("r", "lora_alpha", "target_modules")} == {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj"],
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "is no LoRA"),
        ({"task_type": "SEQ_CLS"}, "write CAUSAL_LM"),
        ({"r": 0}, "a rank of at least 1"),
        ({"init_lora_weights": "pissa"}, "write true or gaussian"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* is not supported"),
    ],
)
def test_what_a_file_may_not_ask(changes, words, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, **changes}))
    with pytest.raises(UserError, match=words):
        parse("--peft_config", str(path))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def margs(base):
    return ModelArguments(model_name_or_path=str(base), lora_rank=4)


def build(margs, seed=1, **options):
    return build_model(margs, load_model_config(margs), seed=seed, **{"dtype": torch.float32, **options})


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_initial_adapters_are_a_function_of_seed_and_name(margs):
    model = build(margs)
    first, other = trained(model), trained(build(margs, seed=2))
    assert len(first) == 2 * 2 * 7 and all(is_adapter(name) for name in first)
    assert all(p.ndim == 2 and p.dtype == torch.float32 for p in first.values())
    for name, value in first.items():
        assert bool(value.any()) == (".lora_A." in name)
        assert torch.equal(value, other[name]) == (".lora_B." in name)
    shapes = [name for name in first if name.endswith("q_proj.lora_A.default.weight")]
    assert not torch.equal(*(first[name] for name in shapes))  # of two layers
    config, stages = load_model_config(margs), {}
    for index in range(2):
        stage = build_stage(margs, config, index=index, num_stages=2, seed=1, dtype=torch.float32)
        stages |= trained(stage.model)
        assert trained(stage.whole).keys() == first.keys()
    assert stages.keys() == first.keys() and all(torch.equal(stages[name], first[name]) for name in first)


def test_types_follow_the_base(margs):
    model = build(margs, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = trained(build(margs))
    assert all(torch.equal(p, exact[name].bfloat16()) for name, p in trained(model).items())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["lm_head"], "names the output embedding"),
        (["embed_tokens"], "is a Embedding, and adapters are for linear layers"),
        (["no_such"], "not found in the base model.*: name linear layers of LlamaForCausalLM"),
    ],
)
def test_what_cannot_have_an_adapter(margs, targets, words):
    with pytest.raises(UserError, match=words):
        build(replace(margs, lora_target_modules=targets))


def test_a_stage_with_nothing_to_train_is_refused(margs, tmp_path):
    path = tmp_path / "adapter_config.json"
    values = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    path.write_text(json.dumps(values))
    first = replace(margs, lora_rank=None, peft_config=str(path))
    with pytest.raises(UserError, match="a pipeline stage has no layer with an adapter"):
        build_stage(first, load_model_config(first), index=1, num_stages=2, seed=1, dtype=torch.float32)


def test_frozen_parameters_count_four_flops(margs):
    adapted, whole = build(margs), build(replace(margs, lora_rank=None))
    adapters = sum(p.numel() for p in trained(adapted).values())
    frozen = active_parameters(whole)
    assert active_parameters(adapted) == frozen + adapters
    assert flops_per_token(whole, 8) - flops_per_token(adapted, 8) == 2 * frozen - 6 * adapters


def test_only_adapters_are_predicted_to_have_gradients_and_moments(margs):
    config = load_model_config(margs)
    deepspeed = {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    facts = RunFacts(device="cpu", hidden_size=32, total_steps=9)
    trace = cache(partial(trace_activations, config))
    shape, plain = ModelShape(config, margs), ModelShape(config, replace(margs, lora_rank=None))
    trained, held = (n / plain.num_parameters for n in (shape.num_trained, shape.num_parameters))
    assert held == 1 + trained
    for stage in range(4):
        resolved = resolve_config({**deepspeed, "zero_optimization": {"stage": stage}}, world_size=2, facts=facts)
        needs = predict_memory(shape, trace, resolved, Flags(32, adapter=json.dumps(margs.adapter)), CPU, 2)
        more = predict_memory(plain, trace, resolved, Flags(32), CPU, 2)
        assert needs.checkpoint_gib == pytest.approx(trained * more.checkpoint_gib)
        assert needs.device["optimizer"] == pytest.approx(trained * more.device["optimizer"])
        assert needs.device["parameters"] == pytest.approx(held * more.device["parameters"])
    settings = (setting_of(resolved, Flags(32, adapter=a), on_cpu=True) for a in (json.dumps(margs.adapter), None))
    adapted, whole = (trace(setting) for setting in settings)
    assert 0.6 < adapted.layer.flops / whole.layer.flops < 0.9


def test_plan_predicts_what_a_run_does(margs):
    config, flags = load_model_config(margs), Flags(32, adapter=json.dumps(margs.adapter))
    planner = Planner(config, margs, Cluster(1, 2, DEVICES["h200"]), flags)
    option = planner.option(Choice(1, "", 1, 2, 1, False, micro_batch=2), 8)
    run = predict_run(margs, config, option.resolved, flags, 2)
    for key, value in option.needs.to_json().items():
        assert run[key] == pytest.approx(value, rel=1e-6), key


def test_plan_refuses_a_stage_with_nothing_to_train(margs, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}))
    first = replace(margs, lora_rank=None, peft_config=str(path))
    shape = ModelShape(load_model_config(first), first)
    assert shape.parts()[0].elements == 2 * 4 * 32
    with pytest.raises(UserError, match="a pipeline stage has no layer with an adapter"):
        shape.parts(PipePlacement(pp_size=2))


def test_plan_takes_the_flags_of_train(margs, tmp_path, capfd):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4, "optimizer": {"type": "AdamW"}}')
    plan = ["plan", "--model_name_or_path", str(margs.model_name_or_path), "--block_size", "32", "--device", "h200"]
    plan += ["--deepspeed_config", str(tmp_path / "ds.json")]
    two = ("--lora_target_modules", "q_proj", "--lora_target_modules", "o_proj")
    assert main([*plan, "--lora_rank", "4", *two, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["num_trainable_parameters"] == 2 * 2 * 2 * 4 * 32  # layers, modules, matrices
    assert main([*plan, "--lora_rank", "4", *two, "--load_in_4bit", "--json"]) == 0
    in_4bit, whole = (f["prediction"]["device_gib"]["parameters"] for f in (json.loads(capfd.readouterr().out), found))
    quantized = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert (whole - in_4bit) * 2**30 == pytest.approx((4 - BYTES_PER_WEIGHT) * quantized)
    assert main([*plan, "--lora_alpha", "4"]) == 2
    assert "--lora_alpha is for adapters: add --lora_rank" in capfd.readouterr().err


def divide(model, partition_config):
    """As AutoTP does in `deepspeed.initialize` for the first of two ranks; without a group nothing is cut."""
    specs = AutoTPConfig.from_dict(partition_config)
    autotp = AutoTP(model, (), "", None, (torch.nn.Linear,), None, partition_config=specs, training_mode=True)
    autotp.set_tensor_parallel_config(2, None)
    autotp._replace_module(model)
    return autotp


def tensor_parallel():
    deepspeed = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}, "tensor_parallel": {"autotp_size": 2}}
    return resolve_config(deepspeed, world_size=2, facts=RunFacts(adapters=True))


def test_tensor_parallelism_divides_bases_and_one_matrix_of_each_adapter(margs):
    config, model = load_model_config(margs), build(margs)
    open_adapters(model)
    divide(model, partition_config(config, tensor_parallel()))
    layer, parts = model.model.layers[0], ("base_layer", "lora_A.default", "lora_B.default")
    for name, kinds in {
        "self_attn.q_proj": ["LinearLayer", "Linear", "LinearLayer"],
        "mlp.down_proj": ["LinearAllreduce", "LinearAllreduce", "Linear"],
    }.items():
        assert [type(layer.get_submodule(f"{name}.{part}")).__name__ for part in parts] == kinds
    # The planner's: two layers, rank 4; q, k, v, gate and up divide B, o and down divide A.
    (whole,), (part,) = (ModelShape(config, margs).parts(tp_size=size) for size in (1, 2))
    assert whole.elements - part.elements == 2 * 4 * (32 + 16 + 16 + 64 + 64 + 32 + 64) // 2
    with pytest.raises(UserError, match="has lora_dropout: leave --lora_dropout out"):
        open_adapters(build(replace(margs, lora_dropout=0.1)))


def test_norms_inside_of_divided_layers_are_frozen(tmp_path):
    """Qwen 3's: AutoTP would register its hook on a parameter without a gradient."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    sizes |= {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)).save_pretrained(tmp_path)
    margs = ModelArguments(model_name_or_path=str(tmp_path), lora_rank=2)
    config, model = load_model_config(margs), build(margs)
    open_adapters(model)
    autotp = divide(model, partition_config(config, tensor_parallel()))
    autotp.mp_group = object()
    autotp.register_replicated_grad_hooks(model)
    assert "LinearLayer" in str(model)


def test_autotp_still_puts_a_divided_base_in_the_place_of_an_adapter(margs):
    """Why `open_adapters` is there."""
    model, spec = build(margs), {"patterns": [r".*q_proj\.weight$"], "partition_type": "column"}
    divide(model, {"use_default_specs": False, "layer_specs": [spec]})
    left = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
    assert left == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_another_base_has_another_fingerprint(base, tmp_path):
    other = write_base(tmp_path / "other", seed=1)
    assert weights_sha256(str(base)) == weights_sha256(str(write_base(tmp_path / "same")))
    assert weights_sha256(str(base)) != weights_sha256(str(other))


def test_checkpoints_without_adapters_have_no_base():
    described = {"identity": {"base": None}, "arguments": {"model_name_or_path": "m"}}
    _check_base(SimpleNamespace(), described, described)
    _check_base(SimpleNamespace(), {}, described)  # of an older dstrain
