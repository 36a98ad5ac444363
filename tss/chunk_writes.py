"""The writes of a batch's chunks, compiled: `resp.chunk_writes`, which says what is right.

Payloads come packed from elsewhere; what is left to do for each chunk is some forty bytes of protocol, the field
name, and two numbers in digits. Every copy is checked against the size of both buffers.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, TracesData

from tss import wire
from tss.model import Record
from tss.native import U0, U1, U2, Bytes, U, UInt, copy_bytes, inner, kernel
from tss.resp import Placed, Request, heads
from tss.rules import RuleSet

Numbers = NDArray[np.uint64]

U10, ZERO = U(10), U(ord("0"))
ID_BYTES = U(16)
LINE = np.frombuffer(b"\r\n", np.uint8)
ID_HEAD = np.frombuffer(b"$16\r\n", np.uint8)
DOLLAR = U(ord("$"))
DIGITS_MAX = 20  # of 64 bits
# Of a row, without its field name, its payload and the head of its HSET: the id three times, four numbers, four sizes.
ROW_BYTES_MAX = 3 * 16 + 8 * (DIGITS_MAX + 5)


@inner
def _put_line(out: Bytes, at: UInt, data: Bytes, start: UInt, size: UInt) -> UInt:
    return copy_bytes(out, copy_bytes(out, at, data, start, size), LINE, U0, U2)


@inner
def _count_digits(value: UInt) -> UInt:
    digits = U1
    while value >= U10:
        value //= U10
        digits += U1
    return digits


@inner
def _put_number(out: Bytes, at: UInt, value: UInt) -> UInt:
    """The number and the end of its line."""
    end = at + _count_digits(value)
    if end >= U(out.size):
        raise IndexError("number outside of the buffer")
    for i in range(end - at):
        out[end - U1 - U(i)] = np.uint8(ZERO + value % U10)
        value //= U10
    return copy_bytes(out, end, LINE, U0, U2)


@inner
def _put_size(out: Bytes, at: UInt, size: UInt) -> UInt:
    if at >= U(out.size):
        raise IndexError("size outside of the buffer")
    out[at] = np.uint8(DOLLAR)
    return _put_number(out, at + U1, size)


@kernel
def _write(
    ids: Bytes,
    names: Bytes,
    name_at: Numbers,
    name_ends: Numbers,
    payloads: Bytes,
    payload_at: Numbers,
    scores: tuple[Numbers, Numbers],
    order: Numbers,
    starts: Numbers,
    texts: Bytes,
    text_at: Numbers,
    out: Bytes,
    ends: Numbers,
) -> None:
    """Part p has three heads, the texts from `text_at[3 * p]` on; it ends at `ends[p]`."""
    at = U0
    for part in range(U(ends.size)):
        text = U(3) * part
        if starts[part] < starts[part + U1]:
            size = text_at[text + U1] - text_at[text]
            for i in range(starts[part], starts[part + U1]):
                row = order[i]
                at = copy_bytes(out, at, texts, text_at[text], size)
                at = _put_line(out, at, ids, row * ID_BYTES, ID_BYTES)
                at = _put_size(out, at, name_ends[row] - name_at[row])
                at = _put_line(out, at, names, name_at[row], name_ends[row] - name_at[row])
                at = _put_size(out, at, payload_at[row + U1] - payload_at[row])
                at = _put_line(out, at, payloads, payload_at[row], payload_at[row + U1] - payload_at[row])
            for index in range(2):
                text += U1
                at = copy_bytes(out, at, texts, text_at[text], text_at[text + U1] - text_at[text])
                for i in range(starts[part], starts[part + U1]):
                    score = scores[index][order[i]]
                    at = _put_number(out, _put_size(out, at, _count_digits(score)), score)
                    at = copy_bytes(out, at, ID_HEAD, U0, U(ID_HEAD.size))
                    at = _put_line(out, at, ids, order[i] * ID_BYTES, ID_BYTES)
        ends[part] = at


def chunk_writes(placed: Placed) -> list[Request]:
    """Exactly what `resp.chunk_writes` gives."""
    chunks, counts = placed.chunks, np.diff(placed.starts).tolist()
    texts = [heads(prefix, rows) for prefix, rows in zip(placed.prefixes, counts, strict=True)]
    payloads = b"".join(placed.payloads)
    names = int((chunks.payload_at - chunks.field_at[:-1]).sum())
    room = len(payloads) + names + len(chunks) * (ROW_BYTES_MAX + max(len(t[0]) for t in texts))
    out = np.empty(room + sum(len(text) for three in texts for text in three), np.uint8)
    ends = np.zeros(len(texts), np.uint64)
    _write(
        chunks.trace_ids.reshape(-1),
        np.frombuffer(chunks.buffer, np.uint8),
        chunks.field_at[:-1].view(np.uint64),
        chunks.payload_at.view(np.uint64),
        np.frombuffer(payloads, np.uint8),
        _bounds(placed.payloads),
        (placed.newest_ms.view(np.uint64), placed.oldest_ms.view(np.uint64)),
        placed.order.view(np.uint64),
        placed.starts.view(np.uint64),
        np.frombuffer(b"".join(itertools.chain(*texts)), np.uint8),
        _bounds(list(itertools.chain(*texts))),
        out,
        ends,
    )
    stops = ends.tolist()
    parts = zip([0, *stops], stops, counts, strict=False)
    return [Request(out[a:b].tobytes(), rows + 2) if rows else Request(b"", 0) for a, b, rows in parts]


def _bounds(texts: Any) -> Numbers:
    bounds = np.zeros(len(texts) + 1, np.uint64)
    np.cumsum(np.fromiter(map(len, texts), np.uint64, len(texts)), out=bounds[1:])
    return bounds


def warm_up() -> None:
    """Loads the kernel from the cache on disk, or compiles it."""
    span = Span(trace_id=b"1" * 16, span_id=b"1" * 8)
    value = TracesData(resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=[span])])])
    chunks = wire.decode([Record(0, 0, 0, value.SerializeToString())], RuleSet()).chunks
    for ids in (chunks.trace_ids, chunks.trace_ids.copy()):  # the twin's cannot be written to
        mine = replace(chunks, trace_ids=ids)
        chunk_writes(Placed(mine, [b"x"], np.zeros(1, np.int64), np.array([0, 1]), [b""]))
