"""Ports for what tests start."""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"

# Below the range from which Linux (32768) and macOS (49152) take the ports of outgoing connections: while a
# part is down between a kill and a restart, no client's connection can come to sit on its port.
FIRST_PORT, LAST_PORT = 20_000, 32_000
TRIES = 200

_given: set[int] = set()


def free_port() -> int:
    """A loopback port that nothing listens on; never the same twice in one process."""
    for _ in range(TRIES):
        port = random.randint(FIRST_PORT, LAST_PORT)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise OSError(f"no free port between {FIRST_PORT} and {LAST_PORT} in {TRIES} tries")
