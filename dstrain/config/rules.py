"""Combinations that DeepSpeed 0.19.8 ignores or gets wrong. One rule: one sentence and its fix, or one repair.

A rule is a generator over a `Case`: it yields the text of a refusal, or a `Repair`. This module runs the rules of
rules_zero.py, rules_precision.py, rules_parallel.py and rules_run.py. docs/deepspeed-facts.md says what DeepSpeed does
with each refused combination and which test shows it.
"""

from typing import Any

from dstrain.config import rules_parallel, rules_precision, rules_run, rules_zero
from dstrain.config.case import Case, Repair, Rule, UnknownValueError

EARLY: tuple[Rule, ...] = rules_precision.EARLY
RULES: tuple[Rule, ...] = (*rules_zero.RULES, *rules_precision.RULES, *rules_parallel.RULES, *rules_run.RULES)


def check_rules(case: Case, rules: tuple[Rule, ...]) -> tuple[list[str], dict[str, tuple[Any, str]]]:
    """(problems, repairs as dotted key -> (value, origin)) of `rules`: first EARLY, then RULES."""
    problems: list[str] = []
    repairs: dict[str, tuple[Any, str]] = {}
    for rule in rules:
        for outcome in _answers(rule, case):
            if isinstance(outcome, Repair):
                repairs[outcome.key] = (outcome.value, outcome.reason)
            else:
                problems.append(outcome)
    return problems, repairs


def _answers(rule: Rule, case: Case) -> list[str | Repair]:
    try:
        return list(rule(case))
    except UnknownValueError:
        return []
