"""The network that a plan is for: of the hosts of a hostfile, as it is now."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dstrain.errors import UserError
from dstrain.launch.hosts import Host
from dstrain.planner.hardware import Device


def check_slots(hosts: Sequence[Host]) -> int:
    """Slots of each host. Raises UserError where they differ: a plan counts devices of a host."""
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise UserError(
            f"the hosts have {', '.join(map(str, sorted(slots)))} slots: a plan needs as many on each, "
            "so make a hostfile of the like ones"
        )
    return slots.pop()


def with_network(device: Device, links: Sequence[Any]) -> Device:
    """The device with the slowest of the measured links (`dstrain.launch.doctor.network.Link`) as its network.

    A ring over hosts goes at the pace of its slowest link, and crosses each once. Raises UserError for a pair that
    could not be measured. What was measured is a host's, whose devices share it.
    """
    problems = [f"{link.hosts[0]} to {link.hosts[1]}: {link.problem}" for link in links if link.problem]
    if problems:
        raise UserError(problems)
    if not links:
        return device
    slowest = min(links, key=lambda link: link.bytes_per_s)
    latency = device.latency + max(link.round_trip_s for link in links)
    return replace(device, network=slowest.bytes_per_s, network_latency=latency, shares_network=True)
