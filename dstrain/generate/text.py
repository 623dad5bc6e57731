"""Continue prompts, many at once: left padding, a cache of keys and values, an end at the end of a text."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from dstrain.data.tokenization import pad_token_id
from dstrain.generate.decoding import Decoding
from dstrain.generate.model import LoadedModel


def generation_config(loaded: LoadedModel, decoding: Decoding) -> GenerationConfig:
    """transformers' own form of `decoding`, whole: nothing in it is left to a model's defaults."""
    # Hugging Face's own default would keep the 50 likeliest.
    drawn = {"temperature": decoding.temperature or 1.0, "top_p": decoding.top_p or 1.0, "top_k": decoding.top_k or 0}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.draws,
        num_beams=decoding.num_beams,
        eos_token_id=loaded.stop_ids or None,
        pad_token_id=pad_token_id(loaded.tokenizer),
        **(drawn if decoding.draws else {}),
    )


@torch.inference_mode()
def continue_prompts(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], decoding: Decoding, streamer: Any = None
) -> list[list[int]]:
    """The new ids of each prompt, without the one that ended it; as long as `max_new_tokens` where none did.

    streamer: of transformers, for a single prompt. Draws come from torch's global state.
    """
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id(loaded.tokenizer))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = loaded.model.generate(
        ids.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        generation_config=generation_config(loaded, decoding),
        streamer=streamer,
    )
    return [_until_stop(row, loaded.stop_ids) for row in output[:, longest:].tolist()]


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, the longest first: what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
