"""Packed documents in models: they do not see each other, or the run is refused with what to write instead."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dstrain.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from dstrain.data.loader import collate
from dstrain.data.packing import PackedSamples, pack_documents
from dstrain.errors import UserError
from dstrain.models.packed import check_packing, packing_difference
from dstrain.models.sequence import attention_mask
from tests.unit.test_packing import store_of

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_ALTERNATING = ["sliding_attention"] * 5 + ["full_attention"]
MODELS = {
    "llama": _SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3": _SIZES,
    "gemma3_text": _SIZES | {"num_hidden_layers": 6, "layer_types": _ALTERNATING, "sliding_window": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}
SEPARATE = ["llama", "gpt2", "qwen3", "gemma3_text"]


def config_of(family):
    return AutoConfig.for_model(family, vocab_size=80, pad_token_id=0, eos_token_id=1, **MODELS[family])


def check(family, attention=None, micro_batch=2, packing=True):
    args = Arguments(ModelArguments(attn_implementation=attention), DataArguments(packing=packing), RunArguments())
    resolved = SimpleNamespace(micro_batch=micro_batch, precision="bf16", autocast_dtype=None)
    check_packing(config_of(family), args, resolved)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SEPARATE)
def test_packed_documents_do_not_see_each_other(family, attention):
    """Logits of a padded batch of packs, as the loader makes it, equal those of each document alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation=attention).eval()
    store = store_of([7, 5, 3, 9])
    samples = PackedSamples(store, pack_documents(store, np.arange(4), 16), 16, 4)
    batch = collate([samples[i] for i in range(len(samples))], pad_token_id=0)
    assert (batch["input_ids"].shape[1] > samples.token_counts).any()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row in range(len(samples)):
            length = samples.token_counts[row]
            starts = [*np.flatnonzero(samples[row]["position_ids"] == 0), length]
            for begin, end in itertools.pairwise(starts):
                alone = model(input_ids=batch["input_ids"][row : row + 1, begin:end]).logits[0]
                torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SEPARATE)
def test_the_check_lets_them_pass(family, attention):
    margs = ModelArguments(attn_implementation=attention)
    difference, used = packing_difference(config_of(family), margs, 2, torch.float32, torch.device("cpu"))
    assert difference <= 1e-5
    assert used == attention
    check(family, attention)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bloom"])
def test_models_that_do_not_look_at_positions_are_refused(family):
    with pytest.raises(UserError, match=rf"see each other in {family} .*leave --packing out$"):
        check(family)
    check(family, packing=False)


@pytest.fixture
def attention_function():
    """Registers an attention function of one's own, for which transformers makes no mask."""
    yield lambda function: ALL_ATTENTION_FUNCTIONS.register("own", function)
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("own")


def test_another_attention_is_named_where_it_helps(attention_function):
    attention_function(sdpa_attention_forward)
    with pytest.raises(UserError, match=r"in llama with own attention .*: write --attn_implementation sdpa, or leave"):
        check("llama", "own")


def test_attention_that_looks_in_single_rows_only(attention_function):
    """As flash attention does."""

    def one_row(module, query, key, value, mask, **kwargs):
        positions = kwargs.get("position_ids")
        mask = attention_mask(positions, None) if positions is not None and len(query) == 1 else None
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    attention_function(one_row)
    with pytest.raises(UserError, match=r"set train_micro_batch_size_per_gpu to 1, write --attn_implementation sdpa"):
        check("llama", "own")
    check("llama", "own", micro_batch=1)


def test_every_kind_of_layer_is_tried(attention_function):
    """One layer in six leaks."""

    def leaks_in_full_layers(module, query, key, value, mask, **kwargs):
        window, positions = kwargs.get("sliding_window"), kwargs["position_ids"]
        mask = attention_mask(positions, window) if window and positions is not None else None
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    attention_function(leaks_in_full_layers)
    with pytest.raises(UserError, match="gemma3_text with own attention"):
        check("gemma3_text", "own")
