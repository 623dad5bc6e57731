"""The fused loss on CUDA, by our own chunks and by Liger-Kernel, against plain torch."""

import pytest
import torch
from torch.nn import functional

from dstrain.models import cross_entropy
from dstrain.models.cross_entropy import LogitTransform, linear_cross_entropy


@pytest.mark.parametrize("kernel", ["ours", "liger"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.3, None), LogitTransform(2.0, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_torch(kernel, transform, dtype, monkeypatch):
    if kernel == "liger":
        pytest.importorskip("liger_kernel")
    else:
        monkeypatch.setattr(cross_entropy, "_liger", lambda: None)
    torch.manual_seed(0)
    hidden = torch.randn(1500, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = (0.3 * torch.randn(1000, 64, device="cuda")).to(dtype).requires_grad_()
    target = torch.randint(0, 1000, (1500,), device="cuda")
    target[::3] = -100
    raw = (hidden.float() @ weight.float().t()) * transform.scale
    logits = raw if transform.cap is None else transform.cap * torch.tanh(raw / transform.cap)
    expected = functional.cross_entropy(logits, target, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, None, target, transform)
    got = torch.autograd.grad(loss, (hidden, weight))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert torch.isclose(loss, expected, rtol=tolerance)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).float().norm() < tolerance * b.float().norm()
