"""The hosts of a run: reading a hostfile, and running one program on all of them at once over ssh.

hosts = read_hostfile("hostfile")
for answer in ask_all([host.name for host in hosts], ["hostname"], timeout_s=10): ...
"""

import re
import shlex
import socket
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from dstrain.errors import UserError

# No question can wait for an answer from a person, and a host that is gone is noticed.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=8"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
_SSH_FAILED = 255
_MAX_CONNECTIONS = 64
# What ssh says -> what is wrong and what to do; `{host}` is filled in.
_REASONS = (
    ("Could not resolve hostname", "{host} is not a known name: correct the hostfile, or add the host to /etc/hosts"),
    ("Permission denied", "{host} refuses this user's key: ssh-copy-id {host}"),
    ("Host key verification failed", "{host} has an unknown or changed key: ssh {host} once, or ssh-keygen -R {host}"),
    ("Connection refused", "{host} runs no ssh server: start sshd there"),
    ("No route to host", "{host} cannot be reached: is it on, and in this network?"),
    ("timed out", "{host} does not answer: is it on, and in this network?"),
)


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. slots: ranks that the host takes."""

    name: str
    slots: int


@dataclass(frozen=True)
class Answer:
    """What a program on a host gave. problem: why there is no answer at all, in one line; None if it ran."""

    host: str
    exit_code: int
    stdout: str
    stderr: str
    problem: str | None = None


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile (`NAME slots=N` lines, # comments), in its order. Raises UserError."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"--hostfile {path} cannot be read ({error.strerror}): name a file of `NAME slots=N` lines"
        ) from None
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", words)
        if match is None or match[2] == "0":
            problems.append(f"{path}:{number}: {words!r} is no host: write `NAME slots=N`")
        elif match[1] in (host.name for host in hosts):
            problems.append(f"{path}:{number}: {match[1]} is named twice: give each host one line with all its slots")
        else:
            hosts.append(Host(match[1], int(match[2])))
    if not hosts and not problems:
        problems.append(f"--hostfile {path} names no host: write `NAME slots=N` lines")
    if problems:
        raise UserError(problems)
    return hosts


def write_hostfile(path: Path, hosts: Iterable[Host]) -> None:
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def is_this_host(name: str) -> bool:
    """Whether a name means the machine that asks: ssh is not needed for it."""
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return False
    own = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    return address in own


def words_on(host: str, command: Sequence[str]) -> list[str]:
    """What runs `command` on a host: over ssh, unless it is this one."""
    return list(command) if is_this_host(host) else ["ssh", *SSH_OPTIONS, host, shlex.join(command)]


def ask(host: str, command: Sequence[str], *, timeout_s: float, stdin: str = "") -> Answer:
    """Run `command` on a host and wait for it. Never raises for a failure."""
    words, here = words_on(host, command), is_this_host(host)
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Answer(host, -1, "", "", f"{host} gave no answer within {timeout_s:.0f} s: is it busy, or cut off?")
    except FileNotFoundError:
        needed = command[0] if here else "ssh (apt-get install openssh-client)"
        return Answer(host, -1, "", "", f"{host} cannot be asked: this machine has no {needed}")
    problem = None
    if not here and done.returncode == _SSH_FAILED:
        problem = _why(host, done.stderr)
    return Answer(host, done.returncode, done.stdout, done.stderr, problem)


def ask_all(hosts: Sequence[str], command: Sequence[str], *, timeout_s: float, stdin: str = "") -> list[Answer]:
    """`ask` on every host at the same time; the answers in the order of `hosts`."""
    with ThreadPoolExecutor(max_workers=min(len(hosts), _MAX_CONNECTIONS)) as pool:
        return list(pool.map(lambda host: ask(host, command, timeout_s=timeout_s, stdin=stdin), hosts))


def _why(host: str, stderr: str) -> str:
    for sign, reason in _REASONS:
        if sign in stderr:
            return reason.format(host=host)
    last = stderr.strip().splitlines()[-1:] or ["no message"]
    return f"ssh to {host} failed ({last[0]}): try `ssh {host} hostname`"
