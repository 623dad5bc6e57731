"""Loss, perplexity and bits per byte of text, on the very samples that training's own evaluation would take."""

import math
from dataclasses import replace
from typing import Any

import torch

from dstrain import distributed
from dstrain.arguments import DataArguments
from dstrain.data import build_data
from dstrain.data.loader import collate
from dstrain.data.sources import find_files
from dstrain.data.tokenization import pad_token_id
from dstrain.evaluate.ranks import over_ranks
from dstrain.generate.model import LoadedModel
from dstrain.models.config import check_block_size
from dstrain.models.loss import check_loss_head, install_fused_loss, token_loss
from dstrain.parallel import Launch


def measure_perplexity(
    loaded: LoadedModel, files: list[str], dargs: DataArguments, *, limit: int | None, batch_size: int, launch: Launch
) -> dict[str, Any]:
    """The figures, plain JSON. limit: samples at most. A collective. Raises UserError."""
    block_size = dargs.block_size or loaded.block_size or min(1024, loaded.positions or 1024)
    check_block_size(loaded.model.config, block_size)
    find_files(files, "--data_file")  # what is wrong is said of this flag
    data = build_data(
        # What is evaluated is all held out; training data must be named too, and are not looked at.
        replace(dargs, train_file=files[:1], validation_file=files),
        loaded.tokenizer,
        seed=0,
        block_size=block_size,
        is_main_per_host=launch.is_main_on_host,
        barrier=distributed.barrier,
    )
    samples: Any = data.validation
    count = min(limit or len(samples), len(samples))
    batches = [list(range(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]
    model, pad = loaded.model, pad_token_id(loaded.tokenizer)
    head = install_fused_loss(model)
    check_loss_head(model, head, model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def loss_of(which: list[int]) -> list[tuple[float, int]]:
        batch = collate([samples[i] for i in batches[which[0]]], pad)
        loss, tokens = token_loss(model, head, {name: t.to(loaded.device) for name, t in batch.items()})
        return [(float(loss), int(tokens))]

    found = over_ranks([[i] for i in range(len(batches))], loss_of, launch)
    tokens = sum(n for _, n in found)
    loss = math.fsum(nats for nats, _ in found) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700.0 else None,  # exp overflows a double at 709.8
        "bits_per_byte": _bits_per_byte(loss, samples.store),
        "tokens": tokens,
        "num_samples": count,
        "block_size": block_size,
    }


def _bits_per_byte(loss: float, store: Any) -> float | None:
    """Bits of a UTF-8 byte of plain text: (tokens of the text / its bytes) x loss / ln 2 (The Pile, Gao et al. 2020,
    section 3.1). None for rows of prompt and completion, whose loss is not that of the text."""
    if store.is_rows:
        return None
    return store.facts["num_tokens"] / store.facts["num_bytes"] * loss / math.log(2)
