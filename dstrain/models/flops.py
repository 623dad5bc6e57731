"""Parameters and model FLOPs, by the convention of PaLM (appendix B) and nanoGPT's estimate_mfu."""

from torch import nn


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, each tied one once; whole sizes also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Training FLOPs (forward and backward, recomputation not counted) per processed token: 6 N + 12 L H Q S."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    n = num_parameters(model)
    if not config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        n -= getattr(embedding, "ds_numel", embedding.numel())
    return 6.0 * n + 12.0 * config.num_hidden_layers * heads * width * seq_len
