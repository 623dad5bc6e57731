"""A tiny model with the byte-level tokenizer, in memory and as a Hugging Face folder, for evaluation and generation.

Its weights are large enough that no two tokens are nearly as likely: a greedy text is the same however it is computed.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dstrain.data.tokenization import build_tokenizer

POSITIONS = 64
END = 256  # <|endoftext|> of the byte-level tokenizer
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
}


def build(kind: str = "llama") -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, vocab_size=258, initializer_range=0.3, **SIZES[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def save(folder: Path, kind: str = "llama", chat_template: str | None = None) -> Path:
    build(kind).save_pretrained(folder)
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def log_likelihood(model: Any, prompt: list[int], label: list[int]) -> float:
    """Of the label after the prompt, by one plain forward of both."""
    log_p = torch.log_softmax(model(torch.tensor([prompt + label])).logits[0].double(), dim=-1)
    return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(label))


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token, `count` times, each from a plain forward of all before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
