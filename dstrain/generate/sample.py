"""Text from a model under training."""

from typing import Any

import torch

from dstrain.data.tokenization import TextEncoder, pad_token_id
from dstrain.models.config import max_positions


@torch.no_grad()
def sample_text(
    engine: Any, tokenizer: Any, prompt_ids: list[int], *, seed: int, max_new_tokens: int = 64
) -> tuple[str, str]:
    """Continue a prompt. Returns (what of it was read, continuation). A collective: ranks run in step.

    engine: an `Engine` whose DeepSpeed module is a Hugging Face causal LM. A prompt longer than half of the model's
    positions is read from its end. Random states are left as they were: a run with samples is the run without them.
    """
    module = engine.deepspeed.module
    module.eval()
    positions = max_positions(module.config) or 2 * len(prompt_ids) + max_new_tokens
    ids = torch.tensor(prompt_ids[-max(1, positions // 2) :], device=engine.device)[None]
    devices = [] if engine.device.type == "cpu" else [engine.device]
    with torch.random.fork_rng(devices, device_type=engine.device.type), engine.sequence.whole():
        torch.manual_seed(seed)  # the same draws on every rank
        output = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, positions - ids.shape[1]),
            do_sample=True,
            top_k=50,
            use_cache=True,
            pad_token_id=pad_token_id(tokenizer),
        )[0]
    return tokenizer.decode(ids[0]), tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)


def prompt_to_sample(tokenizer: Any, samples: Any, text: str | None, num_tokens: int = 16) -> list[int]:
    """The ids of `--sample_prompt`, or without one the beginning of a held-out sample."""
    if text is None:
        return samples[0]["input_ids"][:num_tokens].tolist()
    encoder = TextEncoder(tokenizer)
    return [*encoder.affixes[0].tolist(), *encoder.encode([text])[0].tolist()]
