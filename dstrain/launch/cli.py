"""`dstrain launch`: a supervisor around any way of starting a run.

dstrain launch --max_restarts 3 -- deepspeed --num_gpus 2 dstrain/train.py --deepspeed_config ds_configs/zero2.json ...
dstrain launch --max_restarts 3 -- torchrun --nproc_per_node 2 dstrain/train.py ...
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dstrain.arguments import parse_arguments
from dstrain.errors import UserError
from dstrain.launch.clusters import cli as clusters
from dstrain.launch.supervise import Supervisor
from dstrain.launch.travel import check_words

SCRIPTS = ("train.py", "dstrain.train")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see dstrain launch --help)")


def find_run_folder(command: Sequence[str]) -> Path:
    """The run folder of a start command; checks the script's own flags on the way. Raises UserError."""
    scripts = [i for i, word in enumerate(command) if os.path.basename(word) in SCRIPTS]
    if scripts:
        return Path(parse_arguments(list(command[scripts[0] + 1 :])).run.output_dir)
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--output_dir":
            return Path(following)
    raise UserError(
        "the command names neither dstrain/train.py nor --output_dir: write for example "
        "dstrain launch -- torchrun --nproc_per_node 2 dstrain/train.py ..."
    )


def main(argv: list[str]) -> int:
    """Supervise the command after `--`; returns the run's own exit code. Raises UserError."""
    if any(word.split("=")[0] == "--to" for word in argv[: argv.index("--") if "--" in argv else None]):
        return clusters.main(argv, supervise=main)
    own, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = _Parser(prog="dstrain launch", usage="%(prog)s [flags] -- COMMAND ...", allow_abbrev=False)
    parser.epilog = "On many hosts: dstrain launch --to ENGINE; see dstrain launch --to slurm --help"
    parser.add_argument("--max_restarts", type=int, default=3, help="start again so many times (default: 3)")
    parser.add_argument("--backoff", type=float, default=5.0, help="seconds before the first restart, then doubled")
    args = parser.parse_args(own)
    if args.max_restarts < 0 or args.backoff < 0:
        raise UserError("--max_restarts and --backoff must not be negative")
    if not command:
        raise UserError("no command: write dstrain launch [flags] -- torchrun ... dstrain/train.py ...")
    check_words(command)
    return Supervisor(command, find_run_folder(command), max_restarts=args.max_restarts, backoff_s=args.backoff).run()
