"""How much memory there is: of a device, and of this host, where control groups may give less than the machine has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2.0**30
_UNLIMITED = 2**60  # cgroup v1 writes a number near 2**63


@dataclass(frozen=True)
class Limit:
    """gib: what new processes may take. source: where that is written, for the message."""

    gib: float
    source: str


def host_limit(root: Path = Path("/")) -> Limit:
    """The smallest of what the machine has available and what each control group above this process has left.

    root: of /proc and /sys, for tests.
    """
    return min((_available(root), *_cgroups(root)), key=lambda limit: limit.gib)


def _available(root: Path) -> Limit:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return Limit(int(line.split()[1]) * 1024 / GIB, "MemAvailable of /proc/meminfo")
    return Limit(float("inf"), "nothing")


def _cgroups(root: Path) -> list[Limit]:
    """Limits of cgroup v2 (memory.max) and v1 (memory.limit_in_bytes), less what is in use and not a mere cache."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.strip("/")
        # Inside a container the path may be the host's, which is not mounted here: the root is then the own group.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            limit = _group_limit(place, *names)
            if limit is not None:
                found.append(limit)
    return found


def _group_limit(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Limit | None:
    try:
        limit = int((folder / limit_name).read_text())  # "max" is no number
        used = int((folder / usage_name).read_text())
        caches = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    if limit >= _UNLIMITED:
        return None
    cache = next((int(value) for name, value in caches if name == cache_name), 0)
    return Limit(max(0, limit - used + cache) / GIB, f"{limit_name} of the control group {folder}")


def device_limit(device: Any) -> Limit | None:
    """Total memory of an accelerator (torch.device); None for a CPU, whose limit is the host's."""
    if device.type == "cpu":
        return None
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    return Limit(total / GIB, f"memory of {torch.cuda.get_device_name(device)}")


def resident_gib() -> float:
    """The resident set of this process, in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / GIB
    raise AssertionError("no VmRSS in /proc/self/status")
