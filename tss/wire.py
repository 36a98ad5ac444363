"""OTLP records to facts and chunks, and back: the clear, slow reading on the official protobuf library.

A record is a `TracesData`, a bare `ResourceSpans`, or either as JSON. "It parses" does not tell them apart: a
`TracesData` parses as a `ResourceSpans` with no spans, and the other way round. What does: a top-level field 2
(`scope_spans`) exists only in `ResourceSpans`, and JSON starts with `{`, which is no valid first tag.

Nothing is re-encoded. Framing is read with messages whose inner parts are `bytes`, so a chunk is made of the
original bytes of resource, scope and spans with new length prefixes around them. A repeated resource or scope is
joined, which is what protobuf's merge rule means. Each span is parsed once with the official class, to read what a
decision needs and to be sure that it can be decoded when it is written.

Pure: no clock, no I/O. Compiled kernels are to fill the same interface; this stays their oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tss import otlp_json
from tss.consistent import parse_ot_state, trace_randomness
from tss.model import (
    ERROR,
    FACTS,
    NO_START,
    ROOT,
    SPAN_ID_BYTES,
    TRACE_ID_BYTES,
    Chunks,
    DeadLetter,
    Origin,
    Record,
    encode_origins,
)
from tss.rules import Attributes, RuleSet

_NO_ID = (bytes(TRACE_ID_BYTES), bytes(SPAN_ID_BYTES))


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one batch held. `spans` counts accepted and refused ones; `empty` counts records without any span."""

    chunks: Chunks
    dead: list[DeadLetter]
    spans: int
    empty: int


# --- framing -----------------------------------------------------------------------------------------------------


def _framing() -> tuple[Any, Any, Any]:
    """Message classes whose parts stay bytes; every field is repeated, so that duplicates can be seen and merged."""
    schema = descriptor_pb2.FileDescriptorProto(
        name="tss_framing.proto", package="tss.framing", syntax="proto3"
    )
    for name, fields in (
        ("Envelope", ("resource_spans", "scope_spans")),
        ("ResourceFrame", ("resource", "scope_spans", "schema_url")),
        ("ScopeFrame", ("scope", "spans", "schema_url")),
    ):
        message = schema.message_type.add(name=name)
        for number, field_name in enumerate(fields, start=1):
            message.field.add(name=field_name, number=number, label=3, type=12)  # repeated bytes
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)  # type: ignore[no-untyped-call,unused-ignore]
    names = ("Envelope", "ResourceFrame", "ScopeFrame")
    envelope, resource, scope = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tss.framing.{name}")) for name in names
    )
    return envelope, resource, scope


Envelope, ResourceFrame, ScopeFrame = _framing()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(value)) + value


def _optional(number: int, value: bytes) -> bytes:
    return _delimited(number, value) if value else b""


def _split(value: bytes) -> Iterator[bytes]:
    envelope = Envelope.FromString(value)
    if envelope.scope_spans:
        yield value
    else:
        yield from envelope.resource_spans


# --- records to chunks -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Chunk:
    """One trace's chunk while it grows."""

    trace_id: bytes
    first_ms: int
    last_ms: int
    bits: int = 0
    start_ns: int = NO_START
    end_ns: int = 0
    randomness: int = 0
    mask: int = 0
    spans: int = 0
    size: int = 0
    payload: list[bytes] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)


@dataclass(slots=True)
class _Refused:
    """Spans of one record that are not taken in, framed as a `TracesData` of their own."""

    reason: str
    detail: str
    payload: list[bytes] = field(default_factory=list)
    spans: int = 0


def decode(records: Sequence[Record], rules: RuleSet) -> Decoded:
    """Facts and chunks of a batch. Nothing in a record can make this raise."""
    batch = _Batch(rules)
    for record in records:
        batch.add(record)
    return Decoded(batch.chunks(), batch.dead, batch.span_count, batch.empty)


class _Batch:
    def __init__(self, rules: RuleSet) -> None:
        self._rules = rules
        self._open: dict[bytes, _Chunk] = {}
        self.dead: list[DeadLetter] = []
        self.span_count = 0
        self.empty = 0

    def add(self, record: Record) -> None:
        if not record.value:
            self.empty += 1
            return
        json_text = record.value.lstrip(b" \t\r\n").startswith(b"{")
        try:
            value = otlp_json.to_protobuf(record.value) if json_text else record.value
            frames = [_read_frame(frame) for frame in _split(value)]
        except (DecodeError, ValueError) as fault:
            reason = "invalid_json" if json_text else "undecodable"
            self.dead.append(DeadLetter(record, reason, str(fault)[:500], record.value, 0))
            return
        before = self.span_count
        refused: dict[str, _Refused] = {}
        for frame in frames:
            self._add_frame(record, frame, refused)
        if self.span_count == before:
            self.empty += 1
        for part in refused.values():
            left = record.value if json_text else b"".join(part.payload)
            self.dead.append(DeadLetter(record, part.reason, part.detail, left, part.spans))

    def _add_frame(self, record: Record, frame: Frame, refused: dict[str, _Refused]) -> None:
        fault = _resource_fault(frame)
        attributes: Attributes = {}
        if self._rules.rules and not fault:
            attributes = _attributes(Resource.FromString(frame.resource).attributes)
        taken: dict[bytes, list[Scope]] = {}
        for scope in frame.scopes:
            mine: dict[bytes, list[bytes]] = {}
            for raw in scope.spans:
                self.span_count += 1
                span, why = (None, fault) if fault else _read_span(raw)
                if span is None:
                    part = refused.setdefault(why[0], _Refused(*why))
                    part.payload.append(_frame_bytes(frame, [replace(scope, spans=[raw])]))
                    part.spans += 1
                    continue
                self._summarise(record, span, attributes)
                mine.setdefault(span.trace_id, []).append(raw)
            for trace_id, spans in mine.items():
                taken.setdefault(trace_id, []).append(replace(scope, spans=spans))
        for trace_id, scopes in taken.items():
            self._append(record, trace_id, _frame_bytes(frame, scopes), sum(len(s.spans) for s in scopes))

    def _summarise(self, record: Record, span: Span, resource: Attributes) -> None:
        chunk = self._open.get(span.trace_id)
        if chunk is None:
            chunk = _Chunk(span.trace_id, record.timestamp_ms, record.timestamp_ms)
            chunk.randomness = trace_randomness(span.trace_id)
            self._open[span.trace_id] = chunk
        chunk.first_ms = min(chunk.first_ms, record.timestamp_ms)
        chunk.last_ms = max(chunk.last_ms, record.timestamp_ms)
        if span.status.code == Status.STATUS_CODE_ERROR:
            chunk.bits |= ERROR
        if not span.parent_span_id.strip(b"\0"):
            chunk.bits |= ROOT
        if span.start_time_unix_nano:
            chunk.start_ns = min(chunk.start_ns, span.start_time_unix_nano)
        chunk.end_ns = max(chunk.end_ns, span.end_time_unix_nano)
        if span.trace_state:
            rv = parse_ot_state(span.trace_state).rv
            chunk.randomness = chunk.randomness if rv is None else rv
        if self._rules.rules:
            chunk.mask |= self._rules.mask(resource, _attributes(span.attributes))

    def _append(self, record: Record, trace_id: bytes, piece: bytes, spans: int) -> None:
        chunk = self._open[trace_id]
        chunk.payload.append(piece)
        chunk.spans += spans
        chunk.size += len(piece)
        last = chunk.origins[-1] if chunk.origins else None
        if last and (last.partition, last.offset) == (record.partition, record.offset):
            chunk.origins[-1] = Origin(record.partition, record.offset, last.spans + spans)
        else:
            chunk.origins.append(Origin(record.partition, record.offset, spans))

    def chunks(self) -> Chunks:
        rows = np.zeros(len(self._open), FACTS)
        ids, parts, field_at, payload_at, at = [], [], [0], [], 0
        for row, chunk in zip(rows, self._open.values(), strict=True):
            row["log_time_ms"] = chunk.first_ms
            row["log_span_ms"] = min(chunk.last_ms - chunk.first_ms, 0xFFFFFFFF)
            row["spans"] = chunk.spans
            row["bits"] = chunk.bits
            row["start_ns"] = chunk.start_ns
            row["end_ns"] = chunk.end_ns
            row["randomness"] = chunk.randomness
            row["rules"] = self._rules.version
            row["mask"] = chunk.mask
            name = row.tobytes() + encode_origins(chunk.origins)
            ids.append(chunk.trace_id)
            parts += [name, *chunk.payload]
            payload_at.append(at + len(name))
            at += len(name) + chunk.size
            field_at.append(at)
        return Chunks(
            trace_ids=np.frombuffer(b"".join(ids), np.uint8).reshape(-1, TRACE_ID_BYTES),
            facts=rows,
            buffer=b"".join(parts),
            field_at=np.array(field_at, np.int64),
            payload_at=np.array(payload_at, np.int64),
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """One `ScopeSpans`, its parts as bytes."""

    scope: bytes
    spans: Sequence[bytes]
    schema_url: bytes

    def encode(self) -> bytes:
        spans = b"".join(_delimited(2, span) for span in self.spans)
        return _optional(1, self.scope) + spans + _optional(3, self.schema_url)


@dataclass(frozen=True, slots=True)
class Frame:
    """One `ResourceSpans`, its parts as bytes."""

    resource: bytes
    scopes: list[Scope]
    schema_url: bytes


def _read_frame(value: bytes) -> Frame:
    frame = ResourceFrame.FromString(value)
    scopes = []
    for part in frame.scope_spans:
        scope = ScopeFrame.FromString(part)
        scopes.append(Scope(b"".join(scope.scope), scope.spans, b"".join(scope.schema_url[-1:])))
    return Frame(b"".join(frame.resource), scopes, b"".join(frame.schema_url[-1:]))


def resource_frames(payload: bytes) -> Iterator[Frame]:
    """The `ResourceSpans` of a chunk, in order. Raises DecodeError on bytes that never went through `decode`."""
    return map(_read_frame, _split(payload))


def _frame_bytes(frame: Frame, scopes: Sequence[Scope]) -> bytes:
    """A `TracesData` of one `ResourceSpans` with these scopes."""
    inner = b"".join(_delimited(2, scope.encode()) for scope in scopes)
    return _delimited(1, _optional(1, frame.resource) + inner + _optional(3, frame.schema_url))


def _resource_fault(frame: Frame) -> tuple[str, str] | None:
    """Why no span of this frame can be decoded, if so."""
    try:
        Resource.FromString(frame.resource)
        frame.schema_url.decode()
        for scope in frame.scopes:
            InstrumentationScope.FromString(scope.scope)
            scope.schema_url.decode()
    except (DecodeError, UnicodeDecodeError) as fault:
        return "bad_resource", str(fault)[:500]
    return None


def _read_span(raw: bytes) -> tuple[Any, tuple[str, str]]:
    try:
        span = Span.FromString(raw)
    except DecodeError as fault:
        return None, ("bad_span", str(fault)[:500])
    if len(span.trace_id) != TRACE_ID_BYTES or span.trace_id in _NO_ID:
        return None, ("bad_trace_id", f"trace id {span.trace_id[:32].hex() or 'is empty'}")
    if len(span.span_id) != SPAN_ID_BYTES or span.span_id in _NO_ID:
        return None, ("bad_span_id", f"span id {span.span_id[:32].hex() or 'is empty'}")
    return span, ("", "")


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    """The first of duplicate keys counts."""
    out: dict[str, Any] = {}
    for pair in pairs:
        out.setdefault(pair.key, any_value(pair.value))
    return out


def any_value(value: AnyValue) -> Any:
    """Python's view of an OTLP value: str, bool, int, float, bytes, list, dict or None."""
    kind = value.WhichOneof("value")
    match kind:
        case None:
            return None
        case "array_value":
            return [any_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return {pair.key: any_value(pair.value) for pair in value.kvlist_value.values}
        case _:
            return getattr(value, kind)


def payload_mask(payload: bytes, rules: RuleSet) -> int:
    """The rules that some span of a chunk matches: what `decode` puts into facts, for a rule set that is newer."""
    mask = 0
    for frame in resource_frames(payload):
        resource = _attributes(Resource.FromString(frame.resource).attributes)
        for scope in frame.scopes:
            for raw in scope.spans:
                mask |= rules.mask(resource, _attributes(Span.FromString(raw).attributes))
    return mask
