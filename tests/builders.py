"""Spans, traces and records in one line each, on the official protobuf classes.

    record(resource_spans(*trace(1), service="cart"), offset=7)

makes the Kafka record at offset 7 with the three spans of trace 1, as a Collector would send it. Ids are small
numbers here: `trace_id(1)` and `span_id(1)` are their bytes. Other keyword arguments are fields of the
protobuf class.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import (
    AnyValue,
    ArrayValue,
    InstrumentationScope,
    KeyValue,
    KeyValueList,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status, TracesData

from tss.model import SPAN_ID_BYTES, TRACE_ID_BYTES, Record
from tss.packing import Dictionary, Training
from tss.wire import Decoded

START_MS = 1_800_000_000_000  # when traces of these builders start
LOG_MS = START_MS + 1_000  # and when their records were written
NS_PER_MS = 1_000_000


def trace_id(number: int) -> bytes:
    """The 16 bytes of a small number."""
    return number.to_bytes(TRACE_ID_BYTES, "big")


def span_id(number: int) -> bytes:
    """The 8 bytes of a small number."""
    return number.to_bytes(SPAN_ID_BYTES, "big")


def any_value(value: object) -> AnyValue:
    """A Python value as OTLP holds it; None is the empty value."""
    match value:
        case None:
            return AnyValue()
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
        case list() | tuple():
            return AnyValue(array_value=ArrayValue(values=map(any_value, value)))
        case dict():
            return AnyValue(kvlist_value=KeyValueList(values=attributes(value)))
        case _:
            return AnyValue(string_value=str(value))


def attributes(values: Mapping[str, object]) -> list[KeyValue]:
    """Attributes of Python values."""
    return [KeyValue(key=key, value=any_value(value)) for key, value in values.items()]


def span(
    trace: int = 1,
    number: int = 1,
    *,
    parent: int | None = None,
    start_ms: float = START_MS,
    took_ms: float = 10,
    error: bool = False,
    attrs: Mapping[str, object] | None = None,
    **fields: Any,
) -> Span:
    """Span `number` of a trace; a root unless it has a parent."""
    start_ns = int(start_ms * NS_PER_MS)
    values: dict[str, Any] = {
        "trace_id": trace_id(trace),
        "span_id": span_id(number),
        "parent_span_id": b"" if parent is None else span_id(parent),
        "name": f"operation {number}",
        "kind": Span.SPAN_KIND_SERVER,
        "start_time_unix_nano": start_ns,
        "end_time_unix_nano": start_ns + int(took_ms * NS_PER_MS),
        "attributes": attributes(attrs or {}),
        "status": Status(code=Status.STATUS_CODE_ERROR) if error else None,
    }
    return Span(**(values | fields))


def trace(number: int = 1, spans: int = 3, *, error: bool = False, took_ms: float = 10) -> list[Span]:
    """A root and its children; `error` marks the last span, `took_ms` is the root's."""
    root = span(number, 1, took_ms=took_ms, error=error and spans == 1)
    children = [
        span(number, i, parent=1, took_ms=took_ms / 2, error=error and i == spans)
        for i in range(2, spans + 1)
    ]
    return [root, *children]


def scope_spans(*spans: Span, scope: str = "library", version: str = "1.0", **fields: Any) -> ScopeSpans:
    """Spans of one instrumentation scope."""
    return ScopeSpans(scope=InstrumentationScope(name=scope, version=version), spans=spans, **fields)


def resource_spans(
    *parts: Span | ScopeSpans,
    service: str | None = "shop",
    resource: Mapping[str, object] | None = None,
    **fields: Any,
) -> ResourceSpans:
    """Scopes of one resource; spans given alone are put into a scope together."""
    spans = [part for part in parts if isinstance(part, Span)]
    scopes = [part for part in parts if isinstance(part, ScopeSpans)]
    names = {} if service is None else {"service.name": service}
    described = Resource(attributes=attributes({**names, **(resource or {})}))
    return ResourceSpans(
        resource=described if described.attributes else None,
        scope_spans=[scope_spans(*spans), *scopes] if spans else scopes,
        **fields,
    )


def traces_data(*parts: Span | ResourceSpans) -> TracesData:
    """Resources of one export; spans given alone are put into a resource together."""
    spans = [part for part in parts if isinstance(part, Span)]
    resources = [part for part in parts if isinstance(part, ResourceSpans)]
    return TracesData(resource_spans=[resource_spans(*spans), *resources] if spans else resources)


def record(
    *parts: Span | ResourceSpans,
    value: bytes | None = None,
    partition: int = 0,
    offset: int = 0,
    timestamp_ms: int = LOG_MS,
) -> Record:
    """A Kafka record with these spans, or with `value` as it is."""
    made = traces_data(*parts).SerializeToString() if parts else value
    return Record(partition, offset, timestamp_ms, made)


def fields_of(decoded: Decoded) -> dict[bytes, dict[bytes, bytes]]:
    """Trace id → field → payload: what the Redis hash of each trace would hold."""
    chunks = decoded.chunks
    return {chunks.trace_id(i): {chunks.field(i): chunks.payload(i)} for i in range(len(chunks))}


def spans_of(payload: bytes) -> list[Span]:
    """All spans of a chunk, in order, as the official class reads them."""
    data = TracesData.FromString(payload)
    return [s for resource in data.resource_spans for scope in resource.scope_spans for s in scope.spans]


def varint(value: int) -> bytes:
    """A number in protobuf's base 128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def framed(number: int, *parts: bytes) -> bytes:
    """Each part as the protobuf field `number`, for messages that the official classes would not make."""
    return b"".join(varint(number << 3 | 2) + varint(len(part)) + part for part in parts)


def raw_record(*spans: bytes, resource: bytes = b"", scope: bytes = b"") -> bytes:
    """A `TracesData` around spans (and resource and scope) that may be broken."""
    inner = (framed(1, scope) if scope else b"") + framed(2, *spans)
    return framed(1, (framed(1, resource) if resource else b"") + framed(2, inner))


def nested(depth: int) -> object:
    """A text in `depth` lists."""
    value: object = "deep"
    for _ in range(depth):
        value = [value]
    return value


# --- dictionaries ------------------------------------------------------------------------------------------------


class _Quick(Training):
    """Makes another dictionary of every sample, however small: the same common part, and the sample's hash."""

    def make(self, samples: Sequence[bytes]) -> Dictionary:
        return Dictionary.named(_common_part() + hashlib.sha256(b"".join(samples)).digest())


@functools.cache
def _common_part() -> bytes:
    letters = random.Random(1)
    samples = [bytes(letters.choices(b"abcdefgh", k=40)) * 3 for _ in range(200)]
    return Training(dictionary_bytes=1024).make(samples).content


QUICK = _Quick(sample_bytes=200, samples_min=1)
