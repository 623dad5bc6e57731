"""What a start has left on this host: its processes, and segments in /dev/shm. The supervisor asks every host of a run.

    echo '{"script": "train.py", "output_dir": "/data/runs/a"}' | python -m dstrain.launch.sweep
    echo '{"script": "train.py", "output_dir": "/data/runs/a", "grace_s": 60, "known": []}' | ...

The first form only looks. With `grace_s`, the launchers of those ranks are killed, on which the ranks save and end by
themselves; what is left after so many seconds is killed too, and segments that nobody maps and that are not in `known`
are removed. A process is the run's if it is this user's, Python runs `script` in it (or `deepspeed.launcher.launch`
does), and its `--output_dir` is this very folder: other people's runs, and this user's others, are not touched.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dstrain.launch import processes
from dstrain.launch.words import flag_value

_NODE_LAUNCHER = "deepspeed.launcher.launch"
_POLL_S = 0.2
_UNKILLABLE_S = 10.0  # a process that waits for a dead disk or device dies when that answers


@dataclass
class Left:
    """found: processes of the run. killed: ranks that had to be. removed: segments. segments: those that are left."""

    found: int = 0
    killed: int = 0
    removed: list[str] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)


def role_of(words: Sequence[str], cwd: Path, script: str, output_dir: Path) -> str | None:
    """What a command line is in this run: "rank", "launcher" (of a node) or None: not of this run, or not to be ended.

    The supervisor and the launchers that a user starts carry the same flags, but name another program first.
    """
    program = next((i for i, word in enumerate(words) if i > 0 and not word.startswith("-")), None)
    folder = flag_value(words, "--output_dir")
    if program is None or folder is None or (cwd / folder).resolve() != output_dir:
        return None
    if words[program] == _NODE_LAUNCHER:
        return "launcher"
    return "rank" if os.path.basename(words[program]) == script else None


def find(script: str, output_dir: Path) -> dict[int, str]:
    """Process id -> role, of this user's living processes on this host."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            words = processes.command_line(int(entry.name))
            role = role_of(words, (entry / "cwd").resolve(strict=True), script, output_dir)
        except OSError:  # it ended meanwhile
            continue
        if role is not None:
            found[int(entry.name)] = role
    return found


def sweep(script: str, output_dir: str, grace_s: float | None = None, known: Sequence[str] = ()) -> Left:
    """End what is left of the run on this host, or only look (grace_s None)."""
    folder = Path(output_dir).resolve()
    here = find(script, folder)
    left = Left(found=len(here))
    if grace_s is not None:
        deadline = time.monotonic() + grace_s
        processes.send(here, signal.SIGCONT)  # one that somebody has stopped could not even obey a signal
        while here and time.monotonic() < deadline + _UNKILLABLE_S:
            over = time.monotonic() >= deadline
            victims = [pid for pid, role in here.items() if role == "launcher" or over]
            left.killed += sum(here[pid] == "rank" for pid in victims)
            processes.send(victims, signal.SIGKILL)
            time.sleep(_POLL_S)
            here = find(script, folder)
        new = {path for path in processes.shared_memory() if path.name not in known}
        left.removed = [path.name for path in processes.remove_unmapped(new)]
    left.segments = [path.name for path in processes.shared_memory()]
    return left


if __name__ == "__main__":
    print(json.dumps(asdict(sweep(**json.load(sys.stdin)))))
