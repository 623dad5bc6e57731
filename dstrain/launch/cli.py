"""`dstrain launch`: a supervisor around any way of starting a run.

dstrain launch --max_restarts 3 -- deepspeed --num_gpus 2 dstrain/train.py --deepspeed_config ds_configs/zero2.json ...
dstrain launch --max_restarts 3 -- deepspeed --hostfile hostfile dstrain/train.py ...
dstrain launch --max_restarts 3 -- torchrun --nproc_per_node 2 dstrain/train.py ...
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dstrain.arguments import parse_arguments
from dstrain.errors import UserError
from dstrain.launch.clusters import cli as clusters
from dstrain.launch.doctor.preflight import check_start
from dstrain.launch.fleet import build_place
from dstrain.launch.supervise import Supervisor, say
from dstrain.launch.travel import check_words
from dstrain.run_folder import RunFolder

SCRIPTS = ("train.py", "dstrain.train")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see dstrain launch --help)")


def find_script(command: Sequence[str]) -> int | None:
    """Where a start command names the training script: ours, or else the first Python file behind a launcher."""
    ours = (i for i, word in enumerate(command) if os.path.basename(word) in SCRIPTS)
    other = (i for i, word in enumerate(command) if i > 0 and word.endswith(".py"))
    return next(ours, next(other, None))


def find_run_folder(command: Sequence[str]) -> Path:
    """The run folder of a start command; checks the script's own flags on the way. Raises UserError."""
    script = find_script(command)
    if script is not None and os.path.basename(command[script]) in SCRIPTS:
        return Path(parse_arguments(list(command[script + 1 :])).run.output_dir)
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
    parser.add_argument("--smaller_config", help="DeepSpeed JSON for hosts too few for the run's own degrees")
    args = parser.parse_args(own)
    if args.max_restarts < 0 or args.backoff < 0:
        raise UserError("--max_restarts and --backoff must not be negative")
    if not command:
        raise UserError("no command: write dstrain launch [flags] -- torchrun ... dstrain/train.py ...")
    check_words(command)
    folder = find_run_folder(command)
    if not RunFolder(folder).metrics.exists():  # a run that has begun may go on without a host
        check_start(command, folder)
    place = build_place(command, find_script(command), folder, say, args.smaller_config)
    return Supervisor(place, folder, max_restarts=args.max_restarts, backoff_s=args.backoff).run()
