"""Hosts whose part of a start is over before the ranks have met: the others would wait for them in vain.

`deepspeed --hostfile` starts every host by pdsh, which goes on without a host that ssh cannot reach, that does not take
the key, or whose Python lacks deepspeed (deepspeed 0.19.8, pdsh 2.34). Rank 0 sees that where pdsh runs on its own
host: pdsh has one ssh below it for each host whose part still runs.
"""

import base64
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dstrain.errors import ExitCode
from dstrain.launch.processes import command_line
from dstrain.parallel import Launch
from dstrain.resilience.exits import exit_now

_WORLD = "--world_info="  # of deepspeed.launcher.launch, the parent of every rank: host -> slots
_LOOK_S = 2.0
_WHY = (
    "what was started there has ended before the ranks met; the reason is above, and `dstrain doctor --hostfile F` "
    "says what to do"
)
_LOOKS = 2


Process = tuple[int, list[str]]  # its parent's id, and its command line


@contextmanager
def leaving_without_absent_hosts(launch: Launch) -> Iterator[threading.Event]:
    """End this process with 2 and a line when a host cannot come any more. On rank 0 only.

    Until the event is set (the ranks have met) or the context is left. It begins before torch is imported: a person
    waits for the line.
    """
    met = threading.Event()
    if launch.is_main and launch.world_size > launch.local_world_size:
        threading.Thread(target=_watch, args=(met,), name="dstrain-absent-hosts", daemon=True).start()
    try:
        yield met
    finally:
        met.set()


def _watch(met: threading.Event) -> None:
    looks = 0
    while not met.wait(_LOOK_S):
        absent = absent_hosts(_processes(), os.getppid())
        looks = looks + 1 if absent else 0
        if looks == _LOOKS:
            names = ", ".join(absent)
            line = f"dstrain: error: {names}: {_WHY}\n"
            exit_now(ExitCode.USER_ERROR, partial(_say, line))


def _say(line: str) -> None:
    os.write(2, line.encode())  # sys.stderr is the rank's log


def absent_hosts(processes: Mapping[int, Process], launcher: int) -> list[str]:
    """The hosts of this start that pdsh has done with; [] where this host runs no pdsh for it.

    processes: by their ids. launcher: the id of this host's `deepspeed.launcher.launch`.
    """
    _, words = processes.get(launcher, (0, []))
    mark = next((word for word in words if word.startswith(_WORLD)), None)
    pdsh = next(
        (pid for pid, (_, words) in processes.items() if mark in words and _is(words, "pdsh", "pdsh.bin")), None
    )
    if mark is None or pdsh is None:
        return []
    hosts = json.loads(base64.urlsafe_b64decode(mark.removeprefix(_WORLD)))
    connected = [words for parent, words in processes.values() if parent == pdsh and _is(words, "ssh")]
    return [host for host in hosts if not any(host in words for words in connected)]


def _is(words: Sequence[str], *programs: str) -> bool:
    return bool(words) and os.path.basename(words[0]) in programs


def _processes() -> dict[int, Process]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            found[int(entry.name)] = (int(parent), command_line(int(entry.name)))
    return found
