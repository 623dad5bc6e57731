"""How much memory there is: of a device, and of this host, where control groups may give less than the machine has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.monitor.cgroup import memory_groups

GIB = 2.0**30


@dataclass(frozen=True)
class Limit:
    """gib: what new processes may take. source: where that is written, for the message."""

    gib: float
    source: str


def host_limit(root: Path = Path("/")) -> Limit:
    """The smallest of what the machine has available and what each control group above this process has left.

    root: of /proc and /sys, for tests.
    """
    left = [
        Limit(max(0, group.limit - group.used) / GIB, f"{group.limit_name} of the control group {group.folder}")
        for group in memory_groups(root)
        if group.limit is not None
    ]
    return min((_available(root), *left), key=lambda limit: limit.gib)


def _available(root: Path) -> Limit:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return Limit(int(line.split()[1]) * 1024 / GIB, "MemAvailable of /proc/meminfo")
    return Limit(float("inf"), "nothing")


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
