"""Export: what plain transformers loads is the model that was trained, whoever wrote the pieces."""

import json

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dstrain.checkpoint.export import export, find_checkpoint, parse_size
from dstrain.errors import UserError
from tests.checkpoints import written_by_two_ranks

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
_WIDE = {**_SMALL, "intermediate_size": 32, "num_key_value_heads": 1}
MODELS = {
    "llama": _WIDE,
    "llama_tied": {**_WIDE, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 320},
    "gpt_neox": {**_SMALL, "intermediate_size": 32},
    "gemma3_text": {**_WIDE, "head_dim": 8},
    "mixtral": {**_WIDE, "num_local_experts": 4},
    "qwen3_moe": {**_WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
}


def _model(name):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name.removesuffix("_tied"), **MODELS[name])).eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name, tmp_path):
    model = _model(name)
    out = export(written_by_two_ranks(tmp_path, model), tmp_path / "out", max_shard_bytes=20_000)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(out)("hello").input_ids
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all((out / file).exists() for file in index["weight_map"].values())


def test_the_weights_keep_the_type_of_training_unless_asked(tmp_path):
    path = written_by_two_ranks(tmp_path, _model("llama"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(export(path, tmp_path / "a")).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(export(path, tmp_path / "b", dtype="fp32")).dtype == torch.float32
    assert (tmp_path / "a" / "model.safetensors").exists()


def test_the_card_has_the_numbers_of_the_run(tmp_path):
    path = written_by_two_ranks(tmp_path, _model("llama"))
    lines = [
        {"kind": "train", "step": 3, "loss": 1.5, "tokens_total": 99},
        {"kind": "train", "step": 2, "loss": 2.5, "tokens_total": 66},
        {"kind": "eval", "step": 3, "loss": 1.25, "perplexity": 3.49},
        {"kind": "train", "step": 4, "loss": 9.5, "tokens_total": 132},
    ]
    lines.sort(key=lambda line: line["step"])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = (export(path, tmp_path / "alone") / "README.md").read_text()
    for row in ("| step | 3 |", "| training loss | 1.5 |", "| held-out loss | 1.25 |", "| perplexity | 3.49 |"):
        assert row in alone
    assert "| tokens read | 99 |" in alone and "DeepSpeed configuration" not in alone
    run_json = {
        "arguments": {"model_name_or_path": "org/base", "co2_country": "DEU"},
        "data": {"source": "a|b.txt", "num_tokens": 7},
        "identity": {"seed": 42, "global_batch": 8},
        "deepspeed_config": {"train_batch_size": 8},
        "measured": {"energy_kwh": 0.25, "co2_kg": 0.125},
    }
    (tmp_path / "run.json").write_text(json.dumps(run_json))
    card = (export(path, tmp_path / "whole") / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"
    for row in (
        "| source | a\\|b.txt |",
        "| global batch | 8 |",
        "last start) | 0.25 |",
        "grid of DEU by codecarbon) | 0.125 |",
        '"train_batch_size": 8',
        "```",
    ):
        assert row in card


def test_what_cannot_be_exported_is_refused(tmp_path):
    path = written_by_two_ranks(tmp_path, _model("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        export(path, tmp_path / "full")
    with pytest.raises(UserError, match="is no folder"):
        find_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(str(tmp_path / "full"))
    assert find_checkpoint(str(tmp_path)) == path
    (path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json has 2 bytes"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_are_read_as_hugging_face_writes_them():
    assert [parse_size(s) for s in ("5GB", "500MB", "2GiB", "10", "1.5kb")] == [5 * 10**9, 5 * 10**8, 2**31, 10, 1500]
    for wrong in ("", "GB", "-1GB", "0", "5XB"):
        with pytest.raises(UserError, match="max_shard_size"):
            parse_size(wrong)
