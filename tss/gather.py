"""Kept payloads to the Arrow table of `spans`, compiled: the same function as `rows.span_table`, a hundred times faster.

The twin in `rows` says what is right, and this is a coward in the manner of `kernels`: a trace in which anything is
not plain is made by the twin alone, and its rows are joined to the others in their order. Plain is all that SDKs
send; odd are keys out of their order on the wire, more attributes or events than are kept, ids of another length.

The way of a group of traces:

    join      the payloads end to end in one buffer
    walk      every byte is checked; leaves a row for each span, a pair for each attribute, a row for each event and
              link. A text is not moved: it becomes a *ref*, its position and size
    render    values that are no text get one: numbers and plain lists on the walk, floats and all else in Python,
              the latter once for each distinct value
    sort      rows of a trace by their start
    gather    each column is written into its Arrow buffers, refs in their final order; what is constant for a
              resource, a scope or a trace is made once and taken by number

Rejected: writing Arrow's buffers while walking (a value that is rendered later would have to be put in between, and
the sink would have to sort rows of maps, which costs more than all of this), and JSON of floats in the kernel (the
shortest digits that read back the same are a library of their own).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from tss import rows as twin
from tss.consistent import adjusted_count, parse_ot_state
from tss.model import SPAN_ID_BYTES, TRACE_ID_BYTES, Trigger, Verdict
from tss.native import (
    BAD,
    DEPTH_MAX,
    FIELD_CODES,
    U0,
    U1,
    U2,
    U3,
    U4,
    U5,
    U7,
    U8,
    VALUE_KIND,
    Bytes,
    Keys,
    Schema,
    Table,
    U,
    UInt,
    copy_bytes,
    find_key,
    hash_bytes,
    inner,
    is_equal,
    is_utf8,
    is_valid,
    kernel,
    load_word,
    make_keys,
    merged,
    mix,
    padded,
    pasted,
    read_length,
    read_tag,
    read_varint,
    skip,
    store_word,
)
from tss.rows import (
    ATTRIBUTES_MAX,
    EVENTS_MAX,
    INT64_MAX,
    KINDS,
    PROMOTED,
    SPANS,
    STATUSES,
    STRINGS,
    UNKNOWN_SERVICE,
    VALUE_CHARS_MAX,
    KeptTrace,
    attribute_texts,
    value_text,
)

GROUP_BYTES_MAX = 64 << 20  # payloads gathered at once; bounds the memory that the tables below take
PROBES_MAX = 64  # spans of one id, start and size in a trace; beyond, the twin looks for the equal ones
OFFSET_MAX = (1 << 31) - 1  # Arrow's offsets of texts and lists, and our positions, are 32 bits wide
SEEN = 1024  # slots to notice that a span has a key twice

# --- tables --------------------------------------------------------------------------------------------------------

# A ref is `at << 32 | size`: a text in the payloads, or with IN_TEXT in the rendered texts.
IN_TEXT = 1 << 63
NULL = (1 << 64) - 1
SIZE = (1 << 32) - 1

ROW = np.dtype(
    [
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
        ("span_id", "<u8"),  # the bytes as they stand in memory
        ("parent", "<u8"),  # 0: none
        ("name", "<u8"),  # a ref, as the next two
        ("state", "<u8"),
        ("message", "<u8"),
        ("at", "<u4"),
        ("size", "<u4"),
        ("pair", "<u4"),  # first of its attributes
        ("pairs", "<u4"),
        ("event", "<u4"),
        ("events", "<u4"),
        ("link", "<u4"),
        ("links", "<u4"),
        ("kind", "<u4"),
        ("status", "<u4"),
        ("flags", "<u4"),
        ("dropped_pairs", "<u4"),
        ("dropped_events", "<u4"),
        ("dropped_links", "<u4"),
        ("frame", "<u4"),
        ("scope", "<u4"),
        ("trace", "<u4"),
    ],
    align=True,
)
EVENT = np.dtype(
    [("time_ns", "<u8"), ("name", "<u8"), ("pair", "<u4"), ("pairs", "<u4"), ("dropped", "<u4")], align=True
)
LINK = np.dtype(
    [
        ("trace_high", "<u8"),
        ("trace_low", "<u8"),
        ("span_id", "<u8"),
        ("state", "<u8"),
        ("pair", "<u4"),
        ("pairs", "<u4"),
        ("flags", "<u4"),
    ],
    align=True,
)

# In Tables.used.
ROWS, EVENTS, LINKS, PAIRS, FRAMES, SCOPES, FLOATS, NESTED, RENDERED, REPEATED = (U(n) for n in range(10))
USED = 10


class Tables(NamedTuple):
    """What a walk fills; `used` says how much of each is in use."""

    used: NDArray[np.uint64]
    rows: Table
    promoted: NDArray[np.uint32]  # for each row and promoted column: its pair + 1, 0 for none
    events: Table
    links: Table
    keys: NDArray[np.uint64]  # of pairs: refs
    values: NDArray[np.uint64]
    frames: NDArray[np.uint64]  # the resource of each `ResourceSpans`: refs
    scopes: NDArray[np.uint64]
    float_pairs: NDArray[np.uint32]
    floats: NDArray[np.uint64]
    nested_pairs: NDArray[np.uint32]
    nested: NDArray[np.uint64]  # refs of encoded values
    text: Bytes


class Work(NamedTuple):
    """What a walk needs to remember, and what it is told once."""

    slots: NDArray[np.uint32]  # row + 1 of the spans of this trace, by hash
    seen: NDArray[np.uint32]  # pair + 1 of the keys of this span, by hash
    found: NDArray[np.uint32]  # pair + 1 of each wanted key in this span
    columns: NDArray[np.uint64]  # the wanted keys of promoted column c: columns[c]:columns[c + 1]
    limits: NDArray[np.uint64]
    keys: Keys
    schema: Schema


class Given(NamedTuple):
    """Payloads end to end. Payload p is `bounds[p]:bounds[p + 1]`, those of trace t end before `ends[t]`."""

    bounds: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    take_at: NDArray[np.uint64]  # where the flags of a payload begin, BAD where all its spans are taken
    take_ends: NDArray[np.uint64]
    takes: NDArray[np.bool_]


ATTRIBUTES, EVENTS_OF_SPAN, CHARS = (U(n) for n in range(3))  # in Work.limits
LIMITS = (ATTRIBUTES_MAX, EVENTS_MAX, VALUE_CHARS_MAX)

WANTED = [key for keys in PROMOTED.values() for key in keys]
EXCEPTION_TYPE = "exception.type"
# The last two are what an exception event is known by; its type is the last choice for the last column.
assert list(PROMOTED.values())[-1] == (EXCEPTION_TYPE,)
EXCEPTION_TYPE_KEY, EXCEPTION_KEY = U(WANTED.index(EXCEPTION_TYPE)), U(len(WANTED))
FROM_EVENT = U(len(WANTED))  # in Work.found

TRUE, FALSE = U(IN_TEXT | 4), U(IN_TEXT | 4 << 32 | 5)  # what a text buffer begins with
TRUE_FALSE = np.frombuffer(b"truefalse", np.uint8)
LIST_TEXTS = np.frombuffer(b", null", np.uint8)
DIGITS_MAX = 20  # with the sign
ITEM_BYTES_MAX = 32  # of an item in a list, beside its own: quotes, comma and bracket, or digits instead
MINUS, ZERO, QUOTE, BACKSLASH, OPEN, CLOSE = (np.uint8(ord(sign)) for sign in '-0"\\[]')


# --- walk ----------------------------------------------------------------------------------------------------------


@inner
def _ref(at: UInt, size: UInt) -> UInt:
    return at << U(32) | size


@kernel
def _walk(data: Bytes, given: Given, seed: UInt, plain: NDArray[np.bool_], out: Tables, work: Work) -> None:
    """`plain[t]` becomes whether all of trace t is in the tables; else nothing of it is."""
    used = out.used
    copy_bytes(out.text, U0, TRUE_FALSE, U0, U(9))
    used[RENDERED] = U(9)
    p = U0
    for t in range(U(plain.size)):
        first = used[ROWS]
        before = (used[EVENTS], used[LINKS], used[PAIRS], used[FRAMES], used[SCOPES])
        more = (used[FLOATS], used[NESTED], used[RENDERED], used[REPEATED])
        good = True
        while p < given.ends[t]:
            good = good and _payload(data, p, given, t, first, seed, out, work)
            p += U1
        plain[t] = good
        if not good:
            used[ROWS] = first
            used[EVENTS], used[LINKS], used[PAIRS], used[FRAMES], used[SCOPES] = before
            used[FLOATS], used[NESTED], used[RENDERED], used[REPEATED] = more
            work.slots[:] = 0


@merged
def _payload(
    data: Bytes, payload: UInt, given: Given, trace: UInt, first: UInt, seed: UInt, out: Tables, work: Work
) -> bool:
    at, end = given.bounds[payload], given.bounds[payload + U1]
    take, take_end = given.take_at[payload], given.take_ends[payload]
    while at < end:
        tag, at = read_tag(data, at, end)
        size, at = read_length(data, at, end)
        if at > end or tag != U(0x0A) or out.used[FRAMES] == U(out.frames.size):
            return False
        frame = out.used[FRAMES]
        out.used[FRAMES] += U1
        out.frames[frame] = U0
        frame_end = at + size
        while at < frame_end:
            tag, at = read_tag(data, at, frame_end)
            size, at = read_length(data, at, frame_end)
            if at > frame_end:
                return False
            if tag == U(0x12):
                take = _scope(
                    data, at, at + size, take, take_end, given.takes, out, work, trace, frame, first, seed
                )
                if take == FAILED:
                    return False
            elif tag == U(0x0A) and out.frames[frame] == U0:
                out.frames[frame] = _ref(at, size)
            elif tag != U(0x1A):
                return False
            at += size
    return True


FAILED = U(2**64 - 2)


@merged
def _scope(
    data: Bytes,
    at: UInt,
    end: UInt,
    take: UInt,
    take_end: UInt,
    takes: NDArray[np.bool_],
    out: Tables,
    work: Work,
    trace: UInt,
    frame: UInt,
    first: UInt,
    seed: UInt,
) -> UInt:
    """Returns where the flags of the next scope begin, or FAILED."""
    scope = out.used[SCOPES]
    if scope == U(out.scopes.size):
        return FAILED
    out.used[SCOPES] += U1
    out.scopes[scope] = U0
    while at < end:
        tag, at = read_tag(data, at, end)
        size, at = read_length(data, at, end)
        if at > end:
            return FAILED
        if tag == U(0x12):
            taken = True
            if take != BAD:
                if take >= take_end:
                    return FAILED
                taken = bool(takes[take])
                take += U1
            if taken:
                if out.used[ROWS] == U(out.rows.size) or not _span(data, at, at + size, out, work):
                    return FAILED
                row = out.rows[out.used[ROWS]]
                row.frame = np.uint32(frame)
                row.scope = np.uint32(scope)
                row.trace = np.uint32(trace)
                if not _keep(data, first, seed, out.used, out.rows, work.slots):
                    return FAILED
        elif tag == U(0x0A) and out.scopes[scope] == U0:
            out.scopes[scope] = _ref(at, size)
        elif tag != U(0x1A):
            return FAILED
        at += size
    return take


@inner
def _keep(
    data: Bytes, first: UInt, seed: UInt, used: NDArray[np.uint64], rows: Table, slots: NDArray[np.uint32]
) -> bool:
    """Takes the span that was just read into the rows, unless the trace has one of the same bytes."""
    number = used[ROWS]
    row = rows[number]
    last_slot = U(slots.size) - U1
    slot = mix(mix(mix(seed, row.span_id), row.start_ns), U(row.size)) & last_slot
    for _ in range(U(PROBES_MAX)):
        if U(slots[slot]) <= first:  # free, or of a trace before
            slots[slot] = np.uint32(number + U1)
            used[ROWS] += U1
            return True
        other = rows[U(slots[slot]) - U1]
        same = other.span_id == row.span_id and other.start_ns == row.start_ns and other.size == row.size
        if same and is_equal(data, U(row.at), data, U(other.at), U(row.size)):
            used[REPEATED] += U1  # what its attributes left in the other tables is in nobody's way
            return True
        slot = (slot + U1) & last_slot
    return False


@pasted
def _span(data: Bytes, at: UInt, end: UInt, out: Tables, work: Work) -> bool:
    """Writes the next row. Of a field that is there twice the last counts, as protobuf has it."""
    row = out.rows[out.used[ROWS]]
    _begin_row(row, at, end - at, out.used)
    work.found[:] = 0
    span_id = U0
    attributes = U0
    while at < end:
        tag, at = read_tag(data, at, end)
        if at > end:
            return False
        if tag & U7 != U2:
            at = _number_of_span(data, at, end, tag, row)
            if at > end:
                return False
            continue
        size, at = read_length(data, at, end)
        if at > end:
            return False
        if tag == U(0x4A):
            attributes += U1
            if row.events + row.links != 0 or attributes > work.limits[ATTRIBUTES]:
                return False
            number = out.used[PAIRS]
            if not _attribute(data, at, at + size, U(row.pair), out, work):
                return False
            if number != out.used[PAIRS]:
                key = find_key(data, out.keys[number] >> U(32), out.keys[number] & U(SIZE), work.keys)
                if key < FROM_EVENT:
                    work.found[key] = np.uint32(number + U1)
        elif tag == U(0x2A):
            if not is_utf8(data, at, at + size):
                return False
            row.name = _ref(at, size)
        elif tag == U(0x12):
            if size != U(SPAN_ID_BYTES):
                return False
            span_id = load_word(data, at)
        elif tag == U(0x22):
            if size != U0 and size != U(SPAN_ID_BYTES):
                return False
            row.parent = load_word(data, at) if size != U0 else U0
        elif tag == U(0x1A):
            if not is_utf8(data, at, at + size):
                return False
            row.state = _ref(at, size) if size != U0 else U(NULL)
        elif tag == U(0x5A):
            if out.used[EVENTS] - U(row.event) == work.limits[EVENTS_OF_SPAN]:
                return False
            _end_attributes(row, out.used)
            if not _event(data, at, at + size, out, work):
                return False
            row.events += np.uint32(1)
        elif tag == U(0x6A):
            if out.used[LINKS] - U(row.link) == work.limits[EVENTS_OF_SPAN]:
                return False
            _end_attributes(row, out.used)
            if not _link(data, at, at + size, out, work):
                return False
            row.links += np.uint32(1)
        elif tag == U(0x7A):
            if not _status(data, at, at + size, row):
                return False
        elif tag != U(0x0A) and tag >> U3 <= U(16):
            return False
        at += size
    _end_attributes(row, out.used)
    row.span_id = span_id
    _promote(out.promoted, out.used[ROWS], work.columns, work.found)
    return bool(span_id != U0)


@inner
def _begin_row(row: Any, at: UInt, size: UInt, used: NDArray[np.uint64]) -> None:
    row.at = np.uint32(at)
    row.size = np.uint32(size)
    row.start_ns = U0
    row.end_ns = U0
    row.parent = U0
    row.name = U0
    row.state = U(NULL)
    row.message = U(NULL)
    row.pair = np.uint32(used[PAIRS])
    row.pairs = np.uint32(0)
    row.event = np.uint32(used[EVENTS])
    row.events = np.uint32(0)
    row.link = np.uint32(used[LINKS])
    row.links = np.uint32(0)
    row.kind = np.uint32(0)
    row.status = np.uint32(0)
    row.flags = np.uint32(0)
    row.dropped_pairs = np.uint32(0)
    row.dropped_events = np.uint32(0)
    row.dropped_links = np.uint32(0)


@inner
def _end_attributes(row: Any, used: NDArray[np.uint64]) -> None:
    """The pairs of events and links come behind those of the span."""
    if row.events + row.links == 0:
        row.pairs = np.uint32(used[PAIRS] - U(row.pair))


@inner
def _number_of_span(data: Bytes, at: UInt, end: UInt, tag: UInt, row: Any) -> UInt:
    """A field that is no text and no message; returns the next position, or BAD."""
    start = at
    if tag & U7 == U0:
        value, at = read_varint(data, at, end)
        if at > end:
            return BAD
        if tag == U(0x30):
            row.kind = np.uint32(value & U(SIZE))
        elif tag == U(0x50):
            row.dropped_pairs = np.uint32(value & U(SIZE))
        elif tag == U(0x60):
            row.dropped_events = np.uint32(value & U(SIZE))
        elif tag == U(0x70):
            row.dropped_links = np.uint32(value & U(SIZE))
        elif tag >> U3 <= U(16):
            return BAD
        return at
    at = skip(data, at, end, tag & U7)
    if at > end:
        return BAD
    if tag == U(0x39):
        row.start_ns = load_word(data, start)
    elif tag == U(0x41):
        row.end_ns = load_word(data, start)
    elif tag == U(0x85):
        row.flags = np.uint32(load_word(data, start) & U(SIZE))
    elif tag >> U3 <= U(16):
        return BAD
    return at


@inner
def _status(data: Bytes, at: UInt, end: UInt, row: Any) -> bool:
    while at < end:
        tag, at = read_tag(data, at, end)
        if tag == U(0x18):
            code, at = read_varint(data, at, end)
            row.status = np.uint32(code & U(SIZE))
        elif tag == U(0x12):
            size, at = read_length(data, at, end)
            if at > end or not is_utf8(data, at, at + size):
                return False
            row.message = _ref(at, size) if size != U0 else U(NULL)
            at += size
        else:
            return False
    return bool(at == end)


@inner
def _promote(
    promoted: NDArray[np.uint32], number: UInt, columns: NDArray[np.uint64], found: NDArray[np.uint32]
) -> None:
    """Of the keys of a column, the first that the span has; the type of an exception may come from an event."""
    last = U(columns.size) - U2
    for column in range(last + U1):
        pair = np.uint32(0)
        key = columns[column]
        while key < columns[column + U1] and pair == 0:
            pair = found[key]
            key += U1
        promoted[number, column] = pair
    if promoted[number, last] == 0:
        promoted[number, last] = found[FROM_EVENT]


@pasted
def _attribute(data: Bytes, at: UInt, end: UInt, first: UInt, out: Tables, work: Work) -> bool:
    """The next pair, unless its key is there since `first`."""
    number = out.used[PAIRS]
    if number == U(out.keys.size):
        return False
    key_at = key_size = value_at = value_size = U0
    has_key = has_value = False
    while at < end:
        tag = data[at]
        size, at = read_length(data, at + U1, end)
        if at > end:
            return False
        if tag == 0x0A and not has_key:
            has_key = True
            key_at = at
            key_size = size
        elif tag == 0x12 and not has_value:
            has_value = True
            value_at = at
            value_size = size
        else:
            return False
        at += size
    if not is_utf8(data, key_at, key_at + key_size):
        return False
    out.keys[number] = _ref(key_at, key_size)
    if not _value(data, value_at, value_at + value_size, number, out, work):
        return False
    if _is_repeated(data, first, number, out.keys, work.seen):
        _forget_value(number, out)
        return True
    out.used[PAIRS] += U1
    return True


@inner
def _is_repeated(
    data: Bytes, first: UInt, number: UInt, keys: NDArray[np.uint64], seen: NDArray[np.uint32]
) -> bool:
    """Whether the key of this pair is the key of one from `first` on."""
    at, size = keys[number] >> U(32), keys[number] & U(SIZE)
    word = load_word(data, at + max(size, U8) - U8)  # keys differ in their ends
    if size < U8:
        word &= (U1 << (size << U3)) - U1
    slot = mix(size, word) % U(SEEN)
    if U(seen[slot]) > first:
        for other in range(first, number):
            if keys[other] & U(SIZE) == size and is_equal(data, at, data, keys[other] >> U(32), size):
                return True
    seen[slot] = np.uint32(number + U1)
    return False


@inner
def _forget_value(number: UInt, out: Tables) -> None:
    """Nobody is to render the value of a pair that is not there."""
    floats, nested = out.used[FLOATS], out.used[NESTED]
    if floats != U0 and U(out.float_pairs[floats - U1]) == number:
        out.used[FLOATS] -= U1
    if nested != U0 and U(out.nested_pairs[nested - U1]) == number:
        out.used[NESTED] -= U1


@pasted
def _value(data: Bytes, at: UInt, end: UInt, number: UInt, out: Tables, work: Work) -> bool:
    """The value of pair `number`; what is not text yet is rendered here or noted."""
    if at == end:
        out.values[number] = U0
        return True
    tag = data[at]
    if tag == 0x0A:
        size, start = read_length(data, at + U1, end)
        if start <= end and start + size == end and size <= work.limits[CHARS]:
            out.values[number] = _ref(start, size)
            return is_utf8(data, start, end)
    elif tag == 0x18:
        value, start = read_varint(data, at + U1, end)
        if start == end:
            out.values[number] = _put_number(value, out.text, out.used)
            return bool(out.values[number] != U(NULL))
    elif tag == 0x10:
        value, start = read_varint(data, at + U1, end)
        if start == end:
            out.values[number] = TRUE if value != U0 else FALSE
            return True
    elif tag == 0x21 and end - at == U(9):
        floats = out.used[FLOATS]
        if floats == U(out.floats.size):
            return False
        out.float_pairs[floats] = np.uint32(number)
        out.floats[floats] = load_word(data, at + U1)
        out.used[FLOATS] += U1
        return True
    elif tag == 0x2A:
        size, start = read_length(data, at + U1, end)
        if start <= end and start + size == end:
            out.values[number] = _put_list(data, start, end, work.limits[CHARS], out.text, out.used)
            if out.values[number] != U(NULL):
                return True
    nested = out.used[NESTED]
    if nested == U(out.nested.size) or not is_valid(data, at, end, VALUE_KIND, work.schema):
        return False
    out.nested_pairs[nested] = np.uint32(number)
    out.nested[nested] = _ref(at, end - at)
    out.used[NESTED] += U1
    return True


@inner
def _put_number(value: UInt, text: Bytes, used: NDArray[np.uint64]) -> UInt:
    """The ref of a signed number's text; NULL where there is no room."""
    begin = used[RENDERED]
    if begin + U(DIGITS_MAX) > U(text.size):
        return U(NULL)
    used[RENDERED] = _put_digits(value, text, begin)
    return U(IN_TEXT) | _ref(begin, used[RENDERED] - begin)


@inner
def _put_digits(value: UInt, text: Bytes, at: UInt) -> UInt:
    """The end of a signed number's text; there must be room for DIGITS_MAX."""
    if value >> U(63) != U0:
        value = U0 - value
        text[at] = MINUS
        at += U1
    size = U1
    rest = value
    while rest > U(9):
        rest //= U(10)
        size += U1
    for i in range(size):
        text[at + size - U1 - i] = np.uint8(U(ZERO) + value % U(10))
        value //= U(10)
    return at + size


@inner
def _put_list(
    data: Bytes, at: UInt, end: UInt, size_max: UInt, text: Bytes, used: NDArray[np.uint64]
) -> UInt:
    """The ref of a list's JSON, where all in it is a text as it is, a whole number or a truth; else NULL."""
    begin = used[RENDERED]
    if begin + U2 > U(text.size):
        return U(NULL)
    text[begin] = OPEN
    to = begin + U1
    while at < end:
        tag = data[at]
        size, at = read_length(data, at + U1, end)
        if at > end or tag != 0x0A or to + size + U(ITEM_BYTES_MAX) > U(text.size):
            return U(NULL)
        if to != begin + U1:
            to = copy_bytes(text, to, LIST_TEXTS, U0, U2)
        to = _put_item(data, at, at + size, text, to)
        if to == BAD:
            break
        at += size
    if at != end or to == BAD or to + U1 - begin > size_max:
        return U(NULL)
    text[to] = CLOSE
    used[RENDERED] = to + U1
    return U(IN_TEXT) | _ref(begin, to + U1 - begin)


@inner
def _put_item(data: Bytes, at: UInt, end: UInt, text: Bytes, to: UInt) -> UInt:
    """The end of an item's JSON, BAD where it is not that plain."""
    if at == end:
        return copy_bytes(text, to, LIST_TEXTS, U2, U4)
    tag = data[at]
    if tag == 0x0A:
        size, at = read_length(data, at + U1, end)
        if at > end or at + size != end or not is_utf8(data, at, end):
            return BAD
        for i in range(at, end):
            if data[i] < 0x20 or data[i] == QUOTE or data[i] == BACKSLASH:
                return BAD
        text[to] = QUOTE
        to = copy_bytes(text, to + U1, data, at, size)
        text[to] = QUOTE
        return to + U1
    value, at = read_varint(data, at + U1, end)
    if at != end:
        return BAD
    if tag == 0x18:
        return _put_digits(value, text, to)
    if tag == 0x10:
        start, size = (U0, U4) if value != U0 else (U4, U5)
        return copy_bytes(text, to, TRUE_FALSE, start, size)
    return BAD


@inner
def _attribute_of_another(data: Bytes, at: UInt, end: UInt, first: UInt, out: Tables, work: Work) -> bool:
    """Of an event or a link; these are fewer, so they may cost a call."""
    return _attribute(data, at, end, first, out, work)


@inner
def _event(data: Bytes, at: UInt, end: UInt, out: Tables, work: Work) -> bool:
    number, first = out.used[EVENTS], out.used[PAIRS]
    if number == U(out.events.size):
        return False
    event = out.events[number]
    event.time_ns = U0
    event.name = U0
    event.dropped = np.uint32(0)
    event.pair = np.uint32(first)
    attributes = U0
    while at < end:
        tag, at = read_tag(data, at, end)
        start = at
        at = skip(data, at, end, tag & U7)
        if at > end:
            return False
        if tag == U(0x1A):
            _, start = read_length(data, start, end)
            attributes += U1
            if attributes > work.limits[ATTRIBUTES]:
                return False
            if not _attribute_of_another(data, start, at, first, out, work):
                return False
        elif tag == U(0x12):
            _, start = read_length(data, start, end)
            if not is_utf8(data, start, at):
                return False
            event.name = _ref(start, at - start)
        elif tag == U(0x09):
            event.time_ns = load_word(data, start)
        elif tag == U(0x20):
            dropped, _ = read_varint(data, start, end)
            event.dropped = np.uint32(dropped & U(SIZE))
        elif tag >> U3 <= U4:
            return False
    event.pairs = np.uint32(out.used[PAIRS] - first)
    out.used[EVENTS] += U1
    name, size = event.name >> U(32), event.name & U(SIZE)
    if work.found[FROM_EVENT] == 0 and find_key(data, name, size, work.keys) == EXCEPTION_KEY:
        for pair in range(first, out.used[PAIRS]):
            key, size = out.keys[pair] >> U(32), out.keys[pair] & U(SIZE)
            if find_key(data, key, size, work.keys) == EXCEPTION_TYPE_KEY:
                work.found[FROM_EVENT] = np.uint32(pair + U1)
    return True


@inner
def _link(data: Bytes, at: UInt, end: UInt, out: Tables, work: Work) -> bool:
    number, first = out.used[LINKS], out.used[PAIRS]
    if number == U(out.links.size):
        return False
    link = out.links[number]
    link.state = U(NULL)
    link.flags = np.uint32(0)
    link.pair = np.uint32(first)
    attributes = U0
    has_trace_id = has_span_id = False
    while at < end:
        tag, at = read_tag(data, at, end)
        start = at
        at = skip(data, at, end, tag & U7)
        if at > end:
            return False
        if tag & U7 == U2:
            _, start = read_length(data, start, end)
        if tag == U(0x0A):
            if at - start != U(TRACE_ID_BYTES):
                return False
            has_trace_id = True
            link.trace_high = load_word(data, start)
            link.trace_low = load_word(data, start + U8)
        elif tag == U(0x12):
            if at - start != U(SPAN_ID_BYTES):
                return False
            has_span_id = True
            link.span_id = load_word(data, start)
        elif tag == U(0x1A):
            if not is_utf8(data, start, at):
                return False
            link.state = _ref(start, at - start) if at != start else U(NULL)
        elif tag == U(0x22):
            attributes += U1
            if attributes > work.limits[ATTRIBUTES]:
                return False
            if not _attribute_of_another(data, start, at, first, out, work):
                return False
        elif tag == U(0x35):
            link.flags = np.uint32(load_word(data, start) & U(0x7FFFFFFF))
        elif tag >> U3 <= U(6) and tag != U(0x28):
            return False
    link.pairs = np.uint32(out.used[PAIRS] - first)
    out.used[LINKS] += U1
    return has_trace_id and has_span_id


# --- gather --------------------------------------------------------------------------------------------------------


@inner
def _quick_hash(data: Bytes, at: UInt, size: UInt, seed: UInt) -> UInt:
    """Four in a row at once, where a multiplication need not wait for the one before."""
    a, b, c, d = seed, seed + U1, seed + U2, seed + U3
    end = at + size
    while end - at >= U(32):
        a = mix(a, load_word(data, at))
        b = mix(b, load_word(data, at + U8))
        c = mix(c, load_word(data, at + U(16)))
        d = mix(d, load_word(data, at + U(24)))
        at += U(32)
    return hash_bytes(data, at, end - at, mix(mix(mix(a, b), c), d))


@kernel
def _intern(
    data: Bytes,
    refs: NDArray[np.uint64],
    seed: UInt,
    slots: NDArray[np.uint32],
    numbers: NDArray[np.uint32],
    distinct: NDArray[np.uint64],
) -> UInt:
    """Numbers texts by their bytes; `distinct` gets a ref of each. Returns how many there are."""
    count = U0
    last_slot = U(slots.size) - U1
    for i in range(U(refs.size)):
        at, size = refs[i] >> U(32), refs[i] & U(SIZE)
        slot = _quick_hash(data, at, size, seed) & last_slot
        while slots[slot] != 0:
            other = distinct[U(slots[slot]) - U1]
            if other & U(SIZE) == size and is_equal(data, at, data, other >> U(32), size):
                break
            slot = (slot + U1) & last_slot
        if slots[slot] == 0:
            distinct[count] = refs[i]
            count += U1
            slots[slot] = np.uint32(count)
        numbers[i] = np.uint32(slots[slot] - U1)
    return count


@kernel
def _sort(rows: Table, order: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    """The order of rows by trace, as they stand, and start: merges runs of twice the length round by round."""
    begin = U0
    while begin < U(rows.size):
        end = begin
        while end < U(rows.size) and rows[end].trace == rows[begin].trace:
            order[end] = np.uint32(end)
            end += U1
        width = U1
        while width < end - begin:
            low = begin
            while low < end:
                middle = min(low + width, end)
                _merge(rows, order, spare, low, middle, min(middle + width, end))
                low = min(middle + width, end)
            for i in range(begin, end):
                order[i] = spare[i]
            width <<= U1
        begin = end


@inner
def _merge(
    rows: Table, order: NDArray[np.uint32], spare: NDArray[np.uint32], low: UInt, middle: UInt, high: UInt
) -> None:
    left, right, at = low, middle, low
    while at < high:
        if left < middle and (
            right == high or rows["start_ns"][order[left]] <= rows["start_ns"][order[right]]
        ):
            spare[at] = order[left]
            left += U1
        else:
            spare[at] = order[right]
            right += U1
        at += U1


@kernel
def _expand(
    begins: NDArray[np.uint32],
    counts: NDArray[np.uint32],
    offsets: NDArray[np.int32],
    picks: NDArray[np.uint32],
) -> None:
    """Where the lists of a column end, and what is in them one after the other."""
    at = U0
    offsets[U0] = 0
    for i in range(U(begins.size)):
        for j in range(U(counts[i])):
            picks[at] = np.uint32(U(begins[i]) + j)
            at += U1
        offsets[i + U1] = np.int32(at)


@kernel
def _measure(refs: NDArray[np.uint64], offsets: NDArray[np.int32]) -> UInt:
    """Where texts end in their column; returns the last end, which may be more than an offset can say."""
    at = U0
    offsets[U0] = 0
    for i in range(U(refs.size)):
        if refs[i] != U(NULL):
            at += refs[i] & U(SIZE)
        offsets[i + U1] = np.int32(at)
    return at


@kernel
def _write(data: Bytes, text: Bytes, refs: NDArray[np.uint64], out: Bytes) -> None:
    """Texts one after the other."""
    at = U0
    for i in range(U(refs.size)):
        ref = refs[i]
        if ref == U(NULL):
            continue
        if ref < U(IN_TEXT):
            at = _put(out, at, data, ref >> U(32), ref & U(SIZE))
        else:
            at = _put(out, at, text, (ref ^ U(IN_TEXT)) >> U(32), ref & U(SIZE))


@inner
def _put(out: Bytes, to: UInt, data: Bytes, at: UInt, size: UInt) -> UInt:
    """A copy that is quick for short texts; eight more bytes must be there behind both."""
    if size > U(16):
        return copy_bytes(out, to, data, at, size)
    if size > U8:
        last = load_word(data, at + size - U8)
        store_word(out, to, load_word(data, at))
        store_word(out, to + size - U8, last)
    else:
        store_word(out, to, load_word(data, at))
    return to + size


@kernel
def _repeat(
    data: Bytes,
    bounds: NDArray[np.uint64],
    firsts: NDArray[np.uint64],
    numbers: NDArray[np.uint32],
    offsets: NDArray[np.int32],
    out: Bytes,
) -> None:
    """Runs of texts, again and again: run r is the texts `firsts[r]:firsts[r + 1]`, and text t `bounds[t]:bounds[t + 1]`."""
    at = i = U0
    offsets[i] = 0
    for number in numbers:
        first, last = firsts[number], firsts[U(number) + U1]
        begin = bounds[first]
        for text in range(first, last):
            i += U1
            offsets[i] = np.int32(at + bounds[text + U1] - begin)
        at = copy_bytes(out, at, data, begin, bounds[last] - begin)


# --- Arrow ---------------------------------------------------------------------------------------------------------


Column: TypeAlias = Any  # a pa.Array; its published types are too narrow for what follows
_buffer: Any = pa.py_buffer
_from_buffers: Any = pa.Array.from_buffers


class _UnfitError(Exception):
    """These traces cannot be gathered together: a column would be longer than Arrow's offsets can say."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Where refs point to, and how long a column of texts may be."""

    data: Bytes
    text: Bytes
    column_bytes_max: int

    def texts(self, refs: NDArray[np.uint64]) -> Column:
        refs = np.ascontiguousarray(refs)
        offsets = np.empty(len(refs) + 1, np.int32)
        size = int(_measure(refs, offsets))
        if size > self.column_bytes_max:
            raise _UnfitError
        out = np.empty(size + 8, np.uint8)
        _write(self.data, self.text, refs, out)
        return _array(pa.string(), len(refs), refs != U(NULL), offsets, out)

    def repeated_maps(self, maps: Sequence[Sequence[tuple[str, str]]], numbers: NDArray[np.uint32]) -> Column:
        """A column of few distinct maps."""
        firsts = np.cumsum([0, *map(len, maps)]).astype(np.uint64)
        offsets = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(np.diff(firsts)[numbers], out=offsets[1:])
        sides = [self._repeated([pair[i] for one in maps for pair in one], firsts, numbers) for i in (0, 1)]
        return _list(STRINGS, offsets.astype(np.int32), _struct(_ENTRY, sides))

    def _repeated(
        self, texts: Sequence[str], firsts: NDArray[np.uint64], numbers: NDArray[np.uint32]
    ) -> Column:
        encoded = [text.encode() for text in texts]
        bounds = np.cumsum([0, *map(len, encoded)]).astype(np.uint64)
        runs = bounds[firsts]
        size = int(np.diff(runs)[numbers].sum())
        count = int(np.diff(firsts)[numbers].sum())
        if max(size, count) > self.column_bytes_max:
            raise _UnfitError
        offsets, out = np.empty(count + 1, np.int32), np.empty(size, np.uint8)
        _repeat(padded(encoded), bounds, firsts, np.ascontiguousarray(numbers), offsets, out)
        return _array(pa.string(), count, None, offsets, out)


def _distinct(data: Bytes, refs: NDArray[np.uint64], seed: Any) -> tuple[NDArray[np.uint32], list[bytes]]:
    """The number of each text among the distinct ones, and these."""
    refs = np.ascontiguousarray(refs)
    numbers = np.empty(len(refs), np.uint32)
    distinct = np.empty(len(refs), np.uint64)
    slots = np.zeros(1 << (2 * len(refs)).bit_length(), np.uint32)
    count = int(_intern(data, refs, seed, slots, numbers, distinct))
    found = [(ref >> 32, ref & SIZE) for ref in distinct[:count].tolist()]
    return numbers, [data[at : at + size].tobytes() for at, size in found]


def _array(kind: Any, size: int, valid: NDArray[np.bool_] | None, *buffers: Table) -> Column:
    """An array of these buffers; `valid` where some of it may be null."""
    bits = None if valid is None else _buffer(np.packbits(valid, bitorder="little"))
    return _from_buffers(kind, size, [bits, *map(_buffer, buffers)])


def _numbers(kind: Any, values: Table) -> Column:
    return _array(kind, len(values), None, np.ascontiguousarray(values))


def _taken(values: Sequence[Any], kind: Any, numbers: Table) -> Column:
    """A column of few distinct values."""
    return pa.array(values, kind).take(pa.array(numbers))


HEX = np.frombuffer(bytes(range(256)).hex().encode(), "<u2")


def _hex(ids: NDArray[np.uint64], valid: NDArray[np.bool_] | None = None) -> Column:
    """Ids as texts; each row of `ids` is one."""
    chars = HEX[np.ascontiguousarray(ids).view(np.uint8)]
    width = 2 * ids.itemsize * (ids.shape[1] if ids.ndim == 2 else 1)
    offsets = np.arange(0, (len(ids) + 1) * width, width, dtype=np.int32)
    return _array(pa.string(), len(ids), valid, offsets, chars)


def _moved(rows: Table, order: NDArray[np.uint32]) -> Table:
    """Rows in this order, as bytes: moved field by field they take twenty times as long."""
    whole = np.dtype((np.void, rows.itemsize))
    return rows.view(whole)[order].view(rows.dtype)


def _expanded(begins: Table, counts: Table) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    counts = np.ascontiguousarray(counts)
    offsets = np.empty(len(counts) + 1, np.int32)
    picks = np.empty(int(counts.sum(dtype=np.uint64)), np.uint32)
    _expand(np.ascontiguousarray(begins), counts, offsets, picks)
    return offsets, picks


def _list(kind: Any, offsets: NDArray[np.int32], items: Column) -> Column:
    return _from_buffers(kind, len(offsets) - 1, [None, _buffer(offsets)], children=[items])


def _struct(kind: Any, children: Sequence[Column]) -> Column:
    return _from_buffers(kind, len(children[0]), [None], children=list(children))


# --- render --------------------------------------------------------------------------------------------------------


def _floats(values: NDArray[np.uint64]) -> list[str]:
    """As JSON writes them, which is as Python does but for three values."""
    floats = values.view(np.float64)
    texts = list(map(repr, floats.tolist()))
    for i in np.flatnonzero(~np.isfinite(floats)):
        texts[i] = json.dumps(float(floats[i]))
    return texts


def _rendered(data: Bytes, tables: Tables, seed: Any) -> Bytes:
    """Completes `tables.values` and returns the texts that are not in the payloads."""
    used = tables.used
    text = tables.text[: used[RENDERED]]
    floats = _floats(tables.floats[: used[FLOATS]])
    numbers, nested = _distinct(data, tables.nested[: used[NESTED]], seed)
    texts = [*floats, *(value_text(AnyValue.FromString(encoded)) for encoded in nested)]
    joined = "".join(texts)
    encoded = [joined.encode()] if joined.isascii() else [one.encode() for one in texts]
    sizes = np.fromiter(map(len, texts if joined.isascii() else encoded), np.uint64, len(texts))
    ends = np.cumsum(sizes, dtype=np.uint64) + U(len(text))
    if len(text) + int(sizes.sum()) > OFFSET_MAX:
        raise _UnfitError
    refs = U(IN_TEXT) | (ends - sizes) << U(32) | sizes
    tables.values[tables.float_pairs[: used[FLOATS]]] = refs[: len(floats)]
    tables.values[tables.nested_pairs[: used[NESTED]]] = refs[len(floats) :][numbers]
    return padded([text.tobytes(), *encoded])


# --- a group of traces -----------------------------------------------------------------------------------------------


class Gatherer:
    """`span_table` for any number of threads."""

    def __init__(self, *, group_bytes_max: int = GROUP_BYTES_MAX, column_bytes_max: int = OFFSET_MAX) -> None:
        self._group_bytes_max = group_bytes_max
        self._column_bytes_max = column_bytes_max
        self._seed = np.uint64(hash("tss.gather") & (1 << 64) - 1)  # another in each process
        self._keys = make_keys([*WANTED, "exception"])
        self.odd = 0  # traces that took the slow path so far

    def span_table(self, traces: Iterable[KeptTrace], decided_at: datetime) -> tuple[pa.Table, int]:
        """Exactly what `rows.span_table` gives."""
        ordered = twin.in_order(traces)
        tables, repeated = [], 0
        for begin, end in _groups(ordered, self._group_bytes_max):
            table, more = self._group(ordered[begin:end], decided_at)
            tables.append(table)
            repeated += more
        return (pa.concat_tables(tables) if tables else SPANS.empty_table()), repeated

    def _group(self, traces: Sequence[KeptTrace], decided_at: datetime) -> tuple[pa.Table, int]:
        try:
            return self._gather(traces, decided_at)
        except _UnfitError:
            if len(traces) == 1:
                self.odd += 1
                return twin.span_table(traces, decided_at)
            half = len(traces) // 2
            (one, some), (other, more) = (
                self._group(part, decided_at) for part in (traces[:half], traces[half:])
            )
            return pa.concat_tables([one, other]), some + more

    def _gather(self, traces: Sequence[KeptTrace], decided_at: datetime) -> tuple[pa.Table, int]:
        pairs = list(chain.from_iterable([trace[3].payloads for trace in traces]))
        payloads, takes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        sizes = list(map(len, payloads))
        if sum(sizes) > OFFSET_MAX or set(map(len, [trace[0] for trace in traces])) - {TRACE_ID_BYTES}:
            raise _UnfitError
        data = padded(payloads)
        tables, work = self._tables(len(data), sum([trace[3].spans for trace in traces]))
        plain = np.zeros(len(traces), np.bool_)
        _walk(data, _given(traces, sizes, takes), self._seed, plain, tables, work)
        table = self._table(data, tables, traces, decided_at)
        repeated = int(tables.used[REPEATED])
        if plain.all():
            return table, repeated

        ends = np.searchsorted(tables.rows["trace"][: tables.used[ROWS]], np.flatnonzero(~plain))
        parts, done = [], 0
        for odd, end in zip(np.flatnonzero(~plain).tolist(), ends.tolist(), strict=True):
            slow, more = twin.span_table([traces[odd]], decided_at)
            parts += [table.slice(done, end - done), slow]
            done = end
            repeated += more
        self.odd += len(parts) // 2
        return pa.concat_tables([*parts, table.slice(done)]).combine_chunks(), repeated

    def _tables(self, size: int, spans: int) -> tuple[Tables, Work]:
        """Room for most that payloads of this size hold; a trace that finds none left is odd."""
        rows = min(spans, size // SPAN_BYTES_MIN) + 1
        some = size // 8 + 1
        tables = Tables(
            used=np.zeros(USED, np.uint64),
            rows=np.empty(rows, ROW),
            promoted=np.empty((rows, len(PROMOTED)), np.uint32),
            events=_sparse(some, EVENT),
            links=_sparse(some, LINK),
            keys=np.empty(some, np.uint64),
            values=np.empty(some, np.uint64),
            frames=_sparse(some, np.uint64),
            scopes=_sparse(some, np.uint64),
            float_pairs=_sparse(some, np.uint32),
            floats=_sparse(some, np.uint64),
            nested_pairs=_sparse(some, np.uint32),
            nested=_sparse(some, np.uint64),
            text=_sparse(size + TEXT_BYTES_MIN, np.uint8),
        )
        work = Work(
            slots=np.zeros(1 << (2 * rows).bit_length(), np.uint32),
            seen=np.zeros(SEEN, np.uint32),
            found=np.zeros(len(WANTED) + 1, np.uint32),
            columns=np.cumsum([0, *map(len, PROMOTED.values())]).astype(np.uint64),
            limits=np.array(LIMITS, np.uint64),
            keys=self._keys,
            schema=Schema(FIELD_CODES, np.zeros(DEPTH_MAX, np.uint64), np.zeros(DEPTH_MAX, np.uint64)),
        )
        return tables, work

    def _table(
        self, data: Bytes, tables: Tables, traces: Sequence[KeptTrace], decided_at: datetime
    ) -> pa.Table:
        used = tables.used
        source = _Source(data, _rendered(data, tables, self._seed), self._column_bytes_max)
        rows = tables.rows[: used[ROWS]]
        if 2 * TRACE_ID_BYTES * len(rows) > self._column_bytes_max:
            raise _UnfitError
        order, spare = np.empty(len(rows), np.uint32), np.empty(len(rows), np.uint32)
        _sort(rows, order, spare)
        rows, promoted = _moved(rows, order), tables.promoted[order]
        columns = {
            "span_id": _hex(rows["span_id"]),
            "parent_span_id": _hex(rows["parent"], rows["parent"] != 0),
            "operation_name": source.texts(rows["name"]),
            "trace_state": source.texts(rows["state"]),
            "status_message": source.texts(rows["message"]),
            "attributes": _maps(rows, tables, source),
            "events": _events(rows, tables, source),
            "links": _links(rows, tables, source),
        }
        values = np.concatenate([np.array([NULL], np.uint64), tables.values[: used[PAIRS]]])
        for i, name in enumerate(PROMOTED):
            columns[name] = source.texts(values[promoted[:, i]])
        columns |= _times(rows)
        columns |= _few(rows)
        frames, resources = _distinct(data, tables.frames[: used[FRAMES]], self._seed)
        columns |= _resource_columns(source, frames[rows["frame"]], resources)
        scopes, abouts = _distinct(data, tables.scopes[: used[SCOPES]], self._seed)
        columns |= _scope_columns(source, scopes[rows["scope"]], abouts)
        columns |= _verdict_columns(rows, traces, decided_at)
        columns["adjusted_count"] = _adjusted_counts(rows, traces, source, self._seed)
        return pa.table([columns[name] for name in SPANS.names], schema=SPANS)


SPAN_BYTES_MIN = 12  # a span id and its frame: bounds the rows
TEXT_BYTES_MIN = 64


def _sparse(count: int, kind: Any) -> Table:
    """An array that takes the memory of what is written to it.

    numpy asks for pages of 2 MB for its own large ones, and most of these tables are all but empty.
    """
    held = mmap.mmap(-1, count * np.dtype(kind).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(held, kind)


def _groups(traces: Sequence[KeptTrace], bytes_max: int) -> Iterator[tuple[int, int]]:
    """Begin and end of groups whose payloads are not too large together; a trace alone may be."""
    begin = size = 0
    for i, trace in enumerate(traces):
        more = sum([len(payload) for payload, _ in trace[3].payloads])
        if begin < i and size + more > bytes_max:
            yield begin, i
            begin, size = i, 0
        size += more
    if traces:
        yield begin, len(traces)


def _given(traces: Sequence[KeptTrace], sizes: Sequence[int], takes: Sequence[list[bool] | None]) -> Given:
    bounds = np.zeros(len(sizes) + 1, np.uint64)
    np.cumsum(np.array(sizes, np.uint64), out=bounds[1:])
    take_at, take_ends = np.full(len(sizes), BAD), np.full(len(sizes), BAD)
    flags: list[bool] = []
    for i, take in enumerate(takes):
        if take is not None:
            take_at[i] = len(flags)
            flags += take
            take_ends[i] = len(flags)
    ends = np.cumsum([len(trace[3].payloads) for trace in traces]).astype(np.uint64)
    return Given(bounds, ends, take_at, take_ends, np.array(flags, np.bool_))


# --- columns -------------------------------------------------------------------------------------------------------


_ENTRY = pa.struct([STRINGS.key_field, STRINGS.item_field])


def _maps(owners: Table, tables: Tables, source: _Source) -> Column:
    """The attributes of spans, events or links."""
    offsets, picks = _expanded(owners["pair"], owners["pairs"])
    keys, values = source.texts(tables.keys[picks]), source.texts(tables.values[picks])
    return _list(STRINGS, offsets, _struct(_ENTRY, [keys, values]))


def _events(rows: Table, tables: Tables, source: _Source) -> Column:
    kind = SPANS.field("events").type
    offsets, picks = _expanded(rows["event"], rows["events"])
    events = _moved(tables.events, picks)
    parts = [
        _numbers(pa.int64(), np.minimum(events["time_ns"], U(INT64_MAX))),
        source.texts(events["name"]),
        _maps(events, tables, source),
        _numbers(pa.int32(), np.minimum(events["dropped"], np.uint32(twin.INT32_MAX))),
    ]
    return _list(kind, offsets, _struct(kind.value_type, parts))


def _links(rows: Table, tables: Tables, source: _Source) -> Column:
    kind = SPANS.field("links").type
    offsets, picks = _expanded(rows["link"], rows["links"])
    links = _moved(tables.links, picks)
    parts = [
        _hex(np.stack([links["trace_high"], links["trace_low"]], axis=1)),
        _hex(links["span_id"]),
        source.texts(links["state"]),
        _maps(links, tables, source),
        _numbers(pa.int32(), links["flags"]),
    ]
    return _list(kind, offsets, _struct(kind.value_type, parts))


NS_PER_MS = 1_000_000
EXACT_MAX = 1 << 53  # up to here, a float is a whole number exactly


def _times(rows: Table) -> dict[str, Column]:
    start, end = rows["start_ns"], rows["end_ns"]
    micros = SPANS.field("start_time").type
    limit = U(INT64_MAX)
    duration = np.minimum(np.where(end > start, end - start, U0), limit)
    duration_ms = duration / np.float64(NS_PER_MS)
    for i in np.flatnonzero(duration > EXACT_MAX):
        duration_ms[i] = int(duration[i]) / NS_PER_MS
    return {
        "timestamp_ms": _numbers(pa.int64(), start // U(NS_PER_MS)),
        "duration_ms": _numbers(pa.float64(), duration_ms),
        "start_time": _numbers(micros, start // U(1000)),
        "end_time": _numbers(micros, end // U(1000)),
        "start_time_unix_nano": _numbers(pa.int64(), np.minimum(start, limit)),
        "end_time_unix_nano": _numbers(pa.int64(), np.minimum(end, limit)),
        "duration_ns": _numbers(pa.int64(), duration),
    }


def _few(rows: Table) -> dict[str, Column]:
    """Enumerations, flags and counts. What is negative on the wire is a huge unsigned number here."""
    kind = np.where(rows["kind"] < len(KINDS), rows["kind"], 0).astype(np.int32)
    status = np.where(rows["status"] < len(STATUSES), rows["status"], 0).astype(np.int32)
    return {
        "span_kind": _numbers(pa.int32(), kind),
        "kind_string": _taken(KINDS, pa.string(), kind),
        "status_code": _numbers(pa.int32(), status),
        "status_code_string": _taken(STATUSES, pa.string(), status),
        "flags": _numbers(pa.int64(), rows["flags"].astype(np.int64)),
        "dropped_attributes_count": _numbers(pa.int64(), rows["dropped_pairs"].astype(np.int64)),
        "dropped_events_count": _numbers(pa.int64(), rows["dropped_events"].astype(np.int64)),
        "dropped_links_count": _numbers(pa.int64(), rows["dropped_links"].astype(np.int64)),
    }


def _resource_columns(
    source: _Source, numbers: NDArray[np.uint32], resources: Sequence[bytes]
) -> dict[str, Column]:
    maps = [attribute_texts(Resource.FromString(one).attributes)[0] for one in resources]
    services = [next((v for k, v in one if k == "service.name"), UNKNOWN_SERVICE) for one in maps]
    return {
        "service_name": _taken(services, pa.string(), numbers),
        "resource_attributes": source.repeated_maps(maps, numbers),
    }


def _scope_columns(
    source: _Source, numbers: NDArray[np.uint32], scopes: Sequence[bytes]
) -> dict[str, Column]:
    abouts = [InstrumentationScope.FromString(one) for one in scopes]
    return {
        "scope_name": _taken([one.name or None for one in abouts], pa.string(), numbers),
        "scope_version": _taken([one.version or None for one in abouts], pa.string(), numbers),
        "scope_attributes": source.repeated_maps(
            [attribute_texts(one.attributes)[0] for one in abouts], numbers
        ),
    }


def _verdict_columns(rows: Table, traces: Sequence[KeptTrace], decided_at: datetime) -> dict[str, Column]:
    numbers = rows["trace"]
    ids = np.frombuffer(b"".join(trace[0] for trace in traces), np.uint64).reshape(-1, 2)
    verdicts = [trace[1] for trace in traces]
    moment = pa.scalar(decided_at, SPANS.field("decided_at").type).value
    return {
        "trace_id": _hex(ids[numbers]),
        "sampling_policy": _taken([v.policy for v in verdicts], pa.string(), numbers),
        "sampling_reason": _taken([v.reason for v in verdicts], pa.string(), numbers),
        "sampling_probability": _taken([v.probability for v in verdicts], pa.float64(), numbers),
        "decided_at": _numbers(SPANS.field("decided_at").type, np.full(len(rows), moment, np.int64)),
        "late": _taken([trace[2] for trace in traces], pa.bool_(), numbers),
    }


def _adjusted_counts(rows: Table, traces: Sequence[KeptTrace], source: _Source, seed: Any) -> Column:
    """Once for each distinct pair of tracestate and probability."""
    probabilities = {p: i for i, p in enumerate(dict.fromkeys(trace[1].probability for trace in traces))}
    of_trace = np.array([probabilities[trace[1].probability] for trace in traces], np.int64)
    numbers, states = _distinct(source.data, np.where(rows["state"] == U(NULL), U0, rows["state"]), seed)
    pairs, rows_pairs = np.unique(
        numbers * np.int64(len(probabilities)) + of_trace[rows["trace"]], return_inverse=True
    )
    thresholds = [parse_ot_state(state.decode()).th for state in states]
    known = list(probabilities)
    counts = [
        adjusted_count(thresholds[pair // len(known)], known[pair % len(known)]) for pair in pairs.tolist()
    ]
    return _taken(counts, pa.float64(), rows_pairs)


# --- warming up ------------------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Loads all kernels from the cache on disk, or compiles them."""
    verdict = Verdict(True, "", "", 1.0, Trigger.INACTIVITY, 0)
    Gatherer().span_table(
        [(bytes(TRACE_ID_BYTES), verdict, False, twin.Cut([], "", 0, 0))],
        datetime(2000, 1, 1, tzinfo=UTC),
    )
