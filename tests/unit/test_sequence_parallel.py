"""What sequence parallelism computes without other ranks: masks of whole sequences, refusals, averaging arithmetic."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from dstrain.errors import UserError
from dstrain.models.sequence import attention_mask, check_sequence_parallel
from dstrain.parallel import ParallelDims

PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0, 0], list(range(12))])
PLAIN = torch.arange(12).expand(2, -1)


@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("positions", [PLAIN, PACKED], ids=["plain", "packed"])
def test_mask_is_the_one_transformers_makes(positions, window):
    config = MistralConfig(hidden_size=8, num_attention_heads=1, sliding_window=window, attn_implementation="sdpa")
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    theirs = make(
        config=config,
        inputs_embeds=torch.zeros(2, 12, 8),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    ours = attention_mask(positions, window)
    if theirs is None:
        assert ours is None
    else:
        causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        assert torch.equal(causal if ours is None else ours, theirs)


def test_heads_that_cannot_be_split_are_refused():
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    check_sequence_parallel(config, ParallelDims(3, sp_size=3))
    with pytest.raises(UserError, match="neither divides the model's 3 key-value heads"):
        check_sequence_parallel(config, ParallelDims(2, sp_size=2))
    with pytest.raises(UserError, match="does not divide the model's 6 attention heads"):
        check_sequence_parallel(config, ParallelDims(4, sp_size=4))
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match="linear_attention layers"):
        check_sequence_parallel(config, ParallelDims(3, sp_size=3))


def test_gradient_ranks():
    dims = ParallelDims(8, sp_size=4)
    assert [dims.gradient_ranks(stage) for stage in (0, 1, 2, 3)] == [2, 2, 2, 8]
    assert ParallelDims(8, tp_size=2).gradient_ranks(3) == 4
