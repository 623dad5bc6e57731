"""Loss of held-out text, over whole global batches, so that any number of ranks gives the same figure."""

from collections.abc import Callable
from typing import Any

from dstrain.config import ResolvedConfig


def held_out_loss(
    engine: Any,
    samples: Any,
    resolved: ResolvedConfig,
    rank: int,
    *,
    max_batches: int | None,
    pad_token_id: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> tuple[float, int] | None:
    """Mean loss per label token in nats, and the number of label tokens. A collective.

    engine: an `Engine`; samples: the held-out `Samples`; max_batches: global batches at most. goes_on: asked before
    each batch, on every rank; once it says no, the result is None.
    """
    from dstrain.data.loader import eval_batches

    loss_sum, tokens = 0.0, 0.0
    for batches in eval_batches(
        samples,
        global_batch=resolved.global_batch,
        micro_batch=resolved.micro_batch,
        dp_rank=resolved.parallel.dp_rank(rank),
        dp_size=resolved.parallel.dp_size,
        max_batches=max_batches,
        pad_token_id=pad_token_id,
    ):
        if not goes_on():
            return None
        batch_loss, batch_tokens = engine.eval_batch(batches)
        loss_sum += float(batch_loss)
        tokens += float(batch_tokens)
    return loss_sum / max(tokens, 1.0), int(tokens)
