"""The fused loss against plain torch: value and gradients, in every form of head that Hugging Face models have."""

import ctypes

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from dstrain.models import cross_entropy as module
from dstrain.models.cross_entropy import (
    IGNORE_INDEX,
    LogitTransform,
    cross_entropy,
    linear_cross_entropy,
)
from dstrain.models.loss import check_loss_head, install_fused_loss, shift_labels, token_loss

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {**SMALL, "tie_word_embeddings": False},
    "llama-tied": {**SMALL, "tie_word_embeddings": True},
    "cohere": {**SMALL, "logit_scale": 0.0625},
    "gemma2": {**SMALL, "final_logit_softcapping": 3.0},
    "gemma3_text": {**SMALL, "final_logit_softcapping": 5.0},
    "granite": {**SMALL, "logits_scaling": 8.0},
    "gptj": {**GPT, "rotary_dim": 4},  # its head has a bias
    "phi": {**SMALL},  # and so has this one's
    "recurrent_gemma": {
        **SMALL,
        "logits_soft_cap": 3.0,
        "lru_width": 32,
        "attention_window_size": 16,
        "num_hidden_layers": 3,
    },
    "gpt2": {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(name: str, dtype: torch.dtype = torch.float32, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.removesuffix("-tied"), **{**MODELS[name], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # logits large enough for caps and biases to matter
    return model.to(dtype).eval()


def make_batch(masked: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 16), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 16, generator=generator) < masked, -100)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_models_own_loss(name, dtype):
    model, batch = build(name, dtype), make_batch()
    target = shift_labels(batch["labels"])
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    expected = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum")
    expected.backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    head = install_fused_loss(model)
    assert check_loss_head(model, head, 97) is None
    loss, num = token_loss(model, head, batch)
    loss.backward()
    exact = dtype == torch.float32
    assert loss.dtype == torch.float32
    assert num.item() == (target != -100).sum().item()
    assert relative(loss, expected) < (1e-6 if exact else 5e-3)
    assert grads.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    total, error = torch.zeros(()), torch.zeros(())
    for n, p in model.named_parameters():
        if n in grads:
            total, error = total + grads[n].square().sum(), error + (grads[n] - p.grad.float()).square().sum()
    assert (error / total).sqrt() < (1e-6 if exact else 1e-2)
    # Unarmed, the head gives logits as before.
    assert torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits, logits)


@pytest.mark.parametrize("tokens", [1, 511, 512, 1500])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.3, None), LogitTransform(2.0, 4.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_with_bias(tokens, transform, smoothing, monkeypatch):
    monkeypatch.setattr("dstrain.models.cross_entropy.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("dstrain.models.cross_entropy.BLOCK_ELEMENTS", {"cpu": 100})
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, requires_grad=True) for shape in ((tokens, 16), (33, 16), (33,))
    )
    target = torch.randint(0, 33, (tokens,), generator=generator)
    target[::3] = -100

    def plain(h, w, b):
        raw = functional.linear(h, w, b) * transform.scale
        logits = raw if transform.cap is None else transform.cap * torch.tanh(raw / transform.cap)
        return functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)

    def fused(h, w, b):
        return linear_cross_entropy(h, w, b, target, transform, label_smoothing=smoothing)

    values, grads = [], []
    for function in (plain, fused):
        value = function(hidden, weight, bias)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value * 0.37, (hidden, weight, bias)))
    assert torch.allclose(values[0], values[1], rtol=1e-6, atol=1e-6)
    for a, b in zip(*grads, strict=True):
        assert relative(b, a) < 2e-6 or (a.norm() == 0 and b.norm() == 0)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.3, None), LogitTransform(2.0, 4.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_liger_gets_what_it_needs(transform, smoothing, monkeypatch):
    """What we hand to Liger-Kernel; its own kernels need a GPU (tests/gpu)."""

    class Stub:
        def __init__(self, ignore_index, reduction, softcap, label_smoothing, accum_dtype):
            assert (ignore_index, reduction, accum_dtype) == (-100, "sum", torch.float32)
            self.softcap, self.label_smoothing = softcap, label_smoothing

        def __call__(self, weight, hidden, target, bias):
            logits = functional.linear(hidden, weight, bias)
            logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
            return functional.cross_entropy(logits, target, reduction="sum", label_smoothing=self.label_smoothing)

    monkeypatch.setattr(module, "_liger", lambda: Stub)
    hidden, weight, bias = torch.randn(7, 8), torch.randn(11, 8), torch.randn(11)
    target = torch.tensor([1, 2, -100, 3, 4, 5, 10])
    for b in (None, bias):
        ours = linear_cross_entropy(hidden, weight, b, target, transform, label_smoothing=smoothing)
        assert relative(module._by_liger(hidden, weight, b, target, transform, smoothing), ours) < 1e-6


@pytest.mark.parametrize("fuses", [True, False])
def test_labels_are_smoothed_in_training_only(fuses):
    model, batch = build("llama"), make_batch()
    head = install_fused_loss(model)
    check_loss_head(model, head, 97)
    head.reason = head.reason if fuses else "asked for by the test"
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
    target, head.label_smoothing = shift_labels(batch["labels"]).flatten(), 0.3
    for training, smoothing in ((True, 0.3), (False, 0.0)):
        model.train(training)
        loss, _ = token_loss(model, head, batch)
        expected = functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
        assert relative(loss.detach(), expected.detach()) < 1e-6


def test_all_labels_masked():
    model, batch = build("llama"), make_batch(masked=2.0)
    head = install_fused_loss(model)
    loss, num = token_loss(model, head, batch)
    (loss / num.clamp(min=1)).backward()
    assert loss.item() == 0.0
    assert num.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_no_gradient_is_computed_without_need(monkeypatch):
    model, batch = build("llama"), make_batch()
    head = install_fused_loss(model)
    with torch.no_grad():
        assert not token_loss(model, head, batch)[0].requires_grad
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    token_loss(model, head, batch)[0].backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None


def test_autocast():
    model, batch = build("llama"), make_batch()
    head = install_fused_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = token_loss(model, head, batch)
        logits = model(input_ids=batch["input_ids"]).logits
    loss.backward()
    expected = cross_entropy(logits, shift_labels(batch["labels"]))
    assert relative(loss, expected) < 5e-3
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_shifted_labels_are_taken_as_they_are():
    model, batch = build("llama"), make_batch()
    head = install_fused_loss(model)
    shifted = {"input_ids": batch["input_ids"], "shift_labels": shift_labels(batch["labels"])}
    assert torch.equal(token_loss(model, head, batch)[0], token_loss(model, head, shifted)[0])


def test_router_loss():
    model, batch = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), make_batch()
    head = install_fused_loss(model)
    expected = model(**batch).loss  # Hugging Face's: mean token loss + coefficient * auxiliary loss
    loss, num = token_loss(model, head, batch)
    assert relative(loss / num, expected) < 1e-6


def _scales_silently(module, args, output):
    output.logits = output.logits * 1.5
    return output


def _slices_vocabulary(module, args, output):
    output.logits = output.logits[..., :90]
    return output


@pytest.mark.parametrize("hook", [_scales_silently, _slices_vocabulary])
def test_a_head_that_cannot_be_fused_is_found(hook):
    model, batch = build("llama"), make_batch()
    batch["labels"] = batch["labels"].clamp(max=89)
    model.register_forward_hook(hook)
    head = install_fused_loss(model)
    reason = check_loss_head(model, head, 90)
    assert reason is not None
    assert "logits" in reason
    logits = model(input_ids=batch["input_ids"]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), shift_labels(batch["labels"]).flatten(), reduction="sum")
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss, _ = token_loss(model, head, batch)
    loss.backward()
    assert relative(loss, expected) < 1e-6
    assert max(relative(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True)) < 1e-5


def test_a_head_that_is_no_linear_layer_is_found():
    model = build("llama")

    class Normed(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden / hidden.norm(dim=-1, keepdim=True))

    model.lm_head.__class__ = Normed
    head = install_fused_loss(model)
    assert check_loss_head(model, head, 97) == "Normed is not a plain linear layer"


def test_a_forward_that_breaks_on_the_loss_is_found():
    model = build("llama")
    model.register_forward_hook(lambda *args: args[2].logits[:, 3])
    head = install_fused_loss(model)
    assert "Error" in check_loss_head(model, head, 97)


def test_every_number_of_label_tokens_does_not_have_its_own_shapes():
    """oneDNN keeps a kernel for every shape of a product: memory grew with each batch of another number of labels."""
    shapes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                shapes.add(tuple(tuple(x.shape) for x in args))
            return func(*args, **(kwargs or {}))

    hidden, weight = (torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (256, 16))
    for kept in range(1, 257, 5):
        target = torch.full((256,), IGNORE_INDEX)
        target[:kept] = 3
        with Products():
            linear_cross_entropy(hidden, weight, None, target).backward()
    assert 3 <= len(shapes) <= 3 * 4  # logits, gradient of hidden, gradient of weight; for 64, 128, 192 and 256 tokens


def test_onednn_keeps_a_kernel_for_every_shape(capfd):
    """Why shapes should be few (docs/deepspeed-facts.md)."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no products in bf16 on this CPU")
    weight = torch.randn(72, 104, dtype=torch.bfloat16)  # of no other test
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        for num_tokens in (133, 144, 155, 133, 144, 155):
            torch.randn(num_tokens, 72, dtype=torch.bfloat16) @ weight
    ctypes.CDLL(None).fflush(None)  # oneDNN prints through C
    made = [word for line in capfd.readouterr().out.splitlines() for word in line.split(",") if "create:" in word]
    assert made == ["create:cache_miss"] * 3 + ["create:cache_hit"] * 3
