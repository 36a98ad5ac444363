"""OTLP records to facts and chunks, and back: the clear, slow reading on the official protobuf library.

A record is a `TracesData`, a bare `ResourceSpans`, or either as JSON. "It parses" does not tell them apart: a
`TracesData` parses as a `ResourceSpans` with no spans, and the other way round. What does: a top-level field 2
(`scope_spans`) exists only in `ResourceSpans`, and JSON starts with `{`, which is no valid first tag. Blanks before
the brace need care: a newline is also the first tag of a `TracesData`, and `{` the length 123 after it.

Nothing is re-encoded. Framing is read with messages whose inner parts are `bytes`, so a chunk is made of the
original bytes of resource, scope and spans with new length prefixes around them. A repeated resource or scope is
joined, which is what protobuf's merge rule means. Every `ResourceSpans` is parsed once with the official class where
it stands (text must be UTF-8, nesting is counted from the outermost message), so that whatever goes on can be decoded
by anyone later. Where that fails, resource, scopes and spans are tried one by one and only the faulty are turned away.

Pure: no clock, no I/O. Compiled kernels are to fill the same interface; this stays their oracle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData

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
    decode_origins,
    encode_origins,
)
from tss.rules import Attributes, RuleSet

# Every trace's chunk gets a copy of its resource and scope, so a small record with a huge resource and thousands of
# traces would swell to gigabytes. 10,000 traces with 5 kB each stay below; what exceeds it is turned away.
COPIES_BYTES_MAX = 64 << 20  # of one record, whatever batch it comes in

DETAIL_CHARS_MAX = 500

_NO_ID = (bytes(TRACE_ID_BYTES), bytes(SPAN_ID_BYTES))

# After blanks, only what JSON allows next makes the brace one: `}`, or a key, which has no control characters.
_JSON = re.compile(rb'\{|[ \t\r\n]+\{[ \t\r\n]*(?:\}|"[^\x00-\x1f])')


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
    """Spans of one record that are not taken in for the same reason, framed as a `TracesData` of their own."""

    detail: str
    payload: list[bytes] = field(default_factory=list)
    spans: int = 0


@dataclass(frozen=True, slots=True)
class _Fault:
    reason: str
    detail: str


def decode(records: Sequence[Record], rules: RuleSet) -> Decoded:
    """Facts and chunks of a batch. Nothing in a record can make this raise; one that is there twice counts once."""
    batch = _Batch(rules)
    for record in {(r.partition, r.offset): r for r in records}.values():
        batch.add(record)
    return Decoded(batch.chunks(), batch.dead, batch.span_count, batch.empty)


class _Batch:
    def __init__(self, rules: RuleSet) -> None:
        self._rules = rules
        self._open: dict[bytes, _Chunk] = {}
        self.dead: list[DeadLetter] = []
        self.span_count = 0
        self.empty = 0
        self._copied = 0

    def add(self, record: Record) -> None:
        if not record.value:
            self.empty += 1
            return
        json_text = _JSON.match(record.value) is not None
        try:
            value = otlp_json.to_protobuf(record.value) if json_text else record.value
            frames = [_read_frame(frame) for frame in _split(value)]
        except (DecodeError, ValueError) as fault:
            reason = "invalid_json" if json_text else "undecodable"
            self.dead.append(DeadLetter(record, reason, str(fault)[:DETAIL_CHARS_MAX], record.value, 0))
            return
        before, self._copied = self.span_count, 0
        refused: dict[str, _Refused] = {}
        for frame in frames:
            self._add_frame(record, frame, refused)
        if self.span_count == before:
            self.empty += 1
        for reason, part in refused.items():
            self.dead.append(DeadLetter(record, reason, part.detail, b"".join(part.payload), part.spans))

    def _add_frame(self, record: Record, frame: Frame, refused: dict[str, _Refused]) -> None:
        sound = _fault("", frame, frame.scopes) is None  # then no part of it has to be tried alone
        fault = None if sound else _fault("bad_resource", frame, ())
        attributes: Attributes = {}
        if self._rules.rules and not fault:
            attributes = attribute_map(Resource.FromString(frame.resource).attributes)
        taken: dict[bytes, list[Scope]] = {}  # by trace
        left: dict[str, list[Scope]] = {}  # by reason
        for scope in frame.scopes:
            alone = (replace(scope, spans=()),)
            scope_fault = fault or (None if sound else _fault("bad_scope", _NO_RESOURCE, alone))
            mine: dict[bytes, list[bytes]] = {}
            turned_away: dict[str, list[bytes]] = {}
            for raw in scope.spans:
                span = scope_fault or _read_span(raw, sound=sound)
                if isinstance(span, Span) and span.trace_id not in mine:
                    span = self._copies_fault(frame, scope, first=span.trace_id not in taken) or span
                if isinstance(span, _Fault):
                    turned_away.setdefault(span.reason, []).append(raw)
                    refused.setdefault(span.reason, _Refused(span.detail)).spans += 1
                    continue
                self._summarise(record, span, attributes)
                mine.setdefault(span.trace_id, []).append(raw)
            for trace_id, spans in mine.items():
                taken.setdefault(trace_id, []).append(replace(scope, spans=spans))
            for reason, spans in turned_away.items():
                left.setdefault(reason, []).append(replace(scope, spans=spans))
            self.span_count += len(scope.spans)
        for trace_id, scopes in taken.items():
            self._append(record, trace_id, _frame_bytes(frame, scopes), sum(len(s.spans) for s in scopes))
        for reason, scopes in left.items():
            refused[reason].payload.append(_frame_bytes(frame, scopes))

    def _copies_fault(self, frame: Frame, scope: Scope, *, first: bool) -> _Fault | None:
        """Counts the copies that one more trace of this scope needs; `first`: of this frame, too."""
        self._copied += len(scope.scope) + len(scope.schema_url)
        self._copied += len(frame.resource) + len(frame.schema_url) if first else 0
        if self._copied <= COPIES_BYTES_MAX:
            return None
        return _Fault("too_many_copies", f"resources of its traces together exceed {COPIES_BYTES_MAX} bytes")

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
            chunk.mask |= self._rules.mask(resource, attribute_map(span.attributes))

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
            buffer=memoryview(b"".join(parts)),
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
    scopes: Sequence[Scope]
    schema_url: bytes


_NO_RESOURCE = Frame(b"", (), b"")


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


def _fault(reason: str, frame: Frame, scopes: Sequence[Scope]) -> _Fault | None:
    """`reason` with a detail where the official class cannot read these in their place."""
    try:
        TracesData.FromString(_frame_bytes(frame, scopes))
    except DecodeError as fault:
        return _Fault(reason, str(fault)[:DETAIL_CHARS_MAX])
    return None


def _read_span(raw: bytes, *, sound: bool) -> Any:
    """The span, or why it cannot be taken in; `sound`: it is known to decode."""
    fault = None if sound else _fault("bad_span", _NO_RESOURCE, (Scope(b"", (raw,), b""),))
    if fault:
        return fault
    span = Span.FromString(raw)
    if len(span.trace_id) != TRACE_ID_BYTES or span.trace_id in _NO_ID:
        return _Fault("bad_trace_id", f"trace id {span.trace_id[:32].hex() or 'is empty'}")
    if len(span.span_id) != SPAN_ID_BYTES or span.span_id in _NO_ID:
        return _Fault("bad_span_id", f"span id {span.span_id[:32].hex() or 'is empty'}")
    return span


def attribute_map(pairs: Sequence[KeyValue]) -> dict[str, Any]:
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


def new_error(chunks: Mapping[bytes, bytes], coverage: AbstractSet[tuple[int, int]]) -> bool:
    """Whether a span with an error came with a record that is not covered; `chunks` is field → payload."""
    for name, payload in chunks.items():
        fresh: list[bool] = []
        for origin in decode_origins(name[FACTS.itemsize :]):
            fresh += [(origin.partition, origin.offset) not in coverage] * origin.spans
        raws = (raw for frame in resource_frames(payload) for scope in frame.scopes for raw in scope.spans)
        for new, raw in zip(fresh, raws, strict=False):  # a payload that was freed has no spans
            if new and Span.FromString(raw).status.code == Status.STATUS_CODE_ERROR:
                return True
    return False


def payload_mask(payload: bytes, rules: RuleSet) -> int:
    """The rules that some span of a chunk matches: what `decode` puts into facts, for a rule set that is newer."""
    mask = 0
    for frame in resource_frames(payload):
        resource = attribute_map(Resource.FromString(frame.resource).attributes)
        for scope in frame.scopes:
            for raw in scope.spans:
                mask |= rules.mask(resource, attribute_map(Span.FromString(raw).attributes))
    return mask
