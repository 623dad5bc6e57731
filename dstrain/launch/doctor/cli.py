"""`dstrain doctor`: whether this machine, or the hosts of a hostfile, can carry a run.

dstrain doctor
dstrain doctor --hostfile hostfile --deepspeed_config ds_configs/zero2.json --output_dir /shared/runs/a
dstrain doctor --hostfile hostfile --build

Nothing is changed on a host but by --build, which compiles DeepSpeed's ops. The exit code is 2 when a run could not
work, and 0 otherwise, also with warnings.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dstrain.config import RunFacts, load_config, resolve_config
from dstrain.errors import ExitCode, UserError
from dstrain.launch.asking import module_command
from dstrain.launch.doctor.network import Link, measure_links
from dstrain.launch.doctor.preflight import THOROUGH_S, Examination, examine, last_json, why_no_answer
from dstrain.launch.doctor.verdicts import Problem, judge_links, judge_port, judge_sharing, merge
from dstrain.launch.hosts import Host, ask_all, read_hostfile

_PORT = 29500  # of rank 0, unless a launcher is told another: deepspeed's and torchrun's default
_BUILD_S, _LOOK_S = 1800.0, 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", help="examine these hosts over ssh instead of this machine alone")
    parser.add_argument("--deepspeed_config", help="check its degrees, ops and NVMe folder too")
    parser.add_argument("--output_dir", default="runs/default", help="the run folder (default: that of train.py)")
    parser.add_argument("--build", action="store_true", help="compile DeepSpeed's ops on every host first")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    deepspeed = load_config(args.deepspeed_config) if args.deepspeed_config else None
    hosts = read_hostfile(args.hostfile) if args.hostfile else [Host(socket.gethostname(), 0)]
    problems = _degrees(deepspeed, hosts) if deepspeed and args.hostfile else []
    if args.build:
        problems += _build(hosts, args.deepspeed_config)
    order = {
        "output_dir": os.path.abspath(args.output_dir),
        "nvme_path": _nvme_path(deepspeed),
        "leave_token": len(hosts) > 1,
        "port": _PORT,
        "ops": True,
        "deepspeed": deepspeed,
    }
    examination = examine(hosts, order, THOROUGH_S)
    answering = list(examination.facts)
    sharing = _look_at_sharing(examination)
    links = measure_links(answering)
    if hosts[0].name in examination.facts:
        problems += judge_port(hosts[0].name, examination.facts[hosts[0].name], _PORT)
    problems = merge([*problems, *examination.problems, *(sharing or []), *judge_links(links)])
    shared = None if sharing is None else not sharing
    _report(args.json, examination.facts, links, shared, problems)
    if errors := [str(problem) for problem in problems if problem.level == "error"]:
        raise UserError(errors)
    return ExitCode.FINISHED


def _report(
    as_json: bool, facts: dict[str, Any], links: Sequence[Link], shared: bool | None, problems: Sequence[Problem]
) -> None:
    if as_json:
        found = {"hosts": facts, "links": [asdict(link) for link in links], "output_dir_is_shared": shared}
        print(json.dumps({**found, "problems": [asdict(problem) for problem in problems]}), flush=True)
        return
    if facts:
        from dstrain.launch.doctor.tables import show

        show(facts, links, shared)
    sys.stdout.flush()
    for problem in problems:
        if problem.level == "warning":
            print(f"dstrain: warning: {problem}", file=sys.stderr, flush=True)


def _degrees(deepspeed: dict[str, Any], hosts: Sequence[Host]) -> list[Problem]:
    """Whether the configuration can run on so many ranks."""
    try:
        world_size = sum(host.slots for host in hosts)
        resolve_config(deepspeed, world_size=world_size, facts=RunFacts(config_only=True))
    except UserError as error:
        return [Problem("error", "all hosts", "degrees", text) for text in error.problems]
    return []


def _nvme_path(deepspeed: dict[str, Any] | None) -> str | None:
    zero = (deepspeed or {}).get("zero_optimization") or {}
    offloads = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    return next((offload.get("nvme_path") for offload in offloads if offload.get("device") == "nvme"), None)


def _build(hosts: Sequence[Host], deepspeed_config: str | None) -> list[Problem]:
    words = ["--deepspeed_config", os.path.abspath(deepspeed_config)] if deepspeed_config else []
    command = module_command("dstrain.launch.ops", *words)
    problems = []
    for answer in ask_all([host.name for host in hosts], command, timeout_s=_BUILD_S):
        if answer.problem is None:  # who does not answer is named by the examination
            last = (answer.stdout.strip().splitlines() or [""])[-1]
            print(f"{answer.host}: {last}", file=sys.stderr, flush=True)
        if answer.problem is None and answer.exit_code != ExitCode.FINISHED:
            lines = answer.stderr.strip().splitlines()[-3:]
            problems += [Problem("error", answer.host, "ops", line) for line in lines]
    return problems


def _look_at_sharing(examination: Examination) -> list[Problem] | None:
    """Which hosts see each other's files in the run folder; None where fewer than two could leave one."""
    tokens = {host: facts["disks"]["output_dir"]["token"] for host, facts in examination.facts.items()}
    tokens = {host: token for host, token in tokens.items() if token is not None}
    names = list(examination.facts)
    if len(tokens) < 2:
        return None
    command, order = module_command("dstrain.launch.doctor.probe"), json.dumps({"files": tokens})
    answers = ask_all(names, command, timeout_s=_LOOK_S, stdin=order)
    ask_all(names, ["rm", "-f", *tokens.values()], timeout_s=_LOOK_S)
    failed = [problem for problem in map(why_no_answer, answers) if problem is not None]
    seen = {answer.host: last_json(answer)["seen"] for answer in answers if why_no_answer(answer) is None}
    path = examination.facts[names[0]]["disks"]["output_dir"]["path"]
    return failed + judge_sharing(seen, next(iter(tokens)), path)
