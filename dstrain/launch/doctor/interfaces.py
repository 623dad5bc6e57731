"""Which network interface a rank on this host will take. Only the standard library: it runs where packages may lack.

gloo listens on the interface that GLOO_SOCKET_IFNAME names, or else on the address that the host's own name resolves
to (`ProcessGroupGloo::createDefaultDevice`, PyTorch 2.13). Debian's installer writes `127.0.1.1 NAME` into /etc/hosts:
then every other host is told to connect to itself.
"""

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of every interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def gloo_address() -> str | None:
    """The address at which gloo will listen on this host; None where it finds none (it then takes the loopback)."""
    if wanted := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interfaces().get(wanted.split(",")[0])
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def nccl_interfaces() -> list[str]:
    """The interfaces that NCCL will take for sockets: NCCL_SOCKET_IFNAME, else all but the loopback and Docker's.

    InfiniBand, where there is some, carries the data instead.
    """
    names = [name for name, address in interfaces().items() if not is_loopback(address)]
    wanted = os.environ.get("NCCL_SOCKET_IFNAME")
    if not wanted:
        return [name for name in names if not name.startswith("docker")] or names
    exact, negated = wanted.startswith(("=", "^=")), wanted.startswith("^")
    prefixes = wanted.lstrip("^=").split(",")
    matches = [name for name in names if (name in prefixes if exact else name.startswith(tuple(prefixes)))]
    return [name for name in names if name not in matches] if negated else matches
