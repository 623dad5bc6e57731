"""`dstrain data show | stats`: what a run with these flags reads, through the very code that it reads with.

    dstrain data show --train_file stories.parquet --tokenizer_name gpt2 --block_size 512 --packing
    dstrain data stats --json --train_file stories.parquet --tokenizer_name bytes

The flags are those of dstrain/train.py; a whole command line of it may follow.
"""

import json
import sys
from typing import TYPE_CHECKING, Any

from dstrain.arguments import Arguments, Parser, parse_arguments
from dstrain.data.render import coloured, count, documents, plain
from dstrain.data.statistics import describe
from dstrain.errors import ExitCode, UserError

if TYPE_CHECKING:
    from dstrain.data.build import TrainingData


def main(argv: list[str]) -> int:
    """Returns the exit code. Raises UserError."""
    parser = Parser(
        prog="dstrain data",
        description="What a run reads: its first samples, or statistics of its data.",
        usage="%(prog)s show|stats [--num_samples N] [--json] FLAGS (those of dstrain/train.py)",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("show", "stats"))
    parser.add_argument("--num_samples", type=int, default=3, help="show: how many samples (default 3)")
    parser.add_argument("--json", action="store_true", help="stats: one JSON object")
    own, train_flags = parser.parse_known_args(argv)
    if own.num_samples < 1:
        raise UserError(f"--num_samples is {own.num_samples}: write a positive number")
    if own.json and own.action == "show":
        raise UserError("--json belongs to `dstrain data stats`")
    args = parse_arguments(train_flags)
    tokenizer, block_size = _tokenizer_and_block(args)
    data = _build(args, tokenizer, block_size)
    if own.action == "show":
        _show(data, tokenizer, args.run.seed, own.num_samples)
    if own.json:
        print(json.dumps({"source": data.source, "sha256": data.sha256, **data.facts}, indent=2))
    else:
        print("\n".join(filter(None, [describe(data.facts), *data.notices])))
    return ExitCode.FINISHED


def _tokenizer_and_block(args: Arguments) -> tuple[Any, int]:
    """Those of the run; without a model, the tokenizer named and at most 1024 tokens."""
    if args.model.model_name_or_path or args.model.config_name:
        from dstrain.models.config import load_model_config
        from dstrain.prepare import tokenizer_and_block

        return tokenizer_and_block(args, load_model_config(args.model))
    from dstrain.data.tokenization import build_tokenizer

    model = args.model
    if not model.tokenizer_name:
        raise UserError("no tokenizer is named: write --tokenizer_name T (or bytes), or name the model")
    tokenizer = build_tokenizer(model.tokenizer_name, model.trust_remote_code, model.chat_template)
    return tokenizer, args.data.block_size or 1024


def _build(args: Arguments, tokenizer: Any, block_size: int) -> "TrainingData":
    from dstrain.data.build import build_data

    return build_data(
        args.data, tokenizer, seed=args.run.seed, block_size=block_size, is_main_per_host=True, barrier=lambda: None
    )


def _show(data: "TrainingData", tokenizer: Any, seed: int, num_samples: int) -> None:
    """The samples that training reads first: in colour on a terminal that has any, else between signs."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    in_colour = console.is_terminal and console.color_system is not None and not console.no_color
    console.print(
        "dim: without loss; the colour changes with each token" if in_colour else "⟦without loss⟧ token|token"
    )
    order, is_stream = data.train.order(seed), bool(data.files)
    for i in range(num_samples if is_stream else min(num_samples, len(data.train))):
        sample = data.train[order[i]]
        parts = documents(tokenizer, sample)
        console.print(f"\n== sample {order[i]} (blocks of {data.train.block_size}): {count(parts)}")
        for number, part in enumerate(parts, 1):
            if "position_ids" in sample:  # else nobody knows where in it documents begin
                console.print(
                    f"-- document {number} of {len(parts)}: {count([part])}", style="bold" if in_colour else ""
                )
            console.print(coloured(part) if in_colour else plain(part))
    data.train.close()
    console.print()
    sys.stdout.flush()
