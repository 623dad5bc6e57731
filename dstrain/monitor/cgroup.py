"""What the kernel's control groups of this process say of memory: limits, use, and how many were killed for it."""

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # version 1 writes a number near 2**63


@dataclass(frozen=True)
class MemoryGroup:
    """One group. limit: bytes, or None; limit_name: the file that holds it. used: bytes, file caches left out."""

    folder: Path
    limit: int | None
    limit_name: str
    used: int
    oom_kills: int | None

    @classmethod
    def read(cls, folder: Path, version: int) -> "MemoryGroup | None":
        """None where the folder is of no memory controller."""
        limit_name, used_name, cache_name, kills_name = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"),
            2: ("memory.max", "memory.current", "inactive_file", "memory.events"),
        }[version]
        limit = _number(folder / limit_name)
        if limit is None and not (folder / limit_name).exists():
            return None
        used = (_number(folder / used_name) or 0) - (_number(folder / "memory.stat", cache_name) or 0)
        kills = _number(folder / kills_name, "oom_kill")
        return cls(folder, limit if limit and limit < _UNLIMITED else None, limit_name, used, kills)


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """This process's own group first, then those around it. root: of /proc and /sys, for tests."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        folder = base / path.strip("/")
        # Inside a container the path may be the host's, which is not mounted here: the root is then the own group.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            group = MemoryGroup.read(place, version=1 if controllers else 2)
            found += [] if group is None else [group]
    return found


def memory_group() -> MemoryGroup | None:
    """This process's own; None where there is none."""
    return next(iter(memory_groups()), None)


def memory_limit_mib() -> tuple[int, str]:
    """(MiB, what sets it): the memory of this machine, or the smallest limit of this process's control groups."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    limits = [(int(meminfo["MemTotal"].split()[0]) >> 10, "the machine's memory")]
    limits += [(group.limit >> 20, "the control group's limit") for group in memory_groups() if group.limit]
    return min(limits)


def _number(path: Path, key: str | None = None) -> int | None:
    """The number that a file holds, or that of one key in it; None where there is none ("max")."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    if key is not None:
        words = words[words.index(key) + 1 :] if key in words else []
    return int(words[0]) if words and words[0].isdigit() else None
