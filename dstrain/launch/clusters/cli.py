"""`dstrain launch --to ENGINE`: write what an existing engine needs to start a run on many hosts, and hand it over.

dstrain launch --to slurm --num_nodes 2 --num_procs_per_node 8 --time_limit 24:00:00 -- dstrain/train.py ...
dstrain launch --to kubernetes --num_nodes 2 --num_procs_per_node 8 --image REGISTRY/dstrain -- dstrain/train.py ...
dstrain launch --to ssh --hostfile hostfile --dry_run -- dstrain/train.py ...
"""

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from dstrain.arguments import Arguments, parse_arguments
from dstrain.config.facts import RunFacts
from dstrain.config.load import load_config
from dstrain.config.resolve import resolve_config
from dstrain.errors import UserError
from dstrain.launch.clusters.description import RunDescription, Written, quoted
from dstrain.launch.hosts import Host, read_hostfile

ENGINES = {name: f"dstrain.launch.clusters.{name}" for name in ("slurm", "kubernetes", "ray", "ssh", "mpi")}
_SUBMIT_S = 60.0
_DEFAULTS = {f.name: f.default for f in fields(RunDescription)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see dstrain launch --to slurm --help)")


def main(argv: list[str], *, supervise: Callable[[list[str]], int]) -> int:
    """Start the script after `--` through an engine; returns its exit code. Raises UserError before anything starts.

    supervise: `dstrain launch` without --to, for engines that start nothing again themselves.
    """
    own, script = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    given = vars(_parser().parse_args(own))
    engine, dry_run = given.pop("to"), given.pop("dry_run", False)
    module = import_module(ENGINES[engine])
    description = describe(engine, module.TAKES, given, script)
    written = module.write(description)
    if dry_run:
        print(as_text(written), end="")
        return 0
    return _start(written, description, supervise)


def _parser() -> _Parser:
    """No flag has a default here, so that one that an engine would ignore can be refused."""
    parser = _Parser(
        prog="dstrain launch",
        usage="%(prog)s --to ENGINE [flags] -- dstrain/train.py ...",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--to", required=True, choices=ENGINES, help="the engine that starts the run")
    add("--dry_run", action="store_true", help="print what would be written and run")
    add("--name", help="of the job (default: from the run folder)")
    add("--hostfile", help="`NAME slots=N` lines (ssh, mpi)")
    add("--num_nodes", type=int, help="hosts (slurm, kubernetes, ray; default 1)")
    add("--num_procs_per_node", type=int, help="ranks of each host, and its GPUs (slurm, kubernetes, ray; default 1)")
    add("--cpus_per_proc", type=int, help="CPU threads of a rank (all but ssh; default 1)")
    add("--use_cpu", action="store_true", help="ask for no GPUs (slurm, kubernetes, ray)")
    add("--max_restarts", type=int, help="start again so many times after a crash, a hang or a kill (default 3)")
    add("--grace_s", type=int, help="seconds to save in before the limit or an eviction (slurm, kubernetes; 300)")
    add("--time_limit", help="[D-]HH:MM:SS of one start (slurm)")
    add("--env", action="append", help="NAME=VALUE for the ranks; repeatable (all but ssh, which has .deepspeed_env)")
    add("--engine_args", action="append", help="one more word for sbatch, deepspeed or mpirun; repeatable")
    add("--kind", choices=("Job", "TrainJob"), help="kubernetes: plain, or Kubeflow's (default Job)")
    add("--image", help="kubernetes: the container image (default dstrain:latest)")
    add("--namespace", help="kubernetes: where to (default: kubectl's)")
    add("--claim", help="kubernetes: an existing volume claim for the run folder (default: a new one)")
    add("--storage", help="kubernetes: size of the new claim (default 100Gi)")
    add("--mount", help="kubernetes: where the claim is mounted (default /workspace/runs)")
    return parser


def describe(engine: str, takes: frozenset[str], given: dict[str, Any], script: Sequence[str]) -> RunDescription:
    """The run's description, checked with the script's own flags and its DeepSpeed JSON. Raises UserError."""
    if not script or os.path.basename(script[0]) != "train.py":
        raise UserError(
            f"after -- comes the script alone, since {engine} adds the launcher: "
            f"write dstrain launch --to {engine} ... -- dstrain/train.py ..."
        )
    args = parse_arguments(list(script[1:]))
    problems = [f"--{name} means nothing to {engine}: leave it out" for name in sorted(given.keys() - takes)]
    env = []
    for pair in given.pop("env", []):
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            problems.append(f"--env {pair}: write NAME=VALUE")
        env.append((name, value))
    hosts: tuple[Host, ...] = ()
    if "hostfile" in takes:
        if "hostfile" not in given:
            raise UserError(f"--to {engine} needs --hostfile FILE, with a line `NAME slots=N` for each host")
        hosts = tuple(read_hostfile(given["hostfile"]))
    description = RunDescription(
        script=script[0],
        flags=tuple(script[1:]),
        output_dir=args.run.output_dir,
        hosts=hosts,
        env=tuple(env),
        engine_args=tuple(given.pop("engine_args", ())),
        **{"name": default_name(args.run.output_dir), **given},
    )
    problems += check(description) + (_check_container(description, args) if engine == "kubernetes" else [])
    if not problems:
        problems = _check_config(args, description, in_container=engine == "kubernetes")
    if problems:
        raise UserError(problems)
    return description


def default_name(output_dir: str) -> str:
    """A job's name from its run folder: letters, digits and hyphens, as Kubernetes and DNS want them."""
    return re.sub(r"[^a-z0-9]+", "-", PurePosixPath(output_dir).name.lower()).strip("-") or "dstrain"


def check(description: RunDescription) -> list[str]:
    """What is wrong whatever the engine."""
    problems = []
    for name in ("num_nodes", "num_procs_per_node", "cpus_per_proc", "grace_s"):
        if getattr(description, name) < 1:
            problems.append(f"--{name} is {getattr(description, name)}: write a positive number")
    if description.max_restarts < 0:
        problems.append(f"--max_restarts is {description.max_restarts}: write 0 or more")
    # 63 letters are a DNS label; a pod's name adds an index to the job's.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?", description.name):
        problems.append(
            f"--name {description.name}: write at most 53 lower-case letters, digits and hyphens, a letter first"
        )
    if description.time_limit is not None:
        match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", description.time_limit)
        if match is None:
            problems.append(f"--time_limit {description.time_limit}: write HH:MM:SS or D-HH:MM:SS")
        else:
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            limit_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            if limit_s <= description.grace_s:
                problems.append(
                    f"--time_limit {description.time_limit} leaves nothing before the {description.grace_s} s of "
                    "--grace_s in which the run saves: give it more"
                )
    return problems


def _check_container(description: RunDescription, args: Arguments) -> list[str]:
    problems = []
    where = PurePosixPath("/workspace") / description.output_dir  # the image's working directory
    if not where.is_relative_to(description.mount) or where == PurePosixPath(description.mount):
        problems.append(
            f"--output_dir {args.run.output_dir} is not on the volume, and would be lost with the pod: "
            f"write a folder in {description.mount}, or --mount"
        )
    if not re.fullmatch(r"\d+(\.\d+)?([KMGTPE]i?)?", description.storage):
        problems.append(f"--storage {description.storage}: write a size such as 100Gi")
    return problems


def _check_config(args: Arguments, description: RunDescription, *, in_container: bool) -> list[str]:
    """The degrees and batch of the JSON against the number of ranks; a file of the image alone cannot be looked at."""
    path = args.run.deepspeed_config
    if path is None:
        return ["--deepspeed_config is missing: name a DeepSpeed JSON, for example ds_configs/zero2.json"]
    if in_container and not Path(path).exists():
        return []
    facts = RunFacts(
        source=path,
        gradient_checkpointing=args.model.gradient_checkpointing,
        compile=args.model.compile is not None,
        samples=args.run.sample_steps is not None,
        adapters=args.model.adapter is not None,
        load_in_4bit=args.model.load_in_4bit,
    )
    try:
        resolve_config(load_config(path), world_size=description.world_size, overrides=args.run.set, facts=facts)
    except UserError as error:
        return error.problems
    return []


def as_text(written: Written) -> str:
    """Files and command as a shell would take them."""
    files = "".join(f"# --- {path}\n{text}" for path, text in written.files.items())
    return f"{files}{'# --- then' if files else '# ---'}\n{quoted(written.command)}\n"


def _start(written: Written, description: RunDescription, supervise: Callable[[list[str]], int]) -> int:
    program = written.command[0]
    for path, text in written.files.items():
        Path(path).write_text(text)
    if shutil.which(program) is None:
        left = f"; {' and '.join(written.files)} is written: {quoted(written.command)}" if written.files else ""
        raise UserError(f"this machine has no {program}: start where there is one{left}")
    if written.supervised:
        return supervise(["--max_restarts", str(description.max_restarts), "--", *written.command])
    if written.trains:
        os.execvp(program, written.command)
    return subprocess.run(written.command, timeout=_SUBMIT_S).returncode
