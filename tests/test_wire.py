"""Wire: what a batch of records turns into, whatever is in it; the official protobuf classes are the judge."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span, Status, TracesData

from tests.builders import (
    LOG_MS,
    NS_PER_MS,
    START_MS,
    fields_of,
    framed,
    nested,
    raw_record,
    record,
    resource_spans,
    scope_spans,
    span,
    span_id,
    spans_of,
    trace,
    trace_id,
    traces_data,
)
from tests.fuzz import decode_both_ways
from tests.test_rules import rule
from tss.buffer import shard_of
from tss.consistent import trace_randomness
from tss.model import ERROR, FACTS, NO_START, ROOT, Origin, Record, decode_origins
from tss.rules import RuleSet
from tss.wire import COPIES_BYTES_MAX, Decoded, new_error, payload_mask, resource_frames

NO_RULES = RuleSet()
SHOP_RULES = RuleSet(
    [
        rule("shop", match={"resource": [{"key": "service.name", "op": "eq", "value": "shop"}]}),
        rule("slow-route", match={"span": [{"key": "http.route", "op": "regex", "value": "^/sl"}]}),
        rule("deep", match={"span": [{"key": "k", "op": "contains", "value": "deep"}]}),
        rule("no-key", match={"span": [{"key": "k", "op": "exists", "value": False}]}),
    ]
)


def decoded(*records: Record, rules: RuleSet = NO_RULES) -> Decoded:
    return decode_both_ways(records, rules)


def payload(batch: Decoded, trace: int = 1) -> bytes:
    """The payload of the batch's only chunk of that trace."""
    [only] = fields_of(batch)[trace_id(trace)].values()
    return only


def origins(batch: Decoded, trace: int = 1) -> list[Origin]:
    [field] = fields_of(batch)[trace_id(trace)]
    return list(decode_origins(field[FACTS.itemsize :]))


def facts(batch: Decoded, trace: int = 1) -> dict[str, int]:
    rows = {batch.chunks.trace_id(i): row for i, row in enumerate(batch.chunks.facts)}
    return {name: int(rows[trace_id(trace)][name]) for name in FACTS.names or ()}


def accepted(batch: Decoded) -> int:
    return int(batch.chunks.facts["spans"].sum())


def refusals(batch: Decoded) -> dict[str, int]:
    return {letter.reason: letter.spans for letter in batch.dead}


# --- shapes ------------------------------------------------------------------------------------------------------

AS_JSON = {
    "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]},
    "scopeSpans": [{"spans": [{"traceId": trace_id(1).hex(), "spanId": span_id(1).hex(), "name": "a"}]}],
}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(traces_data(span()).SerializeToString(), id="TracesData"),
        pytest.param(resource_spans(span()).SerializeToString(), id="ResourceSpans"),
        pytest.param(
            resource_spans(span(), service=None).SerializeToString(), id="ResourceSpans without resource"
        ),
        pytest.param(
            resource_spans(span(), service=None, schema_url="https://s").SerializeToString(),
            id="ResourceSpans with schema",
        ),
        pytest.param(json.dumps({"resourceSpans": [AS_JSON]}).encode(), id="JSON"),
        pytest.param(json.dumps(AS_JSON).encode(), id="JSON ResourceSpans"),
        pytest.param(
            b"\n {\n" + json.dumps({"resourceSpans": [AS_JSON]}, indent=1).encode()[1:], id="blanks"
        ),
    ],
)
def test_every_shape_is_recognised(value: bytes) -> None:
    """A record is read as what it is, whichever of the shapes that producers send it has."""
    batch = decoded(record(value=value))
    assert not batch.dead
    assert (batch.spans, batch.empty, accepted(batch)) == (1, 0, 1)
    assert [s.span_id for s in spans_of(payload(batch))] == [span_id(1)]


@pytest.mark.parametrize("resource_bytes", [9, 10, 13, 32, 34, 123, 125])
@pytest.mark.parametrize("shape", ["TracesData", "ResourceSpans"])
def test_a_protobuf_record_that_begins_like_json_is_protobuf(shape: str, resource_bytes: int) -> None:
    """The tag of field 1 is a newline and `{` a length, so some protobuf records begin like a JSON text."""
    filler = "x" * (resource_bytes - 6)
    group = resource_spans(span(), service=None, resource={filler: None})
    assert group.resource.ByteSize() == resource_bytes
    for name_chars in range(140):
        group.scope_spans[0].spans[0].name = "n" * name_chars
        value = traces_data(group) if shape == "TracesData" else group
        batch = decoded(record(value=value.SerializeToString()))
        assert accepted(batch) == 1, (name_chars, batch.dead)


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        traces_data(resource_spans()).SerializeToString(),
        traces_data(resource_spans(scope_spans())).SerializeToString(),
        b"{}",
        b' {"resourceSpans": []}',
        b'{"scopeSpans": [{"spans": []}]}',
    ],
)
def test_records_without_spans_are_counted_not_refused(value: bytes | None) -> None:
    """An empty export and a tombstone are legal."""
    batch = decoded(record(value=value))
    assert (batch.empty, batch.spans, len(batch.chunks), batch.dead) == (1, 0, 0, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"garbage", "undecodable"),
        (b"\x00\x01\x02", "undecodable"),
        (b"\xff" * 1000, "undecodable"),
        (traces_data(span()).SerializeToString()[:-1], "undecodable"),
        (b"\xef\xbb\xbf{}", "undecodable"),
        (b"{", "invalid_json"),
        (b"{garbage", "invalid_json"),
        (b'\n {"resourceSpans": [', "invalid_json"),
        (b'{"resourceSpans": 1}', "invalid_json"),
        (b'{"resourceSpans": "\xff"}', "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
    ],
    ids=range(11),
)
def test_what_cannot_be_decoded_is_dead_whole(value: bytes, reason: str) -> None:
    """The dead letter carries the record's bytes, its origin and the reason; its neighbours go on."""
    bad = record(value=value, partition=3, offset=9)
    batch = decoded(record(span(1)), bad, record(span(2), offset=1))
    [letter] = batch.dead
    assert (letter.record, letter.reason, letter.value, letter.spans) == (bad, reason, value, 0)
    assert letter.detail
    assert accepted(batch) == batch.spans == 2


# --- spans that are turned away, beside those that go on ---------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trace_id": b""}, "bad_trace_id"),
        ({"trace_id": bytes(16)}, "bad_trace_id"),
        ({"trace_id": b"\1" * 15}, "bad_trace_id"),
        ({"trace_id": b"\1" * 24}, "bad_trace_id"),
        ({"trace_id": b"\1" * 100_000}, "bad_trace_id"),
        ({"span_id": b""}, "bad_span_id"),
        ({"span_id": bytes(8)}, "bad_span_id"),
        ({"span_id": b"\1" * 16}, "bad_span_id"),
    ],
)
def test_bad_ids_turn_away_their_span_alone(fields: dict[str, Any], reason: str) -> None:
    """Good spans of the same scope go on; the dead letter is a TracesData of exactly the bad ones, in their frame."""
    bad = [span(1, 8, **fields), span(1, 9, **fields)]
    group = resource_spans(span(1, 1), bad[0], span(2, 2), bad[1], span(1, 3), schema_url="https://s")
    batch = decoded(record(group))
    assert [s.span_id for s in spans_of(payload(batch, 1))] == [span_id(1), span_id(3)]
    assert [s.span_id for s in spans_of(payload(batch, 2))] == [span_id(2)]
    [letter] = batch.dead
    assert (letter.reason, letter.spans, batch.spans) == (reason, 2, 5)
    del group.scope_spans[0].spans[:]
    group.scope_spans[0].spans.extend(bad)
    assert TracesData.FromString(letter.value) == traces_data(group)


def test_each_reason_has_its_own_dead_letter() -> None:
    """Several faults in one record are told apart and each counted."""
    batch = decoded(
        record(span(1), span(1, trace_id=b""), span(1, span_id=b""), span(2, trace_id=b"x"), span(3))
    )
    assert refusals(batch) == {"bad_trace_id": 2, "bad_span_id": 1}
    assert accepted(batch) == 2


def test_bad_ids_in_json_leave_a_protobuf_dead_letter() -> None:
    """A replayed dead letter of a JSON record does not repeat the spans that went on."""
    good = {"traceId": trace_id(1).hex(), "spanId": span_id(1).hex()}
    spans = [good, {**good, "traceId": "no hex", "name": "lost"}, {**good, "spanId": span_id(2).hex()}]
    batch = decoded(
        record(value=json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode())
    )
    [letter] = batch.dead
    assert (letter.reason, letter.spans, accepted(batch)) == ("bad_trace_id", 1, 2)
    assert [s.name for s in spans_of(letter.value)] == ["lost"]


INVALID_UTF8 = b"\xff\xfe"
GOOD, OTHER = span(1, 1).SerializeToString(), span(2, 2).SerializeToString()
NAMELESS = span(1, 3, name="").SerializeToString()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(framed(5, INVALID_UTF8), id="name"),
        pytest.param(framed(9, framed(1, INVALID_UTF8)), id="attribute key"),
        pytest.param(framed(9, framed(1, b"k") + framed(2, framed(1, INVALID_UTF8))), id="attribute value"),
        pytest.param(framed(11, framed(2, INVALID_UTF8)), id="event name"),
        pytest.param(framed(3, INVALID_UTF8), id="trace state"),
        pytest.param(b"\x0a\x7f", id="length beyond the span"),
        pytest.param(b"\x39", id="cut in a number"),
        pytest.param(
            span(attrs={"k": nested(48)}).SerializeToString(), id="nests too deep once it is in a TracesData"
        ),
    ],
)
def test_a_span_that_cannot_be_decoded_is_turned_away_alone(fault: bytes) -> None:
    """Its bytes are in the dead letter unchanged; the spans beside it go on."""
    broken = NAMELESS + fault
    batch = decoded(record(value=raw_record(GOOD, broken, OTHER)))
    assert refusals(batch) == {"bad_span": 1}
    assert len(spans_of(payload(batch, 1))) == len(spans_of(payload(batch, 2))) == 1
    [frame] = resource_frames(batch.dead[0].value)
    assert [bytes(raw) for scope in frame.scopes for raw in scope.spans] == [broken]


def test_a_bad_resource_turns_away_its_spans_only() -> None:
    """Nothing of a resource that cannot be decoded is guessed; other resources of the record go on."""
    broken = raw_record(GOOD, OTHER, resource=framed(1, framed(1, INVALID_UTF8)))
    batch = decoded(record(value=broken + raw_record(span(3).SerializeToString())))
    assert refusals(batch) == {"bad_resource": 2}
    assert list(fields_of(batch)) == [trace_id(3)]
    assert batch.dead[0].value == broken


def test_a_bad_scope_turns_away_its_spans_only() -> None:
    """Other scopes of the same resource go on."""
    broken = framed(1, framed(1, INVALID_UTF8)) + framed(2, GOOD)
    value = framed(1, framed(2, broken) + framed(2, framed(2, OTHER)))
    batch = decoded(record(value=value))
    assert refusals(batch) == {"bad_scope": 1}
    assert list(fields_of(batch)) == [trace_id(2)]
    assert batch.dead[0].value == framed(1, framed(2, broken))


@pytest.mark.parametrize("levels", [1, 16, 46])
def test_deep_values_that_protobuf_can_hold_go_on(levels: int) -> None:
    """A chunk with the deepest values that were taken in can be parsed by anyone as a TracesData."""
    raw = span(attrs={"k": nested(levels)}).SerializeToString()
    batch = decoded(record(value=raw_record(raw)), rules=SHOP_RULES)
    assert [s.SerializeToString() for s in spans_of(payload(batch))] == [raw]


# --- what goes on is the original bytes --------------------------------------------------------------------------


def test_unknown_fields_and_repeated_ones_are_kept_as_they_came() -> None:
    """A chunk's span bytes are the producer's, also where a parse and a rewrite would change them."""
    odd = framed(5, b"first") + framed(99, b"from the future") + GOOD + framed(5, b"last")
    batch = decoded(record(value=raw_record(odd)))
    [frame] = resource_frames(payload(batch))
    assert [bytes(raw) for raw in frame.scopes[0].spans] == [odd]
    assert spans_of(payload(batch))[0].name == "last"


def test_a_resource_or_scope_that_comes_in_pieces_is_joined() -> None:
    """Protobuf's merge rule: message fields that repeat are one message, of strings the last one counts."""
    resources = [resource_spans(resource={key: key}, service=None).resource for key in "ab"]
    one = framed(1, framed(1, b"library")) + framed(2, GOOD) + framed(1, framed(2, b"2.0"))
    frame = (
        framed(3, b"https://first")
        + framed(1, *(r.SerializeToString() for r in resources))
        + framed(2, one)
        + framed(3, b"https://last")
    )
    batch = decoded(record(value=framed(1, frame)))
    merged = TracesData.FromString(framed(1, frame))
    assert TracesData.FromString(payload(batch)) == merged
    assert [pair.key for pair in merged.resource_spans[0].resource.attributes] == ["a", "b"]


def test_ten_thousand_attributes_go_on() -> None:
    """No limit on the wire; what a table cell may hold is cut where the table is made."""
    large = span(attrs={f"key.{i}": "v" * 20 for i in range(10_000)})
    batch = decoded(record(large), rules=SHOP_RULES)
    assert spans_of(payload(batch)) == [large]


def test_a_hundred_thousand_spans_of_one_trace() -> None:
    """One chunk of all of them, in seconds."""
    raw = [span(1, i, parent=1).SerializeToString() for i in range(1, 100_001)]
    started = time.monotonic()
    batch = decoded(record(value=raw_record(*raw)))
    assert time.monotonic() - started < 20
    assert facts(batch)["spans"] == 100_000
    assert [bytes(s) for f in resource_frames(payload(batch)) for s in f.scopes[0].spans] == raw


def test_copies_of_a_huge_resource_are_bounded() -> None:
    """A small record cannot swell to gigabytes: traces beyond the stated bound are turned away, in one copy."""
    resource = framed(1, framed(1, b"k" * 500_000))
    traces = [span(i, 1).SerializeToString() for i in range(1, 201)]
    batch = decoded(record(value=raw_record(*traces, resource=resource)))
    assert len(batch.chunks.buffer) <= COPIES_BYTES_MAX + 100_000
    assert accepted(batch) == COPIES_BYTES_MAX // 500_000
    assert refusals(batch) == {"too_many_copies": 200 - accepted(batch)}
    assert len(batch.dead[0].value) < 600_000


def test_refused_spans_share_one_copy_of_their_resource() -> None:
    """A dead letter is about as large as what it holds came in."""
    value = raw_record(*[b""] * 10_000, resource=framed(1, framed(1, b"k" * 500_000)))
    batch = decoded(record(value=value))
    assert refusals(batch) == {"bad_trace_id": 10_000}
    assert batch.dead[0].value == value


# --- facts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        pytest.param(
            [span(start_ms=START_MS, took_ms=10)],
            {"start_ns": START_MS * NS_PER_MS, "end_ns": (START_MS + 10) * NS_PER_MS, "bits": ROOT},
            id="times",
        ),
        pytest.param(
            [span(start_ms=START_MS + 5, took_ms=1), span(start_ms=START_MS, took_ms=2)],
            {"start_ns": START_MS * NS_PER_MS, "end_ns": (START_MS + 6) * NS_PER_MS},
            id="earliest start, latest end",
        ),
        pytest.param(
            [span(took_ms=-5)],
            {"start_ns": START_MS * NS_PER_MS, "end_ns": (START_MS - 5) * NS_PER_MS},
            id="end before start",
        ),
        pytest.param(
            [span(start_time_unix_nano=0, end_time_unix_nano=7)],
            {"start_ns": NO_START, "end_ns": 7},
            id="no start",
        ),
        pytest.param(
            [span(start_time_unix_nano=0), span(start_time_unix_nano=9)], {"start_ns": 9}, id="one start"
        ),
        pytest.param(
            [span(start_time_unix_nano=2**64 - 1, end_time_unix_nano=2**64 - 1)],
            {"start_ns": 2**64 - 1, "end_ns": 2**64 - 1},
            id="end of time",
        ),
        pytest.param([span(parent=7)], {"bits": 0}, id="child"),
        pytest.param([span(parent=7), span(parent=7, error=True)], {"bits": ERROR}, id="error"),
        pytest.param([span(status=Status(code=Status.STATUS_CODE_OK))], {"bits": ROOT}, id="status ok"),
        pytest.param([span(parent_span_id=bytes(8), error=True)], {"bits": ERROR | ROOT}, id="zero parent"),
        pytest.param([span()], {"randomness": trace_randomness(trace_id(1))}, id="randomness"),
        pytest.param(
            [span(trace_state="a=b, ot=th:8;rv:00000000000abc")], {"randomness": 0xABC}, id="explicit rv"
        ),
        pytest.param(
            [span(trace_state="ot=rv:0000000000000f"), span(2), span(trace_state="ot=th:8")],
            {"randomness": 0xF},
            id="explicit rv beside spans without",
        ),
        pytest.param(
            [span(trace_state="ot=rv:nonsense")], {"randomness": trace_randomness(trace_id(1))}, id="bad rv"
        ),
    ],
)
def test_facts(spans: list[Span], expected: dict[str, int]) -> None:
    """Facts of a trace are what its spans say."""
    found = facts(decoded(record(*spans)))
    assert {name: found[name] for name in expected} == expected


def test_log_times_span_the_records_of_a_chunk() -> None:
    """The oldest and the newest record timestamp, not the spans' own times."""
    batch = decoded(
        *(record(span(), offset=i, timestamp_ms=LOG_MS + ms) for i, ms in enumerate((50, 0, 70))),
        record(span(2), offset=3, timestamp_ms=LOG_MS + 500),
    )
    assert (facts(batch, 1)["log_time_ms"], facts(batch, 1)["log_span_ms"]) == (LOG_MS, 70)
    assert (facts(batch, 2)["log_time_ms"], facts(batch, 2)["log_span_ms"]) == (LOG_MS + 500, 0)


def test_rules_leave_their_bits_and_version() -> None:
    """A span matches with its own resource; the mask joins all spans, and says which rules it is of."""
    batch = decoded(
        record(
            resource_spans(span(1, 1, attrs={"http.route": "/slow", "k": 1}), service="other"),
            resource_spans(span(2, 2, attrs={"k": "deep"}), span(3, 3, attrs={"k": nested(3)})),
            resource_spans(span(1, 4), service=None),
        ),
        rules=SHOP_RULES,
    )
    names = {
        t: {r.id for i, r in enumerate(SHOP_RULES.rules) if facts(batch, t)["mask"] >> i & 1}
        for t in (1, 2, 3)
    }
    assert names == {1: {"slow-route", "no-key"}, 2: {"shop", "deep"}, 3: {"shop", "deep"}}
    assert {facts(batch, t)["rules"] for t in (1, 2, 3)} == {SHOP_RULES.version}


def test_a_batch_without_spans_has_no_chunks() -> None:
    """All columns are there, empty."""
    chunks = decoded().chunks
    assert (len(chunks), chunks.trace_ids.shape, len(chunks.buffer)) == (0, (0, 16), 0)
    assert chunks.field_at.tolist() == [0]


# --- origins -----------------------------------------------------------------------------------------------------


def test_origins_follow_the_payload() -> None:
    """For each record that has spans of the trace: its partition, offset and how many, in the payload's order."""
    batch = decoded(
        record(span(1, 1), span(2, 2), span(1, 3), partition=0, offset=5),
        record(resource_spans(span(1, 4)), resource_spans(span(1, 5)), partition=2, offset=1),
        record(span(2, 6), partition=2, offset=2),
        record(span(1, 7), span(1, 8, span_id=b""), partition=0, offset=9),
        record(span(1, 9), partition=0, offset=4),
    )
    assert origins(batch, 1) == [Origin(0, 5, 2), Origin(2, 1, 2), Origin(0, 9, 1), Origin(0, 4, 1)]
    assert [s.span_id for s in spans_of(payload(batch, 1))] == [span_id(i) for i in (1, 3, 4, 5, 7, 9)]
    assert origins(batch, 2) == [Origin(0, 5, 1), Origin(2, 2, 1)]


def test_a_record_that_is_twice_in_a_batch_counts_once() -> None:
    """A rebalance in the middle of a poll can hand out a record again."""
    one, other = record(span(1, 1), span(2, 2, span_id=b"")), record(span(1, 3), offset=1)
    batch = decoded(one, other, one)
    assert (batch.spans, accepted(batch), refusals(batch)) == (3, 2, {"bad_span_id": 1})
    assert origins(batch) == [Origin(0, 0, 1), Origin(0, 1, 1)]


# --- laws --------------------------------------------------------------------------------------------------------

ids = st.integers(1, 4)
times = st.one_of(
    st.just(0), st.integers(0, 2**64 - 1), st.integers(START_MS * NS_PER_MS, LOG_MS * NS_PER_MS)
)
texts = st.text(max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=3,
)
attribute_maps = st.dictionaries(st.sampled_from(["k", "http.route", "service.name", ""]), values, max_size=3)
spans = st.builds(
    span,
    ids,
    ids,
    parent=st.none() | ids,
    attrs=attribute_maps,
    name=texts,
    start_time_unix_nano=times,
    end_time_unix_nano=times,
    error=st.booleans(),
    trace_state=st.sampled_from(["", "ot=th:8", "ot=rv:0000000000000f", "ot=rv:ffffffffffffff"]),
)
some_bad = st.one_of(
    spans,
    spans,
    spans,
    st.builds(span, trace_id=st.binary(max_size=17)),
    st.builds(span, span_id=st.binary(max_size=9)),
)
scopes = st.builds(
    lambda members, name: scope_spans(*members, scope=name), st.lists(some_bad, max_size=4), texts
)
groups = st.builds(
    lambda members, resource: resource_spans(*members, service=None, resource=resource),
    st.lists(scopes, max_size=3),
    attribute_maps,
)
exports = st.lists(groups, max_size=3).map(lambda found: traces_data(*found))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Record], list[TracesData]]:
    """Records of several partitions, offsets ascending in each, and what they hold."""
    found = draw(st.lists(exports, max_size=5))
    reached: dict[int, int] = defaultdict(int)
    records = []
    for data in found:
        partition = draw(st.integers(0, 2))
        reached[partition] += draw(st.integers(1, 3))
        value = data.SerializeToString()
        if len(data.resource_spans) == 1 and data.resource_spans[0].scope_spans and draw(st.booleans()):
            value = data.resource_spans[0].SerializeToString()
        at_ms = LOG_MS + draw(st.integers(0, 1000))
        records.append(Record(partition, reached[partition], at_ms, value))
    return records, found


def valid(one: Span) -> bool:
    return all((len(one.trace_id) == 16, any(one.trace_id), len(one.span_id) == 8, any(one.span_id)))


def flat(data: TracesData) -> list[tuple[bytes, bytes, bytes, str]]:
    """Every span with its resource, scope and schemas, as bytes: what must be the same before and after."""
    return [
        (
            s.SerializeToString(),
            group.resource.SerializeToString(),
            scope.scope.SerializeToString(),
            f"{group.schema_url} {scope.schema_url}",
        )
        for group in data.resource_spans
        for scope in group.scope_spans
        for s in scope.spans
    ]


@given(batches())
def test_chunks_hold_exactly_the_spans_of_their_traces(given_: tuple[list[Record], list[TracesData]]) -> None:
    """Each trace's chunk is a TracesData of exactly its spans, each with its resource and scope, in arrival order."""
    records, exported = given_
    batch = decode_both_ways(records, NO_RULES)
    expected: dict[bytes, list[tuple[bytes, bytes, bytes, str]]] = defaultdict(list)
    for data in exported:
        for row in flat(data):
            one = Span.FromString(row[0])
            if valid(one):
                expected[one.trace_id].append(row)
    found = {t: flat(TracesData.FromString(p)) for t, f in fields_of(batch).items() for p in f.values()}
    assert found == expected


@given(batches(), st.integers(0, 5))
def test_chunks_of_a_trace_concatenate(given_: tuple[list[Record], list[TracesData]], at: int) -> None:
    """However records are cut into batches, a trace's chunks end to end are the same TracesData."""
    records, _ = given_
    whole = fields_of(decode_both_ways(records, NO_RULES))
    parts = [fields_of(decode_both_ways(half, NO_RULES)) for half in (records[:at], records[at:])]
    for trace_id_, field in whole.items():
        joined = b"".join(p for part in parts for p in part.get(trace_id_, {}).values())
        assert flat(TracesData.FromString(joined)) == flat(TracesData.FromString(b"".join(field.values())))


@given(batches())
def test_nothing_is_uncounted(given_: tuple[list[Record], list[TracesData]]) -> None:
    """Accepted and refused spans are all that came; the dead letters hold exactly the refused ones."""
    records, exported = given_
    batch = decode_both_ways(records, NO_RULES)
    came = [row for data in exported for row in flat(data)]
    refused = [row for row in came if not valid(Span.FromString(row[0]))]
    assert batch.spans == len(came) == accepted(batch) + sum(letter.spans for letter in batch.dead)
    assert sorted(r for d in batch.dead for r in flat(TracesData.FromString(d.value))) == sorted(refused)
    assert batch.empty == sum(not flat(data) for data in exported)


@given(batches())
def test_facts_are_what_the_official_classes_say(given_: tuple[list[Record], list[TracesData]]) -> None:
    """Facts equal those computed from the chunk's parsed spans; origins add up to its spans."""
    batch = decode_both_ways(given_[0], SHOP_RULES)
    for i in range(len(batch.chunks)):
        members = spans_of(batch.chunks.payload(i))
        row = batch.chunks.facts[i]
        assert row["spans"] == len(members)
        assert bool(row["bits"] & ERROR) == any(s.status.code == Status.STATUS_CODE_ERROR for s in members)
        assert bool(row["bits"] & ROOT) == any(not s.parent_span_id for s in members)
        starts = [s.start_time_unix_nano for s in members if s.start_time_unix_nano]
        assert row["start_ns"] == min(starts, default=NO_START)
        assert row["end_ns"] == max(s.end_time_unix_nano for s in members)
        assert row["mask"] == payload_mask(batch.chunks.payload(i), SHOP_RULES)
        assert batch.chunks.field(i)[: FACTS.itemsize] == row.tobytes()
        named = list(decode_origins(batch.chunks.field(i)[FACTS.itemsize :]))
        assert sum(origin.spans for origin in named) == len(members)
        stamps = {(r.partition, r.offset): r.timestamp_ms for r in given_[0]}
        mine = [stamps[o.partition, o.offset] for o in named]
        assert (row["log_time_ms"], row["log_span_ms"]) == (min(mine), max(mine) - min(mine))


SAMPLES = [
    b"{}",
    json.dumps({"resourceSpans": [AS_JSON]}).encode(),
    resource_spans(span(), service=None).SerializeToString(),
    traces_data(*trace(1, 4, error=True)).SerializeToString(),
    traces_data(
        resource_spans(*trace(1), *trace(2), resource={"host": "a", "list": [1, 2.5, {"k": b"\0"}]}),
        resource_spans(
            scope_spans(span(3, attrs={"k": nested(4), "http.route": "/slow"}), schema_url="https://s"),
            scope_spans(span(1, 9, trace_state="ot=rv:0000000000000f;th:8", events=[Span.Event(name="e")])),
        ),
    ).SerializeToString(),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A record with some bytes cut, flipped, left out, put in, or taken from another."""
    first, second = draw(st.sampled_from(SAMPLES)), draw(st.sampled_from(SAMPLES))
    value = bytearray(first)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(value)))
        match draw(st.sampled_from(["truncate", "flip", "delete", "insert", "splice"])):
            case "truncate":
                del value[at:]
            case "flip":
                value[at : at + 1] = bytes(b ^ draw(st.integers(1, 255)) for b in value[at : at + 1])
            case "delete":
                del value[at : at + draw(st.integers(1, 8))]
            case "insert":
                value[at:at] = draw(st.binary(max_size=8))
            case _:
                value[at:] = second[draw(st.integers(0, len(second))) :]
    return bytes(value)


@settings(max_examples=400)
@given(st.one_of(damaged(), damaged(), st.binary(max_size=200)))
def test_no_bytes_can_break_decoding(value: bytes) -> None:
    """Whatever a record holds, decoding returns, counts what it counted, and what goes on can be decoded."""
    batch = decode_both_ways([record(value=value), record(span(9), partition=1)], SHOP_RULES)
    assert accepted(batch) + sum(letter.spans for letter in batch.dead) == batch.spans
    assert trace_id(9) in fields_of(batch)
    for i in range(len(batch.chunks)):
        members = spans_of(batch.chunks.payload(i))
        assert len(members) == batch.chunks.facts["spans"][i]
        assert {s.trace_id for s in members} == {batch.chunks.trace_id(i)}
    for letter in batch.dead:
        if letter.reason in ("undecodable", "invalid_json"):
            assert (letter.value, letter.spans) == (value, 0)
        else:
            frames = resource_frames(letter.value)
            assert letter.spans == sum(len(scope.spans) for frame in frames for scope in frame.scopes)


@settings(max_examples=100)
@given(damaged())
def test_what_the_official_class_accepts_is_accepted(value: bytes) -> None:
    """Damage that leaves a legal TracesData behind costs no span with good ids."""
    assume(not value.startswith(b"{"))
    try:
        data = TracesData.FromString(value)
        assume(not ResourceSpans.FromString(value).scope_spans)
    except DecodeError:
        assume(False)
    batch = decode_both_ways([record(value=value)], NO_RULES)
    assert accepted(batch) == sum(valid(Span.FromString(row[0])) for row in flat(data))


# --- shards ------------------------------------------------------------------------------------------------------


def id_rows(ids_: list[bytes]) -> Any:
    return np.frombuffer(b"".join(ids_), np.uint8).reshape(-1, 16)


def test_shards_never_move() -> None:
    """Where a trace lives is part of what is stored: a new version finds it in the same shard."""
    ids_ = [trace_id(1), bytes(range(16)), b"\xff" * 16, bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736")]
    assert shard_of(id_rows(ids_), 8).tolist() == [1, 2, 4, 2]


RANDOM = np.random.default_rng(7).bytes(16 * 4000)
HALVES = [RANDOM[at : at + 8] for at in range(0, len(RANDOM), 8)]


@pytest.mark.parametrize("shards", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    "ids_",
    [
        pytest.param([a + b for a, b in zip(HALVES[::2], HALVES[1::2], strict=True)], id="random"),
        pytest.param([bytes(8) + half for half in HALVES], id="64 random bits, padded left"),
        pytest.param([half + bytes(8) for half in HALVES], id="64 random bits, padded right"),
        pytest.param([b"\x68\x8f\0" + RANDOM[at : at + 13] for at in range(4000)], id="time first"),
        pytest.param([trace_id(n) for n in range(1, 4001)], id="counted up"),
    ],
)
def test_shards_are_spread(shards: int, ids_: list[bytes]) -> None:
    """No shard holds more than one and a half times its share, also where only a part of an id varies."""
    rows = shard_of(id_rows(ids_), shards)
    assert rows.min() >= 0
    assert np.bincount(rows, minlength=shards).max() <= 1.5 * len(ids_) / shards


def test_an_error_is_new_by_its_record() -> None:
    """Of a chunk of several records, an error counts as new exactly if its own record is not covered."""
    failing = span(1, 2, error=True)
    records = [
        record(resource_spans(span(1, 1)), offset=0),
        record(resource_spans(failing, span(1, 3)), offset=1),
        record(resource_spans(span(1, 4)), offset=2),
    ]
    chunks = decoded(*records).chunks
    held = {chunks.field(0): chunks.payload(0)}
    assert new_error(held, frozenset())
    assert new_error(held, {(0, 0), (0, 2)})
    assert not new_error(held, {(0, 1)})
    assert not new_error(dict.fromkeys(held, b""), frozenset()), "freed: it was looked at before"
