"""The Redis protocol from the server's side, and a real socket before `tests.sim.redis`.

The socket lets the suite of tests/test_buffer.py run over the double with the clients that it has.
"""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hiredis

from tests.ports import LOOPBACK
from tests.sim.redis import Ok, Server, Session


def parsed(data: bytes) -> list[list[bytes]]:
    """The whole commands in it."""
    reader = hiredis.Reader()
    reader.feed(data)
    return list(_commands(reader))


def _commands(reader: Any) -> Iterator[list[bytes]]:
    while (command := reader.gets()) is not False:
        yield command


def encoded(reply: Any) -> bytes:
    """One reply."""
    match reply:
        case None:
            return b"$-1\r\n"
        case Ok():
            return b"+%b\r\n" % bytes(reply)
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case int():
            return b":%d\r\n" % reply
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(encoded, reply))
        case Exception():
            return b"-%b\r\n" % str(reply).encode()
    raise TypeError(type(reply))


@contextmanager
def served(port: int) -> Iterator[None]:
    """One server on the system's clock."""
    server, turn = Server(time.time), threading.Lock()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            session, reader = Session(), hiredis.Reader()
            while received := self.request.recv(1 << 18):
                reader.feed(received)
                with turn:
                    replies = [server.execute(session, command) for command in _commands(reader)]
                self.request.sendall(b"".join(map(encoded, replies)))

    class Threads(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Threads((LOOPBACK, port), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            listening.shutdown()
            thread.join()
