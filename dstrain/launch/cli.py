"""`dstrain launch`: a supervisor around any way of starting a run.

dstrain launch --max_restarts 3 -- deepspeed --num_gpus 2 dstrain/train.py --deepspeed_config ds_configs/zero2.json ...
dstrain launch --max_restarts 3 -- deepspeed --hostfile hostfile dstrain/train.py ...
dstrain launch --max_restarts 3 -- torchrun --nproc_per_node 2 dstrain/train.py ...
"""

import argparse

from dstrain.errors import UserError
from dstrain.launch.clusters import cli as clusters
from dstrain.launch.doctor.preflight import check_start
from dstrain.launch.fleet import build_place
from dstrain.launch.supervise import Supervisor, say
from dstrain.launch.travel import check_words
from dstrain.launch.words import find_run_folder
from dstrain.run_folder import RunFolder


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see dstrain launch --help)")


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
    place = build_place(command, folder, say, args.smaller_config)
    if not RunFolder(folder).metrics.exists():  # a run that has begun may go on without a host
        check_start(command, folder)
    return Supervisor(place, folder, max_restarts=args.max_restarts, backoff_s=args.backoff).run()
