"""Models from scratch and pretrained against transformers' own build, and the mistakes a user can make with one."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dstrain.arguments import ModelArguments
from dstrain.errors import UserError
from dstrain.models.build import build_model, build_skeleton, check_block_size, check_vocabulary, load_model_config
from dstrain.models.flops import active_parameters, flops_per_token, num_parameters
from tests.architectures import tiny_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}


def write(path: Path, values: object) -> str:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


@pytest.fixture
def llama(tmp_path) -> str:
    return write(tmp_path / "llama.json", LLAMA)


def scratch(config_name: str, seed: int = 1, dtype: torch.dtype = torch.float32, **flags):
    margs = ModelArguments(config_name=config_name, **flags)
    return build_model(margs, load_model_config(margs), seed=seed, dtype=dtype)


def pretrained(folder: str, dtype: torch.dtype = torch.float32, **flags):
    margs = ModelArguments(model_name_or_path=str(folder), **flags)
    return build_model(margs, load_model_config(margs), seed=0, dtype=dtype)


# --- from scratch


def test_weights_are_a_function_of_seed_and_name(llama):
    first, again, other = scratch(llama), scratch(llama), scratch(llama, seed=2)
    deeper = scratch(llama, config_overrides="num_hidden_layers=3")
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.equal(parameter, deeper.get_parameter(name))
        assert "norm" in name or not torch.equal(parameter, other.get_parameter(name))
    q, k = (first.get_parameter(f"model.layers.{i}.self_attn.q_proj.weight") for i in (0, 1))
    assert not torch.equal(q, k)


def test_sixteen_bits_are_the_rounded_weights_and_the_generator_is_left_alone(llama):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = scratch(llama, dtype=torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    exact = scratch(llama)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16())
    assert model.config.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if "inv_freq" in n)
    assert not any(hasattr(p, "_is_hf_initialized") for p in model.parameters())


# Types with an initialisation of their own: by parent (gpt2, modernbert), in constructors only (apertus, openai-gpt),
# of state-space parameters (mamba2), of experts (mixtral), with a tied head that is initialised otherwise (modernbert).
@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "gemma2", "gptj", "bloom", "mixtral", "mamba2", "modernbert-decoder", "apertus", "openai-gpt"],
)
def test_distribution_is_that_of_transformers(model_type, tmp_path):
    config = tiny_config(model_type)
    torch.manual_seed(0)
    usual = AutoModelForCausalLM.from_config(tiny_config(model_type))
    model = build_model(ModelArguments(config_name="x"), config, seed=1, dtype=torch.float32)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in usual.named_parameters()]
    for name, parameter in model.named_parameters():
        expected = usual.get_parameter(name)
        assert parameter.shape == expected.shape
        if expected.numel() < 2 or expected.std() == 0:
            assert torch.equal(parameter, expected), name
        elif expected.numel() >= 256:
            assert abs(parameter.std() / expected.std() - 1) < 0.25, name
            assert abs(parameter.mean() - expected.mean()) < 0.25 * expected.std(), name
    for name, buffer in usual.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    tied = usual.get_output_embeddings().weight is usual.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


# --- configurations


def test_values_that_follow_from_others_follow_the_overrides(llama):
    assert load_model_config(ModelArguments(config_name=llama)).head_dim == 8
    assert load_model_config(ModelArguments(config_name=llama, config_overrides="num_attention_heads=8")).head_dim == 4
    gpt2 = ModelArguments(config_name=write(Path(llama).with_name("gpt2.json"), {"model_type": "gpt2", "n_embd": 64}))
    changed = ModelArguments(config_name=gpt2.config_name, config_overrides="hidden_size=128,n_layer=2")
    assert (load_model_config(changed).n_embd, load_model_config(changed).num_hidden_layers) == (128, 2)
    typed = ModelArguments(config_name=llama, config_overrides="tie_word_embeddings=true, rms_norm_eps=1e-3")
    assert (load_model_config(typed).tie_word_embeddings, load_model_config(typed).rms_norm_eps) == (True, 1e-3)


WRONG_FILES = [
    ("{", "is not valid JSON"),
    ([1], "holds no object"),
    ({"hidden_size": 3}, "names no model_type"),
    ({"model_type": "lama"}, "unknown model_type 'lama': did you mean llama?"),
    ({**LLAMA, "hiden_size": 3}, "unknown name hiden_size: did you mean hidden_size?"),
    ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0: write a positive number"),
    ({**LLAMA, "vocab_size": -3}, "vocab_size is -3: write a positive number"),
    ({**LLAMA, "hidden_size": "a"}, "is no valid llama configuration"),
    ({**LLAMA, "num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ({"model_type": "t5"}, "t5 is not a causal language model"),
    ({**LLAMA, "hidden_act": "foo"}, "no llama can be built from its configuration"),
]


@pytest.mark.parametrize(("values", "expected"), WRONG_FILES)
def test_wrong_configuration_file(values, expected, tmp_path):
    with pytest.raises(UserError) as error:
        scratch(write(tmp_path / "model.json", values))
    assert expected in str(error.value)
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


WRONG_OVERRIDES = [
    ("num_layers=3", "llama has no num_layers to change: did you mean num_hidden_layers?"),
    ("hidden_size=x", "hidden_size is 'x': write a whole number"),
    ("tie_word_embeddings=2", "tie_word_embeddings is '2': write true or false"),
    ("foo", "'foo' is not name=value"),
    ("vocab_size=1,vocab_size=2", "vocab_size is given twice"),
    ("model_type=gpt2", "has no model_type to change"),
    ("num_attention_heads=5", "not a multiple"),
    ("vocab_size=0", "vocab_size is 0: write a positive number"),
]


@pytest.mark.parametrize(("overrides", "expected"), WRONG_OVERRIDES)
def test_wrong_overrides(overrides, expected, llama):
    with pytest.raises(UserError) as error:
        load_model_config(ModelArguments(config_name=llama, config_overrides=overrides))
    assert expected in str(error.value)


def test_wrong_names(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    cases = [
        (ModelArguments(), "no model is named"),
        (ModelArguments(config_name=str(tmp_path / "no.json")), "does not exist"),
        (ModelArguments(config_name=str(tmp_path / "empty")), "has no config.json"),
        (ModelArguments(model_name_or_path="./no/such"), "there is no such folder"),
        (ModelArguments(model_name_or_path=llama), "is a file"),
        (ModelArguments(config_name="dstrain-tests/no-such-model"), "the hub cannot be reached"),
    ]
    for margs, expected in cases:
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            load_model_config(margs)
        assert expected in str(error.value)
        assert time.monotonic() - start < 15


def test_wrong_attention(llama):
    with pytest.raises(UserError, match="--attn_implementation nonsense cannot be used here"):
        scratch(llama, attn_implementation="nonsense")
    with pytest.raises(UserError, match="--attn_implementation flash_attention_2 cannot be used here"):
        scratch(llama, attn_implementation="flash_attention_2")
    assert scratch(llama, attn_implementation="eager").config._attn_implementation == "eager"


def test_vocabulary_and_positions(llama):
    config = load_model_config(ModelArguments(config_name=llama))
    check_vocabulary(config, 97, "x")
    check_block_size(config, 64)
    with pytest.raises(UserError, match=r"x has 98 tokens, the model 97: .* vocab_size=98"):
        check_vocabulary(config, 98, "x")
    with pytest.raises(UserError, match="--block_size is 65, the model has 64 positions"):
        check_block_size(config, 65)
    check_block_size(CONFIG_MAPPING["mamba"](), 10**6)  # no positions, no limit


def test_gradient_checkpointing(llama):
    model = scratch(llama, gradient_checkpointing=True)
    plain = scratch(llama)
    ids = torch.arange(20)[None]
    for m in (model, plain):
        m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, plain.get_parameter(name).grad, atol=1e-7)


# --- pretrained


def save(model_type: str, folder: Path, **options) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral", "gptj", "qwen2_moe"])
def test_pretrained_equals_from_pretrained(model_type, dtype, tmp_path):
    folder = save(model_type, tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, usual = pretrained(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    state = usual.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    tied = usual.get_output_embeddings().weight is usual.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.training
    # What is saved again is what was read, in the layout of the files (Mixtral: expert by expert).
    model.float().save_pretrained(tmp_path / "again")
    stored = {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
    again = {k: t for f in (tmp_path / "again").glob("*.safetensors") for k, t in load_file(f).items()}
    assert again.keys() == stored.keys()
    if model_type == "mixtral":
        assert any("experts.0." in key for key in stored)
    if dtype == torch.float32:
        assert all(torch.equal(again[key], stored[key]) for key in stored)


def test_real_weights(shared_data):
    folder = shared_data / "models" / "stories260K-hf"
    model, usual = pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(t, usual.state_dict()[n]) for n, t in model.state_dict().items())
    assert model.generation_config.to_dict() == usual.generation_config.to_dict()
    assert num_parameters(model) == 260_032


@pytest.fixture
def broken(tmp_path):
    """A function that saves a tied Llama, lets a test spoil its tensors, and returns the folder."""

    def spoil(change, **overrides) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "broken"
        config = CONFIG_MAPPING["llama"](**{**LLAMA, "tie_word_embeddings": True, **overrides})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return spoil


def test_missing_unexpected_and_mismatched_weights_are_named(broken):
    def change(tensors):
        tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)

    with pytest.raises(UserError) as error:
        pretrained(broken(change))
    missing, unexpected, mismatched = error.value.problems
    assert "lacks weights of the model: model.norm.weight:" in missing
    assert "has weights that the model does not: model.norm.wait:" in unexpected
    assert "model.layers.1.mlp.up_proj.weight has shape [3, 32], the model wants [64, 32]" in mismatched


def test_a_tied_head_is_not_missing_under_either_name(broken):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    model = pretrained(broken(lambda tensors: None))
    renamed = pretrained(broken(rename))
    assert renamed.lm_head.weight is renamed.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, renamed.lm_head.weight)
    both = pretrained(broken(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})))
    assert torch.equal(model.lm_head.weight, both.lm_head.weight)
    with pytest.raises(
        UserError, match=r"lm_head.weight and model.embed_tokens.weight differ, but its config.json ties"
    ):
        pretrained(broken(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})))
    with pytest.raises(UserError, match=r"lacks weights of the model: lm_head.weight, model.embed_tokens.weight"):
        pretrained(broken(lambda t: t.pop("model.embed_tokens.weight")))


def test_an_untied_head_is_missing(broken):
    with pytest.raises(UserError, match=r"lacks weights of the model: lm_head.weight"):
        pretrained(broken(lambda t: t.pop("lm_head.weight"), tie_word_embeddings=False))


def test_broken_files(tmp_path):
    folder = save("llama", tmp_path / "model", max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        pretrained(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks 1 of .* shards of its index: {shard.name}"):
        pretrained(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        pretrained(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has pickled weights"):
        pretrained(folder)


def test_quantized_weights_are_refused(tmp_path):
    folder = save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds quantized weights"):
        pretrained(folder)
    shutil.rmtree(folder)


# --- parameters and FLOPs


def skeleton(model_type: str, **values):
    config = CONFIG_MAPPING[model_type](**values)
    return build_skeleton(ModelArguments(config_name="x"), config, torch.float32)


def test_flops_of_gpt2_are_nanogpts():
    model = skeleton("gpt2")
    assert num_parameters(model) == 124_439_808
    n = 124_439_808 - 1024 * 768  # nanoGPT's get_num_params leaves the position embedding out
    assert flops_per_token(model, 1024) == 6 * n + 12 * 12 * 12 * 64 * 1024


def test_flops_of_an_untied_llama():
    model = skeleton("llama")  # 7 B
    n = num_parameters(model) - 32000 * 4096
    assert flops_per_token(model, 2048) == 6 * n + 12 * 32 * 32 * 128 * 2048


def test_only_visited_experts_count():
    model = skeleton("mixtral")  # 8x7B: 46.7 B parameters, 12.9 B active with the input embedding
    assert num_parameters(model) == 46_702_792_704
    assert active_parameters(model) == 12_879_925_248 - 32000 * 4096


def test_windows_bound_the_attention():
    model = skeleton("gemma2", num_hidden_layers=4, sliding_window=512)  # every other layer slides
    per_layer = 12 * 8 * 256
    assert flops_per_token(model, 4096) == 6 * num_parameters(model) + 2 * per_layer * (512 + 4096)


def test_layers_without_attention_add_nothing():
    model = skeleton("mamba", num_hidden_layers=2)
    assert flops_per_token(model, 4096) == flops_per_token(model, 128)
