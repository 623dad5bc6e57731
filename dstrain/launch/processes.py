"""The processes below this one, by id, and what they leave in /dev/shm."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_SHM = Path("/dev/shm")
ORPHANS_SAVE_S = 60.0  # ranks that lost their launcher save, then end


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (Linux's child subreaper): none can get out of sight."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int | None = None) -> list[int]:
    """Living processes below `pid` (default: this one), children before grandchildren; zombies are left out."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(name))
        if fields[0] == "Z":
            zombies.add(int(name))
    found, todo = [], [os.getpid() if pid is None else pid]
    while todo:
        below = children.get(todo.pop(0), [])
        found += below
        todo += below
    return [p for p in found if p not in zombies]


def command_line(pid: int) -> list[str]:
    """The words that a process was started with; [] of a zombie. Raises OSError for one that has ended."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]


def names(pids: Iterable[int]) -> list[str]:
    """The programs that run in these processes, by the kernel's short names."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return found


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap() -> None:
    """Collect the adopted children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_descendants(grace_s: float) -> int:
    """Wait so long for what is left below this process to end by itself, then kill it. Returns how many were killed."""
    deadline = time.monotonic() + grace_s
    while (left := descendants()) and time.monotonic() < deadline:
        reap()
        time.sleep(0.1)
    killed = 0
    while left := descendants():  # again: a process may have started another meanwhile
        killed += len(left)
        send(left, signal.SIGKILL)
        time.sleep(0.05)
        reap()
    reap()
    return killed


def shared_memory() -> set[Path]:
    """Segments of this user that PyTorch, DeepSpeed and NCCL make."""
    patterns = (f"deepspeed_allreduce_buffer_{os.getuid()}_*", "torch_*", "nccl-*")
    found = {path for pattern in patterns for path in _SHM.glob(pattern)}
    return {path for path in found if path.exists() and path.stat().st_uid == os.getuid()}


def unmapped(paths: Iterable[Path]) -> list[Path]:
    """Those segments that no process maps any more."""
    paths = list(paths)
    if not paths:
        return []
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    return [path for path in paths if str(path) not in mapped]


def remove_unmapped(paths: Iterable[Path]) -> list[Path]:
    """Delete those segments that no process maps any more; returns them."""
    unused = unmapped(paths)
    for path in unused:
        path.unlink(missing_ok=True)
    return unused
