"""Rows: every column of a span, what is cut off, and that no redelivery writes a span twice or leaves one out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, Status

from tests.builders import (
    LOG_MS,
    NS_PER_MS,
    START_MS,
    attributes,
    fields_of,
    nested,
    record,
    resource_spans,
    scope_spans,
    span,
    span_id,
    trace_id,
)
from tss.model import NO_START, Record, Trigger, Verdict, parse_records
from tss.rows import (
    ATTRIBUTES_MAX,
    DECISIONS,
    EVENTS_MAX,
    PROMOTED,
    SPANS,
    VALUE_CHARS_MAX,
    Cut,
    Decision,
    cut,
    decision_table,
    from_millis,
    span_table,
)
from tss.rules import RuleSet
from tss.wire import decode

DECIDED_AT = datetime(2027, 1, 15, 8, 0, 1, 500_000, UTC)
KEPT = Verdict(True, "error", "error", 1.0, Trigger.INACTIVITY, 0xAB)
START_NS = START_MS * NS_PER_MS
START = datetime.fromtimestamp(START_MS / 1000, UTC)


def chunks_of(*batches: list[Record], trace: int = 1) -> dict[bytes, bytes]:
    """Field → payload of a trace, as Redis holds it after these batches."""
    held: dict[bytes, bytes] = {}
    for batch in batches:
        held |= fields_of(decode(batch, RuleSet())).get(trace_id(trace), {})
    return held


def whole(*records: Record, trace: int = 1) -> Cut:
    return cut(chunks_of(list(records), trace=trace), frozenset())


def rows_of(
    *records: Record, verdict: Verdict = KEPT, late: bool = False, trace: int = 1
) -> list[dict[str, Any]]:
    """The rows that the spans of a trace become."""
    table, _ = span_table([(trace_id(trace), verdict, late, whole(*records, trace=trace))], DECIDED_AT)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def row_of(one: Span, verdict: Verdict = KEPT, **resource: Any) -> dict[str, Any]:
    [row] = rows_of(record(resource_spans(one, **resource)), verdict=verdict)
    return row


# --- columns -----------------------------------------------------------------------------------------------------


def test_every_column_of_a_rich_span() -> None:
    """What a producer said is found in the column that names it."""
    rich = span(
        1,
        2,
        parent=9,
        name="GET /cart",
        kind=Span.SPAN_KIND_CLIENT,
        trace_state="vendor=1,ot=th:8",
        flags=0x301,
        took_ms=12.5,
        attrs={
            "http.request.method": "GET",
            "http.route": "/cart",
            "http.response.status_code": 503,
            "db.system.name": "postgresql",
            "rpc.service": "Cart",
            "messaging.system": "kafka",
            "exception.type": "Timeout",
        },
        status=Status(code=Status.STATUS_CODE_ERROR, message="no answer"),
        events=[
            Span.Event(
                time_unix_nano=START_NS + 5,
                name="retry",
                attributes=attributes({"attempt": 2}),
                dropped_attributes_count=3,
            )
        ],
        links=[
            Span.Link(
                trace_id=trace_id(2),
                span_id=span_id(3),
                trace_state="a=b",
                attributes=attributes({"k": "v"}),
                flags=1,
            )
        ],
        dropped_attributes_count=1,
        dropped_events_count=2,
        dropped_links_count=3,
    )
    scope = scope_spans(rich, scope="lib", version="2.1")
    scope.scope.attributes.extend(attributes({"scope.key": True}))
    verdict = Verdict(True, "probabilistic", "base_rate", 0.25, Trigger.INACTIVITY, 7)
    [row] = rows_of(
        record(resource_spans(scope, service="cart", resource={"host.name": "a"})), verdict=verdict, late=True
    )
    assert row == {
        "trace_id": "00000000000000000000000000000001",
        "span_id": "0000000000000002",
        "parent_span_id": "0000000000000009",
        "timestamp_ms": START_MS,
        "duration_ms": 12.5,
        "status_code": 2,
        "span_kind": 3,
        "service_name": "cart",
        "operation_name": "GET /cart",
        "trace_state": "vendor=1,ot=th:8",
        "flags": 0x301,
        "kind_string": "CLIENT",
        "start_time": START,
        "end_time": START.replace(microsecond=12_500),
        "start_time_unix_nano": START_NS,
        "end_time_unix_nano": START_NS + 12_500_000,
        "duration_ns": 12_500_000,
        "status_code_string": "ERROR",
        "status_message": "no answer",
        "attributes": [
            ("http.request.method", "GET"),
            ("http.route", "/cart"),
            ("http.response.status_code", "503"),
            ("db.system.name", "postgresql"),
            ("rpc.service", "Cart"),
            ("messaging.system", "kafka"),
            ("exception.type", "Timeout"),
        ],
        "resource_attributes": [("service.name", "cart"), ("host.name", "a")],
        "scope_name": "lib",
        "scope_version": "2.1",
        "scope_attributes": [("scope.key", "true")],
        "http_request_method": "GET",
        "http_route": "/cart",
        "http_response_status_code": "503",
        "db_system": "postgresql",
        "rpc_service": "Cart",
        "messaging_system": "kafka",
        "exception_type": "Timeout",
        "events": [
            {
                "time_unix_nano": START_NS + 5,
                "name": "retry",
                "attributes": [("attempt", "2")],
                "dropped_attributes_count": 3,
            }
        ],
        "links": [
            {
                "trace_id": trace_id(2).hex(),
                "span_id": span_id(3).hex(),
                "trace_state": "a=b",
                "attributes": [("k", "v")],
                "flags": 1,
            }
        ],
        "dropped_attributes_count": 1,
        "dropped_events_count": 2,
        "dropped_links_count": 3,
        "sampling_policy": "base_rate",
        "sampling_reason": "probabilistic",
        "sampling_probability": 0.25,
        "adjusted_count": 4.0,
        "decided_at": DECIDED_AT,
        "late": True,
    }


def test_what_a_bare_span_does_not_say_is_null() -> None:
    """Absent is not empty, but for numbers, lists and maps, where nothing is nothing."""
    bare = Span(trace_id=trace_id(1), span_id=span_id(1))
    [row] = rows_of(record(resource_spans(ScopeSpans(spans=[bare]), service=None)))
    absent = {
        *("parent_span_id", "trace_state", "status_message", "scope_name", "scope_version"),
        *PROMOTED,
    }
    assert {name for name, value in row.items() if value is None} == absent
    assert row["service_name"] == "unknown_service"
    assert (row["kind_string"], row["status_code_string"]) == ("UNSPECIFIED", "UNSET")
    assert (row["operation_name"], row["attributes"], row["events"], row["links"]) == ("", [], [], [])


@pytest.mark.parametrize(
    ("column", "attrs", "expected"),
    [
        ("http_request_method", {"http.method": "GET"}, "GET"),
        ("http_request_method", {"http.method": "GET", "http.request.method": "PUT"}, "PUT"),
        ("http_response_status_code", {"http.status_code": 404}, "404"),
        ("http_response_status_code", {"http.response.status_code": "200", "http.status_code": 404}, "200"),
        ("db_system", {"db.system": "mysql"}, "mysql"),
        ("db_system", {"db.system.name": "mariadb", "db.system": "mysql"}, "mariadb"),
        ("http_route", {"http.route": ""}, ""),
        ("http_route", {"http.target": "/"}, None),
    ],
)
def test_promoted_attributes(column: str, attrs: Mapping[str, object], expected: str | None) -> None:
    """A column of its own for a hot attribute, under its new name or its older one; the new one counts."""
    assert row_of(span(attrs=attrs))[column] == expected


@pytest.mark.parametrize(
    ("attrs", "events", "expected"),
    [
        ({}, [("exception", {"exception.type": "A"})], "A"),
        ({"exception.type": "B"}, [("exception", {"exception.type": "A"})], "B"),
        (
            {},
            [
                ("exception", {}),
                ("exception", {"exception.type": "A"}),
                ("exception", {"exception.type": "C"}),
            ],
            "A",
        ),
        ({}, [("exception", {"exception.message": "m"})], None),
        ({}, [("other", {"exception.type": "A"})], None),
    ],
)
def test_the_exception_type_comes_from_its_event(
    attrs: dict[str, object], events: list[tuple[str, dict[str, object]]], expected: str | None
) -> None:
    """Where SDKs record it: the first exception event that names one, unless the span says it itself."""
    made = [Span.Event(name=name, attributes=attributes(values)) for name, values in events]
    row = row_of(span(attrs=attrs, events=made))
    assert row["exception_type"] == expected
    assert dict(row["attributes"]) == attrs


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ("", ""),
        ("é\0😀", "é\0😀"),
        (None, ""),
        (True, "true"),
        (-5, "-5"),
        (2**63 - 1, "9223372036854775807"),
        (1.5, "1.5"),
        (1e300, "1e+300"),
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (b"\0\xff", "AP8="),
        ([], "[]"),
        (["a", 1, None, True, b"\0"], '["a", 1, null, true, "AA=="]'),
        ({"k": {"é": [1.5]}}, '{"k": {"é": [1.5]}}'),
        (nested(3), '[[["deep"]]]'),
    ],
)
def test_values_as_text(value: object, text: str) -> None:
    """Strings as they are, bytes as base64, everything else as JSON."""
    row = row_of(span(attrs={"k": value}), resource={"k": value})
    assert dict(row["attributes"])["k"] == text
    assert dict(row["resource_attributes"])["k"] == text


def test_the_first_of_duplicate_keys_counts() -> None:
    """A map column has each key once."""
    one = span(attrs={"k": "first"})
    one.attributes.extend(attributes({"k": "second", "l": 1}))
    assert row_of(one)["attributes"] == [("k", "first"), ("l", "1")]


@pytest.mark.parametrize(
    ("start_ns", "end_ns", "duration_ns"),
    [
        (0, 0, 0),
        (0, 5, 5),
        (5, 0, 0),
        (START_NS, START_NS - 1, 0),
        (START_NS, START_NS + 999, 999),
        (2**64 - 1, 2**64 - 1, 0),
        (0, 2**64 - 1, 2**63 - 1),
        (2**63, 2**63 + 10, 10),
    ],
)
def test_strange_times(start_ns: int, end_ns: int, duration_ns: int) -> None:
    """No time breaks a row: a negative duration is 0, what a signed number cannot hold is its largest value."""
    row = row_of(span(start_time_unix_nano=start_ns, end_time_unix_nano=end_ns))
    assert row["duration_ns"] == duration_ns
    assert row["duration_ms"] == duration_ns / NS_PER_MS
    assert row["start_time_unix_nano"] == min(start_ns, 2**63 - 1)
    assert row["end_time_unix_nano"] == min(end_ns, 2**63 - 1)
    assert row["timestamp_ms"] == start_ns // NS_PER_MS
    for column, nanos in (("start_time", start_ns), ("end_time", end_ns)):
        since = row[column] - datetime.fromtimestamp(0, UTC)
        assert (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds == nanos // 1000


@pytest.mark.parametrize(("kind", "status"), [(6, 3), (99, 99), (-1, -1), (2**31 - 1, -(2**31))])
def test_unknown_enums_are_unspecified(kind: int, status: int) -> None:
    """Numbers that OTLP does not define yet become its zero, in the number and in the name."""
    row = row_of(span(kind=kind, status=Status(code=status)))  # type: ignore[arg-type]
    assert (row["span_kind"], row["kind_string"]) == (0, "UNSPECIFIED")
    assert (row["status_code"], row["status_code_string"]) == (0, "UNSET")


@pytest.mark.parametrize(
    ("trace_state", "probability", "count"),
    [
        ("", 1.0, 1.0),
        ("", 0.1, 10.0),
        ("ot=th:8", 1.0, 2.0),
        ("ot=th:8", 0.1, 10.0),
        ("ot=th:fd70a4", 0.1, 100.0),
        ("ot=th:nonsense", 0.5, 2.0),
        ("ot=th:8", 0.0, None),
    ],
)
def test_adjusted_count(trace_state: str, probability: float, count: float | None) -> None:
    """How many spans a row stands for, a head sampler's share included."""
    verdict = Verdict(True, "probabilistic", "base_rate", probability, Trigger.INACTIVITY, 0)
    found = row_of(span(trace_state=trace_state), verdict)["adjusted_count"]
    assert found == (None if count is None else pytest.approx(count, rel=1e-5))


@pytest.mark.parametrize(
    ("parent", "expected"), [(b"", None), (bytes(8), None), (span_id(7), span_id(7).hex())]
)
def test_a_root_has_no_parent(parent: bytes, expected: str | None) -> None:
    """An empty and a zero parent id are the same."""
    assert row_of(span(parent_span_id=parent))["parent_span_id"] == expected


# --- limits ------------------------------------------------------------------------------------------------------


def test_attributes_beyond_the_limit_are_counted_as_dropped() -> None:
    """In spans and in events; what the producer dropped is added."""
    many = {f"k{i}": i for i in range(10_000)}
    event = Span.Event(name="e", attributes=attributes(many), dropped_attributes_count=5)
    full = Span.Event(name="e", dropped_attributes_count=2**32 - 1)
    row = row_of(span(attrs=many, events=[event, full], dropped_attributes_count=7), resource=many)
    assert row["attributes"] == [(f"k{i}", str(i)) for i in range(ATTRIBUTES_MAX)]
    assert row["dropped_attributes_count"] == 10_000 - ATTRIBUTES_MAX + 7
    assert len(row["resource_attributes"]) == ATTRIBUTES_MAX
    assert len(row["events"][0]["attributes"]) == ATTRIBUTES_MAX
    assert row["events"][0]["dropped_attributes_count"] == 10_000 - ATTRIBUTES_MAX + 5
    assert row["events"][1]["dropped_attributes_count"] == 2**31 - 1


def test_events_and_links_beyond_the_limit_are_counted_as_dropped() -> None:
    """The first ones are kept."""
    events = [Span.Event(name=f"e{i}") for i in range(EVENTS_MAX + 3)]
    links = [Span.Link(trace_id=trace_id(i), span_id=span_id(i)) for i in range(EVENTS_MAX + 4)]
    row = row_of(span(events=events, links=links, dropped_events_count=1, dropped_links_count=2**32 - 1))
    assert [event["name"] for event in row["events"]] == [f"e{i}" for i in range(EVENTS_MAX)]
    assert len(row["links"]) == EVENTS_MAX
    assert (row["dropped_events_count"], row["dropped_links_count"]) == (3 + 1, 4 + 2**32 - 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("v" * 100_000, "v" * VALUE_CHARS_MAX),
        ("😀" * 100_000, "😀" * VALUE_CHARS_MAX),
        (b"\0" * 100_000, "A" * VALUE_CHARS_MAX),
        (["v" * 100_000], '["' + "v" * (VALUE_CHARS_MAX - 2)),
        ("v" * VALUE_CHARS_MAX, "v" * VALUE_CHARS_MAX),
    ],
    ids=["text", "wide", "bytes", "list", "at the limit"],
)
def test_long_values_are_cut(value: object, text: str) -> None:
    """To so many characters, never inside of one."""
    assert row_of(span(attrs={"k": value}))["attributes"] == [("k", text)]


def test_ids_of_links_are_bounded() -> None:
    """Their length is not checked when a span comes in."""
    row = row_of(span(links=[Span.Link(trace_id=b"\1" * 1000, span_id=b"\2" * 1000)]))
    assert (row["links"][0]["trace_id"], row["links"][0]["span_id"]) == ("01" * 16, "02" * 8)


# --- tables ------------------------------------------------------------------------------------------------------


def test_empty_tables_keep_the_schema() -> None:
    """A sequence without kept spans is no special case for the sink."""
    spans, repeated = span_table([], DECIDED_AT)
    assert (spans.schema, spans.num_rows, repeated) == (SPANS, 0, 0)
    decisions = decision_table([], DECIDED_AT, "writer", 1)
    assert (decisions.schema, decisions.num_rows) == (DECISIONS, 0)


def test_spans_of_several_traces_resources_and_scopes() -> None:
    """Each row has its own trace, service, scope and verdict."""
    records = [
        record(
            resource_spans(
                scope_spans(span(1, 1), scope="a"),
                scope_spans(span(2, 2), span(1, 3), scope="b"),
                service="x",
            ),
            resource_spans(span(2, 4), service="y"),
        )
    ]
    other = Verdict(True, "latency", "latency", 0.5, Trigger.MAX_SIZE, 1)
    table, _ = span_table(
        [
            (trace_id(1), KEPT, False, whole(*records, trace=1)),
            (trace_id(2), other, True, whole(*records, trace=2)),
        ],
        DECIDED_AT,
    )
    columns = ("trace_id", "span_id", "service_name", "scope_name", "sampling_reason", "late")
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == [
        (trace_id(1).hex(), span_id(1).hex(), "x", "a", "error", False),
        (trace_id(1).hex(), span_id(3).hex(), "x", "b", "error", False),
        (trace_id(2).hex(), span_id(2).hex(), "x", "b", "latency", True),
        (trace_id(2).hex(), span_id(4).hex(), "y", "library", "latency", True),
    ]


def test_a_decision_row() -> None:
    """Kept or dropped, with all that is needed to ask why; a trace that never said when it began has no start."""
    dropped = Verdict(False, "not_sampled", "not_sampled", 0.1, Trigger.ROOT_SEEN, 0xAB)
    decisions = [
        Decision(trace_id(1), KEPT, Trigger.INACTIVITY, False, 3, True, START_NS, 12.5, LOG_MS, "0:1-2;3:9"),
        Decision(trace_id(2), dropped, Trigger.ROOT_SEEN, True, 1, False, NO_START, 0.0, LOG_MS, ""),
    ]
    table = decision_table(decisions, DECIDED_AT, "writer-a", 7)
    assert table.schema == DECISIONS
    first, second = table.to_pylist()
    assert first == {
        "trace_id": trace_id(1).hex(),
        "kept": True,
        "reason": "error",
        "policy": "error",
        "probability": 1.0,
        "trigger": "inactivity",
        "late": False,
        "span_count": 3,
        "error": True,
        "start_time": START,
        "duration_ms": 12.5,
        "decided_at": DECIDED_AT,
        "last_log_time": datetime.fromtimestamp(LOG_MS / 1000, UTC),
        "rules_version": "00000000000000ab",
        "writer": "writer-a",
        "sequence": 7,
        "records": "0:1-2;3:9",
    }
    assert (second["kept"], second["trigger"], second["start_time"]) == (False, "root_seen", None)


def test_millis_are_utc() -> None:
    """Stamps are aware."""
    assert from_millis(START_MS) == START
    assert from_millis(0).tzinfo is UTC


# --- what is written of a trace ----------------------------------------------------------------------------------


def written(pieces: Cut) -> list[str]:
    """Span ids of the rows, in order."""
    table, _ = span_table([(trace_id(1), KEPT, False, pieces)], DECIDED_AT)
    return [str(one) for one in table.column("span_id").to_pylist()]


def numbered(*numbers: int, offset: int, partition: int = 0) -> Record:
    """A record of trace 1 with these spans."""
    return record(*(span(1, n) for n in numbers), offset=offset, partition=partition)


def hexes(*numbers: int) -> list[str]:
    return [span_id(n).hex() for n in numbers]


def test_what_landed_is_cut_away() -> None:
    """Records of the coverage are not written again; the others are, and are the new coverage."""
    chunks = chunks_of([numbered(1, 2, offset=0), numbered(3, offset=1), numbered(4, 5, offset=2)])
    pieces = cut(chunks, {(0, 1), (5, 5)})
    assert written(pieces) == hexes(1, 2, 4, 5)
    assert (pieces.spans, pieces.duplicates, parse_records(pieces.records)) == (4, 1, {(0, 0), (0, 2)})


def test_what_landed_whole_leaves_nothing() -> None:
    """A redelivery of all that is covered writes no row and names no record."""
    pieces = cut(chunks_of([numbered(1, 2, offset=0)]), {(0, 0)})
    assert pieces == Cut([], "", 0, 2)


def test_overlapping_chunks_are_cut_at_record_boundaries() -> None:
    """After a redelivery in other batches, a record in two chunks is written once, and what is beside it not lost."""
    a, b, c = (numbered(2 * i + 1, 2 * i + 2, offset=i) for i in range(3))
    pieces = cut(chunks_of([a, b], [b, c]), frozenset())
    assert sorted(written(pieces)) == hexes(1, 2, 3, 4, 5, 6)
    assert (pieces.spans, pieces.duplicates) == (6, 2)


def test_the_same_batch_again_is_the_same_chunk() -> None:
    """An exact redelivery has the same field, so it replaces itself."""
    batch = [numbered(1, offset=0), numbered(2, offset=1)]
    assert len(chunks_of(batch, batch)) == 1


def test_spans_that_a_producer_sent_twice_are_written_once() -> None:
    """The same bytes in two records or twice in one; a span that only shares its id is another one."""
    twice, other = span(1, 1), span(1, 1, name="another of that id")
    records = [record(twice, twice, offset=0), record(twice, other, offset=1)]
    table, repeated = span_table([(trace_id(1), KEPT, False, whole(*records))], DECIDED_AT)
    assert table.column("operation_name").to_pylist() == ["operation 1", "another of that id"]
    assert repeated == 2


def test_dropped_traces_are_cut_without_their_payloads() -> None:
    """Fields alone tell what is new of a trace that is not written."""
    fields = chunks_of([numbered(1, 2, offset=0), numbered(3, offset=1)])
    pieces = cut(dict.fromkeys(fields, b""), {(0, 1)})
    assert (pieces.spans, pieces.duplicates, parse_records(pieces.records)) == (2, 1, {(0, 0)})


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[Record], list[list[Record]], set[tuple[int, int]]]:
    """Records of a trace (among others), batches in which each came at least once, and what had landed before."""
    number, records = 0, []
    for position in range(draw(st.integers(1, 8))):
        members = []
        for _ in range(draw(st.integers(1, 3))):
            number += 1
            members.append(span(draw(st.sampled_from([1, 1, 2])), number))
        parts = [resource_spans(*members[:1], service="a"), resource_spans(*members[1:], service="b")]
        stamp = LOG_MS + draw(st.integers(0, 3))
        partition, offset = position % draw(st.integers(1, 3)), position
        records.append(record(*parts, partition=partition, offset=offset, timestamp_ms=stamp))
    batches, at = [], 0
    while at < len(records):
        size = draw(st.integers(1, 4))
        batches.append(records[at : at + size])
        at += draw(st.integers(1, size))  # less than the size: some are read again, in other company
    coverage = draw(st.sets(st.sampled_from([(r.partition, r.offset) for r in records])))
    return records, batches, coverage


@given(deliveries())
def test_every_record_is_written_exactly_once(
    given_: tuple[list[Record], list[list[Record]], set[tuple[int, int]]],
) -> None:
    """However records were batched, read again and covered: each span of what had not landed has one row."""
    records, batches, coverage = given_
    pieces = cut(chunks_of(*batches), coverage)
    fresh = [r for r in records if (r.partition, r.offset) not in coverage]
    expected = [row["span_id"] for row in rows_of(*fresh)] if chunks_of(fresh) else []
    assert sorted(written(pieces)) == sorted(expected)
    assert pieces.spans == len(expected)
    written_records = parse_records(pieces.records)
    assert not written_records & coverage
    assert written_records == {(one.partition, one.offset) for one in fresh if chunks_of([one])}
    assert cut(chunks_of(*batches), coverage | written_records).spans == 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ),
    st.text(),
)
def test_any_attribute_becomes_text(value: object, key: str) -> None:
    """Whatever the wire lets in has a row."""
    row = row_of(span(attrs={key: value}, events=[Span.Event(attributes=attributes({key: value}))]))
    [(found, text)] = row["attributes"]
    assert (found, type(text)) == (key, str)
    assert row["events"][0]["attributes"] == [(key, text)]


def test_a_large_trace_has_all_its_rows() -> None:
    """Nothing is cut from a trace for its size."""
    one = record(*(span(1, i, parent=1) for i in range(1, 20_001)))
    assert len(written(whole(one))) == 20_000


@pytest.mark.parametrize(("service", "name"), [("shop", "shop"), ("", ""), (None, "unknown_service")])
def test_the_service(service: str | None, name: str) -> None:
    """What the resource says; only an absent name is unknown."""
    assert row_of(span(), service=service)["service_name"] == name
