"""The facts of all hosts at once, and the quick part of the checks, which `dstrain launch` makes before a start."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.errors import UserError
from dstrain.launch.asking import module_command
from dstrain.launch.doctor.verdicts import Problem, compare, judge_host, judge_names, merge
from dstrain.launch.hosts import Answer, Host, ask_all, is_this_host, read_hostfile
from dstrain.launch.words import hostfile_of

QUICK_S, THOROUGH_S = 20.0, 25.0


@dataclass
class Examination:
    """facts: of the hosts that answered, in the order of the hostfile."""

    hosts: Sequence[Host]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def preflight(hosts: Sequence[Host], output_dir: Path) -> list[str]:
    """Why a start on these hosts could not work: who does not answer, lacks a package, differs, has a full disk.

    One line each; in a second or two, at most half a minute where a host is silent.
    """
    examination = examine(hosts, {"output_dir": str(output_dir)}, QUICK_S)
    return [str(problem) for problem in merge(examination.problems) if problem.level == "error"]


def check_start(command: Sequence[str], output_dir: Path) -> None:
    """`preflight` of `deepspeed --hostfile F ...` over several hosts; another command passes. Raises UserError."""
    hostfile = hostfile_of(command)
    if hostfile is None:
        return
    hosts = read_hostfile(hostfile)
    if all(is_this_host(host.name) for host in hosts):
        return
    if problems := preflight(hosts, output_dir):
        raise UserError(problems)


def examine(hosts: Sequence[Host], order: dict[str, Any], timeout_s: float) -> Examination:
    """Ask every host at the same time. order: the arguments of `probe.describe`."""
    found = Examination(hosts)
    command = module_command("dstrain.launch.doctor.probe")
    answers = ask_all([host.name for host in hosts], command, timeout_s=timeout_s, stdin=json.dumps(order))
    for host, answer in zip(hosts, answers, strict=True):
        problem = why_no_answer(answer)
        if problem is not None:
            found.problems.append(problem)
            continue
        facts = found.facts[host.name] = last_json(answer)
        found.problems += judge_host(host.name, host.slots or None, facts)
        found.problems += judge_names(host.name, facts) if len(hosts) > 1 else []
    found.problems += compare(found.facts)
    return found


def last_json(answer: Answer) -> dict[str, Any]:
    """What a program of dstrain printed; what a shell prints at a login comes before it."""
    return json.loads(answer.stdout.splitlines()[-1])


def why_no_answer(answer: Answer) -> Problem | None:
    """Of a program of dstrain that was run on a host."""
    if answer.problem is not None:
        text = answer.problem.removeprefix(f"{answer.host} ")
        return Problem("error", answer.host, "reachable", text)
    if answer.exit_code == 0:
        return None
    last = (answer.stderr.strip().splitlines() or [f"exit code {answer.exit_code}"])[-1]
    remedy = "put the same checkout and the same Python environment at the same path there"
    return Problem("error", answer.host, "same versions", f"dstrain does not run there ({last}): {remedy}")
