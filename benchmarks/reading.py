"""How fast the order of a mixture is found, and a stream is read: in one process, without training.

    python -m benchmarks.reading

The mixture: three sources of 10 million samples together, of random lengths and of one length. The streams: the
built-in corpus as JSON lines of text and of chats, with the byte-level tokenizer. The last line is JSON.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.arguments import DataArguments
from dstrain.data.mixture import Mixture
from dstrain.data.order import Order
from dstrain.data.packing import Samples
from dstrain.data.rows import Row
from dstrain.data.sources import BuiltinCorpus
from dstrain.data.stream import StreamSamples
from dstrain.data.stream_source import open_stream
from dstrain.data.tokenization import TextEncoder, build_tokenizer

SIZES, WEIGHTS, SEED = (6_000_000, 3_999_000, 1_000), (5, 3, 2), 1
READ, BLOCK_SIZE, SAMPLES = 200_000, 1024, 4_000
TEMPLATE = Path(__file__).parent.parent / "examples/chat/template.jinja"


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


def chats(texts: list[str]) -> list[dict]:
    """One to three questions of 60 characters, each with an answer of 120."""
    parts = [text[at : at + 60] for text in texts for at in range(0, len(text), 60)]
    turns = [
        [{"role": "user", "content": parts[i]}, {"role": "assistant", "content": parts[i + 1] + parts[i + 2]}]
        for i in range(0, len(parts) - 2, 3)
    ]
    return [{"messages": [m for turn in turns[i : i + 1 + i // 3 % 3] for m in turn]} for i in range(0, len(turns), 3)]


def stream_rates(file: Path, **flags: Any) -> dict[str, float]:
    """Seconds of CPU, which others on the machine change little."""
    encoder = TextEncoder(build_tokenizer("bytes", chat_template=str(TEMPLATE)))
    dargs = DataArguments(streaming=True, train_file=[str(file)], **flags)
    begin = time.process_time()
    stream = StreamSamples(open_stream(dargs), encoder, dargs, BLOCK_SIZE)
    order = stream.order(SEED)
    try:
        num_tokens = len(stream[order[0]]["input_ids"])
        first_s = time.process_time() - begin
        num_tokens += sum(len(stream[order[i]]["input_ids"]) for i in range(1, SAMPLES))
        seconds = time.process_time() - begin
    finally:
        stream.close()
    return {
        "first_sample_cpu_s": first_s,
        "tokens_per_cpu_second": num_tokens / seconds,
        "tokens_per_sample": num_tokens / SAMPLES,
    }


def main() -> None:
    draw = np.random.default_rng(SEED)
    plain = Order(sum(SIZES), SEED)
    found: dict[str, Any] = {
        "mixture of random lengths": order_rates([draw.integers(1, BLOCK_SIZE, size) for size in SIZES]),
        "mixture of one length": order_rates([np.full(size, BLOCK_SIZE) for size in SIZES]),
        "plain shuffle": {"samples_per_second": READ / timed(lambda: [plain[i] for i in range(READ)])},
    }
    with tempfile.TemporaryDirectory(prefix="reading_") as folder:
        texts = [row.document[0] for row in BuiltinCorpus().documents() if isinstance(row, Row)]
        for name, rows in (("text", [{"text": text} for text in texts]), ("chats", chats(texts))):
            file = Path(folder, f"{name}.jsonl")
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            found[f"stream of {name}"] = stream_rates(file)
        found["stream of chats, packed"] = stream_rates(file, packing=True)
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.3g}" for key, value in figures.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
