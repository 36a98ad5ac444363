"""OTLP/JSON: what producers write is read as the specification and the Collector read it, and nothing else is."""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData

from tests.builders import any_value, resource_spans, scope_spans, span, span_id, trace_id, traces_data
from tss.otlp_json import NESTING_MAX, to_protobuf

TRACE, SPAN = "5B8EFFF798038103D269B633813FC60C", "EEE19B7EC3C1B174"


def export(**fields: Any) -> dict[str, Any]:
    """A document with one span, of good ids unless `fields` say otherwise."""
    return {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": TRACE, "spanId": SPAN, **fields}]}]}]}


def read(document: object) -> TracesData:
    return TracesData.FromString(to_protobuf(json.dumps(document).encode()))


def read_span(**fields: Any) -> Span:
    [one] = read(export(**fields)).resource_spans[0].scope_spans[0].spans
    return one


def read_value(value: object) -> AnyValue:
    [pair] = read_span(attributes=[{"key": "k", "value": value}]).attributes
    return pair.value


def test_the_example_of_the_specification() -> None:
    """A document like the one that OpenTelemetry publishes as the example of a trace is read in full."""
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "my.service"}}]},
                "scopeSpans": [
                    {
                        "scope": {
                            "name": "shop.checkout",
                            "version": "1.0.0",
                            "attributes": [
                                {
                                    "key": "my.scope.attribute",
                                    "value": {"stringValue": "some scope attribute"},
                                }
                            ],
                        },
                        "spans": [
                            {
                                "traceId": TRACE,
                                "spanId": SPAN,
                                "parentSpanId": "EEE19B7EC3C1B173",
                                "flags": 256,
                                "name": "I'm a server span",
                                "startTimeUnixNano": "1544712660000000000",
                                "endTimeUnixNano": "1544712661000000000",
                                "kind": 2,
                                "attributes": [
                                    {"key": "my.span.attr", "value": {"stringValue": "some value"}}
                                ],
                            }
                        ],
                    }
                ],
            }
        ]
    }
    [group] = read(document).resource_spans
    [scope] = group.scope_spans
    [one] = scope.spans
    assert group.resource.attributes[0].value.string_value == "my.service"
    assert (scope.scope.name, scope.scope.version) == ("shop.checkout", "1.0.0")
    assert scope.scope.attributes[0].key == "my.scope.attribute"
    assert one == Span(
        trace_id=bytes.fromhex(TRACE),
        span_id=bytes.fromhex(SPAN),
        parent_span_id=bytes.fromhex("EEE19B7EC3C1B173"),
        flags=256,
        name="I'm a server span",
        start_time_unix_nano=1544712660000000000,
        end_time_unix_nano=1544712661000000000,
        kind=Span.SPAN_KIND_SERVER,
        attributes=[KeyValue(key="my.span.attr", value=any_value("some value"))],
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"traceId": TRACE.lower()}, {"trace_id": bytes.fromhex(TRACE)}),
        ({"traceId": "no hex"}, {"trace_id": b""}),
        ({"traceId": "5b8"}, {"trace_id": b""}),
        ({"traceId": ""}, {"trace_id": b""}),
        ({"traceId": None}, {"trace_id": b""}),
        ({"traceId": "W47/95gDgQPSabYzgT/GDA=="}, {"trace_id": b""}),  # base64, as protobuf's own JSON has it
        ({"spanId": "00"}, {"span_id": b"\0"}),
        ({"parentSpanId": ""}, {"parent_span_id": b""}),
        ({"kind": 3}, {"kind": 3}),
        ({"kind": "3"}, {"kind": 3}),
        ({"kind": 3.0}, {"kind": 3}),
        ({"kind": "SPAN_KIND_CLIENT"}, {"kind": 3}),
        ({"kind": "client"}, {"kind": 3}),
        ({"kind": 77}, {"kind": 77}),
        (
            {"status": {"code": "STATUS_CODE_ERROR", "message": "no"}},
            {"status": Status(code=Status.STATUS_CODE_ERROR, message="no")},
        ),
        ({"status": {"code": 2}}, {"status": Status(code=Status.STATUS_CODE_ERROR)}),
        ({"status": None}, {"status": Status()}),
        ({"startTimeUnixNano": 1544712660000000000}, {"start_time_unix_nano": 1544712660000000000}),
        ({"startTimeUnixNano": "18446744073709551615"}, {"start_time_unix_nano": 2**64 - 1}),
        ({"startTimeUnixNano": None}, {"start_time_unix_nano": 0}),
        (
            {"start_time_unix_nano": "5", "trace_state": "a=b"},
            {"start_time_unix_nano": 5, "trace_state": "a=b"},
        ),
        (
            {"droppedEventsCount": 1, "dropped_links_count": "2"},
            {"dropped_events_count": 1, "dropped_links_count": 2},
        ),
        ({"fromTheFuture": {"a": [1]}, "name": "n"}, {"name": "n"}),
        ({"name": "\u00e9\U0001f600\x00"}, {"name": "é😀\0"}),
        ({"attributes": None, "events": None, "links": None}, {"attributes": [], "events": [], "links": []}),
        (
            {"events": [{"timeUnixNano": "7", "name": "e", "attributes": [{"key": "k"}]}]},
            {
                "events": [
                    Span.Event(time_unix_nano=7, name="e", attributes=[KeyValue(key="k", value=AnyValue())])
                ]
            },
        ),
        (
            {"links": [{"traceId": TRACE, "spanId": SPAN, "flags": 1, "traceState": "a=b"}]},
            {
                "links": [
                    Span.Link(
                        trace_id=bytes.fromhex(TRACE), span_id=bytes.fromhex(SPAN), flags=1, trace_state="a=b"
                    )
                ]
            },
        ),
    ],
)
def test_fields(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Ids are hex of either case, enums numbers or names, 64-bit numbers strings too; a bad id becomes no id."""
    one = read_span(**fields)
    found = {name: getattr(one, name) for name in expected}
    assert found == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"stringValue": "text"}, "text"),
        ({"stringValue": ""}, ""),
        ({"boolValue": False}, False),
        ({"intValue": "-9223372036854775808"}, -(2**63)),
        ({"intValue": 9223372036854775807}, 2**63 - 1),
        ({"intValue": 5.0}, 5),
        ({"int_value": "5"}, 5),
        ({"doubleValue": 1.5}, 1.5),
        ({"doubleValue": 2}, 2.0),
        ({"doubleValue": "1e3"}, 1000.0),
        ({"doubleValue": "Infinity"}, math.inf),
        ({"doubleValue": "-Infinity"}, -math.inf),
        ({"doubleValue": -math.inf}, -math.inf),
        ({"bytesValue": "AP8="}, b"\0\xff"),
        ({"bytesValue": "AP8"}, b"\0\xff"),
        ({"bytesValue": "-_8="}, b"\xfb\xff"),
        ({"bytesValue": ""}, b""),
        ({"arrayValue": {}}, []),
        ({"arrayValue": {"values": [{"stringValue": "a"}, {"intValue": "1"}, {}]}}, ["a", 1, None]),
        ({"kvlistValue": {"values": [{"key": "a", "value": {"boolValue": True}}]}}, {"a": True}),
        ({"kvlistValue": {"values": [{"key": "a"}]}}, {"a": None}),
        ({"arrayValue": {"values": [{"arrayValue": {"values": [{"kvlistValue": {}}]}}]}}, [[{}]]),
        ({}, None),
        (None, None),
        ({"stringValue": None}, None),
        ({"intValue": None, "stringValue": "a"}, "a"),
        ({"fromTheFuture": 1}, None),
    ],
)
def test_values(value: object, expected: object) -> None:
    """Every kind of attribute value, its empty form, and what other writers make of it."""
    assert read_value(value) == any_value(expected)


@pytest.mark.parametrize("value", ["NaN", math.nan])
def test_not_a_number(value: object) -> None:
    """NaN comes as protobuf's JSON writes it, or as JavaScript does."""
    assert math.isnan(read_value({"doubleValue": value}).double_value)


@pytest.mark.parametrize(
    "document",
    [
        [],
        "text",
        5,
        None,
        {"resourceSpans": {}},
        {"resourceSpans": [None]},
        {"resourceSpans": [[]]},
        {"scopeSpans": 1},
        {"resourceSpans": [{"resource": []}]},
        {"resourceSpans": [{"schemaUrl": 5}]},
        {"resourceSpans": [{"scopeSpans": [{"scope": "name"}]}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": {}}]}]},
        export(traceId=5),
        export(name=5),
        export(name=["n"]),
        export(name="\ud800"),
        export(kind="NO_KIND"),
        export(kind=[]),
        export(kind=2**40),
        export(kind=1.5),
        export(status=2),
        export(flags=-1),
        export(flags=True),
        export(startTimeUnixNano="yesterday"),
        export(startTimeUnixNano=-1),
        export(startTimeUnixNano=2**64),
        export(startTimeUnixNano=1.5),
        export(startTimeUnixNano=math.inf),
        export(startTimeUnixNano="9" * 5000),
        export(attributes={"k": "v"}),
        export(attributes=[{"key": 1}]),
        export(attributes=[{"key": "k", "value": "bare"}]),
    ],
    ids=repr,
)
def test_wrong_types_are_refused(document: object) -> None:
    """ValueError, which says what is wrong; a value is never guessed at."""
    with pytest.raises(ValueError, match=r"."):
        to_protobuf(json.dumps(document).encode())


@pytest.mark.parametrize(
    "value",
    [
        {"stringValue": 5},
        {"boolValue": "true"},
        {"intValue": "5.5"},
        {"intValue": 5.5},
        {"intValue": 2**63},
        {"intValue": True},
        {"doubleValue": "high"},
        {"doubleValue": []},
        {"bytesValue": "!"},
        {"bytesValue": 5},
        {"bytesValue": "é"},
        {"arrayValue": []},
        {"arrayValue": {"values": [1]}},
        {"arrayValue": {"values": "values"}},
        {"kvlistValue": "values"},
        {"kvlistValue": {"values": [{"key": "a", "value": 1}]}},
    ],
    ids=repr,
)
def test_wrong_attribute_values_are_refused(value: object) -> None:
    """The same for what an attribute holds."""
    with pytest.raises(ValueError, match=r"."):
        read_value(value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": }',
        b"\xff",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 5000,
    ],
    ids=range(8),
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    """Also text that is nested beyond all measure."""
    with pytest.raises(ValueError, match=r"."):
        to_protobuf(text)


def nested(kind: str, levels: int) -> dict[str, Any]:
    """A text inside of so many values of `kind`."""
    value: dict[str, Any] = {"stringValue": "deep"}
    for _ in range(levels):
        inner = value if kind == "arrayValue" else {"key": "k", "value": value}
        value = {kind: {"values": [inner]}}
    return value


@pytest.mark.parametrize("kind", ["arrayValue", "kvlistValue"])
@pytest.mark.parametrize("place", ["attributes", "events"])
def test_nesting_ends_where_protobuf_could_not_follow(kind: str, place: str) -> None:
    """The deepest value that is taken in can be parsed again, wherever it stands; one level more is refused."""

    def document(levels: int) -> dict[str, Any]:
        attributes = [{"key": "k", "value": nested(kind, levels)}]
        return export(**{place: attributes if place == "attributes" else [{"attributes": attributes}]})

    assert read(document(NESTING_MAX - 1)).ByteSize() > NESTING_MAX
    with pytest.raises(ValueError, match="nest deeper than 32"):
        read(document(NESTING_MAX))


# --- JSON says the same as protobuf ------------------------------------------------------------------------------


def value_json(value: AnyValue) -> dict[str, Any]:
    match value.WhichOneof("value"):
        case None:
            return {}
        case "string_value":
            return {"stringValue": value.string_value}
        case "bool_value":
            return {"boolValue": value.bool_value}
        case "int_value":
            return {"intValue": str(value.int_value)}
        case "double_value":
            return {"doubleValue": value.double_value}
        case "bytes_value":
            return {"bytesValue": base64.b64encode(value.bytes_value).decode()}
        case "array_value":
            return {"arrayValue": {"values": [value_json(v) for v in value.array_value.values]}}
        case _:
            return {"kvlistValue": {"values": pairs_json(value.kvlist_value.values)}}


def pairs_json(pairs: Any) -> list[dict[str, Any]]:
    return [{"key": pair.key, "value": value_json(pair.value)} for pair in pairs]


def span_json(one: Span) -> dict[str, Any]:
    return {
        "traceId": one.trace_id.hex(),
        "spanId": one.span_id.hex(),
        "parentSpanId": one.parent_span_id.hex(),
        "traceState": one.trace_state,
        "flags": one.flags,
        "name": one.name,
        "kind": one.kind,
        "startTimeUnixNano": str(one.start_time_unix_nano),
        "endTimeUnixNano": str(one.end_time_unix_nano),
        "attributes": pairs_json(one.attributes),
        "droppedAttributesCount": one.dropped_attributes_count,
        "droppedEventsCount": one.dropped_events_count,
        "droppedLinksCount": one.dropped_links_count,
        "events": [
            {
                "timeUnixNano": str(event.time_unix_nano),
                "name": event.name,
                "attributes": pairs_json(event.attributes),
                "droppedAttributesCount": event.dropped_attributes_count,
            }
            for event in one.events
        ],
        "links": [
            {
                "traceId": link.trace_id.hex(),
                "spanId": link.span_id.hex(),
                "traceState": link.trace_state,
                "attributes": pairs_json(link.attributes),
                "droppedAttributesCount": link.dropped_attributes_count,
                "flags": link.flags,
            }
            for link in one.links
        ],
        **(
            {"status": {"code": one.status.code, "message": one.status.message}}
            if one.HasField("status")
            else {}
        ),
    }


def data_json(data: TracesData) -> dict[str, Any]:
    """As the specification says it is to be written."""
    return {
        "resourceSpans": [
            {
                "resource": {
                    "attributes": pairs_json(group.resource.attributes),
                    "droppedAttributesCount": group.resource.dropped_attributes_count,
                },
                "schemaUrl": group.schema_url,
                "scopeSpans": [
                    {
                        "scope": {
                            "name": scope.scope.name,
                            "version": scope.scope.version,
                            "attributes": pairs_json(scope.scope.attributes),
                            "droppedAttributesCount": scope.scope.dropped_attributes_count,
                        },
                        "schemaUrl": scope.schema_url,
                        "spans": [span_json(one) for one in scope.spans],
                    }
                    for scope in group.scope_spans
                ],
            }
            for group in data.resource_spans
        ]
    }


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
).map(any_value)
pairs = st.lists(st.builds(KeyValue, key=texts, value=values), max_size=3)
counts = st.integers(0, 2**32 - 1)
nanos = st.integers(0, 2**64 - 1)
spans = st.builds(
    Span,
    trace_id=st.binary(max_size=16),
    span_id=st.binary(max_size=8),
    parent_span_id=st.binary(max_size=8),
    trace_state=texts,
    flags=counts,
    name=texts,
    kind=st.integers(0, 9),
    start_time_unix_nano=nanos,
    end_time_unix_nano=nanos,
    attributes=pairs,
    dropped_attributes_count=counts,
    dropped_events_count=counts,
    dropped_links_count=counts,
    events=st.lists(st.builds(Span.Event, time_unix_nano=nanos, name=texts, attributes=pairs), max_size=2),
    links=st.lists(
        st.builds(Span.Link, trace_id=st.binary(max_size=16), flags=counts, attributes=pairs), max_size=2
    ),
    status=st.none() | st.builds(Status, code=st.integers(0, 2), message=texts),
)


@given(st.lists(st.lists(spans, max_size=2), max_size=2), pairs)
def test_json_says_what_protobuf_says(scopes: list[list[Span]], resource: list[KeyValue]) -> None:
    """A message written as JSON is read as the same message."""
    group = resource_spans(
        *(scope_spans(*members, schema_url="https://a") for members in scopes), schema_url="https://b"
    )
    group.resource.attributes.extend(resource)
    data = traces_data(group)
    assert read(data_json(data)) == data


# --- nothing but ValueError --------------------------------------------------------------------------------------

COMPLETE = data_json(
    traces_data(
        resource_spans(
            span(
                attrs={"s": "a", "b": True, "i": 1, "d": 0.5, "y": b"\0", "l": [1, "a"], "m": {"k": None}},
                events=[Span.Event(name="e", attributes=[KeyValue(key="k", value=any_value(1))])],
                links=[Span.Link(trace_id=trace_id(2), span_id=span_id(2))],
                error=True,
            )
        )
    )
)


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places(value, (*above, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["key", "value", "values", "stringValue", "intValue", "arrayValue", "kvlistValue"]
            )
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=400)
@given(st.sampled_from(list(places(COMPLETE))), json_values)
def test_any_value_in_any_place_is_read_or_refused(place: tuple[Any, ...], value: object) -> None:
    """Where something else stands than expected, the result is legal protobuf or ValueError, and no other error."""
    document: Any = copy.deepcopy(COMPLETE)
    at = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    try:
        out = to_protobuf(json.dumps(document).encode())
    except ValueError:
        return
    TracesData.FromString(out)


@given(json_values)
def test_any_document_is_read_or_refused(document: object) -> None:
    """The same for a document that has nothing to do with OTLP."""
    try:
        out = to_protobuf(json.dumps(document).encode())
    except ValueError:
        return
    assert TracesData.FromString(out) is not None
