"""Parameters, and the FLOPs that training on one token takes by the model's own arithmetic.

The convention of PaLM (https://arxiv.org/abs/2204.02311, appendix B) and nanoGPT's `estimate_mfu`: 6 N + 12 L H Q S for
forward and backward, without a discount for the causal mask, and without recomputation.

N: parameters without embeddings that are only looked up (input and position embeddings); a tied embedding counts once,
as the head. Of routed experts those count that a token visits. L: layers with attention, H: heads, Q: width of a head
(where queries and values differ, as in latent attention, their mean), S: sequence length, or the window where it is
shorter. Layers without attention (state space, convolution) add nothing beyond 6 N. Frozen parameters count 4 in place
of 6: they get no gradient.
"""

from typing import Any

from torch import nn

from dstrain.models.quantized import size_of

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_VISITED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_WINDOWED = ("sliding_attention", "chunked_attention")


def _size(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 has partitioned it or 4 bits of each are packed."""
    return size_of(parameter) or getattr(parameter, "ds_numel", parameter.numel())


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters (only of those that are trained), each tied one once; whole sizes also where ZeRO-3 has
    partitioned them."""
    return sum(_size(p) for p in model.parameters() if p.requires_grad or not trainable)


def _first(config: Any, names: tuple[str, ...]) -> Any:
    """The first of these settings that a configuration (or its block for the feed-forward part) has."""
    config = next(iter(_layer_configs(config)), config)
    configs = (config, getattr(config, "ffn_config", None))
    values = (getattr(c, name, None) for c in configs for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _layer_configs(config: Any) -> list[Any]:
    """One configuration per layer: the same, or in models whose layers differ (Gemma 4) each its own."""
    layers = getattr(config, "per_layer_config", None)
    return list(layers) if layers else [config] * getattr(config, "num_hidden_layers", 0)


def active_parameters(model: nn.Module, *, frozen: bool = False) -> float:
    """N of the formula above, or the frozen ones among them."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    kept = id(head.weight) if head is not None else None
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters() if id(p) != kept}
    experts, visited = _first(config, _EXPERTS), _first(config, _VISITED)
    share = min(1.0, visited / experts) if experts and visited else 1.0
    routed = {
        id(p)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
        if "shared" not in name
        for p in module.parameters()
    }
    counted = [p for p in model.parameters() if id(p) not in looked_up and not (frozen and p.requires_grad)]
    sizes = {id(p): _size(p) for p in counted}
    return sum(size * (share if key in routed else 1.0) for key, size in sizes.items())


def _attention_flops(config: Any, seq_len: int, kind: str) -> float:
    """Forward and backward of one layer's attention, per token."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or kind not in (*_WINDOWED, "full_attention", "attention", "hybrid"):
        return 0.0
    window = getattr(config, "sliding_window", None) if kind in _WINDOWED else None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = sum(getattr(config, name, None) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")) or width
    values = getattr(config, "v_head_dim", None) or width
    return 6.0 * heads * (queries + values) * min(seq_len, window or seq_len)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Training FLOPs (forward and backward) per processed token, in sequences of seq_len tokens."""
    config = model.config.get_text_config()
    layers = _layer_configs(config)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    kinds = kinds or ["full_attention"] * len(layers)
    attention = sum(_attention_flops(layer, seq_len, kind) for layer, kind in zip(layers, kinds, strict=False))
    return 6.0 * active_parameters(model) - 2.0 * active_parameters(model, frozen=True) + attention
