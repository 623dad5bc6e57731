"""Figures of a task from its rows, through the libraries that others report with."""

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import fsum
from typing import Any

from dstrain.errors import UserError

# Metric -> the package that computes it; all are in the extra `evaluate`.
TEXT_METRICS: dict[str, str | None] = {
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "rouge": "rouge_score",
    "exact_match": None,
}
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def require(package: str, extra: str, what: str) -> None:
    """Raises UserError where an optional package is missing."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs the package {package.replace('_', '-')}: pip install 'dstrain[{extra}]'")


def classification_metrics(
    golds: Sequence[str], predictions: Sequence[str], labels: list[str], positive: str
) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 of the positive label, of every label and their mean, by scikit-learn.

    confusion_matrix: [gold][predicted], in the order of `labels`. What divides by zero is 0.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    table = precision_recall_fscore_support(golds, predictions, labels=labels, zero_division=0)
    mean = precision_recall_fscore_support(golds, predictions, labels=labels, average="macro", zero_division=0)
    names = ("precision", "recall", "f1")
    rows = {
        label: {**{name: float(table[k][i]) for k, name in enumerate(names)}, "rows": int(table[3][i])}
        for i, label in enumerate(labels)
    }
    return {
        "accuracy": float(accuracy_score(golds, predictions)),
        **{name: rows[positive][name] for name in names},
        **{f"macro_{name}": float(value) for name, value in zip(names, mean, strict=False)},
        "positive_label": positive,
        "by_label": rows,
        "confusion_matrix": confusion_matrix(golds, predictions, labels=labels).tolist(),
    }


def group_metrics(
    golds: Sequence[str], predictions: Sequence[str], groups: Sequence[str], labels: list[str], positive: str
) -> dict[str, dict[str, Any]]:
    """Group -> its rows, accuracy and, of two labels, false positive and false negative rate; None where it has no row
    that could be one."""
    found = {}
    for group in sorted(set(groups)):
        pairs = [(gold, p) for gold, p, own in zip(golds, predictions, groups, strict=True) if own == group]
        found[group] = {"rows": len(pairs), "accuracy": _share(gold == p for gold, p in pairs)}
        if len(labels) == 2:
            found[group] |= {
                "false_positive_rate": _share(p == positive for gold, p in pairs if gold != positive),
                "false_negative_rate": _share(p != positive for gold, p in pairs if gold == positive),
            }
    return found


def _share(flags: Iterable[bool]) -> float | None:
    counted = list(flags)
    return sum(counted) / len(counted) if counted else None


def text_metrics(
    predictions: Sequence[str], references: Sequence[str], names: Sequence[str], answer_regex: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of texts (BLEU, chrF and ROUGE from 0 to 100, exact match from 0 to 1), and how each was computed.

    White space around texts does not count. answer_regex: exact match compares what it first matches (its group 1, if
    it has one) instead of the texts. Raises UserError for a reference without a match.
    """
    predictions, references = [p.strip() for p in predictions], [r.strip() for r in references]
    figures: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    if "bleu" in names or "chrf" in names:
        from sacrebleu.metrics import BLEU, CHRF

        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            if name in names:
                figures[name] = metric.corpus_score(predictions, [references]).score
                signatures[name] = str(metric.get_signature())
    if "rouge" in names:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
        rows = [scorer.score(r, p) for r, p in zip(references, predictions, strict=True)]
        figures |= {kind: 100 * fsum(row[kind].fmeasure for row in rows) / len(rows) for kind in ROUGE_TYPES}
        signatures["rouge"] = "rouge-score, mean F1, Porter stemmer"
    if "exact_match" in names:
        golds = [answer(text, answer_regex) for text in references]
        if None in golds:
            row = golds.index(None) + 1
            raise UserError(f"--answer_regex {answer_regex!r} matches nothing in the completion of row {row}")
        given = [answer(text, answer_regex) for text in predictions]
        figures["exact_match"] = sum(a == b for a, b in zip(given, golds, strict=True)) / len(golds)
        signatures["exact_match"] = f"of {answer_regex!r}" if answer_regex else "of the whole text"
    return figures, signatures


def answer(text: str, regex: str | None) -> str | None:
    """The part of a text that counts; None where the pattern is not in it."""
    if regex is None:
        return text
    match = re.search(regex, text)
    return None if match is None else (match[1] if match.re.groups else match[0]).strip()
