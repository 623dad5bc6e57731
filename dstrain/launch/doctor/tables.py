"""The doctor's findings for people: facts that are the same on several hosts share a line."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dstrain.launch.doctor.network import Link
from dstrain.launch.doctor.verdicts import size


def show(facts: Mapping[str, Mapping[str, Any]], links: Sequence[Link], shared: bool | None) -> None:
    """shared: whether all hosts see one output_dir; None if that is not known."""
    console = Console()
    table = Table("", "found", "on", header_style="bold")
    lines = {host: _lines(found) for host, found in facts.items()}
    for check in dict.fromkeys(name for found in lines.values() for name in found):
        hosts_of: dict[str, list[str]] = {}
        for host, found in lines.items():
            hosts_of.setdefault(found.get(check, "unknown"), []).append(host)
        for number, (text, hosts) in enumerate(hosts_of.items()):
            everyone = "all" if len(facts) > 1 else hosts[0]
            table.add_row(check if number == 0 else "", text, everyone if len(hosts) == len(facts) else " ".join(hosts))
    if shared is not None:
        table.add_row("run folder", "shared" if shared else "not shared", "all")
    console.print(table)
    if links:
        console.print(_network(links))


def _lines(facts: Mapping[str, Any]) -> dict[str, str]:
    versions, ops, network = facts["versions"], facts["ops"], facts["network"]
    cpu = facts["cpu"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed", "transformers"))
    lines = {
        "packages": packages,
        "dstrain": f"{versions['dstrain']}, sources {facts['code']}, commit {facts['commit'] or 'unknown'}",
        "devices": _gpus(facts["gpus"]) or f"{cpu['cores']} cores {cpu['model']}, {' '.join(cpu['flags'])}",
        "memory free": f"{facts['memory']['free_gib']:.0f} GiB",
        "/dev/shm free": f"{size(facts['shm']['free_gib'])} of {size(facts['shm']['size_gib'])}",
        **{name: _disk(disk) for name, disk in facts["disks"].items()},
        "gloo, NCCL": f"{_interface(network)}, {' '.join(network['nccl']) or 'none'}",
    }
    if ops is not None:
        lines["ops"] = f"{len(ops['builders']) - len(ops['unbuilt'])} of {len(ops['builders'])} built"
    return lines


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(gpus)} x {gpus[0]['name']} ({gpus[0]['memory_gib']:.0f} GiB)" if gpus else ""


def _disk(disk: Mapping[str, Any]) -> str:
    return f"{size(disk['free_gib'])} of {size(disk['size_gib'])} free at {disk['path']}"


def _interface(network: Mapping[str, Any]) -> str:
    names = {address: name for name, address in network["interfaces"].items()}
    return names.get(network["gloo"], str(network["gloo"]))


def _network(links: Sequence[Link]) -> Table:
    table = Table("between", "MB/s", "round trip ms", "clocks differ by s", header_style="bold")
    for link in sorted(links, key=lambda link: link.bytes_per_s):
        hosts = " and ".join(link.hosts)
        if link.problem is None:
            clock = f"{abs(link.clock_s):.3f}"
            table.add_row(hosts, f"{link.bytes_per_s / 1e6:.0f}", f"{link.round_trip_s * 1e3:.3f}", clock)
        else:
            table.add_row(hosts, "none", "", "")
    return table
