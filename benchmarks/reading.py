"""How fast the order of a mixture is found, and a stream is read: in one process, without training.

    python -m benchmarks.reading

The mixture: three sources of 10 million samples together, of random lengths and of one length. The stream: the built-in
corpus as JSON lines, with the byte-level tokenizer. The last line is JSON.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.data.columns import ColumnFlags
from dstrain.data.mixture import Mixture
from dstrain.data.order import Order
from dstrain.data.packing import Samples
from dstrain.data.sources import BuiltinCorpus
from dstrain.data.stream import SHUFFLE_BUFFER, FileStream, StreamSamples
from dstrain.data.tokenization import TextEncoder, build_tokenizer

SIZES, WEIGHTS, SEED = (6_000_000, 3_999_000, 1_000), (5, 3, 2), 1
READ, BLOCK_SIZE, BLOCKS = 200_000, 1024, 8_000


class Sized(Samples):
    """Samples that have lengths and nothing else."""

    def __init__(self, token_counts: np.ndarray):
        self.block_size, self.token_counts, self.label_counts = BLOCK_SIZE, token_counts, token_counts - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        raise NotImplementedError


def timed(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def order_rates(lengths: Sequence[np.ndarray]) -> dict[str, float]:
    """Seconds to the first index and to one in the middle of the first epoch, and indices a second."""
    mixture = Mixture([Sized(counts) for counts in lengths], WEIGHTS)
    order = mixture.order(SEED)
    first_s = timed(lambda: order[0])
    rate = READ / timed(lambda: [order[i] for i in range(READ)])
    return {
        "first_index_s": first_s,
        "samples_per_second": rate,
        "index_in_the_middle_s": timed(lambda: mixture.order(SEED)[len(mixture) // 2]),
    }


def stream_rates(file: Path) -> dict[str, float]:
    encoder = TextEncoder(build_tokenizer("bytes"))
    stream = StreamSamples(FileStream([file], ColumnFlags()), encoder, BLOCK_SIZE, SHUFFLE_BUFFER)
    order = stream.order(SEED)
    try:
        first_s = timed(lambda: stream[order[0]])
        seconds = timed(lambda: [stream[order[i]] for i in range(BLOCKS)])
    finally:
        stream.close()
    return {"first_block_s": first_s, "tokens_per_second": BLOCKS * BLOCK_SIZE / (first_s + seconds)}


def main() -> None:
    draw = np.random.default_rng(SEED)
    plain = Order(sum(SIZES), SEED)
    found: dict[str, Any] = {
        "mixture of random lengths": order_rates([draw.integers(1, BLOCK_SIZE, size) for size in SIZES]),
        "mixture of one length": order_rates([np.full(size, BLOCK_SIZE) for size in SIZES]),
        "plain shuffle": {"samples_per_second": READ / timed(lambda: [plain[i] for i in range(READ)])},
    }
    with tempfile.TemporaryDirectory(prefix="reading_") as folder:
        file = Path(folder, "corpus.jsonl")
        rows = (getattr(row, "document", [""])[0] for row in BuiltinCorpus().documents())
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows if text))
        found["stream"] = stream_rates(file)
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.3g}" for key, value in figures.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
