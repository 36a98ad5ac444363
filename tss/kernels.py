"""OTLP records to facts and chunks, compiled: the same function as `wire.decode`, some thirty times faster.

The twin in `wire` says what is right. This module only promises to say the same, byte for byte, and it keeps that
promise by being a coward: a kernel takes a record in only where every byte of it is understood and plain. At the
first oddity (JSON, a bad id, a repeated resource, a group, a text that is no UTF-8, deep nesting, a tombstone, …) it
takes back what it wrote of that record and marks it, and the twin decodes that record alone. Its chunks then join the
others as finished rows. So one bad producer costs its own records the slow path and no other, and every decision on
what a damaged record means is made in one place.

The way of a batch:

    join      the values end to end in one buffer; positions in it are all that later steps pass on
    scan      every byte is checked as the official class would check it; leaves a row for each span, and where the
              attributes are that rules ask for
    masks     an attribute value is looked up by its bytes; only one never seen before is judged, by the rules' own code
    group     rows get their trace, in order of appearance; facts are summed up on the way
    pack      field names and payloads are written into one buffer, span bytes copied as they came

Rejected: handing a whole batch to the twin when one record is odd (a single bad producer would cost the fleet its
speed), re-reading the twin's chunks through `scan` (what was odd stays odd), and rules judged in the kernel (twelve
operators on seven kinds of values, twice).

About the code, see `native`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status, TracesData

from tss import wire
from tss.consistent import parse_ot_state
from tss.model import ERROR, FACTS, NO_START, ROOT, SPAN_ID_BYTES, TRACE_ID_BYTES, Chunks, DeadLetter, Record
from tss.native import (
    BAD,
    DEPTH_MAX,
    FIELD_CODES,
    FIELDS_MAX,
    NONE,
    RESOURCE_KIND,
    SCOPE_KIND,
    SPAN_KIND,
    U0,
    U1,
    U2,
    U3,
    U4,
    U7,
    U8,
    UNKNOWN,
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
)
from tss.rules import ForceRule, Matcher, RuleSet
from tss.wire import COPIES_BYTES_MAX, Decoded

BATCH_BYTES_MAX = 1 << 31  # positions in tables are 32 bits wide; a larger batch goes to the twin
SPAN_BYTES_MIN = 30  # 18 for the trace id, 10 for the span id, 2 for the frame: bounds the rows of a batch
HIT_BYTES_MIN = 5  # an attribute with a key of one character and no value
VALUES_MAX = 1 << 16  # attribute values whose verdict is remembered; beyond, all are forgotten
VALUES_BYTES_MAX = 8 << 20
VALUE_BYTES_MAX = VALUES_BYTES_MAX >> 3  # a longer value is the twin's business

# --- tables --------------------------------------------------------------------------------------------------------

ROW = np.dtype(
    [  # a span, or a whole chunk that the twin made (frame and scope are NONE then)
        ("trace_high", "<u8"),  # the id's bytes as they stand in memory
        ("trace_low", "<u8"),
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
        ("randomness", "<u8"),  # as its tracestate says, else NO_RANDOMNESS
        ("mask", "<u8"),
        ("at", "<u4"),
        ("size", "<u4"),
        ("spans", "<u4"),
        ("bits", "<u4"),
        ("record", "<u4"),
        ("frame", "<u4"),
        ("scope", "<u4"),
        ("state_at", "<u4"),  # of its tracestate
        ("state_size", "<u4"),  # 0 unless it may state a randomness
        ("trace", "<u4"),
    ],
    align=True,
)
NO_RANDOMNESS = (1 << 64) - 1

# A `ResourceSpans` or a `ScopeSpans`: where its head (resource or scope) and its schema URL are.
FRAME = np.dtype([("at", "<u4"), ("size", "<u4"), ("schema_at", "<u4"), ("schema_size", "<u4")])

# The first value of a wanted key in a span, or the resource of a frame: what is looked up to judge it.
HIT = np.dtype(
    [("holds", "<u8"), ("row", "<u4"), ("key", "<u4"), ("at", "<u4"), ("size", "<u4"), ("entry", "<u4")],
    align=True,
)

ENTRY = np.dtype(
    [("hash", "<u8"), ("holds", "<u8"), ("key", "<u4"), ("at", "<u4"), ("size", "<u4")], align=True
)

ROWS, FRAMES, SCOPES, HITS, COPIED, SERIAL = (U(n) for n in range(6))  # in Scan.used


class Scan(NamedTuple):
    """What a scan fills. `used` says how much of each table is in use."""

    used: NDArray[np.uint64]
    rows: Table
    frames: Table
    scopes: Table
    hits: Table


# --- scan ----------------------------------------------------------------------------------------------------------


@kernel
def _scan(
    data: Bytes,
    bounds: NDArray[np.uint64],
    copies_bytes_max: UInt,
    plain: NDArray[np.bool_],
    out: Scan,
    keys: Keys,
    schema: Schema,
) -> None:
    """Record i is `bounds[i]:bounds[i + 1]`; `plain[i]` becomes whether its spans are in the tables."""
    for i in range(U(plain.size)):
        before = (out.used[ROWS], out.used[FRAMES], out.used[SCOPES], out.used[HITS])
        out.used[COPIED] = U0
        plain[i] = (
            _record(data, bounds[i], bounds[i + U1], i, out, keys, schema)
            and out.used[ROWS] > before[0]
            and out.used[COPIED] <= copies_bytes_max
        )
        if not plain[i]:
            out.used[ROWS], out.used[FRAMES], out.used[SCOPES], out.used[HITS] = before


@inner
def _is_json(data: Bytes, at: UInt, end: UInt) -> bool:
    """The rule of `wire` for values that begin with a newline, which is the tag of field 1, too."""
    while at < end and (data[at] == 0x0A or data[at] == 0x20 or data[at] == 0x09 or data[at] == 0x0D):
        at += U1
    if at >= end or data[at] != 0x7B:
        return False
    at += U1
    while at < end and (data[at] == 0x0A or data[at] == 0x20 or data[at] == 0x09 or data[at] == 0x0D):
        at += U1
    if at >= end:
        return False
    return bool(data[at] == 0x7D or (data[at] == 0x22 and at + U1 < end and data[at + U1] >= 0x20))


@merged
def _record(data: Bytes, at: UInt, end: UInt, record: UInt, out: Scan, keys: Keys, schema: Schema) -> bool:
    """Whether the whole record is plain; else what it left in the tables is void."""
    if _is_json(data, at, end):
        return False
    bare = False  # a `ResourceSpans`: field 2 exists there only
    field = at
    while field < end:
        tag, field = read_tag(data, field, end)
        if field > end or (tag >> U3 <= U2 and tag & U7 != U2):
            return False
        bare = bare or tag == U(0x12)
        field = skip(data, field, end, tag & U7)
        if field > end:
            return False
    if bare:
        return _resource_spans(data, at, end, record, out, keys, schema)
    while at < end:
        tag, at = read_tag(data, at, end)
        if tag == U(0x0A):
            size, at = read_length(data, at, end)
            if not _resource_spans(data, at, at + size, record, out, keys, schema):
                return False
            at += size
        else:
            at = skip(data, at, end, tag & U7)
    return True


@inner
def _resource_spans(
    data: Bytes, at: UInt, end: UInt, record: UInt, out: Scan, keys: Keys, schema: Schema
) -> bool:
    number = out.used[FRAMES]
    out.used[FRAMES] += U1
    first = out.used[ROWS]
    frame = out.frames[number]
    _clear(frame)
    has_resource = has_schema = False
    while at < end:
        tag, at = read_tag(data, at, end)
        if at > end:
            return False
        if tag >> U3 > U3:
            at = skip(data, at, end, tag & U7)
            if at > end:
                return False
            continue
        size, at = read_length(data, at, end)
        if at > end or tag & U7 != U2:
            return False
        if tag == U(0x12):
            if not _scope_spans(data, at, at + size, record, number, out, keys, schema):
                return False
        elif tag == U(0x0A):
            if has_resource or size > U(VALUE_BYTES_MAX):
                return False
            if not is_valid(data, at, at + size, RESOURCE_KIND, schema):
                return False
            has_resource = True
            frame.at = np.uint32(at)
            frame.size = np.uint32(size)
        else:
            if has_schema or not is_utf8(data, at, at + size):
                return False
            has_schema = True
            frame.schema_at = np.uint32(at)
            frame.schema_size = np.uint32(size)
        at += size
    rows = out.used[ROWS] - first
    if rows == U0:
        out.used[FRAMES] = number
    out.used[COPIED] += rows * (U(frame.size) + U(frame.schema_size))
    return True


@inner
def _clear(frame: Any) -> None:
    frame.at = np.uint32(0)
    frame.size = np.uint32(0)
    frame.schema_at = np.uint32(0)
    frame.schema_size = np.uint32(0)


@merged
def _scope_spans(
    data: Bytes, at: UInt, end: UInt, record: UInt, frame: UInt, out: Scan, keys: Keys, schema: Schema
) -> bool:
    number = out.used[SCOPES]
    out.used[SCOPES] += U1
    first = out.used[ROWS]
    scope = out.scopes[number]
    _clear(scope)
    has_scope = has_schema = False
    while at < end:
        tag, at = read_tag(data, at, end)
        if at > end:
            return False
        if tag >> U3 > U3:
            at = skip(data, at, end, tag & U7)
            if at > end:
                return False
            continue
        size, at = read_length(data, at, end)
        if at > end or tag & U7 != U2:
            return False
        if tag == U(0x12):
            if not _span(data, at, at + size, out, keys, schema):
                return False
            row = out.rows[out.used[ROWS]]
            row.record = np.uint32(record)
            row.frame = np.uint32(frame)
            row.scope = np.uint32(number)
            out.used[ROWS] += U1
        elif tag == U(0x0A):
            if has_scope or not is_valid(data, at, at + size, SCOPE_KIND, schema):
                return False
            has_scope = True
            scope.at = np.uint32(at)
            scope.size = np.uint32(size)
        else:
            if has_schema or not is_utf8(data, at, at + size):
                return False
            has_schema = True
            scope.schema_at = np.uint32(at)
            scope.schema_size = np.uint32(size)
        at += size
    rows = out.used[ROWS] - first
    if rows == U0:
        out.used[SCOPES] = number
    out.used[COPIED] += rows * (U(scope.size) + U(scope.schema_size))
    return True


@pasted
def _span(data: Bytes, at: UInt, end: UInt, out: Scan, keys: Keys, schema: Schema) -> bool:
    """Writes the next row. Of a field that is there twice the last counts, as protobuf has it."""
    row = out.rows[out.used[ROWS]]
    _begin_row(row, at, end - at)
    out.used[SERIAL] += U1
    trace_high = trace_low = span_id = status = U0
    root = True
    while at < end:
        tag, at = read_tag(data, at, end)
        if at > end:
            return False
        if tag & U7 != U2:
            start = at
            at = skip(data, at, end, tag & U7)
            if at > end or not _is_wire_type(tag, schema):
                return False
            if tag == U(0x39):
                row.start_ns = load_word(data, start)
            elif tag == U(0x41):
                row.end_ns = load_word(data, start)
            continue
        size, at = read_length(data, at, end)
        if at > end:
            return False
        if tag == U(0x4A):
            if not _attribute(data, at, at + size, out, keys, schema):
                return False
        elif tag == U(0x2A):
            if not is_utf8(data, at, at + size):
                return False
        elif tag == U(0x0A):
            if size != U(TRACE_ID_BYTES):
                return False
            trace_high = load_word(data, at)
            trace_low = load_word(data, at + U8)
        elif tag == U(0x12):
            if size != U(SPAN_ID_BYTES):
                return False
            span_id = load_word(data, at)
        elif tag == U(0x1A):
            if not is_utf8(data, at, at + size):
                return False
            stated = _states_randomness(data, at, at + size)
            row.state_at = np.uint32(at)
            row.state_size = np.uint32(size if stated else U0)
        elif tag == U(0x22):
            root = _is_zero(data, at, at + size)
        elif tag == U(0x7A):
            status = _status(data, at, at + size, status)
            if status == BAD:
                return False
        elif not _is_valid_field(data, at, at + size, tag, schema):
            return False
        at += size
    row.trace_high = trace_high
    row.trace_low = trace_low
    row.bits = np.uint32((U(ROOT) if root else U0) | (U(ERROR) if status == U(ERROR_CODE) else U0))
    return bool((trace_high | trace_low) != U0 and span_id != U0)


ERROR_CODE = int(Status.STATUS_CODE_ERROR)


@inner
def _begin_row(row: Any, at: UInt, size: UInt) -> None:
    row.at = np.uint32(at)
    row.size = np.uint32(size)
    row.spans = np.uint32(1)
    row.start_ns = U0
    row.end_ns = U0
    row.randomness = U(NO_RANDOMNESS)
    row.mask = U0
    row.state_at = np.uint32(0)
    row.state_size = np.uint32(0)


@inner
def _is_wire_type(tag: UInt, schema: Schema) -> bool:
    """False where it is a known field of a span with another wire type."""
    if tag >> U3 >= U(FIELDS_MAX):
        return True
    code = U(schema.fields[SPAN_KIND, tag >> U3]) & U7
    return bool(code == U(UNKNOWN) or code == tag & U7)


@inner
def _is_valid_field(data: Bytes, at: UInt, end: UInt, tag: UInt, schema: Schema) -> bool:
    """Whether a delimited field of a span is unknown, or known as such and its content valid."""
    if tag >> U3 >= U(FIELDS_MAX):
        return True
    code = U(schema.fields[SPAN_KIND, tag >> U3])
    if code == U(UNKNOWN):
        return True
    if code & U7 != U2:
        return False
    if code >= U(16):
        return is_valid(data, at, end, (code >> U4) - U1, schema)
    if code & U8:
        return is_utf8(data, at, end)
    return True


@inner
def _is_zero(data: Bytes, at: UInt, end: UInt) -> bool:
    while at < end:
        if data[at] != 0:
            return False
        at += U1
    return True


@inner
def _states_randomness(data: Bytes, at: UInt, end: UInt) -> bool:
    """Whether `rv:` stands somewhere in a tracestate; without it, no member can state a randomness."""
    while at + U2 < end:
        if data[at] == 0x72 and data[at + U1] == 0x76 and data[at + U2] == 0x3A:
            return True
        at += U1
    return False


@inner
def _status(data: Bytes, at: UInt, end: UInt, code: UInt) -> UInt:
    """The code after this status has been merged into what was there before, or BAD."""
    while at < end:
        tag, at = read_tag(data, at, end)
        if tag == U(0x18):
            code, at = read_varint(data, at, end)
            code &= U(0xFFFFFFFF)
        elif tag == U(0x12):
            size, at = read_length(data, at, end)
            if at > end or not is_utf8(data, at, at + size):
                return BAD
            at += size
        else:
            return BAD
    return code if at == end else BAD


@pasted
def _attribute(data: Bytes, at: UInt, end: UInt, out: Scan, keys: Keys, schema: Schema) -> bool:
    """One attribute of the span that is being read; noted where a rule asks for its key."""
    key_at = key_size = value_at = value_size = U0
    has_key = has_value = False
    while at < end:
        tag = data[at]
        size, at = read_length(data, at + U1, end)
        if at > end:
            return False
        if tag == 0x0A and not has_key:
            if not is_utf8(data, at, at + size):
                return False
            has_key = True
            key_at = at
            key_size = size
        elif tag == 0x12 and not has_value:
            if not _value(data, at, at + size, schema):
                return False
            has_value = True
            value_at = at
            value_size = size
        else:
            return False
        at += size
    if keys.seen.size == 0:
        return True
    key = find_key(data, key_at, key_size, keys)
    if key == U(NONE) or keys.seen[key] == out.used[SERIAL]:
        return True
    if value_size > U(VALUE_BYTES_MAX):
        return False
    keys.seen[key] = out.used[SERIAL]
    hit = out.hits[out.used[HITS]]
    hit.row = np.uint32(out.used[ROWS])
    hit.key = np.uint32(key)
    hit.at = np.uint32(value_at)
    hit.size = np.uint32(value_size)
    out.used[HITS] += U1
    return True


@pasted
def _value(data: Bytes, at: UInt, end: UInt, schema: Schema) -> bool:
    """Whether an `AnyValue` is valid: quickly for one text or whole number, as most are."""
    if at == end:
        return True
    tag = data[at]
    if tag == 0x0A:
        size, start = read_length(data, at + U1, end)
        if start <= end and start + size == end:
            return is_utf8(data, start, end)
    elif tag == 0x18:
        _, start = read_varint(data, at + U1, end)
        if start == end:
            return True
    return is_valid(data, at, end, VALUE_KIND, schema)


# --- masks -------------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """Attribute values and resources met before: a hash table of entries, their bytes end to end."""

    used: NDArray[np.uint64]  # of entries; of bytes
    slots: NDArray[np.uint32]  # entry + 1; 0 is free
    entries: Table
    text: Bytes


@kernel
def _look_up(data: Bytes, hits: Table, start: UInt, seed: UInt, values: Values) -> UInt:
    """Gives the hits from `start` on their entry, a new one where needed. Returns where the table was full."""
    last_slot = U(values.slots.size) - U1
    for i in range(start, U(hits.size)):
        hit = hits[i]
        at, size = U(hit.at), U(hit.size)
        hashed = hash_bytes(data, at, size, mix(seed, U(hit.key)))
        slot = hashed & last_slot
        while values.slots[slot] != 0:
            entry = values.entries[values.slots[slot] - U1]
            same = entry.hash == hashed and entry.key == hit.key and entry.size == hit.size
            if same and is_equal(data, at, values.text, U(entry.at), size):
                break
            slot = (slot + U1) & last_slot
        if values.slots[slot] == 0:
            number, used = values.used[U0], values.used[U1]
            if number == U(values.entries.size) or used + size + U8 > U(values.text.size):
                return i
            copy_bytes(values.text, used, data, at, size)
            entry = values.entries[number]
            entry.hash = hashed
            entry.key = hit.key
            entry.at = np.uint32(used)
            entry.size = hit.size
            values.slots[slot] = np.uint32(number + U1)
            values.used[U0] = number + U1
            values.used[U1] = used + size
        hit.entry = np.uint32(values.slots[slot] - U1)
    return U(hits.size)


@kernel
def _set_masks(
    rows: Table, resources: Table, hits: Table, absent: NDArray[np.uint64], found: NDArray[np.uint64]
) -> None:
    """A span's mask: the rules that its resource, its values, and its lack of values leave standing."""
    h = U0
    for i in range(U(rows.size)):
        row = rows[i]
        mask = resources[row.frame].holds
        while h < U(hits.size) and hits[h].row == i:
            mask &= hits[h].holds
            found[hits[h].key] = i + U1
            h += U1
        if mask != U0:
            for key in range(U(absent.size)):
                if found[key] != i + U1:
                    mask &= absent[key]
        row.mask = mask


# --- group -------------------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """The rows trace by trace: trace t has `order[starts[t]:starts[t + 1]]`."""

    order: NDArray[np.uint32]
    starts: NDArray[np.uint64]


@kernel
def _group(
    rows: Table,
    stamps: NDArray[np.int64],
    seed: UInt,
    slots: NDArray[np.uint32],
    facts: Table,
    groups: Groups,
) -> UInt:
    """Numbers the traces by their first row, sums up their facts and orders the rows. Returns how many there are."""
    traces = U0
    last_slot = U(slots.size) - U1
    for i in range(U(rows.size)):
        row = rows[i]
        slot = mix(mix(seed, row.trace_high), row.trace_low) & last_slot
        while slots[slot] != 0:
            first = rows[groups.order[slots[slot] - U1]]
            if first.trace_high == row.trace_high and first.trace_low == row.trace_low:
                break
            slot = (slot + U1) & last_slot
        if slots[slot] == 0:
            groups.order[traces] = np.uint32(i)  # the trace's first row, until the order is known
            _begin_facts(facts[traces], row, stamps[row.record])
            traces += U1
            slots[slot] = np.uint32(traces)
        row.trace = np.uint32(slots[slot] - U1)
        _sum_up(facts[row.trace], row, stamps[row.record])
        groups.starts[row.trace + U1] += U1
    for t in range(traces):
        groups.starts[t + U1] += groups.starts[t]
    for i in range(U(rows.size)):
        trace = rows[i].trace
        groups.order[groups.starts[trace]] = np.uint32(i)
        groups.starts[trace] += U1
    t = traces
    while t != U0:  # each start has moved to the next one's place
        groups.starts[t] = groups.starts[t - U1]
        t -= U1
    groups.starts[U0] = U0
    return traces


@inner
def _begin_facts(facts: Any, row: Any, stamp: UInt) -> None:
    facts.log_time_ms = stamp
    facts.start_ns = U(NO_START)
    low = U0
    for i in range(U1, U8):  # the last seven bytes of the id, most significant first
        low = low << U8 | (row.trace_low >> (i << U3)) & U(0xFF)
    facts.randomness = low


@inner
def _sum_up(facts: Any, row: Any, stamp: UInt) -> None:
    newest = max(facts.log_time_ms + np.int64(facts.log_span_ms), stamp)
    facts.log_time_ms = min(facts.log_time_ms, stamp)
    facts.log_span_ms = np.uint32(min(newest - facts.log_time_ms, np.int64(0xFFFFFFFF)))
    facts.spans += row.spans
    facts.bits |= row.bits
    facts.mask |= row.mask
    if row.start_ns != U0:
        facts.start_ns = min(facts.start_ns, row.start_ns)
    facts.end_ns = max(facts.end_ns, row.end_ns)
    if row.randomness != U(NO_RANDOMNESS):
        facts.randomness = row.randomness


# --- pack --------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Bytes of each trace's payload; of each scope and frame where its first row stands in the order of rows."""

    payloads: NDArray[np.uint64]
    scopes: NDArray[np.uint64]
    frames: NDArray[np.uint64]


class Names(NamedTuple):
    """Facts and origins of all traces, as bytes; the origins of trace t end at `ends[t]`."""

    facts: Bytes
    origins: Bytes
    ends: NDArray[np.uint64]


@inner
def _varint_size(value: UInt) -> UInt:
    size = U1
    while value > U(0x7F):
        value >>= U7
        size += U1
    return size


@inner
def _put_varint(out: Bytes, at: UInt, value: UInt) -> UInt:
    while value > U(0x7F):
        out[at] = np.uint8(value & U(0x7F) | U(0x80))
        at += U1
        value >>= U7
    out[at] = np.uint8(value)
    return at + U1


@inner
def _delimited_size(size: UInt) -> UInt:
    return U1 + _varint_size(size) + size


@inner
def _optional_size(size: UInt) -> UInt:
    return _delimited_size(size) if size != U0 else U0


@inner
def _put_head(out: Bytes, at: UInt, number: UInt, size: UInt) -> UInt:
    out[at] = np.uint8(number << U3 | U2)
    return _put_varint(out, at + U1, size)


@inner
def _put_optional(out: Bytes, at: UInt, number: UInt, data: Bytes, start: UInt, size: UInt) -> UInt:
    if size == U0:
        return at
    return copy_bytes(out, _put_head(out, at, number, size), data, start, size)


@kernel
def _encode_origins(
    rows: Table, groups: Groups, partitions: NDArray[np.uint64], offsets: NDArray[np.uint64], names: Names
) -> None:
    """What `model.encode_origins` makes of each trace's records."""
    order, out, at = groups.order, names.origins, U0
    for t in range(U(names.ends.size)):
        p, stop = groups.starts[t], groups.starts[t + U1]
        while p < stop:  # one round a group: records of one partition whose offsets ascend
            partition = partitions[rows[order[p]].record]
            count = U1
            after = p + U1
            while after < stop:
                before, record = rows[order[after - U1]].record, rows[order[after]].record
                if record != before:
                    if partitions[record] != partition or offsets[record] <= offsets[before]:
                        break
                    count += U1
                after += U1
            at = _put_varint(out, _put_varint(out, at, partition), count)
            previous = U0
            while p < after:
                record = rows[order[p]].record
                spans = U0
                while p < after and rows[order[p]].record == record:
                    spans += U(rows[order[p]].spans)
                    p += U1
                at = _put_varint(out, at, offsets[record] - previous)
                at = _put_varint(out, at, spans)
                previous = offsets[record]
        names.ends[t] = at


@kernel
def _measure(rows: Table, groups: Groups, scan: Scan, sizes: Sizes) -> None:
    order = groups.order
    for t in range(U(sizes.payloads.size)):
        p, stop = groups.starts[t], groups.starts[t + U1]
        payload = U0
        while p < stop:
            number = rows[order[p]].frame
            if number == NONE:
                payload += U(rows[order[p]].size)
                p += U1
                continue
            frame_begin = p
            frame = scan.frames[number]
            frame_size = _optional_size(U(frame.size)) + _optional_size(U(frame.schema_size))
            while p < stop and rows[order[p]].frame == number:
                scope_begin = p
                scope_number = rows[order[p]].scope
                scope = scan.scopes[scope_number]
                scope_size = _optional_size(U(scope.size)) + _optional_size(U(scope.schema_size))
                while p < stop and rows[order[p]].scope == scope_number:
                    scope_size += _delimited_size(U(rows[order[p]].size))
                    p += U1
                sizes.scopes[scope_begin] = scope_size
                frame_size += _delimited_size(scope_size)
            sizes.frames[frame_begin] = frame_size
            payload += _delimited_size(frame_size)
        sizes.payloads[t] = payload


@kernel
def _pack(
    data: Bytes,
    rows: Table,
    groups: Groups,
    scan: Scan,
    sizes: Sizes,
    names: Names,
    payload_at: NDArray[np.int64],
    out: Bytes,
) -> None:
    """Writes field name and payload of each trace, framed as `wire` frames them."""
    order, facts_bytes = groups.order, U(names.facts.size) // U(payload_at.size)
    at = origins_at = U0
    for t in range(U(payload_at.size)):
        at = copy_bytes(out, at, names.facts, t * facts_bytes, facts_bytes)
        at = copy_bytes(out, at, names.origins, origins_at, names.ends[t] - origins_at)
        origins_at = names.ends[t]
        payload_at[t] = np.int64(at)
        p, stop = groups.starts[t], groups.starts[t + U1]
        while p < stop:
            row = rows[order[p]]
            if row.frame == NONE:
                at = copy_bytes(out, at, data, U(row.at), U(row.size))
                p += U1
                continue
            frame = scan.frames[row.frame]
            at = _put_head(out, at, U1, sizes.frames[p])
            at = _put_optional(out, at, U1, data, U(frame.at), U(frame.size))
            while p < stop and rows[order[p]].frame == row.frame:
                scope_number = rows[order[p]].scope
                scope = scan.scopes[scope_number]
                at = _put_head(out, at, U2, sizes.scopes[p])
                at = _put_optional(out, at, U1, data, U(scope.at), U(scope.size))
                while p < stop and rows[order[p]].scope == scope_number:
                    span = rows[order[p]]
                    at = copy_bytes(out, _put_head(out, at, U2, U(span.size)), data, U(span.at), U(span.size))
                    p += U1
                at = _put_optional(out, at, U3, data, U(scope.schema_at), U(scope.schema_size))
            at = _put_optional(out, at, U3, data, U(frame.schema_at), U(frame.schema_size))


# --- rules -------------------------------------------------------------------------------------------------------


class _Judge:
    """One rule set, and what it says of the values met so far.

    Each value of a key that some span matcher names gets a mask: the rules that it lets stand. A rule that does not
    ask for the key stands. A span matches the rules that stand after its resource and all of these keys.
    """

    def __init__(self, rules: RuleSet) -> None:
        self.version = rules.version
        self._rules = [(1 << bit, rule.match) for bit, rule in enumerate(rules.rules)]
        self._all = (1 << len(self._rules)) - 1
        asked: dict[str, list[tuple[int, list[Matcher]]]] = {}
        for bit, match in self._rules:
            for key in dict.fromkeys(m.key for m in match.span):
                asked.setdefault(key, []).append((bit, [m for m in match.span if m.key == key]))
        self._asked = list(asked.items())
        self.keys = make_keys(list(asked))
        self._absent = np.array([self._value_mask(key, {}) for key in range(len(asked))], np.uint64)
        self._values = Values(
            used=np.zeros(2, np.uint64),
            slots=np.zeros(2 * VALUES_MAX, np.uint32),
            entries=np.zeros(VALUES_MAX, ENTRY),
            text=np.zeros(VALUES_BYTES_MAX, np.uint8),
        )

    def set_masks(self, data: Bytes, scan: Scan, seed: Any) -> None:
        rows, frames, hits = (
            table[: scan.used[part]]
            for table, part in ((scan.rows, ROWS), (scan.frames, FRAMES), (scan.hits, HITS))
        )
        resources = np.zeros(len(frames), HIT)
        resources["key"], resources["at"], resources["size"] = len(self._asked), frames["at"], frames["size"]
        self._look_up(data, resources, seed)
        self._look_up(data, hits, seed)
        _set_masks(rows, resources, hits, self._absent, np.zeros(len(self._absent), np.uint64))

    def _look_up(self, data: Bytes, hits: Table, seed: Any) -> None:
        values, done = self._values, 0
        while done < len(hits):
            known = int(values.used[0])
            reached = int(_look_up(data, hits, np.uint64(done), seed, values))
            new = values.entries[known : int(values.used[0])]
            new["holds"] = self._masks(new, values.text)
            hits["holds"][done:reached] = values.entries["holds"][hits["entry"][done:reached]]
            done = reached
            if done < len(hits):
                values.used[:] = 0
                values.slots[:] = 0

    def _masks(self, entries: Table, stored: Bytes) -> list[int]:
        """Of each value. Texts, which may be many and different, are judged together."""
        masks = []
        texts: dict[int, list[tuple[int, str]]] = {}
        columns = (entries["key"].tolist(), entries["at"].tolist(), entries["size"].tolist())
        for number, (key, at, size) in enumerate(zip(*columns, strict=True)):
            encoded = stored[at : at + size].tobytes()
            text = _short_text(encoded) if key < len(self._asked) else None
            if text is None:
                masks.append(self._mask(key, encoded))
            else:
                masks.append(self._all)
                texts.setdefault(key, []).append((number, text))
        for key, found in texts.items():
            for bit, matchers in self._asked[key][1]:
                for matcher in matchers:
                    holds = matcher.holds_on_texts([text for _, text in found])
                    for (number, _), held in zip(found, holds, strict=True):
                        if not held:
                            masks[number] &= ~bit
        return masks

    def _mask(self, key: int, encoded: bytes) -> int:
        if key < len(self._asked):
            name = self._asked[key][0]
            return self._value_mask(key, {name: wire.any_value(AnyValue.FromString(encoded))})
        resource = wire.attribute_map(Resource.FromString(encoded).attributes)
        return sum(bit for bit, match in self._rules if all(m.holds(resource) for m in match.resource))

    def _value_mask(self, key: int, attributes: dict[str, Any]) -> int:
        asking = self._asked[key][1]
        return self._all & ~sum(bit for bit, ms in asking if not all(m.holds(attributes) for m in ms))


def _short_text(encoded: bytes) -> str | None:
    """What an `AnyValue` of one text of up to 127 bytes holds, as most are; None for any other."""
    plain = len(encoded) >= 2 and encoded[0] == 0x0A and encoded[1] == len(encoded) - 2 < 0x80
    return encoded[2:].decode() if plain else None


# --- batches -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Odd:
    """What the twin made of the records that are not plain; chunks as rows whose `at` counts within `payloads`."""

    dead: list[DeadLetter] = dataclasses.field(default_factory=list)
    rows: list[Table] = dataclasses.field(default_factory=list)
    payloads: list[bytes] = dataclasses.field(default_factory=list)
    size: int = 0
    spans: int = 0
    empty: int = 0

    def add(self, number: int, record: Record, rules: RuleSet) -> None:
        decoded = wire.decode([record], rules)
        self.dead += decoded.dead
        self.spans += decoded.spans
        self.empty += decoded.empty
        chunks = decoded.chunks
        rows = np.zeros(len(chunks), ROW)
        rows["record"], rows["frame"], rows["scope"] = number, NONE, NONE
        ids = chunks.trace_ids.view(np.uint64)
        rows["trace_high"], rows["trace_low"] = ids[:, 0], ids[:, 1]
        for name in ("spans", "bits", "end_ns", "mask"):
            rows[name] = chunks.facts[name]
        start_ns = chunks.facts["start_ns"]
        rows["start_ns"] = np.where(start_ns == NO_START, 0, start_ns)
        for i, row in enumerate(rows):
            payload = chunks.payload(i)
            row["at"], row["size"] = self.size, len(payload)
            row["randomness"] = _stated_randomness(payload)
            self.payloads.append(payload)
            self.size += len(payload)
        self.rows.append(rows)


def _stated_randomness(payload: bytes) -> int:
    """The last one that a span's tracestate states: the facts do not tell it from that of the trace id."""
    stated = NO_RANDOMNESS
    if b"rv:" in payload:
        for frame in wire.resource_frames(payload):
            for scope in frame.scopes:
                for span in scope.spans:
                    randomness = parse_ot_state(Span.FromString(span).trace_state).rv
                    stated = stated if randomness is None else randomness
    return stated


class Decoder:
    """`decode` with a memory: of values that rules have judged, and of the room that a batch needs. For one thread."""

    def __init__(self) -> None:
        self._judge = _Judge(RuleSet())
        self._schema = Schema(FIELD_CODES, np.zeros(DEPTH_MAX, np.uint64), np.zeros(DEPTH_MAX, np.uint64))
        self._room = _room(0, hits=0)
        self._seed = np.uint64(hash("tss.kernels") & (1 << 64) - 1)  # another in each process
        self.odd = 0  # records that took the slow path so far

    def decode(self, records: Sequence[Record], rules: RuleSet) -> Decoded:
        """Exactly what `wire.decode` gives."""
        records = list({(r.partition, r.offset): r for r in records}.values())
        values = [r.value or b"" for r in records]
        bounds = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(np.fromiter(map(len, values), np.uint64, len(values)), out=bounds[1:])
        if not 0 < bounds[-1] <= BATCH_BYTES_MAX:
            return wire.decode(records, rules)
        if rules.version != self._judge.version:
            self._judge = _Judge(rules)
        data = padded(values)
        plain = np.zeros(len(values), np.bool_)
        scan = self._tables(len(data))
        _scan(data, bounds, U(COPIES_BYTES_MAX), plain, scan, self._judge.keys, self._schema)
        self.odd += len(plain) - int(plain.sum())
        if not plain.any():
            return wire.decode(records, rules)

        rows = scan.rows[: scan.used[ROWS]]
        if rules.rules:
            self._judge.set_masks(data, scan, self._seed)
        for number in np.flatnonzero(rows["state_size"]):
            _read_randomness(rows[number], data)
        odd = _Odd(spans=len(rows))
        for number in np.flatnonzero(~plain):
            odd.add(int(number), records[number], rules)
        if len(data) + odd.size > BATCH_BYTES_MAX:  # small records, huge resources, many traces
            return wire.decode(records, rules)
        if odd.size:
            rows, data = _joined(rows, data, odd)
        return Decoded(self._chunks(data, rows, records, rules), odd.dead, odd.spans, odd.empty)

    def _tables(self, size: int) -> Scan:
        """Empty tables that any batch of this size fits into."""
        if len(self._room.rows) < _rows_max(size) or len(self._room.hits) < _hits_max(size):
            self._room = _room(_rows_max(size), hits=_hits_max(size))
        self._room.used[:] = 0
        self._judge.keys.seen[:] = 0
        return self._room

    def _chunks(self, data: Bytes, rows: Table, records: Sequence[Record], rules: RuleSet) -> Chunks:
        stamps = np.fromiter((r.timestamp_ms for r in records), np.int64, len(records))
        partitions = np.fromiter((r.partition for r in records), np.uint64, len(records))
        offsets = np.fromiter((r.offset for r in records), np.uint64, len(records))
        facts = np.zeros(len(rows), FACTS)
        groups = Groups(np.empty(len(rows), np.uint32), np.zeros(len(rows) + 1, np.uint64))
        slots = np.zeros(1 << (2 * len(rows)).bit_length(), np.uint32)
        traces = int(_group(rows, stamps, self._seed, slots, facts, groups))
        facts = facts[:traces].copy()
        facts["rules"] = rules.version

        names = Names(
            facts=facts.view(np.uint8),
            origins=np.empty(len(rows) * ORIGIN_BYTES_MAX, np.uint8),
            ends=np.empty(traces, np.uint64),
        )
        _encode_origins(rows, groups, partitions, offsets, names)
        sizes = Sizes(
            payloads=np.empty(traces, np.uint64),
            scopes=np.empty(len(rows), np.uint64),
            frames=np.empty(len(rows), np.uint64),
        )
        _measure(rows, groups, self._room, sizes)
        field_at = np.zeros(traces + 1, np.int64)
        np.cumsum(sizes.payloads.astype(np.int64) + FACTS.itemsize, out=field_at[1:])
        field_at[1:] += names.ends.astype(np.int64)
        payload_at = np.empty(traces, np.int64)
        packed = np.empty(field_at[-1], np.uint8)
        _pack(data, rows, groups, self._room, sizes, names, payload_at, packed)
        firsts = rows[groups.order[groups.starts[:traces]]]
        ids = np.stack([firsts["trace_high"], firsts["trace_low"]], axis=1)
        return Chunks(ids.view(np.uint8), facts, packed.data.toreadonly(), field_at, payload_at)


ORIGIN_BYTES_MAX = 40  # four varints of up to ten bytes: partition, records of the group, distance, spans


def _rows_max(size: int) -> int:
    return size // SPAN_BYTES_MIN + 2


def _hits_max(size: int) -> int:
    return size // HIT_BYTES_MIN + 2


def _room(rows: int, *, hits: int) -> Scan:
    # A page of a large array takes no memory before something is written there.
    return Scan(
        used=np.zeros(6, np.uint64),
        rows=np.empty(rows, ROW),
        frames=np.empty(rows, FRAME),
        scopes=np.empty(rows, FRAME),
        hits=np.empty(hits, HIT),
    )


def _read_randomness(row: Any, data: Bytes) -> None:
    state = data[row["state_at"] : row["state_at"] + row["state_size"]].tobytes().decode()
    randomness = parse_ot_state(state).rv
    if randomness is not None:
        row["randomness"] = randomness


def _joined(rows: Table, data: Bytes, odd: _Odd) -> tuple[Table, Bytes]:
    """Plain and odd rows in the order of their records, and the bytes of both."""
    for part in odd.rows:
        part["at"] += np.uint32(len(data))
    rows = np.concatenate([rows, *odd.rows])
    rows = rows[np.argsort(rows["record"], kind="stable")]
    return rows, padded([data.tobytes(), *odd.payloads])


def decode(records: Sequence[Record], rules: RuleSet) -> Decoded:
    """Exactly what `wire.decode` gives. Batch after batch, a `Decoder` is faster."""
    return Decoder().decode(records, rules)


def warm_up() -> None:
    """Loads all kernels from the cache on disk, or compiles them."""
    now = datetime(2000, 1, 1, tzinfo=UTC)
    matcher = {"key": "k", "op": "exists"}
    rule = {"id": "any", "match": {"span": [matcher]}, "created_at": now, "expires_at": now}
    span = Span(trace_id=b"1" * TRACE_ID_BYTES, span_id=b"1" * SPAN_ID_BYTES, attributes=[KeyValue(key="k")])
    value = TracesData(resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=[span])])])
    decode([Record(0, 0, 0, value.SerializeToString())], RuleSet([ForceRule.model_validate(rule)]))
