"""Text from a model under training."""

from typing import Any

import torch

from dstrain.models.config import max_positions


@torch.no_grad()
def sample_text(
    engine: Any, tokenizer: Any, samples: Any, *, seed: int, prompt_tokens: int = 16, max_new_tokens: int = 64
) -> tuple[str, str]:
    """Continue the beginning of a held-out sample. Returns (prompt, continuation). A collective: ranks run in step.

    engine: an `Engine` whose DeepSpeed module is a Hugging Face causal LM.
    """
    module = engine.deepspeed.module
    module.eval()
    positions = max_positions(module.config) or prompt_tokens + max_new_tokens
    prompt_tokens = min(prompt_tokens, positions // 2)
    ids = torch.tensor(samples[0]["input_ids"][:prompt_tokens].astype("int64"), device=engine.device)[None]
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # the same draws on every rank
    with engine.sequence.whole():
        output = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, positions - ids.shape[1]),
            do_sample=True,
            top_k=50,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or 0,
        )[0]
    torch.set_rng_state(state)
    return tokenizer.decode(ids[0]), tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)
