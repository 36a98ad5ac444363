"""Requests to Redis as bytes: pure, and the slow twin of `chunk_writes`.

Commands are packed by hand, as redis-py's command path costs twice as much, and a batch's chunks by a function of
their own, as they are nearly all that is ever sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tss.model import TRACE_ID_BYTES, Chunks

Command: TypeAlias = tuple[Any, ...]


class Request(NamedTuple):
    """Commands as the Redis protocol has them."""

    packed: bytes
    commands: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A batch's chunks on their way into Redis: part p has the rows `order[starts[p]:starts[p + 1]]` and a key prefix.

    `payloads` are those of the rows as they are to be stored.
    """

    chunks: Chunks
    payloads: Sequence[bytes]
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    prefixes: Sequence[bytes]

    @property
    def oldest_ms(self) -> NDArray[np.int64]:
        oldest: NDArray[np.int64] = self.chunks.facts["log_time_ms"].astype(np.int64)
        return oldest

    @property
    def newest_ms(self) -> NDArray[np.int64]:
        newest: NDArray[np.int64] = self.oldest_ms + self.chunks.facts["log_span_ms"]
        return newest

    def rows(self, part: int) -> NDArray[np.int64]:
        return self.order[self.starts[part] : self.starts[part + 1]]


ChunkWrites: TypeAlias = Callable[[Placed], list[Request]]  # `chunk_writes`, or its kernel


def pack(commands: Sequence[Command]) -> bytes:
    out: list[bytes] = []
    for command in commands:
        out.append(b"*%d\r\n" % len(command))
        for part in command:
            if not isinstance(part, bytes):
                part = str(part).encode()
            out += (b"$%d\r\n" % len(part), part, b"\r\n")
    return b"".join(out)


def heads(prefix: bytes, rows: int) -> tuple[bytes, bytes, bytes]:
    """What comes before the trace id in each HSET, and before the scores in the ZADDs of `seen` and of `born`."""
    hset = b"*4\r\n$4\r\nHSET\r\n$%d\r\n%bt:" % (len(prefix) + 2 + TRACE_ID_BYTES, prefix)
    zadd = b"*%d\r\n$4\r\nZADD\r\n$%d\r\n" % (3 + 2 * rows, len(prefix) + 4)
    return hset, zadd + prefix + b"seen\r\n$2\r\nGT\r\n", zadd + prefix + b"born\r\n$2\r\nLT\r\n"


def chunk_writes(placed: Placed) -> list[Request]:
    """For each part: an HSET a chunk into `t:<id>`, a ZADD GT into `seen` and one LT into `born`; or nothing."""
    requests = []
    oldest_ms, newest_ms = placed.oldest_ms, placed.newest_ms
    for part, prefix in enumerate(placed.prefixes):
        rows = placed.rows(part).tolist()
        hset, seen, born = heads(prefix, len(rows))
        out = []
        for row in rows:
            name, payload = placed.chunks.field(row), placed.payloads[row]
            sizes = len(name), name, len(payload), payload
            out.append(b"%b%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (hset, placed.chunks.trace_id(row), *sizes))
        for head, scores in ((seen, newest_ms), (born, oldest_ms)):
            out.append(head)
            for row in rows:
                score, trace_id = b"%d" % scores[row], placed.chunks.trace_id(row)
                out.append(b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(score), score, len(trace_id), trace_id))
        requests.append(Request(b"".join(out), len(rows) + 2) if rows else Request(b"", 0))
    return requests
