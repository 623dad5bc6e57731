"""One end of a measurement between two hosts: what `network.measure_links` starts on each. Only the standard library.

It prints `{"address", "port"}`, answers what connects there, and takes one order a line (`{"address", "port"}` of
another peer) from stdin, to each of which it answers with one line. It ends with its stdin.
"""

import json
import socket
import statistics
import sys
import threading
import time
from typing import Any

from dstrain.launch.doctor.interfaces import gloo_address, is_loopback

_CONNECT_S, _SILENCE_S = 5.0, 10.0
_SEND_S = 0.25  # a direction
_PINGS = 40
_CHUNK = bytes(1 << 20)


def serve(server: socket.socket) -> None:
    """Answer every peer that connects, one thread each."""
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        _tune(connection)
        try:
            wish = connection.recv(1)
            if wish == b"p":
                while connection.recv(1):
                    connection.sendall(b"%020d" % time.time_ns())
            elif wish == b"r":
                connection.sendall(json.dumps(_receive(connection)).encode())
            elif wish == b"s":
                _send(connection)
        except OSError:
            return  # the other end says what happened


def measure(address: str, port: int) -> dict[str, Any]:
    """Round trip and clock difference (the peer's less ours) in seconds, bytes/s to the peer and from it.

    {"problem": text} where the connection fails.
    """
    try:
        round_trip_s, clock_s = _ping(address, port)
        with _connect(address, port, b"r") as connection:
            _send(connection)
            sent = json.loads(connection.makefile().read())
        with _connect(address, port, b"s") as connection:
            received = _receive(connection)
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    return {"round_trip_s": round_trip_s, "clock_s": clock_s, "sent": sent, "received": received}


def _ping(address: str, port: int) -> tuple[float, float]:
    """The median round trip, and the clock difference of the fastest one, which errs by at most half of it."""
    trips = []
    with _connect(address, port, b"p") as connection:
        for _ in range(_PINGS):
            before = time.time_ns()
            connection.sendall(b".")
            there = int(connection.recv(20, socket.MSG_WAITALL))
            after = time.time_ns()
            trips.append((after - before, there - (after + before) // 2))
    return statistics.median(trip for trip, _ in trips) / 1e9, min(trips)[1] / 1e9


def _connect(address: str, port: int, wish: bytes) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_CONNECT_S)
    _tune(connection)
    connection.sendall(wish)
    return connection


def _tune(connection: socket.socket) -> None:
    connection.settimeout(_SILENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send(connection: socket.socket) -> None:
    end = time.monotonic() + _SEND_S
    while time.monotonic() < end:
        connection.sendall(_CHUNK)
    connection.shutdown(socket.SHUT_WR)


def _receive(connection: socket.socket) -> float:
    """Bytes/s from the first byte to the last: what has arrived counts, not what a sender's buffer took."""
    buffer = bytearray(len(_CHUNK))
    total, began = 0, 0.0
    while size := connection.recv_into(buffer):
        began = began or time.monotonic()
        total += size
    return total / max(time.monotonic() - began, 1e-6)


def main() -> None:
    server = socket.create_server(("", 0), backlog=128)
    address = gloo_address()
    usable = None if address is None or is_loopback(address) else address
    print(json.dumps({"address": usable, "port": server.getsockname()[1]}), flush=True)
    threading.Thread(target=serve, args=(server,), daemon=True).start()
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
