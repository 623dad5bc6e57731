"""The `dstrain` command.

    dstrain config check ds_configs/zero2.json --world_size 2
    dstrain config explain ds_configs/zero2.json --set optimizer.params.lr=1e-4
    dstrain config migrate old.json > new.json

Each subcommand lives in a module of its own, imported only when asked for, so that `dstrain config` answers without
torch: with `add_arguments(parser)` and `run(args) -> int`, or, where the words are flags of train.py, with
`main(argv) -> int`.
"""

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from dstrain.errors import ExitCode, UserError

# Subcommand -> (module, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "config": ("dstrain.config.commands", "check, explain or migrate a DeepSpeed JSON"),
    "plan": ("dstrain.planner.cli", "what a model needs on some machine, and which configuration to choose"),
    "tune": ("dstrain.planner.tune", "try the best plans for a few steps each on this machine, and choose"),
    "verify": ("dstrain.verify", "compare this configuration with plain torch on a shallower model"),
    "doctor": ("dstrain.launch.doctor.cli", "whether this machine, or the hosts of a hostfile, can carry a run"),
    "launch": ("dstrain.launch.cli", "start a run under a supervisor that restarts it"),
    "env": ("dstrain.launch.env", "write the variables that a hostfile run takes to its other hosts"),
    "postmortem": ("dstrain.resilience.postmortem", "explain in a page why a run ended"),
    "checkpoint": ("dstrain.checkpoint.cli", "verify, list, show or convert checkpoints"),
    "evaluate": ("dstrain.evaluate.cli", "figures of a model on a task: perplexity, labels, generated texts"),
    "generate": ("dstrain.generate.cli", "text from a checkpoint or a model folder, or a chat with it"),
    "data": ("dstrain.show", "a few samples as the model gets them, and statistics of the data"),
    "tokenizer": ("dstrain.data.train_tokenizer", "train a byte-level BPE on local text"),
    "export": ("dstrain.checkpoint.export", "write a checkpoint as a Hugging Face folder"),
}


class Parser(argparse.ArgumentParser):
    """Usage errors as `UserError`; no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "commands:\n" + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())


def dispatch(argv: list[str]) -> int:
    """Run one subcommand and return its exit code. Raises UserError."""
    top = Parser(
        prog="dstrain",
        description="DeepSpeed training that is never silently wrong.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, metavar="command")
    command = top.parse_args(argv[:1] or ["--help"]).command
    module = import_module(COMMANDS[command][0])
    if hasattr(module, "main"):
        return module.main(argv[1:])
    parser = Parser(prog=f"dstrain {command}", description=COMMANDS[command][1])
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv[1:]))


def main(argv: list[str] | None = None) -> int:
    """The entry point: problems are one line each on stderr, and exit code 2."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for problem in error.problems:
            print(f"dstrain: error: {problem}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing to tell, and no message at exit either
        return ExitCode.CRASH


if __name__ == "__main__":
    sys.exit(main())
