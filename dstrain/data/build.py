"""From flags to training data: `build_data`."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dstrain.arguments import DataArguments
from dstrain.data.packing import BlockSamples, Samples
from dstrain.data.sources import BuiltinCorpus, Source
from dstrain.data.store import TokenStore, find_or_write_store
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Training and held-out samples, and the facts about them for `run.json`.

    sha256: of the sources' content alone; samples_sha256: also of the tokenizer, the block and the split, so equal
    hashes mean equal samples. num_tokens: tokens in the training samples; num_label_tokens: those that carry loss.
    """

    train: Samples
    validation: Samples | None
    sha256: str
    samples_sha256: str
    source: str
    num_documents: int
    num_tokens: int
    num_label_tokens: int
    num_empty_documents: int

    @property
    def loss_share(self) -> float:
        """Share of the training tokens that carry loss."""
        return self.num_label_tokens / self.num_tokens


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/dstrain`, or `~/.cache/dstrain`. Everything in it can be made again: delete it at will."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dstrain"


def build_data(
    dargs: DataArguments,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    block_size: int,
    is_main_per_host: bool,
    barrier: Callable[[], None],
    cache_dir: Path | str | None = None,
) -> TrainingData:
    """Tokenize (or find in the cache) the data that the flags name; every rank calls this.

    One process of each host reads and writes while the others wait in `barrier`; an error of that process is raised
    in all of them. Raises UserError.
    """
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    encoder = TextEncoder(tokenizer)
    request = json.dumps([asdict(dargs), encoder.sha256, seed, block_size])
    answer_file = cache / "requests" / f"{hashlib.sha256(request.encode()).hexdigest()[:32]}.json"
    if is_main_per_host:
        try:
            answer = _prepare(dargs, encoder, cache)
        except UserError as error:
            answer = {"problems": error.problems}
        answer_file.parent.mkdir(parents=True, exist_ok=True)
        answer_file.write_text(json.dumps(answer))
    barrier()
    answer = json.loads(answer_file.read_text())
    if "problems" in answer:
        raise UserError(answer["problems"])
    store = TokenStore.open(Path(answer["train"]))
    documents = np.arange(len(store.lengths))
    held_out = (store.hashes % np.uint64(100)) == 0
    train = BlockSamples(store, documents[~held_out], block_size)
    validation = BlockSamples(store, documents[held_out], block_size)
    return TrainingData(
        train=train,
        validation=validation,
        sha256=answer["sha256"],
        samples_sha256=hashlib.sha256(request.encode() + answer["sha256"].encode()).hexdigest(),
        source=store.facts["source"],
        num_documents=len(documents),
        num_tokens=train.num_tokens,
        num_label_tokens=train.num_label_tokens,
        num_empty_documents=store.facts["num_empty_documents"],
    )


def _prepare(dargs: DataArguments, encoder: TextEncoder, cache: Path) -> dict:
    source: Source = BuiltinCorpus(dargs.max_train_samples)
    return {"train": str(find_or_write_store(cache, source, encoder)), "sha256": source.sha256}
