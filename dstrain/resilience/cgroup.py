"""What the kernel's control group of this process says of memory: its limit, and how many were killed for it."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def memory_group() -> Path | None:
    """The folder of this process's memory controller, of version 2 or 1; None where there is none."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in lines:
        if controllers == "" or "memory" in controllers.split(","):
            root = _ROOT / "memory" if controllers else _ROOT
            # In a container the path may be the host's, and what is mounted its own group.
            for folder in (root / path.lstrip("/"), root):
                if (folder / "memory.max").exists() or (folder / "memory.limit_in_bytes").exists():
                    return folder
    return None


def _number(name: str, key: str | None = None) -> int | None:
    folder = memory_group()
    try:
        words = (folder / name).read_text().split() if folder else []
    except OSError:
        return None
    if key is not None:
        words = words[words.index(key) + 1 :] if key in words else []
    return int(words[0]) if words and words[0].isdigit() else None


def memory_limit_mib() -> tuple[int, str]:
    """(MiB, what sets it): the memory of this machine, or the smaller limit of this process's control group."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(meminfo["MemTotal"].split()[0]) >> 10
    limit = _number("memory.max") or _number("memory.limit_in_bytes")
    if limit and limit >> 20 < total:
        return limit >> 20, "the control group's limit"
    return total, "the machine's memory"


def oom_kills() -> int | None:
    """Processes of this group that were killed for memory, ever; None where nobody counts."""
    found = _number("memory.events", "oom_kill")
    return _number("memory.oom_control", "oom_kill") if found is None else found
