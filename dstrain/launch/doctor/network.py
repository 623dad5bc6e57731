"""The network between hosts, measured: bandwidth, round trip and clock difference of each pair.

    for link in measure_links(["node1", "node2"]):
        print(link.hosts, link.bytes_per_s, link.round_trip_s, link.problem)

One TCP connection carries it, at the address that gloo will take: InfiniBand under NCCL is faster. Pairs are measured
in rounds in which no host is in two of them, a second a round.
"""

import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dstrain.launch.asking import module_command
from dstrain.launch.hosts import words_on

_START_S, _ROUND_S, _END_S = 20.0, 30.0, 2.0


@dataclass(frozen=True)
class Link:
    """Between two hosts. bytes_per_s: of the slower direction. clock_s: the second host's clock less the first's.

    problem: why nothing could be measured (then the numbers are 0), without the hosts' names; None if all is well.
    """

    hosts: tuple[str, str]
    bytes_per_s: float
    round_trip_s: float
    clock_s: float
    problem: str | None = None


def rounds(hosts: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """All pairs, in as few rounds as can be, each host at most once in a round (the circle method)."""
    circle: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def measure_links(hosts: Sequence[str]) -> list[Link]:
    """Every pair of `hosts` (names as in a hostfile), which must answer to ssh. Never raises for a failed host."""
    if len(hosts) < 2:
        return []
    with ExitStack() as stack, ThreadPoolExecutor(len(hosts)) as pool:
        peers = {host: stack.enter_context(_peer(host)) for host in hosts}
        offers = dict(zip(hosts, pool.map(lambda host: _line(peers[host], _START_S), hosts), strict=True))

        def measure(pair: tuple[str, str]) -> Link:
            here, there = pair
            silent = next((host for host in pair if "problem" in offers[host]), None)
            if silent is not None:
                return Link(pair, 0.0, 0.0, 0.0, f"{silent} cannot measure: {offers[silent]['problem']}")
            address = offers[there]["address"] or there
            return _link(pair, _order(peers[here], {"address": address, "port": offers[there]["port"]}), address)

        return [link for pairs in rounds(hosts) for link in pool.map(measure, pairs)]


def _link(pair: tuple[str, str], found: dict[str, Any], address: str) -> Link:
    if "problem" in found:
        return Link(pair, 0.0, 0.0, 0.0, f"no TCP connection to {address} ({found['problem']})")
    return Link(pair, min(found["sent"], found["received"]), found["round_trip_s"], found["clock_s"])


@contextmanager
def _peer(host: str) -> Iterator[subprocess.Popen]:
    """The other end's program on a host, while the context lasts."""
    words = words_on(host, module_command("dstrain.launch.doctor.peer"))
    peer = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield peer
    finally:
        try:
            peer.communicate(timeout=_END_S)  # closes its stdin, on which it ends, also behind ssh
        except subprocess.TimeoutExpired:
            peer.kill()
            peer.communicate()


def _order(peer: subprocess.Popen, order: dict[str, Any]) -> dict[str, Any]:
    try:
        peer.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
    except BrokenPipeError:
        return {"problem": "its program ended"}
    return _line(peer, _ROUND_S)


def _line(peer: subprocess.Popen, timeout_s: float) -> dict[str, Any]:
    """The peer's next line (a shell may print others at a login); one that says nothing for so long is ended."""
    assert peer.stdout is not None and peer.stderr is not None
    timer = threading.Timer(timeout_s, peer.kill)
    timer.start()
    line = next((line for line in iter(peer.stdout.readline, "") if line.startswith("{")), None)
    timer.cancel()
    if line:
        return json.loads(line)
    last = peer.stderr.read().strip().splitlines()[-1:] or [f"no answer within {timeout_s:.0f} s"]
    return {"problem": last[0]}
