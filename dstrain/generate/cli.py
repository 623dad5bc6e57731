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

from dstrain.arguments import DataArguments, is_taken
from dstrain.errors import ExitCode, UserError
from dstrain.generate.decoding import Decoding
from dstrain.parallel import Launch


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it: what `load_named` reads."""
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder, a step_* folder, a Hugging Face folder or a hub name"
    )
    parser.add_argument("--tokenizer_name", help="default: the model's own")
    parser.add_argument("--attn_implementation", help="attention kernel: eager, sdpa")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: as stored)")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a hub repository to run its own code")


def load_named(args: argparse.Namespace) -> Any:
    """The `LoadedModel` that the flags of `add_model_arguments` name. Raises UserError."""
    from dstrain.generate.model import load

    names = ("tokenizer_name", "attn_implementation", "dtype", "trust_remote_code")
    return load(args.model, **{name: getattr(args, name) for name in names})


def check_output(flag: str, path: str | None) -> None:
    """Refuse a file that is there, or that no folder is there for."""
    if path is None:
        return
    if is_taken(Path(path)):
        raise UserError(f"{flag} {path} is there already: name a new file")
    if not Path(path).parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {Path(path).parent}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    prompts = parser.add_argument_group("one of")
    prompts.add_argument("--prompt", help="a text to continue; what follows it is written as it comes")
    prompts.add_argument("--prompt_file", help="rows with prompts, as --train_file of train.py")
    prompts.add_argument("--chat", action="store_true", help="a conversation; /reset begins anew, /exit ends it")
    rows = parser.add_argument_group("with --prompt_file")
    rows.add_argument("--text_column", help="column that holds the prompt (default: text, or the only column)")
    rows.add_argument("--output", help="JSON lines to write (default: to the terminal)")
    rows.add_argument("--batch_size", type=int, default=16, help="prompts at once (default: 16)")
    text = parser.add_argument_group("the text (greedy without temperature, top_p and top_k)")
    text.add_argument("--max_new_tokens", type=int, help="at most (default: 128, or half of what the model reads)")
    text.add_argument("--temperature", type=float, help="draw, flatter above 1 and sharper below")
    text.add_argument("--top_p", type=float, help="draw among the likeliest tokens of this share")
    text.add_argument("--top_k", type=int, help="draw among so many likeliest tokens")
    text.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")


def run(args: argparse.Namespace) -> int:
    if [args.prompt is not None, args.prompt_file is not None, args.chat].count(True) != 1:
        raise UserError("write one of --prompt TEXT, --prompt_file FILE and --chat")
    if args.prompt_file is None and (args.output or args.text_column):
        raise UserError("--output and --text_column belong to --prompt_file")
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
    from dstrain.generate.prompts import fit_prompts, read_documents, room_for_prompts
    from dstrain.generate.text import batches_by_length, continue_prompts

    documents = read_documents([args.prompt_file], "--prompt_file", DataArguments(text_column=args.text_column))
    texts = [document[0] for document in documents]
    whole = prompts = loaded.encode_prompts(texts)
    if loaded.positions:
        prompts = fit_prompts(whole, room_for_prompts(loaded.positions, decoding.max_new_tokens), "left")
    lines: dict[int, str] = {}
    for batch in batches_by_length([len(prompt) for prompt in prompts], args.batch_size):
        for row, ids in zip(batch, continue_prompts(loaded, [prompts[i] for i in batch], decoding), strict=True):
            facts = {
                "prompt": texts[row],
                "completion": loaded.tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids),
                "ended": len(ids) < decoding.max_new_tokens,
                "prompt_cut": len(prompts[row]) < len(whole[row]),
            }
            lines[row] = json.dumps(facts, ensure_ascii=False)
    text = "".join(lines[row] + "\n" for row in range(len(texts)))
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    else:
        out.write(text)
