"""The tasks of `dstrain evaluate`: from flags and a model to figures. Each is a collective."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dstrain.errors import UserError
from dstrain.evaluate.classification import check_groups, choose, encode_labels, find_labels, score_rows
from dstrain.evaluate.cli import OF_SAMPLES, decoding_of, metrics_of
from dstrain.evaluate.metrics import classification_metrics, group_metrics, text_metrics
from dstrain.evaluate.perplexity import measure_perplexity
from dstrain.evaluate.ranks import over_ranks
from dstrain.generate.flags import row_arguments
from dstrain.generate.model import LoadedModel
from dstrain.generate.prompts import fit_prompts, read_prompts, room_for_prompts
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
    """texts and answers as the rows have them; prompts: tokens, cut where they were too long."""

    texts: list[str]
    answers: list[str]
    groups: list[str | None]
    whole: list[list[int]]
    prompts: list[list[int]]
    settings: dict[str, Any]

    def is_cut(self, row: int) -> bool:
        return len(self.prompts[row]) < len(self.whole[row])

    def fitted(self, args: argparse.Namespace, loaded: LoadedModel, answer_tokens: int) -> "_Rows":
        """With prompts that leave room for answers of so many tokens. Raises UserError."""
        max_length, side = args.max_length or loaded.max_length, args.truncation_side or "left"
        if args.max_length and loaded.positions and args.max_length > loaded.positions:
            raise UserError(f"--max_length is {args.max_length}, the model has {loaded.positions} positions")
        if max_length is None:
            return self
        rows = replace(self, prompts=fit_prompts(self.whole, room_for_prompts(max_length, answer_tokens), side))
        num_cut = sum(rows.is_cut(i) for i in range(len(rows.whole)))
        return replace(rows, settings=self.settings | {"num_cut": num_cut, "max_length": max_length})


def _read_rows(args: argparse.Namespace, loaded: LoadedModel) -> _Rows:
    """Rows of a prompt and an answer. Raises UserError."""
    found = read_prompts(
        args.data_file, "--data_file", row_arguments(args), loaded, args.max_eval_samples, args.group_column
    )
    if plain := next((i for i, prompt in enumerate(found.prompts, 1) if prompt.answer is None), None):
        raise UserError(
            f"row {plain} of --data_file is plain text, and --task {args.task} needs a prompt and a completion: "
            "name the columns prompt and completion, or see --prompt_column and --prompt_template"
        )
    ids = [prompt.ids for prompt in found.prompts]
    settings = {
        "num_rows": len(ids),
        "skipped_rows": found.skipped_rows,
        "num_cut": 0,
        "max_length": None,
        "truncation_side": args.truncation_side or "left",
    }
    answers, groups = [str(prompt.answer) for prompt in found.prompts], [prompt.group for prompt in found.prompts]
    return _Rows([prompt.text for prompt in found.prompts], answers, groups, ids, ids, settings)


def _perplexity(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    found = measure_perplexity(
        loaded,
        args.data_file,
        row_arguments(args, OF_SAMPLES),
        limit=args.max_eval_samples,
        batch_size=args.batch_size,
        launch=launch,
    )
    settings = {name: found.pop(name) for name in ("tokens", "num_samples", "block_size")}
    return Outcome(found, settings)


def _classification(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    rows = _read_rows(args, loaded)
    golds, groups = rows.answers, [group for group in rows.groups if group is not None]
    check_groups(args.group_column, groups)
    labels = encode_labels(loaded, find_labels(args.labels or [], golds))
    positive = args.positive_label or labels.texts[-1]
    if positive not in labels.texts:
        raise UserError(f"--positive_label {positive!r} is none of the labels {', '.join(map(repr, labels.texts))}")
    rows = rows.fitted(args, loaded, labels.longest)
    scores = score_rows(loaded, rows.prompts, labels, batch_size=args.batch_size, launch=launch)
    chosen = choose(scores, labels, length_normalized=args.length_normalized)
    lines = [
        {
            "row": i + 1,
            "gold": golds[i],
            "predicted": chosen[i],
            "log_likelihoods": dict(zip(labels.texts, scores[i], strict=True)),
            "prompt_tokens": len(rows.prompts[i]),
            "prompt_cut": rows.is_cut(i),
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
    metrics = classification_metrics(golds, chosen, labels.texts, positive)
    if args.group_column:
        settings["group_column"] = args.group_column
        metrics["by_group"] = group_metrics(golds, chosen, groups, labels.texts, positive)
    return Outcome(metrics, settings, lines)


def _generation(args: argparse.Namespace, loaded: LoadedModel, launch: Launch) -> Outcome:
    decoding = decoding_of(args)
    if args.max_new_tokens is None:
        decoding = decoding.at_most_half(args.max_length or loaded.max_length)
    rows = _read_rows(args, loaded).fitted(args, loaded, decoding.max_new_tokens)

    def answers(batch: list[int]) -> Sequence[list[int]]:
        return continue_prompts(loaded, [rows.prompts[i] for i in batch], decoding)

    batches = batches_by_length([len(prompt) for prompt in rows.prompts], args.batch_size)
    ids = over_ranks(batches, answers, launch)
    predictions = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    figures, signatures = text_metrics(predictions, rows.answers, metrics_of(args), args.answer_regex)
    lines = [
        {
            "row": i + 1,
            "prompt": rows.texts[i],
            "reference": rows.answers[i],
            "prediction": predictions[i],
            "tokens": len(ids[i]),
            "prompt_cut": rows.is_cut(i),
        }
        for i in range(len(ids))
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
