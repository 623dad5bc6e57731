"""`dstrain evaluate`: figures of a model on a task.

dstrain evaluate runs/a --task perplexity --data_file held_out.jsonl
dstrain evaluate runs/a --task classification --data_file test.jsonl --labels " negative" --labels " positive"
dstrain evaluate some/folder --task generation --data_file test.jsonl --metrics bleu,chrf --output result.json
dstrain evaluate some/folder --task lm_eval:hellaswag
torchrun --nproc_per_node 4 -m dstrain.cli evaluate runs/a ...       # the same figures, sooner

A table for a person; the last line of standard output is JSON. docs/evaluation.md says what each figure is.
"""

import argparse
import re
import time

from dstrain.errors import ExitCode, UserError
from dstrain.evaluate.metrics import TEXT_METRICS, require
from dstrain.generate.decoding import Decoding
from dstrain.generate.flags import (
    add_model_arguments,
    add_row_flags,
    check_output,
    load_named,
    row_arguments,
    row_flags,
)
from dstrain.parallel import Launch
from dstrain.resilience.exits import speaks_for_host

TASKS = ("perplexity", "classification", "generation", "lm_eval")
# As training's own evaluation takes its samples.
OF_SAMPLES = ("block_size", "packing", "long_rows", "train_on_prompts")
# Flag -> the tasks that read it; with any other it would do nothing, and is refused.
FOR_TASKS = {
    "data_file": TASKS[:3],
    "predictions": ("classification", "generation"),
    "max_length": ("classification", "generation"),
    "truncation_side": ("classification", "generation"),
    **dict.fromkeys(OF_SAMPLES, ("perplexity",)),
    **dict.fromkeys(row_flags(), TASKS[:3]),
    "labels": ("classification",),
    "positive_label": ("classification",),
    "length_normalized": ("classification",),
    "group_column": ("classification",),
    "metrics": ("generation",),
    "max_new_tokens": ("generation",),
    "num_beams": ("generation",),
    "answer_regex": ("generation",),
    "include_path": ("lm_eval",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--task", required=True, help="perplexity, classification, generation or lm_eval:NAME,...")
    parser.add_argument("--max_eval_samples", type=int, help="only the first rows (perplexity: samples)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows at once (default: 16)")
    parser.add_argument("--output", help="a file for the JSON")
    data = parser.add_argument_group("the data")
    data.add_argument("--data_file", action="append", help="as --train_file of train.py; repeatable")
    add_row_flags(data, OF_SAMPLES)
    rows = parser.add_argument_group("rows of a prompt and a completion (classification, generation)")
    rows.add_argument("--predictions", help="a file for JSON lines, one a row")
    rows.add_argument(
        "--max_length", type=int, help="tokens of prompt and answer (default: those of a training sample, or positions)"
    )
    rows.add_argument(
        "--truncation_side", choices=("left", "right"), help="where a prompt that is too long gives way (default: left)"
    )
    labels = parser.add_argument_group("classification")
    labels.add_argument("--labels", action="append", help="one label's text; repeatable (default: all completions)")
    labels.add_argument("--positive_label", help="of precision, recall and F1 (default: the last label)")
    labels.add_argument("--length_normalized", action="store_true", help="compare likelihoods by token")
    labels.add_argument("--group_column", help="a column of few values: error rates for each of them")
    texts = parser.add_argument_group("generation")
    texts.add_argument("--metrics", help="of bleu,chrf,rouge,exact_match (default: all)")
    texts.add_argument("--max_new_tokens", type=int, help="default: 128, or half of --max_length")
    texts.add_argument("--num_beams", type=int, help="1: greedy (default)")
    texts.add_argument("--answer_regex", help="what exact_match compares, such as '#### (.*)'")
    parser.add_argument_group("lm_eval").add_argument("--include_path", help="a folder with tasks of one's own")


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except UserError:
        if speaks_for_host():
            raise
        return ExitCode.USER_ERROR


def _run(args: argparse.Namespace) -> int:
    task = _check(args)
    from dstrain.monitor.logs import QuietOutput

    with QuietOutput(Launch.from_environment().rank):  # before the libraries are imported: they warn while they are
        from dstrain.evaluate.ranks import joined
        from dstrain.evaluate.report import report
        from dstrain.evaluate.tasks import TASK

        with joined() as launch:
            loaded = load_named(args)
            started = time.monotonic()
            outcome = TASK[task](args, loaded, launch)
            if launch.is_main:
                report(args, loaded, outcome, launch, seconds=time.monotonic() - started)
    return ExitCode.FINISHED


def _check(args: argparse.Namespace) -> str:
    """The task, if all flags fit it. Raises UserError with every problem; imports nothing heavy."""
    task = args.task.partition(":")[0]
    if task not in TASKS or (task == "lm_eval") != (":" in args.task):
        raise UserError(f"--task is {args.task!r}: write perplexity, classification, generation or lm_eval:NAME")
    problems = [
        f"--{flag} belongs to --task {' or '.join(tasks)}: leave it out"
        for flag, tasks in FOR_TASKS.items()
        if task not in tasks and getattr(args, flag) not in (None, False)
    ]
    if task != "lm_eval" and not args.data_file:
        problems.append("--data_file is missing: name the rows to evaluate on")
    for name in ("max_eval_samples", "batch_size", "max_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"--{name} is {getattr(args, name)}: write a positive number")
    for check in (
        lambda: check_output("--output", args.output),
        lambda: check_output("--predictions", args.predictions),
        lambda: row_arguments(args, OF_SAMPLES),
        lambda: _check_task(args, task),
    ):
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return task


def _check_task(args: argparse.Namespace, task: str) -> None:
    if task == "classification":
        require("sklearn", "evaluate", "--task classification")
        if args.labels and args.positive_label and args.positive_label not in args.labels:
            raise UserError(f"--positive_label {args.positive_label!r} is none of the --labels")
    elif task == "generation":
        decoding_of(args)
        for name in metrics_of(args):
            if name not in TEXT_METRICS:
                raise UserError(f"--metrics {name}: write some of {','.join(TEXT_METRICS)}")
            if package := TEXT_METRICS[name]:
                require(package, "evaluate", f"--metrics {name}")
        if args.answer_regex and "exact_match" not in metrics_of(args):
            raise UserError("--answer_regex belongs to exact_match: add it to --metrics")
        try:
            re.compile(args.answer_regex or "")
        except re.error as error:
            raise UserError(f"--answer_regex {args.answer_regex!r} is no regular expression: {error}") from None
    elif task == "lm_eval":
        require("lm_eval", "lm-eval", "--task lm_eval")
        if Launch.from_environment().world_size > 1:
            raise UserError("--task lm_eval is one process: start it without a launcher")


def metrics_of(args: argparse.Namespace) -> list[str]:
    return args.metrics.split(",") if args.metrics else list(TEXT_METRICS)


def decoding_of(args: argparse.Namespace) -> Decoding:
    return Decoding.asked_for(args.max_new_tokens, num_beams=args.num_beams)
