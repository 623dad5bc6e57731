"""What training data amount to: for `run.json`, for the screen before training, and for `dstrain data`."""

from typing import Any

import numpy as np

_LENGTHS = {"min": 0, "median": 50, "p95": 95, "max": 100}
_NOTES = {
    "num_empty_documents": "empty documents",
    "num_cut_rows": "rows cut at the block",
    "num_rows_without_loss": "rows left out: without loss",
}


def length_facts(lengths: np.ndarray, block_size: int) -> dict[str, Any]:
    """JSON of how long documents are. lengths: int64 [documents], in tokens, special ones included."""
    found = np.percentile(lengths, list(_LENGTHS.values()), method="nearest").astype(int).tolist()
    return {
        "document_lengths": dict(zip(_LENGTHS, found, strict=True)),
        "share_longer_than_block": round(float((lengths > block_size).mean()), 6),
    }


def describe(facts: dict[str, Any]) -> str:
    """Two lines from the facts of `TrainingData`, or two for each source of a mixture; one of a stream."""
    if "sources" in facts:
        return "\n".join(describe(source) for source in facts["sources"])
    if "shuffle_buffer" in facts:
        return (
            f"data: {facts['source']}: {' and '.join(facts['kinds'])}, shuffled in windows of "
            f"{facts['shuffle_buffer']:,} samples; how many there are, how long, and what share of them carries loss "
            "shows only in training"
        )
    lengths = facts["document_lengths"]
    notes = [f"; {facts[name]:,} {what}" for name, what in _NOTES.items() if facts.get(name)]
    if "share_reached" in facts:
        notes.append(f"; {facts['share_reached']:.1%} of the mixture")
    return (
        f"data: {facts['source']}: {facts['num_documents']:,} documents of {lengths['min']:,} to {lengths['max']:,} "
        f"tokens (median {lengths['median']:,}, 95 % up to {lengths['p95']:,}), "
        f"{facts['share_longer_than_block']:.1%} longer than a block of {facts['block_size']:,}\n"
        f"data: {facts['num_samples']:,} samples of {facts['num_tokens']:,} tokens fill "
        f"{facts['packing_efficiency']:.1%} of their blocks, {facts['loss_share']:.1%} carry loss{''.join(notes)}"
    )
