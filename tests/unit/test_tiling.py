"""MLPs in tiles: the same numbers, and less memory kept for the backward pass."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dstrain.errors import UserError
from dstrain.models.tiling import tile_mlps
from tests.distributed.parity import MODELS


def build(name: str):
    values = dict(MODELS[name])
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def loss_and_kept(model, ids) -> tuple[float, int]:
    """The loss after a backward pass, and the bytes that autograd kept for it."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), kept


@pytest.mark.parametrize(("name", "mlps"), [("llama", 2), ("gpt2", 2), ("gemma3", 3), ("qwen3", 2), ("gpt_neox", 2)])
def test_the_same_loss_and_gradients(name, mlps):
    whole, tiled = build(name), build(name)
    assert tile_mlps(tiled) == mlps
    ids = torch.randint(0, 320, (2, 250), generator=torch.Generator().manual_seed(1))
    (plain, kept), (found, kept_tiled) = loss_and_kept(whole, ids), loss_and_kept(tiled, ids)
    assert found == pytest.approx(plain, rel=1e-6)
    for (parameter, one), two in zip(whole.named_parameters(), tiled.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-6), parameter
    assert kept_tiled < 0.85 * kept


def test_a_model_without_mlps_is_refused():
    with pytest.raises(UserError, match="--tiled_mlp finds no MLP in MixtralForCausalLM"):
        tile_mlps(build("mixtral"))
