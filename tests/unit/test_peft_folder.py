"""Folders that peft itself wrote: asked, they are peft's model; what cannot be merged is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dstrain import cli
from dstrain.errors import UserError
from dstrain.generate.model import load
from dstrain.models.adapters import weights_sha256
from tests import tiny_model
from tests.adapters import logits

peft = pytest.importorskip("peft")
LINEAR = ["q_proj", "down_proj"]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("base"))


def write(folder, base, dtype=torch.float32, **settings):
    """An adapter whose weights matter, written by peft; and the model it was written from."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": LINEAR, "lora_dropout": 0.1, **settings})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_peft_s_model(kind, base, tmp_path):
    model = write(tmp_path / "adapter", base, **KINDS[kind])
    asked = load(str(tmp_path / "adapter"))
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - logits(model)).abs().max() > 1e-2
    torch.testing.assert_close(logits(asked.model), logits(model), rtol=1e-4, atol=1e-4)
    assert asked.source == str(tmp_path / "adapter") and asked.encoder.tokenizer.name_or_path == str(base)


def test_biases_of_a_gpt2(tmp_path):
    settings = {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}
    model = write(tmp_path / "a", tiny_model.save(tmp_path / "b", "gpt2"), **settings)
    torch.testing.assert_close(logits(load(str(tmp_path / "a")).model), logits(model), rtol=1e-4, atol=1e-4)


def tied(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return shutil.copytree(base, folder, dirs_exist_ok=True, ignore=lambda *_: {"config.json", "model.safetensors"})


def test_tied_embeddings(base, tmp_path):
    """A head that is saved whole ends the tie; an adapter of one of the two would be added to both."""
    base = tied(base, tmp_path / "base")
    model = write(tmp_path / "head", base, modules_to_save=["lm_head"])
    torch.testing.assert_close(logits(load(str(tmp_path / "head")).model), logits(model), rtol=1e-4, atol=1e-4)
    write(tmp_path / "embedding", base, target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="has an adapter of tied embeddings"):
        load(str(tmp_path / "embedding"))


def test_types_are_those_of_the_adapters_unless_asked(base, tmp_path):
    write(tmp_path / "adapter", base)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert load(str(tmp_path / "adapter")).model.dtype == torch.float32
    assert load(str(tmp_path / "adapter"), dtype="bf16").model.dtype == torch.bfloat16
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(narrow, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    assert load(str(tmp_path / "adapter")).model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write(folder, base)
    return folder


def changed(adapter, folder, **settings):
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA can be merged here"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' cannot be merged here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' cannot be merged here"),
        ({"lora_bias": True}, "lora_bias True cannot be merged here"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication .* cannot be merged here"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens .* cannot be merged here"),
        ({"something_new": 1}, "something_new 1 cannot be merged here"),
        ({"revision": "v2"}, "revision 'v2' cannot be merged here"),
        ({"r": 4}, "do not fit .*size mismatch"),
        ({"target_modules": ["q_proj"]}, "do not fit .*: 4 of other names"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "do not fit .*: 4 of other names, such as .*up_proj"),
        ({"target_modules": ["c_attn"]}, "do not fit .*c_attn"),
        ({"base_model_name_or_path": None}, "names no base model: name it with --base_model"),
    ],
)
def test_what_is_not_merged(adapter, settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load(str(changed(adapter, tmp_path / "changed", **settings)))


def test_a_base_that_is_elsewhere(adapter, base, tmp_path, capfd):
    shutil.copytree(base, tmp_path / "moved")
    ask = ["--prompt", "Once", "--max_new_tokens", "4"]
    assert cli.main(["generate", str(adapter), *ask]) == 0
    text = capfd.readouterr().out
    lost = changed(adapter, tmp_path / "lost", base_model_name_or_path=str(tmp_path / "gone"))
    assert cli.main(["generate", str(lost), *ask]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert f"the base of the adapters, {tmp_path / 'gone'}: there is no such folder" in err and "--base_model" in err
    assert cli.main(["generate", str(lost), "--base_model", str(tmp_path / "moved"), *ask]) == 0
    assert capfd.readouterr().out == text
    assert cli.main(["generate", str(base), "--base_model", str(base), *ask]) == 2
    assert "is a whole model, and no adapters to merge: leave --base_model out" in capfd.readouterr().err


def test_a_base_with_other_weights_is_refused_where_they_are_known(adapter, base, tmp_path):
    """dstrain's own exports note the fingerprint of the base."""
    folder = shutil.copytree(adapter, tmp_path / "noted")
    weights = load_file(adapter / "adapter_model.safetensors")

    def note(sha256):
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt", "base_sha256": sha256})

    note(weights_sha256(str(base)))
    load(str(folder))
    note("0" * 64)
    with pytest.raises(UserError, match="has other weights than the model of these adapters"):
        load(str(folder))
