"""Classification by the likelihood of label texts after a prompt."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.errors import UserError
from dstrain.evaluate.ranks import over_ranks
from dstrain.generate.model import LoadedModel
from dstrain.generate.text import batches_by_length
from dstrain.parallel import Launch

MAX_FOUND_LABELS = 100
MAX_GROUPS = 100


@dataclass(frozen=True)
class Labels:
    """texts: as rows have them. ids: the tokens of each that are compared, and whether the end of the text is one."""

    texts: list[str]
    ids: list[list[int]]
    with_end: bool

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


def find_labels(named: list[str], golds: Sequence[str]) -> list[str]:
    """The label texts: as named, else all that the rows have, sorted. Raises UserError for a row with none of them."""
    labels = list(dict.fromkeys(named)) or sorted(set(golds))
    if not named and len(labels) > MAX_FOUND_LABELS:
        raise UserError(
            f"the rows have {len(labels)} different completions: name the labels with --labels, or write "
            "--task generation"
        )
    if len(labels) < 2:
        raise UserError(f"there is one label, {labels[0]!r}: name at least two, each with a --labels of its own")
    if other := next((f"row {i} has {gold!r}" for i, gold in enumerate(golds, 1) if gold not in labels), None):
        raise UserError(f"{other}, which is none of the labels {', '.join(map(repr, labels))}: name it with --labels")
    return labels


def check_groups(column: str | None, groups: Sequence[str]) -> None:
    """Raises UserError for a column that tells single rows apart, not groups."""
    if (count := len(set(groups))) > MAX_GROUPS:
        raise UserError(f"--group_column {column} has {count} different values: name a column of at most {MAX_GROUPS}")


def encode_labels(loaded: LoadedModel, texts: list[str]) -> Labels:
    """The tokens of labels as training reads completions. Raises UserError for labels that are the same tokens.

    The end that training puts behind a completion counts only where one label is the beginning of another, and the end
    alone tells them apart: a model that was not trained on these rows says little about it.
    """
    ids = [row.tolist() for row in loaded.encoder.encode(texts)]
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise UserError(f"the label {text!r} has no token: give it a text")
    twins = [(a, b) for i, a in enumerate(texts) for j, b in enumerate(texts) if i < j and ids[i] == ids[j]]
    if twins:
        raise UserError(f"the labels {twins[0][0]!r} and {twins[0][1]!r} are the same tokens: name others")
    with_end = any(a != b and b[: len(a)] == a for a in ids for b in ids)
    end = loaded.encoder.completion_suffix.tolist() if with_end else []
    if with_end and not end:
        raise UserError("one label is the beginning of another, and the tokenizer has no end of text: name others")
    return Labels(texts, [[*row, *end] for row in ids], with_end)


def score_rows(
    loaded: LoadedModel, prompts: Sequence[list[int]], labels: Labels, *, batch_size: int, launch: Launch
) -> list[list[float]]:
    """Log-likelihood, nats, of every label after every prompt: [rows][labels]. A collective."""
    batches = batches_by_length([len(prompt) for prompt in prompts], batch_size)
    return over_ranks(batches, lambda rows: score_batch(loaded.model, [prompts[i] for i in rows], labels.ids), launch)


@torch.inference_mode()
def score_batch(model: Any, prompts: Sequence[list[int]], labels: Sequence[list[int]]) -> list[list[float]]:
    """Sum of the log-probabilities of each label's tokens after each prompt: [prompts][labels].

    A sequence is read once for all labels that differ in their last token only: labels of one token cost one forward.
    """
    beginnings = list(dict.fromkeys(tuple(label[:-1]) for label in labels))
    sequences = [[*prompt, *beginning] for prompt in prompts for beginning in beginnings]
    first = min(map(len, prompts)) - 1
    logits = _logits(model, sequences, first)
    scores = []
    for i, prompt in enumerate(prompts):
        start = len(prompt) - 1 - first
        log_p = [
            torch.log_softmax(logits[i * len(beginnings) + k, start : start + len(beginning) + 1].float(), dim=-1)
            for k, beginning in enumerate(beginnings)
        ]
        for label in labels:
            of_tokens = log_p[beginnings.index(tuple(label[:-1]))]
            scores.append(of_tokens[range(len(label)), label].sum())
    return torch.stack(scores).view(len(prompts), len(labels)).tolist()


def _logits(model: Any, sequences: Sequence[list[int]], first: int) -> torch.Tensor:
    """Logits [sequences, longest - first, vocabulary] from position `first` on.

    Padded on the right without a mask: in a causal model no token sees what comes after it.
    """
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if "logits_to_keep" in known:  # the output embedding is half of the work of a small model
        options["logits_to_keep"] = longest - first
    return model(input_ids=ids.to(model.device), **options).logits[:, first - longest :]


def choose(scores: Sequence[Sequence[float]], labels: Labels, *, length_normalized: bool) -> list[str]:
    """The likeliest label of each row, the first of equals; length_normalized: by token."""
    divisors = [len(ids) if length_normalized else 1 for ids in labels.ids]
    best = [max(range(len(divisors)), key=lambda k: row[k] / divisors[k]) for row in scores]
    return [labels.texts[k] for k in best]
