"""A base in 4 bits on a GPU: quantized there, unit by unit, to what a CPU makes of it, and what is merged on a CPU."""

import pytest
import torch

from dstrain.arguments import ModelArguments
from dstrain.models.build import build_model, load_model_config
from dstrain.models.quantized import round_to_4bit, size_of
from tests.adapters import load_plain, write_base

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def test_a_gpu_computes_with_the_weights_that_are_merged(tmp_path):
    margs = ModelArguments(model_name_or_path=str(write_base(tmp_path)), lora_rank=4, load_in_4bit=True)
    config, device = load_model_config(margs), torch.device("cuda:0")
    model = build_model(margs, config, seed=1, dtype=torch.float32, device=device)
    assert {p.device for p in model.parameters()} == {device}
    assert sum(size_of(p) is not None for p in model.parameters()) == 2 * 7
    ids = (torch.arange(24) * 7 % 250).reshape(2, 12)
    logits = model(input_ids=ids.to(device)).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = load_plain(str(margs.model_name_or_path))
    round_to_4bit(merged, torch.float32)
    torch.testing.assert_close(logits.cpu(), merged(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
