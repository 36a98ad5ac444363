"""Where a trace's spans came from, as text: `model.list_records`, compiled.

A claim of two thousand traces names some thirty thousand records, three bytes each; in Python, reading, sorting and
writing them would be a third of what a decision costs. The twin in `model` says what is right; a field name that
this module does not understand goes to it, and fails there.

Every index is checked against the size of what it points into, by the loops themselves or by `_digits`. Numbers that
address memory are unsigned 64-bit, for the reason given in `native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tss import model
from tss.model import FACTS, Claimed
from tss.native import U0, U1, U7, U, UInt, inner, kernel

Numbers = NDArray[np.uint64]

ORIGIN_BYTES_MIN = 2  # a distance and a number of spans
TEXT_BYTES_MAX = 44  # of an origin: a partition and an offset of up to 20 digits, a sign before or after each
COLON, COMMA, DASH, SEMICOLON, ZERO = (U(ord(sign)) for sign in ":,-;0")


@inner
def _read(
    data: NDArray[np.uint8], at: UInt, end: UInt, partitions: Numbers, offsets: Numbers, n: UInt
) -> UInt:
    """Appends the records of one field name behind the first `n`; returns how many there are then, 0 when damaged."""
    left = partition = offset = U0  # of the group that is being read
    place = U0  # of the next number: 0 the partition, 1 how many records, 2 a distance, 3 its spans
    value = shift = U0
    while at < end:
        byte = U(data[at])
        at += U1
        if shift > U(63):
            return U0
        value |= (byte & U(0x7F)) << shift
        shift += U7
        if byte >= U(0x80):
            continue
        if place == U0:
            partition, offset = value, U0
        elif place == U1:
            left = value
        elif place == U(2):
            if n >= U(offsets.size):
                return U0
            offset += value
            partitions[n] = partition
            offsets[n] = offset
            n += U1
        else:
            left -= U1
        place = U1 if place == U0 else U0 if place != U(2) and left == U0 else U(3) if place == U(2) else U(2)
        value = shift = U0
    return n if place == U0 and shift == U0 else U0


@inner
def _is_before(partitions: Numbers, offsets: Numbers, a: UInt, b: UInt) -> bool:
    if partitions[a] != partitions[b]:
        return bool(partitions[a] < partitions[b])
    return bool(offsets[a] < offsets[b])


@inner
def _swap(partitions: Numbers, offsets: Numbers, a: UInt, b: UInt) -> None:
    partitions[a], partitions[b] = partitions[b], partitions[a]
    offsets[a], offsets[b] = offsets[b], offsets[a]


@inner
def _sink(partitions: Numbers, offsets: Numbers, at: UInt, n: UInt) -> None:
    while True:
        child = at + at + U1
        if child >= n:
            return
        if child + U1 < n and _is_before(partitions, offsets, child, child + U1):
            child += U1
        if not _is_before(partitions, offsets, at, child):
            return
        _swap(partitions, offsets, at, child)
        at = child


@inner
def _sort(partitions: Numbers, offsets: Numbers, n: UInt) -> None:
    """The first `n` pairs, ascending: a heap sort, as it needs no room and is never slow."""
    for i in range(U1, n):
        if _is_before(partitions, offsets, i, i - U1):
            break
    else:
        return
    for i in range(n // U(2), U0, -1):
        _sink(partitions, offsets, U(i) - U1, n)
    for i in range(n - U1, U0, -1):
        _swap(partitions, offsets, U0, U(i))
        _sink(partitions, offsets, U0, U(i))


@inner
def _digits(out: NDArray[np.uint8], at: UInt, value: UInt) -> UInt:
    size = U1
    rest = value // U(10)
    while rest > U0:
        size += U1
        rest //= U(10)
    if at + size >= U(out.size):
        raise IndexError("text outside of the buffer")
    for i in range(size):
        out[at + size - U1 - U(i)] = ZERO + value % U(10)
        value //= U(10)
    return at + size


@inner
def _write(partitions: Numbers, offsets: Numbers, n: UInt, out: NDArray[np.uint8], at: UInt) -> UInt:
    """As `model.format_records` does; each sign written has room, as `_digits` leaves some."""
    i = U0
    while i < n:
        first = i
        while i + U1 < n and partitions[i + U1] == partitions[i] and offsets[i + U1] == offsets[i] + U1:
            i += U1
        if first == U0 or partitions[first] != partitions[first - U1]:
            if first > U0:
                out[at] = SEMICOLON
                at += U1
            at = _digits(out, at, partitions[first])
            out[at] = COLON
        else:
            out[at] = COMMA
        at = _digits(out, at + U1, offsets[first])
        if i > first:
            out[at] = DASH
            at = _digits(out, at + U1, offsets[i])
        i += U1
    return at


@kernel
def _list_records(
    data: NDArray[np.uint8],
    names: Numbers,
    traces: Numbers,
    partitions: Numbers,
    offsets: Numbers,
    out: NDArray[np.uint8],
    ends: Numbers,
    repeated: NDArray[np.bool_],
) -> bool:
    """Name j is `data[names[j]:names[j + 1]]`, trace t has names `traces[t]:traces[t + 1]`; False when damaged."""
    at = U0
    for t in range(U(repeated.size)):
        n = U0
        for j in range(traces[t], traces[t + U1]):
            end = names[j + U1]
            if end > U(data.size) or names[j] > end:
                return False
            n = _read(data, names[j], end, partitions, offsets, n)
            if n == U0:
                return False
        _sort(partitions, offsets, n)
        kept = min(n, U1)
        for i in range(U1, n):
            if _is_before(partitions, offsets, i - U1, i):
                partitions[kept] = partitions[i]
                offsets[kept] = offsets[i]
                kept += U1
        repeated[t] = kept < n
        at = _write(partitions, offsets, kept, out, at)
        ends[t] = at
    return True


def list_records(traces: Sequence[Claimed]) -> tuple[list[str], list[bool]]:
    """Exactly what `model.list_records` gives."""
    tails = [name[FACTS.itemsize :] for trace in traces for name in trace.fields]
    data = np.frombuffer(b"".join(tails), np.uint8)
    room = len(data) // ORIGIN_BYTES_MIN
    out = np.empty(room * TEXT_BYTES_MAX + 1, np.uint8)
    ends = np.zeros(len(traces), np.uint64)
    repeated = np.zeros(len(traces), np.bool_)
    whole = _list_records(
        data,
        _bounds(map(len, tails), len(tails)),
        _bounds((len(trace.fields) for trace in traces), len(traces)),
        np.empty(room, np.uint64),
        np.empty(room, np.uint64),
        out,
        ends,
        repeated,
    )
    if not whole:
        return model.list_records(traces)
    text = out[: ends[-1] if len(ends) else 0].tobytes().decode("ascii")
    stops = ends.tolist()
    return [text[a:b] for a, b in zip([0, *stops], stops, strict=False)], repeated.tolist()


def _bounds(sizes: Any, count: int) -> Numbers:
    bounds = np.zeros(count + 1, np.uint64)
    np.cumsum(np.fromiter(sizes, np.uint64, count), out=bounds[1:])
    return bounds


def warm_up() -> None:
    """Loads the kernel from the cache on disk, or compiles it."""
    list_records([])
