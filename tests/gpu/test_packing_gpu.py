"""Packed documents under flash attention: apart in a micro-batch of one row, seen in more."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from dstrain.arguments import ModelArguments
from dstrain.models.packed import bound_of, packing_difference
from tests.unit.test_packed_models import SEPARATE, config_of


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
@pytest.mark.parametrize("family", SEPARATE)
def test_flash_attention(family):
    margs, bound = ModelArguments(attn_implementation="flash_attention_2"), bound_of("flash_attention_2")
    one, two = (
        packing_difference(config_of(family), margs, rows, torch.bfloat16, torch.device("cuda:0"))[0] for rows in (1, 2)
    )
    assert one <= bound < two


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SEPARATE)
def test_other_attention(family, attention):
    margs = ModelArguments(attn_implementation=attention)
    difference, _ = packing_difference(config_of(family), margs, 2, torch.bfloat16, torch.device("cuda:0"))
    assert difference <= 1e-5
