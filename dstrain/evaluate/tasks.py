"""The tasks of `dstrain evaluate`: from flags and a model to figures. Each is a collective."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstrain.errors import UserError
from dstrain.evaluate.classification import choose, encode_labels, find_labels, score_rows
from dstrain.evaluate.cli import decoding_of, metrics_of, row_arguments
from dstrain.evaluate.metrics import classification_metrics, text_metrics
from dstrain.evaluate.perplexity import measure_perplexity
from dstrain.evaluate.ranks import over_ranks
from dstrain.generate.model import LoadedModel
from dstrain.generate.prompts import fit_prompts, read_documents, room_for_prompts
from dstrain.generate.text import batches_by_length, continue_prompts
from dstrain.parallel import Launch


@dataclass(frozen=True)
class Outcome:
    """metrics: the figures; settings: how they came about; rows: what `--predictions` writes, an object a row."""

    metrics: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Rows:
    """prompts: their tokens, cut where they were too long."""

    completions: list[str]
    texts: list[str]
    prompts: list[list[int]]
    cut: list[bool]
    settings: dict[str, Any]


def _read_pairs(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts and completions of all rows. Raises UserError."""
    rows = read_documents(args.data_file, "--data_file", row_arguments(args), args.max_eval_samples)
    if plain := next((i for i, row in enumerate(rows, 1) if len(row) != 2), None):
        raise UserError(
            f"row {plain} of --data_file is plain text, and --task {args.task} needs a prompt and a completion: "
            "name the columns prompt and completion"
        )
    return [row[0] for row in rows], [row[-1] for row in rows]


def _fit(
    args: argparse.Namespace, loaded: LoadedModel, texts: list[str], completions: list[str], answer_tokens: int
) -> _Rows:
    """Rows whose prompts leave room for answers of so many tokens."""
    max_length = args.max_length or loaded.max_length
    if args.max_length and loaded.positions and args.max_length > loaded.positions:
        raise UserError(f"--max_length is {args.max_length}, the model has {loaded.positions} positions")
    whole = prompts = loaded.encode_prompts(texts)
    side = args.truncation_side or "left"
    if max_length is not None:
        prompts = fit_prompts(whole, room_for_prompts(max_length, answer_tokens), side)
    cut = [len(a) < len(b) for a, b in zip(prompts, whole, strict=True)]
    settings = {"num_rows": len(texts), "num_cut": sum(cut), "max_length": max_length, "truncation_side": side}
    return _Rows(completions, texts, prompts, cut, settings)


def _perplexity(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    found = measure_perplexity(
        loaded,
        args.data_file,
        row_arguments(args),
        limit=args.max_eval_samples,
        batch_size=args.batch_size,
        launch=launch,
    )
    settings = {name: found.pop(name) for name in ("tokens", "num_samples", "block_size")}
    return Outcome(found, settings)


def _classification(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    texts, golds = _read_pairs(args)
    labels = encode_labels(loaded, find_labels(args.labels or [], golds))
    positive = args.positive_label or labels.texts[-1]
    if positive not in labels.texts:
        raise UserError(f"--positive_label {positive!r} is none of the labels {', '.join(map(repr, labels.texts))}")
    rows = _fit(args, loaded, texts, golds, labels.longest)
    scores = score_rows(loaded, rows.prompts, labels, batch_size=args.batch_size, launch=launch)
    chosen = choose(scores, labels, length_normalized=args.length_normalized)
    lines = [
        {
            "row": i + 1,
            "gold": golds[i],
            "predicted": chosen[i],
            "log_likelihoods": dict(zip(labels.texts, scores[i], strict=True)),
            "prompt_tokens": len(rows.prompts[i]),
            "prompt_cut": rows.cut[i],
        }
        for i in range(len(golds))
    ]
    settings = {
        **rows.settings,
        "labels": labels.texts,
        "label_tokens": [len(ids) for ids in labels.ids],
        "end_of_text_scored": labels.with_end,
        "length_normalized": args.length_normalized,
    }
    return Outcome(classification_metrics(golds, chosen, labels.texts, positive), settings, lines)


def _generation(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    decoding = decoding_of(args)
    if args.max_new_tokens is None:
        decoding = decoding.at_most_half(args.max_length or loaded.max_length)
    texts, references = _read_pairs(args)
    rows = _fit(args, loaded, texts, references, decoding.max_new_tokens)

    def answers(batch: list[int]) -> Sequence[list[int]]:
        return continue_prompts(loaded, [rows.prompts[i] for i in batch], decoding)

    batches = batches_by_length([len(prompt) for prompt in rows.prompts], args.batch_size)
    ids = over_ranks(batches, answers, launch)
    predictions = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    figures, signatures = text_metrics(predictions, references, metrics_of(args), args.answer_regex)
    lines = [
        {
            "row": i + 1,
            "prompt": texts[i],
            "reference": references[i],
            "prediction": predictions[i],
            "tokens": len(ids[i]),
            "prompt_cut": rows.cut[i],
        }
        for i in range(len(texts))
    ]
    settings = {
        **rows.settings,
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.num_beams,
        "num_not_ended": sum(len(row) >= decoding.max_new_tokens for row in ids),
        "signatures": signatures,
    }
    return Outcome(figures, settings, lines)


def _lm_eval(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    from dstrain.evaluate.harness import run_tasks

    names = args.task.partition(":")[2].split(",")
    found = run_tasks(
        loaded, names, batch_size=args.batch_size, limit=args.max_eval_samples, include_path=args.include_path
    )
    return Outcome(found, {"limit": args.max_eval_samples})


TASK: dict[str, Callable[[argparse.Namespace, LoadedModel, Launch], Outcome]] = {
    "perplexity": _perplexity,
    "classification": _classification,
    "generation": _generation,
    "lm_eval": _lm_eval,
}
