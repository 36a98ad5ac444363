"""OTLP/JSON to OTLP protobuf, as lenient on input as the Collector is.

`google.protobuf.json_format` must not be used here: it reads the hex ids of OTLP as base64 (32 hex digits become 24
bytes without complaint) and refuses unknown fields, both against the OTLP specification.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status, TracesData

# Of AnyValue: protobuf parsers stop at 100 messages in each other, up to three for each level and some around.
NESTING_MAX = 32

Object = dict[str, Any]


def to_protobuf(text: bytes) -> bytes:
    """A serialized `TracesData` of a JSON `TracesData` or lone `ResourceSpans`.

    A malformed id becomes an empty one, so that the span is turned away alone and its neighbours go on.
    Raises ValueError when the text is not OTLP/JSON.
    """
    try:
        document = json.loads(text)
    except (UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(str(fault)) from fault
    if not isinstance(document, dict):
        raise ValueError(f"expected an object, got {type(document).__name__}")  # noqa: TRY004
    lone = _get(document, "scopeSpans") is not None
    groups = [document] if lone else _objects(document, "resourceSpans")
    try:
        return TracesData(resource_spans=map(_resource_spans, groups)).SerializeToString()
    except (TypeError, AttributeError, OverflowError) as fault:
        raise ValueError(f"a value has the wrong type: {fault}") from fault


def _resource_spans(source: Object) -> ResourceSpans:
    out = ResourceSpans(schema_url=_text(source, "schemaUrl"))
    resource = _object(source, "resource")
    out.resource.attributes.extend(_attributes(resource))
    out.resource.dropped_attributes_count = _integer(resource, "droppedAttributesCount")
    out.scope_spans.extend(map(_scope_spans, _objects(source, "scopeSpans")))
    return out


def _scope_spans(source: Object) -> ScopeSpans:
    out = ScopeSpans(schema_url=_text(source, "schemaUrl"))
    scope = _object(source, "scope")
    out.scope.name, out.scope.version = _text(scope, "name"), _text(scope, "version")
    out.scope.attributes.extend(_attributes(scope))
    out.scope.dropped_attributes_count = _integer(scope, "droppedAttributesCount")
    out.spans.extend(map(_span, _objects(source, "spans")))
    return out


def _span(source: Object) -> Span:
    out = Span(
        trace_id=_id(source, "traceId"),
        span_id=_id(source, "spanId"),
        parent_span_id=_id(source, "parentSpanId"),
        trace_state=_text(source, "traceState"),
        flags=_integer(source, "flags"),
        name=_text(source, "name"),
        kind=_enum(source, "kind", Span.SpanKind.Value, "SPAN_KIND_"),
        start_time_unix_nano=_integer(source, "startTimeUnixNano"),
        end_time_unix_nano=_integer(source, "endTimeUnixNano"),
        attributes=_attributes(source),
        dropped_attributes_count=_integer(source, "droppedAttributesCount"),
        dropped_events_count=_integer(source, "droppedEventsCount"),
        dropped_links_count=_integer(source, "droppedLinksCount"),
    )
    for event in _objects(source, "events"):
        out.events.add(
            time_unix_nano=_integer(event, "timeUnixNano"),
            name=_text(event, "name"),
            attributes=_attributes(event),
            dropped_attributes_count=_integer(event, "droppedAttributesCount"),
        )
    for link in _objects(source, "links"):
        out.links.add(
            trace_id=_id(link, "traceId"),
            span_id=_id(link, "spanId"),
            trace_state=_text(link, "traceState"),
            attributes=_attributes(link),
            dropped_attributes_count=_integer(link, "droppedAttributesCount"),
            flags=_integer(link, "flags"),
        )
    status = _object(source, "status")
    if status:
        out.status.message = _text(status, "message")
        out.status.code = _enum(status, "code", Status.StatusCode.Value, "STATUS_CODE_")
    return out


def _attributes(source: Object) -> list[KeyValue]:
    return [
        KeyValue(key=_text(pair, "key"), value=_any_value(_object(pair, "value"), NESTING_MAX))
        for pair in _objects(source, "attributes")
    ]


def _any_value(source: Object, depth: int) -> AnyValue:
    if depth == 0:
        raise ValueError(f"attribute values nest deeper than {NESTING_MAX}")
    for key, value in source.items():
        if value is None:  # as good as absent
            continue
        match _camel(key):
            case "stringValue":
                return AnyValue(string_value=value)
            case "boolValue":
                return AnyValue(bool_value=value)
            case "intValue":
                return AnyValue(int_value=_whole(value))
            case "doubleValue":
                return AnyValue(double_value=float(value))
            case "bytesValue":
                return AnyValue(bytes_value=_base64(value))
            case "arrayValue":
                out = AnyValue()
                out.array_value.SetInParent()
                out.array_value.values.extend(_any_value(v, depth - 1) for v in _objects(value, "values"))
                return out
            case "kvlistValue":
                out = AnyValue()
                out.kvlist_value.SetInParent()
                for pair in _objects(value, "values"):
                    out.kvlist_value.values.add(
                        key=_text(pair, "key"), value=_any_value(_object(pair, "value"), depth - 1)
                    )
                return out
    return AnyValue()


def _base64(value: str) -> bytes:
    padded = value.replace("-", "+").replace("_", "/") + "=" * (-len(value) % 4)
    try:
        return base64.b64decode(padded, validate=True)
    except binascii.Error as fault:
        raise ValueError(f"bytesValue is not base64: {fault}") from fault


def _camel(key: str) -> str:
    """`start_time_unix_nano` and `startTimeUnixNano` are the same key; the Collector takes both."""
    if "_" not in key:
        return key
    head, *tail = key.split("_")
    return head + "".join(part.capitalize() for part in tail)


def _get(source: Object, key: str) -> Any:
    if key in source:
        return source[key]
    return next((value for name, value in source.items() if _camel(name) == key), None)


def _object(source: Object, key: str) -> Object:
    value = _get(source, key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")  # noqa: TRY004
    return value


def _objects(source: Object, key: str) -> list[Object]:
    value = _get(source, key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key} is not a list of objects")
    return value


def _text(source: Object, key: str) -> str:
    value = _get(source, key)
    return "" if value is None else value


def _integer(source: Object, key: str) -> int:
    value = _get(source, key)
    return 0 if value is None else _whole(value)


def _whole(value: Any) -> int:
    """A number or a decimal string; what is no whole number is refused rather than rounded."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _id(source: Object, key: str) -> bytes:
    try:
        return bytes.fromhex(_text(source, key))
    except ValueError:
        return b""


def _enum(source: Object, key: str, by_name: Callable[[str], int], prefix: str) -> Any:
    value = _get(source, key)
    if value is None:
        return 0
    if isinstance(value, str) and not value.lstrip("-").isdigit():
        return by_name(prefix + value.upper().removeprefix(prefix))
    return _whole(value)
