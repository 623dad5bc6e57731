"""`dstrain generate`: text from a checkpoint or a model folder.

dstrain generate runs/a --prompt "Once upon a time"                  # the newest checkpoint, greedy, to the terminal
dstrain generate runs/a/checkpoints/step_00000100 --prompt "def " --temperature 0.8 --top_p 0.9 --seed 1
dstrain generate some/folder --prompt_file questions.jsonl --output answers.jsonl
dstrain generate some/folder --chat                                  # with the tokenizer's template
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dstrain.errors import ExitCode, UserError
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    prompts = parser.add_argument_group("one of")
    prompts.add_argument("--prompt", help="a text to continue; what follows it is written as it comes")
    prompts.add_argument("--prompt_file", help="rows with prompts, as --train_file of train.py")
    prompts.add_argument("--chat", action="store_true", help="a conversation; /reset begins anew, /exit ends it")
    rows = parser.add_argument_group("with --prompt_file")
    rows.add_argument("--output", help="JSON lines to write (default: to the terminal)")
    rows.add_argument("--batch_size", type=int, default=16, help="prompts at once (default: 16)")
    add_row_flags(rows)
    text = parser.add_argument_group("the text (greedy without temperature, top_p and top_k)")
    text.add_argument("--max_new_tokens", type=int, help="at most (default: 128, or half of what the model reads)")
    text.add_argument("--temperature", type=float, help="draw, flatter above 1 and sharper below")
    text.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this share")
    text.add_argument("--top_k", type=int, help="draw among so many likeliest tokens")
    text.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")


def run(args: argparse.Namespace) -> int:
    if [args.prompt is not None, args.prompt_file is not None, args.chat].count(True) != 1:
        raise UserError("write one of --prompt TEXT, --prompt_file FILE and --chat")
    of_rows = [name for name in ("output", *row_flags()) if getattr(args, name) is not None]
    if args.prompt_file is None and of_rows:
        raise UserError(f"--{of_rows[0]} belongs to --prompt_file")
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}: write a positive number")
    if Launch.from_environment().world_size > 1:
        raise UserError("dstrain generate is one process: start it without a launcher")
    check_output("--output", args.output)
    choices = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    decoding = Decoding.asked_for(**choices)
    from dstrain.monitor.logs import QuietOutput

    with QuietOutput(0) as quiet:  # before the libraries are imported: they warn while they are
        import torch

        from dstrain.generate.terminal import Conversation, show_continuation

        loaded = load_named(args)
        if args.max_new_tokens is None:
            decoding = decoding.at_most_half(loaded.positions)
        torch.manual_seed(args.seed)
        if args.prompt is not None:
            show_continuation(loaded, args.prompt, decoding, quiet.screen)
        elif args.chat:
            Conversation(loaded, decoding, quiet.screen).hold(sys.stdin)
        else:
            _answer_file(args, loaded, decoding, quiet.screen)
    return ExitCode.FINISHED


def _answer_file(args: argparse.Namespace, loaded: Any, decoding: Decoding, out: Any) -> None:
    """One JSON line for each row, in the order of the rows."""
    from dstrain.generate.prompts import fit_prompts, read_prompts, room_for_prompts
    from dstrain.generate.text import batches_by_length, continue_prompts

    found = read_prompts([args.prompt_file], "--prompt_file", row_arguments(args), loaded)
    prompts = [prompt.ids for prompt in found.prompts]
    if loaded.positions:
        prompts = fit_prompts(prompts, room_for_prompts(loaded.positions, decoding.max_new_tokens), "left")
    lines: dict[int, str] = {}
    for batch in batches_by_length([len(prompt) for prompt in prompts], args.batch_size):
        for row, ids in zip(batch, continue_prompts(loaded, [prompts[i] for i in batch], decoding), strict=True):
            facts = {
                "prompt": found.prompts[row].text,
                "completion": loaded.tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids),
                "ended": len(ids) < decoding.max_new_tokens,
                "prompt_cut": len(prompts[row]) < len(found.prompts[row].ids),
            }
            lines[row] = json.dumps(facts, ensure_ascii=False)
    text = "".join(lines[row] + "\n" for row in range(len(prompts)))
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    else:
        out.write(text)
