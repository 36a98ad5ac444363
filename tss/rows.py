"""Kept chunks and verdicts to Arrow tables: the columns of `spans` and `decisions`, and how they are filled.

A trace is written from its chunks, minus the records that landed before and the records that a redelivery put into
two chunks: both are cut by the (partition, offset) each span came from. Within what is left, a span whose bytes come
twice was sent twice by its producer and is written once.

Pure. `gather` fills `span_table` by compiled kernels; this stays their oracle.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tss.consistent import adjusted_count, parse_ot_state
from tss.model import (
    FACTS,
    NO_START,
    SPAN_ID_BYTES,
    TRACE_ID_BYTES,
    Trigger,
    Verdict,
    decode_origins,
    format_records,
)
from tss.wire import any_value, resource_frames

ATTRIBUTES_MAX = 1024  # a map; more are counted in the dropped count. SDKs stop at 128 by default
VALUE_CHARS_MAX = 65_536  # an attribute value, about the largest stack trace worth reading
EVENTS_MAX = 1024  # events or links a span; more are counted as dropped
INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1
UNKNOWN_SERVICE = "unknown_service"  # what OpenTelemetry prescribes where service.name is absent

KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
STATUSES = ("UNSET", "OK", "ERROR")

STRINGS: Any = pa.map_(pa.string(), pa.string())
_MICROS: Any = pa.timestamp("us", "UTC")
_EVENT: Any = pa.struct(
    [
        ("time_unix_nano", pa.int64()),
        ("name", pa.string()),
        ("attributes", STRINGS),
        ("dropped_attributes_count", pa.int32()),
    ]
)
_LINK: Any = pa.struct(
    [
        ("trace_id", pa.string()),
        ("span_id", pa.string()),
        ("trace_state", pa.string()),
        ("attributes", STRINGS),
        ("flags", pa.int32()),
    ]
)

# Copies of hot attributes: a column is some ten times faster to filter than a map. Older spellings come second.
PROMOTED: dict[str, tuple[str, ...]] = {
    "http_request_method": ("http.request.method", "http.method"),
    "http_route": ("http.route",),
    "http_response_status_code": ("http.response.status_code", "http.status_code"),
    "db_system": ("db.system.name", "db.system"),
    "rpc_service": ("rpc.service",),
    "messaging_system": ("messaging.system",),
    "exception_type": ("exception.type",),
}

SPANS = pa.schema(
    [
        ("trace_id", pa.string()),
        ("span_id", pa.string()),
        ("parent_span_id", pa.string()),
        ("timestamp_ms", pa.int64()),
        ("duration_ms", pa.float64()),
        ("status_code", pa.int32()),
        ("span_kind", pa.int32()),
        ("service_name", pa.string()),
        ("operation_name", pa.string()),
        ("trace_state", pa.string()),
        ("flags", pa.int64()),
        ("kind_string", pa.string()),
        ("start_time", _MICROS),
        ("end_time", _MICROS),
        ("start_time_unix_nano", pa.int64()),
        ("end_time_unix_nano", pa.int64()),
        ("duration_ns", pa.int64()),
        ("status_code_string", pa.string()),
        ("status_message", pa.string()),
        ("attributes", STRINGS),
        ("resource_attributes", STRINGS),
        ("scope_name", pa.string()),
        ("scope_version", pa.string()),
        ("scope_attributes", STRINGS),
        *((name, pa.string()) for name in PROMOTED),
        ("events", pa.list_(_EVENT)),
        ("links", pa.list_(_LINK)),
        ("dropped_attributes_count", pa.int64()),
        ("dropped_events_count", pa.int64()),
        ("dropped_links_count", pa.int64()),
        ("sampling_policy", pa.string()),
        ("sampling_reason", pa.string()),
        ("sampling_probability", pa.float64()),
        ("adjusted_count", pa.float64()),
        ("decided_at", _MICROS),
        ("late", pa.bool_()),
    ]
)

DECISIONS = pa.schema(
    [
        ("trace_id", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("policy", pa.string()),
        ("probability", pa.float64()),
        ("trigger", pa.string()),
        ("late", pa.bool_()),
        ("span_count", pa.int64()),
        ("error", pa.bool_()),
        ("start_time", _MICROS),
        ("duration_ms", pa.float64()),
        ("decided_at", _MICROS),
        ("last_log_time", _MICROS),
        ("rules_version", pa.string()),
        ("writer", pa.string()),
        ("sequence", pa.int64()),
        ("records", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a trace is written: per payload, which of its spans in order (None = all), and their records as text."""

    payloads: list[tuple[bytes, list[bool] | None]]
    records: str
    spans: int
    duplicates: int


KeptTrace: TypeAlias = tuple[bytes, Verdict, bool, Cut]  # trace id, verdict, late, what of it is written


class Decision(NamedTuple):
    """One row of `decisions`: what was decided of the spans that are new in this sequence.

    `trigger` is why it was looked at now, `records` is as `format_records` writes them.
    """

    trace_id: bytes
    verdict: Verdict
    trigger: Trigger
    late: bool
    span_count: int
    error: bool
    start_ns: int
    duration_ms: float
    last_log_ms: int
    records: str


def cut(chunks: Mapping[bytes, bytes], coverage: AbstractSet[tuple[int, int]]) -> Cut:
    """The spans of a trace that did not land before, each once; `chunks` is field → payload."""
    seen = set(coverage)
    payloads: list[tuple[bytes, list[bool] | None]] = []
    spans = duplicates = 0
    for name in sorted(chunks):  # any order would do; a stable one makes every attempt write the same
        take: list[bool] = []
        for origin in decode_origins(name[FACTS.itemsize :]):
            record = (origin.partition, origin.offset)
            fresh = record not in seen
            seen.add(record)
            take += [fresh] * origin.spans
        fresh_spans = sum(take)
        spans += fresh_spans
        duplicates += len(take) - fresh_spans
        if fresh_spans:
            payloads.append((chunks[name], None if fresh_spans == len(take) else take))
    return Cut(payloads, format_records(seen - set(coverage)), spans, duplicates)


def decision_table(
    decisions: Sequence[Decision], decided_at: datetime, writer: str, sequence: int
) -> pa.Table:
    """One row a decision."""
    if not decisions:
        return DECISIONS.empty_table()
    # A column at a time: zip would go through all of them side by side, each somewhere else in memory.
    fields: list[list[Any]] = [[one[i] for one in decisions] for i in range(len(Decision._fields))]
    ids, verdicts, triggers, late, spans, errors, starts, durations, last, records = fields
    *outcome, version = _each_once(
        verdicts, lambda v: (v.kept, v.reason, v.policy, v.probability, f"{v.rules:016x}")
    )
    start_ns = np.array(starts, np.uint64)
    columns = (
        _hex_texts(ids),
        *outcome,
        *_each_once(triggers, lambda trigger: (trigger.label,)),
        *(late, spans, errors),
        pa.array((start_ns // 1000).astype(np.int64), _MICROS, mask=start_ns == NO_START),
        durations,
        pa.repeat(pa.scalar(decided_at, _MICROS), len(ids)),
        pa.array(np.array(last, np.int64) * 1000, _MICROS),
        version,
        pa.repeat(writer, len(ids)),
        pa.repeat(pa.scalar(sequence, pa.int64()), len(ids)),
        records,
    )
    return _filled(columns, DECISIONS)


def _hex_texts(ids: Sequence[bytes]) -> Any:
    """Trace ids as text, without a text of Python for each."""
    width = 2 * TRACE_ID_BYTES
    ends: Any = np.arange(0, width * len(ids) + 1, width, dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(ids), pa.py_buffer(ends), pa.py_buffer(b"".join(ids).hex().encode())
    )


def _each_once(objects: Sequence[Any], values: Callable[[Any], tuple[Any, ...]]) -> list[Any]:
    """Columns of what follows from objects of which few are different, told apart without looking into them."""
    different = {id(one): one for one in objects}
    places = {key: place for place, key in enumerate(different)}
    numbers = pa.array([places[key] for key in map(id, objects)], pa.int32())
    return [pa.array(column).take(numbers) for column in zip(*map(values, different.values()), strict=True)]


def in_order(traces: Iterable[KeptTrace]) -> list[KeptTrace]:
    """By trace id, as the tables are sorted."""
    return sorted(traces, key=lambda trace: trace[0])


def span_table(traces: Iterable[KeptTrace], decided_at: datetime) -> tuple[pa.Table, int]:
    """One row a span, by trace id and start; also how many were left out as sent twice."""
    rows: list[tuple[Any, ...]] = []
    repeated = 0
    for trace_id, verdict, late, pieces in in_order(traces):
        written: set[bytes] = set()
        found: list[tuple[int, tuple[Any, ...]]] = []
        for payload, take in pieces.payloads:
            index = -1
            for frame in resource_frames(payload):
                resource = Resource.FromString(frame.resource)
                resource_map, _ = attribute_texts(resource.attributes)
                service = next((v for k, v in resource_map if k == "service.name"), UNKNOWN_SERVICE)
                for scope in frame.scopes:
                    about = InstrumentationScope.FromString(scope.scope)
                    context = (
                        resource_map,
                        about.name or None,
                        about.version or None,
                        attribute_texts(about.attributes)[0],
                    )
                    for raw in scope.spans:
                        index += 1
                        if take is not None and not take[index]:
                            continue
                        if raw in written:
                            repeated += 1
                            continue
                        written.add(raw)
                        decided = (verdict, decided_at, late)
                        span = Span.FromString(raw)
                        row = _span_row(trace_id, span, service, context, decided)
                        found.append((span.start_time_unix_nano, row))
        rows += [row for _, row in sorted(found, key=lambda one: one[0])]
    return _table(rows, SPANS), repeated


def _span_row(
    trace_id: bytes,
    span: Span,
    service: str,
    context: tuple[Any, Any, Any, Any],
    decided: tuple[Verdict, datetime, bool],
) -> tuple[Any, ...]:
    resource_map, scope_name, scope_version, scope_map = context
    verdict, decided_at, late = decided
    attributes, dropped = attribute_texts(span.attributes)
    by_key = dict(attributes)
    for event in span.events[:EVENTS_MAX]:
        for pair in event.attributes if event.name == "exception" else ():
            if pair.key == "exception.type":
                by_key.setdefault(pair.key, value_text(pair.value))
    events = [_event_row(event) for event in span.events[:EVENTS_MAX]]
    links = [_link_row(link) for link in span.links[:EVENTS_MAX]]
    start, end = span.start_time_unix_nano, span.end_time_unix_nano
    duration_ns = max(0, min(end - start, INT64_MAX))
    kind = span.kind if 0 <= span.kind < len(KINDS) else 0
    status = span.status.code if 0 <= span.status.code < len(STATUSES) else 0
    parent = span.parent_span_id
    return (
        trace_id.hex(),
        span.span_id.hex(),
        parent.hex() if parent.strip(b"\0") else None,
        start // 1_000_000,
        duration_ns / 1_000_000,
        status,
        kind,
        service,
        span.name,
        span.trace_state or None,
        span.flags,
        KINDS[kind],
        _micros(start),
        _micros(end),
        min(start, INT64_MAX),
        min(end, INT64_MAX),
        duration_ns,
        STATUSES[status],
        span.status.message or None,
        attributes,
        resource_map,
        scope_name,
        scope_version,
        scope_map,
        *(next((by_key[k] for k in keys if k in by_key), None) for keys in PROMOTED.values()),
        events,
        links,
        span.dropped_attributes_count + dropped,
        span.dropped_events_count + len(span.events) - len(events),
        span.dropped_links_count + len(span.links) - len(links),
        verdict.policy,
        verdict.reason,
        verdict.probability,
        adjusted_count(parse_ot_state(span.trace_state).th, verdict.probability),
        decided_at,
        late,
    )


def _event_row(event: Span.Event) -> dict[str, Any]:
    attributes, dropped = attribute_texts(event.attributes)
    return {
        "time_unix_nano": min(event.time_unix_nano, INT64_MAX),
        "name": event.name,
        "attributes": attributes,
        "dropped_attributes_count": min(event.dropped_attributes_count + dropped, INT32_MAX),
    }


def _link_row(link: Span.Link) -> dict[str, Any]:
    return {
        "trace_id": link.trace_id[:TRACE_ID_BYTES].hex(),
        "span_id": link.span_id[:SPAN_ID_BYTES].hex(),
        "trace_state": link.trace_state or None,
        "attributes": attribute_texts(link.attributes)[0],
        "flags": link.flags & 0x7FFFFFFF,
    }


def attribute_texts(pairs: Sequence[KeyValue]) -> tuple[list[tuple[str, str]], int]:
    """Attributes as text, first of duplicate keys, and how many were cut off."""
    out: dict[str, str] = {}
    for pair in pairs[:ATTRIBUTES_MAX]:
        out.setdefault(pair.key, value_text(pair.value))
    return list(out.items()), max(0, len(pairs) - ATTRIBUTES_MAX)


def value_text(value: AnyValue) -> str:
    """A string as it is, bytes as base64, everything else as JSON."""
    plain = any_value(value)
    if isinstance(plain, str):
        text = plain
    elif isinstance(plain, bytes):
        text = base64.b64encode(plain).decode()
    elif plain is None:
        text = ""
    else:
        text = json.dumps(plain, ensure_ascii=False, default=lambda b: base64.b64encode(b).decode())
    return text[:VALUE_CHARS_MAX]


def _micros(nanos: int) -> int:
    return nanos // 1000


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    return _filled(zip(*rows, strict=True) if rows else ((),) * len(schema), schema)


def _filled(columns: Iterable[Any], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, schema, strict=True)
        ],
        schema=schema,
    )


def from_millis(millis: int) -> datetime:
    return datetime.fromtimestamp(millis / 1000, UTC)
