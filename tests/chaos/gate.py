"""A line to the object store that can be cut, choked, or answer for it that it is overloaded.

It forwards bytes, not requests: S3 requests are signed over the host they were made for, which an HTTP proxy would
change.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

from tests.ports import LOOPBACK

PIECE_BYTES = 64 << 10
SLOW_SECS = 0.7  # before each piece of an answer: a request takes some of them
_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
OVERLOADED = (
    b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Type: application/xml\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)

Mode = Literal["open", "cut", "overloaded", "slow"]


class Gate:
    """Listens at `url` while the block lasts and forwards to `upstream`, as far as the mode lets it."""

    def __init__(self, upstream: str) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = (parts.hostname or LOOPBACK, parts.port or 80)
        self._mode: Mode = "open"
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((LOOPBACK, 0))
        self._thread = threading.Thread(target=self._accept, name="gate", daemon=True)
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self._cut_all()

    @contextmanager
    def set(self, mode: Mode) -> Iterator[None]:
        """In this mode for the length of the block; connections made before it are cut, so that it is felt at once."""
        self._mode = mode
        self._cut_all()
        try:
            yield
        finally:
            self._mode = "open"
            self._cut_all()

    def _cut_all(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), name="gate-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self._open.add(client)
            if self._mode == "cut":
                return
            if self._mode == "overloaded":
                client.recv(PIECE_BYTES)
                client.sendall(OVERLOADED)
                return
            with socket.create_connection(self._upstream) as server:
                self._open.add(server)
                there = threading.Thread(target=self._pump, args=(client, server), daemon=True)
                there.start()
                self._pump(server, client)
                there.join()
                self._open.discard(server)
        self._open.discard(client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                if self._mode == "slow":
                    self._closing.wait(SLOW_SECS)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
