"""A dead rank ends the others: every rank holds one TCP connection to rank 0, and the kernel closes those of the dead.

The end of a process is an end of file at once. The end of a host or a cable is noticed by TCP, which gives up when a
beat is not acknowledged for 20 seconds: the other side's kernel answers, so a rank that holds the interpreter
lock is not taken for dead. (Keepalive alone does not count probes that a dead link drops on this side: 97 s.) Before it
ends, a rank says why; rank 0 passes that on. Ranks started by `srun` or by hand have no launcher that would do this.
"""

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dstrain.errors import ExitCode

_BEAT_S, _GIVE_UP_S = 5.0, 20.0
_CONNECT_S = 30.0
# Ranks that raise the same error end by themselves, with their own words, if they are given time to.
GRACE_S = 15.0

OnLoss = Callable[[ExitCode, str], None]


class Lifeline:
    """What a rank without peers has: nothing to lose."""

    has_peers = False
    lost: str | None = None  # the first end of a rank, of this one or another

    def watch(self, on_loss: OnLoss) -> None:
        """From now on `on_loss(code, text)` is called, in a thread, when another rank ends without agreement."""

    def hear(self, timeout_s: float) -> None:
        """Wait for news of another rank's end: a collective may fail for it before its word is here."""

    def tell(self, code: int, text: str) -> None:
        """Tell the others that this rank ends, and why. Never waits and never raises."""

    def close(self) -> None:
        """The run is over on all ranks: what ends now ends well."""


class TcpLifeline(Lifeline):
    """Rank 0 listens, the others connect. A collective of the default group."""

    has_peers = True

    def __init__(self, rank: int, world_size: int, address: str):
        self.rank = rank
        self._lock = threading.Lock()
        self._closed = False
        self._news = threading.Event()
        self._on_loss: OnLoss = lambda code, text: None
        self._peers: dict[int, socket.socket] = {}
        offer: list[Any] = [None]
        if rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=dual)
            offer = [(server.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(offer, src=0)
        port, token = offer[0]
        if rank == 0:
            self._accept(server, world_size, token)
        else:
            peer = socket.create_connection((address, port), timeout=_CONNECT_S)
            peer.sendall(json.dumps({"rank": rank, "token": token}).encode() + b"\n")
            self._adopt(0, peer)
        threading.Thread(target=self._listen, name="dstrain-lifeline", daemon=True).start()

    def _accept(self, server: socket.socket, world_size: int, token: str) -> None:
        deadline = time.monotonic() + _CONNECT_S
        with server:
            while len(self._peers) < world_size - 1:
                server.settimeout(max(0.1, deadline - time.monotonic()))
                peer, _ = server.accept()
                peer.settimeout(5.0)
                hello = _read_line(peer)
                if hello is not None and hello.get("token") == token:
                    self._adopt(hello["rank"], peer)

    def _adopt(self, rank: int, peer: socket.socket) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _GIVE_UP_S))
        self._peers[rank] = peer

    def watch(self, on_loss: OnLoss) -> None:
        self._on_loss = on_loss

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            beaten_at = time.monotonic()
            while selector.get_map():
                ready = selector.select(_BEAT_S)
                if not self._closed and time.monotonic() - beaten_at >= _BEAT_S:
                    beaten_at = time.monotonic()
                    self._send({"beat": True})
                for key, _ in ready:
                    word = _read_line(key.fileobj)  # type: ignore[arg-type]
                    if word is None or word.get("bye"):
                        selector.unregister(key.fileobj)
                    if word is None:
                        word = {"rank": key.data, "code": int(ExitCode.CRASH), "silent": True}
                        word["text"] = f"rank {key.data} has died without a word (killed, or its host is gone)"
                    if "text" in word:
                        self._heard(word)

    def _heard(self, word: dict[str, Any]) -> None:
        if self._closed or self.lost is not None:
            return
        self.lost = word["text"]
        self._news.set()
        self._send(word)  # from rank 0 to the rest; the others only reach rank 0, which knows
        if not word.get("silent") and word["code"] != ExitCode.HUNG:
            time.sleep(GRACE_S)
        if not self._closed:
            self._on_loss(ExitCode(word["code"]), word["text"])

    def _send(self, word: dict[str, Any]) -> None:
        line = json.dumps(word).encode() + b"\n"
        for rank, peer in self._peers.items():
            if rank != word.get("rank"):
                try:
                    peer.send(line, socket.MSG_DONTWAIT)
                except OSError:  # it is gone as well
                    continue

    def hear(self, timeout_s: float) -> None:
        self._news.wait(timeout_s)

    def tell(self, code: int, text: str) -> None:
        with self._lock:
            if not self._closed and self.lost is None:
                self.lost = text
                self._send({"rank": self.rank, "code": int(code), "text": f"rank {self.rank}: {text}"})

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._send({"bye": True})


def _read_line(peer: socket.socket) -> dict[str, Any] | None:
    """One message; None at the end of the connection."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            if not (more := peer.recv(1)):
                return None
            data += more
    except OSError:
        return None
    try:
        return json.loads(data)
    except ValueError:
        return None


def build_lifeline(address: str) -> Lifeline:
    """The lifeline of this process group; address: where rank 0 can be reached (MASTER_ADDR). A collective.

    Where rank 0 cannot be reached on a port of its own choice (a firewall), every rank goes on without: the launcher
    and the timeouts of the process groups remain.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Lifeline()
    try:
        lifeline: Lifeline = TcpLifeline(dist.get_rank(), dist.get_world_size(), address)
    except OSError:
        lifeline = Lifeline()
    connected: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(connected, isinstance(lifeline, TcpLifeline))
    if not all(connected):
        lifeline.close()
        return Lifeline()
    return lifeline
