"""From flags to training data: `build_data`."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dstrain.arguments import DataArguments
from dstrain.data.columns import ColumnFlags
from dstrain.data.mixture import Concatenation, Mixture, mixture_facts, mixture_parts
from dstrain.data.order import epoch_order, hash_words, mix
from dstrain.data.packing import BlockSamples, PackedSamples, RowSamples, Samples, Subset, pack_documents
from dstrain.data.rows import NUM_PLACES, describe_skipped
from dstrain.data.segments import RowRules
from dstrain.data.sources import build_sources, hash_json, write_text
from dstrain.data.statistics import length_facts
from dstrain.data.store import FORMAT_VERSION, TokenStore, find_or_write_store
from dstrain.data.stream import StreamSamples
from dstrain.data.stream_source import open_stream
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD_OUT = 0.01  # share of the training documents that is kept for validation when the user names none
# None: numpy, on a full disk too, says only how much it wrote
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, None)
_FEW_DOCUMENTS = 100  # with fewer documents of plain text, blocks are held out instead


@dataclass(frozen=True)
class TrainingData:
    """Training and held-out samples, and what is known about them.

    sha256: of the sources' content alone. samples_sha256: also of the tokenizer, the block, packing and the split, so
    that equal hashes mean equal samples. facts: for `run.json`, see `_facts`. notices: lines for the user. files: of a
    stream, by name, what is known of each without reading it.
    """

    train: Samples
    validation: Samples | None
    sha256: str
    samples_sha256: str
    source: str
    facts: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str | dict[str, str]:
        """JSON: what must be the same when a run goes on."""
        return {**self.files, "samples": self.samples_sha256} if self.files else self.samples_sha256

    @property
    def num_tokens(self) -> int:
        """Tokens in all training samples together, without padding."""
        return self.train.num_tokens

    @property
    def num_label_tokens(self) -> int:
        """Those of them that carry loss."""
        return self.train.num_label_tokens


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

    One process of each host reads and writes while the others wait in `barrier`, then all map the same files. What
    stops that process is raised in all of them. cache_dir: None is `default_cache_dir()`. Raises UserError.
    """
    if dargs.streaming:
        common = {"is_main_per_host": is_main_per_host, "barrier": barrier, "cache_dir": cache_dir}
        return _build_stream(dargs, tokenizer, seed=seed, block_size=block_size, **common)
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    encoder = TextEncoder(tokenizer)
    recipe = [FORMAT_VERSION, asdict(dargs), encoder.sha256, seed, block_size]
    answer_file = cache / "requests" / f"{hash_json(recipe)[:32]}.json"
    if is_main_per_host:
        try:
            _prepare_and_tell(answer_file, dargs, encoder, cache, seed, block_size)
        finally:
            barrier()
    else:
        barrier()
    answer = _read_answer(answer_file)
    return _open(answer, dargs, encoder, seed, block_size)


def _build_stream(
    dargs: DataArguments, tokenizer: "PreTrainedTokenizerBase", *, block_size: int, **common: Any
) -> TrainingData:
    """Training data that are read while training; held-out text has files of its own, read before as always."""
    source, encoder = open_stream(dargs), TextEncoder(tokenizer)
    train = StreamSamples(source, encoder, dargs, block_size)
    _check_row_flags(dargs, source.description, is_text=train.is_text)
    facts = {"source": source.description, "files": source.identity, "kinds": train.kinds, "block_size": block_size}
    facts |= {"packing": dargs.packing, "shuffle_buffer": train.window}
    chosen = [dargs.max_train_samples, dargs.bad_rows, dargs.packing, dargs.train_on_prompts, dargs.long_rows]
    recipe = [source.identity, encoder.sha256, block_size, train.window, astuple(ColumnFlags.of(dargs)), *chosen]
    notices: list[str] = []
    if not dargs.validation_file:
        held_out, facts["validation"] = None, "none: a stream holds nothing out (name a --validation_file)"
    else:
        read_before = replace(
            dargs,
            streaming=False,
            shuffle_buffer=None,
            dataset_name=None,
            dataset_config_name=None,
            max_train_samples=None,
            train_file=dargs.validation_file,
        )
        data = build_data(read_before, tokenizer, block_size=block_size, **common)
        held_out, notices = data.validation, data.notices
        recipe.append(data.samples_sha256)
        facts |= {name: value for name, value in data.facts.items() if "validation" in name}
    return TrainingData(
        train=train,
        validation=held_out,
        sha256=hash_json(source.identity),
        samples_sha256=hash_json([*recipe, FORMAT_VERSION]),
        source=source.description,
        facts=facts,
        notices=notices,
        files=source.identity,
    )


def _prepare_and_tell(
    answer_file: Path, dargs: DataArguments, encoder: TextEncoder, cache: Path, seed: int, block_size: int
) -> None:
    """Do the work of the host and leave the outcome, good or bad, where its other processes look for it."""
    try:
        answer_file.unlink(missing_ok=True)
        try:
            answer = _prepare(dargs, encoder, cache)
            _open(answer, dargs, encoder, seed, block_size)  # makes the packs, and finds what is wrong with the samples
        except UserError as error:
            answer = {"problems": error.problems}
        write_text(answer_file, json.dumps(answer))
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"the data cache {cache} cannot be written ({error.strerror or error}): "
            "free some space, or name another place with XDG_CACHE_HOME"
        ) from None


def _read_answer(answer_file: Path) -> dict[str, Any]:
    if not answer_file.exists():
        raise UserError("the training data could not be prepared: see the message of this host's first process")
    answer = json.loads(answer_file.read_text())
    if "problems" in answer:
        raise UserError(answer["problems"])
    return answer


def _prepare(dargs: DataArguments, encoder: TextEncoder, cache: Path) -> dict[str, Any]:
    """Tokenize what is not in the cache. Returns where it is, as JSON."""
    if parts := mixture_parts(dargs):
        return {"mixture": [[_prepare_source(part, encoder, cache), weight] for part, weight in parts]}
    return _prepare_source(dargs, encoder, cache)


def _prepare_source(dargs: DataArguments, encoder: TextEncoder, cache: Path) -> dict[str, Any]:
    train, validation = build_sources(dargs, cache)
    rules = RowRules(dargs.bad_rows, dargs.train_on_prompts)
    answer: dict[str, Any] = {
        "source": train.description,
        "sha256": train.sha256,
        "split_seeded": train.split_seeded,
        "train": str(find_or_write_store(cache, train, encoder, rules)),
        "validation": None,
    }
    if validation is not None:
        answer["validation"] = str(find_or_write_store(cache, validation, encoder, rules))
        answer["validation_source"] = validation.description
        answer["sha256"] = hashlib.sha256(f"{train.sha256} {validation.sha256}".encode()).hexdigest()
    return answer


def _open(
    answer: dict[str, Any], dargs: DataArguments, encoder: TextEncoder, seed: int, block_size: int
) -> TrainingData:
    if "mixture" in answer:
        parts = [(_open(part, dargs, encoder, seed, block_size), weight) for part, weight in answer["mixture"]]
        return _mixed(parts, dargs, seed)
    store = TokenStore.open(Path(answer["train"]))
    documents, skipped = _usable_documents(store, dargs, block_size)
    split_seed = seed if answer["split_seeded"] else 0
    validation: Samples | None = None
    skipped_validation: dict[str, Any] = {}
    if answer["validation"]:
        held_out_store = TokenStore.open(Path(answer["validation"]))
        held_out, skipped_validation = _usable_documents(held_out_store, dargs, block_size)
        train = _build_samples(store, documents, block_size, dargs)
        validation = _build_samples(held_out_store, held_out, block_size, dargs)
        split = answer["validation_source"]
    elif len(documents) >= (2 if store.is_rows else _FEW_DOCUMENTS):
        is_held_out = held_out_documents(store.hashes[documents], split_seed)
        train = _build_samples(store, documents[~is_held_out], block_size, dargs)
        validation = _build_samples(store, documents[is_held_out], block_size, dargs)
        split = f"{is_held_out.sum()} of the {len(documents)} training documents"
    else:
        train, validation, split = _hold_out_samples(_build_samples(store, documents, block_size, dargs), split_seed)
    for name, samples in (("training", train), ("validation", validation)):
        if samples is not None and samples.num_label_tokens == 0:
            raise UserError(f"the {name} data ({answer['source']}) hold no token to predict: give more text")
    chosen = [dargs.packing, dargs.train_on_prompts, dargs.long_rows]
    identity = [answer["sha256"], encoder.sha256, block_size, *chosen, split_seed, FORMAT_VERSION]
    return TrainingData(
        train=train,
        validation=validation,
        sha256=answer["sha256"],
        samples_sha256=hash_json(identity),
        source=answer["source"],
        facts=_facts(store, train, validation, split)
        | {"skipped_rows": skipped, "skipped_validation_rows": skipped_validation},
        notices=[
            *describe_skipped(skipped, answer["source"]),
            *describe_skipped(skipped_validation, answer.get("validation_source", "")),
        ],
    )


def _mixed(parts: list[tuple[TrainingData, float]], dargs: DataArguments, seed: int) -> TrainingData:
    """One mixture of several sources; each has held out its own samples, unless there is a validation file for all."""
    sources, weights = [part for part, _ in parts], [weight for _, weight in parts]
    train = Mixture([source.train for source in sources], weights)
    held_out = [source.validation for source in sources if source.validation is not None]
    validation: Samples | None = None
    if held_out:
        validation = held_out[0] if dargs.validation_file else Concatenation(held_out)
    facts = mixture_facts(train, seed, [source.facts for source in sources])
    facts["num_validation_samples"] = len(validation) if validation is not None else 0
    facts["num_validation_tokens"] = validation.num_tokens if validation is not None else 0
    return TrainingData(
        train=train,
        validation=validation,
        sha256=hash_json([source.sha256 for source in sources]),
        samples_sha256=hash_json([[source.samples_sha256, weight] for source, weight in parts]),
        source=facts["source"],
        facts=facts,
        notices=list(dict.fromkeys(notice for source in sources for notice in source.notices)),
    )


def _usable_documents(store: TokenStore, dargs: DataArguments, block_size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """(the documents that the flags let in: int64, ascending; the rows left out, as `SkippedRows` counts them)."""
    _check_row_flags(dargs, store.facts["source"], is_text=not store.is_rows)
    skipped = dict(store.facts["skipped_rows"])
    documents, long = np.arange(len(store.lengths)), np.flatnonzero(store.lengths > block_size)
    if dargs.long_rows.startswith("cut") or len(long) == 0:
        return documents, skipped
    if dargs.long_rows == "refuse":
        raise UserError(
            f"rows longer than a block of {block_size} tokens: {len(long):,}, the first at {store.place(long[0])} with "
            f"{store.lengths[long[0]]:,}: raise --block_size, or write --long_rows cut, cut_start or skip"
        )
    skipped["longer than the block"] = {"rows": len(long), "first": [store.place(i) for i in long[:NUM_PLACES]]}
    return np.delete(documents, long), skipped


def _check_row_flags(dargs: DataArguments, source: str, *, is_text: bool) -> None:
    for name, default in (("long_rows", "cut"), ("train_on_prompts", False)):
        if getattr(dargs, name) != default and is_text:
            raise UserError(f"--{name} is for rows of prompts or chats, and {source} is plain text: leave it out")


def _build_samples(store: TokenStore, documents: np.ndarray, block_size: int, dargs: DataArguments) -> Samples:
    keep_end = dargs.long_rows == "cut_start"
    if dargs.packing:
        return PackedSamples(store, _packs(store, documents, block_size, keep_end), block_size, len(documents))
    if store.is_rows:
        return RowSamples(store, documents, block_size, keep_end)
    return BlockSamples(store, documents, block_size)


def _packs(store: TokenStore, documents: np.ndarray, block_size: int, keep_end: bool) -> np.ndarray:
    """`pack_documents`, kept beside the tokens: int64 [p, 4], memory-mapped."""
    name = hashlib.sha256(documents.astype(np.int64).tobytes()).hexdigest()[:16]
    file = store.folder / f"packs-{block_size}-{name}{'-ends' if keep_end else ''}.npy"
    if not file.exists():
        scratch = file.with_name(f"{file.stem}.tmp-{os.getpid()}.npy")
        np.save(scratch, pack_documents(store, documents, block_size, keep_end))
        scratch.replace(file)
    return np.load(file, mmap_mode="r")


def held_out_documents(hashes: np.ndarray, seed: int) -> np.ndarray:
    """bool [n]: about 1 % of the documents, at least one, never all.

    A function of each document's text and the seed alone: copies of a document fall on the same side, and a document
    stays where it is when others are added. hashes: uint64 [n].
    """
    scores = mix(np.asarray(hashes) + hash_words(seed))
    held_out = scores < np.uint64(_HELD_OUT * 2.0**64)
    if not held_out.any():
        held_out = scores == scores.min()
    if held_out.all():  # nothing but copies of one document
        held_out[1:] = False
    return held_out


def _hold_out_samples(samples: Samples, seed: int) -> tuple[Samples, Samples | None, str]:
    """Few documents: 1 % of the samples, at least one, drawn by the seed; none when there is only one sample."""
    if len(samples) < 2:
        return samples, None, "none: there is only one sample"
    count = max(1, round(len(samples) * _HELD_OUT))
    drawn = epoch_order(len(samples), seed, -1, 0, len(samples))
    train, validation = Subset(samples, np.sort(drawn[count:])), Subset(samples, np.sort(drawn[:count]))
    return train, validation, f"{count} of the {len(samples)} training samples"


def _facts(store: TokenStore, train: Samples, validation: Samples | None, split: str) -> dict[str, Any]:
    """JSON for `run.json`: what was read, what became of it, and how much of it carries loss."""
    return {
        "source": store.facts["source"],
        "kinds": store.facts["kinds"],
        "num_documents": store.facts["num_documents"],
        "num_empty_documents": store.facts["num_empty_documents"],
        "num_bytes": store.facts["num_bytes"],
        "tokenization_s": store.facts["tokenization_s"],
        "num_cut_rows": getattr(train, "num_cut", 0),
        "num_rows_without_loss": getattr(train, "num_without_loss", 0),
        "block_size": train.block_size,
        "num_samples": len(train),
        "num_tokens": train.num_tokens,
        "num_label_tokens": train.num_label_tokens,
        "loss_share": round(train.num_label_tokens / train.num_tokens, 6),
        "tokens_per_sample": round(train.num_tokens / len(train), 2),
        "packing_efficiency": round(train.num_tokens / (len(train) * train.block_size), 6),
        **length_facts(store.lengths, train.block_size),
        "validation": split,
        "num_validation_samples": len(validation) if validation is not None else 0,
        "num_validation_tokens": validation.num_tokens if validation is not None else 0,
    }


def check_same_data(found: list[tuple[str, str]]) -> None:
    """(host, hash of its samples) of every rank. Raises UserError: each host reads files of its own."""
    other = next((host for host, sha256 in found if sha256 != found[0][1]), None)
    if other is not None:
        raise UserError(
            f"{found[0][0]} and {other} have different training data: give every host the same files and tokenizer "
            "(the built-in corpus is Python's own sources: the same Python version)"
        )
