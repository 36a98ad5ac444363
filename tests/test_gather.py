"""The compiled gather and its slow twin give the same table, whatever is in the payloads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, Status

from tests import fuzz
from tests.bench import generate
from tests.builders import (
    any_value,
    attributes,
    fields_of,
    framed,
    nested,
    raw_record,
    resource_spans,
    scope_spans,
    span,
    span_id,
    trace_id,
    traces_data,
)
from tests.fuzz import DECIDED_AT, KEPT, gather_fault, kept
from tests.test_kernels import attribute_values
from tss import compiler, gather, native, rows, wire
from tss.gather import Gatherer
from tss.model import Record, Trigger, Verdict
from tss.rows import ATTRIBUTES_MAX, EVENTS_MAX, PROMOTED, VALUE_CHARS_MAX, Cut, KeptTrace, cut
from tss.rules import RuleSet

PLAIN = traces_data(span(1, 1), span(1, 2, start_ms=5)).SerializeToString()


def kept_traces(records: Sequence[Record], batch: int, *, taken: bool = True) -> list[KeptTrace]:
    """All traces of these records as they lie in Redis when they were read in batches; every other one is late."""
    held: dict[bytes, dict[bytes, bytes]] = {}
    for at in range(0, len(records), batch):
        for name, fields in fields_of(wire.decode(records[at : at + batch], RuleSet())).items():
            held.setdefault(name, {}).update(fields)
    landed = frozenset() if taken else frozenset((r.partition, r.offset) for r in records[::3])
    other = Verdict(True, "latency", "slow", 0.125, Trigger.LATE, 1)
    return [
        (name, (KEPT, other)[i % 3 == 0], i % 2 == 0, cut(fields, landed))
        for i, (name, fields) in enumerate(held.items())
    ]


def assert_same(traces: Sequence[KeptTrace], *, odd: int = 0, **limits: int) -> pa.Table:
    gatherer = Gatherer(**limits)
    assert gather_fault(gatherer, traces) is None
    assert gatherer.odd == odd
    return gatherer.span_table(traces, DECIDED_AT)[0]


@pytest.mark.parametrize("taken", [True, False], ids=["whole", "cut"])
@pytest.mark.parametrize("layout", generate.LAYOUTS)
def test_realistic_traces_are_the_same_and_take_the_fast_path(layout: str, taken: bool) -> None:
    """Traces in one chunk and in many, all of them and only what did not land before; none of them is odd."""
    traces = kept_traces(generate.records(layout, 2000), 2, taken=taken)
    table = assert_same(traces)
    assert table.num_rows == sum(pieces.spans for *_, pieces in traces)


def test_rows_are_in_the_order_of_the_tables() -> None:
    """By trace id and then by start, those of the same start as they came: the sink need not sort them again."""
    starts = (7, 3, 3, 9, 1, 3, 8, 2, 7)
    spans = [span(2, i, start_ms=start) for i, start in enumerate(starts, start=1)]
    table = assert_same([kept(2, traces_data(*spans).SerializeToString()), kept(1, PLAIN)])
    assert table["trace_id"].to_pylist() == [trace_id(1).hex()] * 2 + [trace_id(2).hex()] * len(starts)
    expected = sorted(range(1, len(starts) + 1), key=lambda i: starts[i - 1])
    assert table["span_id"].to_pylist()[2:] == [span_id(i).hex() for i in expected]


def value_of(**fields: Any) -> bytes:
    """A payload of one span whose attribute `k` has this value."""
    one = span()
    one.attributes.append(KeyValue(key="k", value=AnyValue(**fields)))
    return traces_data(one).SerializeToString()


def many(count: int) -> list[KeyValue]:
    return attributes({f"key-{i}": i for i in range(count)})


def with_span(*parts: bytes) -> bytes:
    """A payload of a plain span with more fields behind."""
    return raw_record(span().SerializeToString() + b"".join(parts))


TWICE = span()
TWICE.attributes.extend([*attributes({"k": 1.5}), *attributes({"k": [2]}), *attributes({"k": 3, "l": [2]})])
EXCEPTION = [Span.Event(name="exception", attributes=attributes({"a": 1, "exception.type": [1]}))]

# What is a little more than plain, and taken in all the same.
PLAIN_ENOUGH = {
    "floats": traces_data(
        *(span(1, i, attrs={"f": f}) for i, f in enumerate((0.1, 1e300, -0.0, 5e-324, 1e16, 3.0), start=1))
    ),
    "strange floats": traces_data(span(attrs={k: float(k) for k in ("nan", "inf", "-inf", "1")})),
    "bytes and nested": traces_data(
        span(1, 1, attrs={"b": b"\xff\0", "l": [1, "a", None, 2.5, b"x"], "d": {"k": [{}]}, "e": []}),
        span(1, 2, attrs={"n": nested(25), "l": [1, "a", None, 2.5, b"x"], "ü": {"ö": "€𝄞\ud7ff\n"}}),
    ),
    "lists": traces_data(
        span(
            1, 1, attrs={"a": ["a"], "b": ["ä€𝄞", "", "b"], "c": [1, -5, 2**63 - 1], "d": [True, None, False]}
        ),
        span(
            1,
            2,
            attrs={"q": ['say "it"'], "s": ["a\\b"], "n": ["a\n"], "z": ["\0"], "d": ["\x7f"], "e": [""]},
        ),
        span(
            1, 3, attrs={"m": ["a", 1, "b", 2.5], "l": [["a"]], "x": ["a", b"b"], "k": [{}], "c": ["a", [1]]}
        ),
        span(1, 4, attrs={"long": ["x" * VALUE_CHARS_MAX], "limit": ["x" * (VALUE_CHARS_MAX - 4)]}),
        span(1, 5, attrs={"over": ["x" * (VALUE_CHARS_MAX - 3)], "many": [-(2**63)] * 50}),
    ),
    "whole numbers": traces_data(
        span(attrs={str(n): n for n in (0, 9, 10, -1, 99, 100, 2**63 - 1, -(2**63), -(2**63) + 1)})
    ),
    "truths": traces_data(span(attrs={"t": True, "f": False, "n": None, "": "", "e": ""})),
    "a key twice": traces_data(TWICE),
    "many attributes": traces_data(span(attributes=many(ATTRIBUTES_MAX))),
    "many events": traces_data(span(events=[Span.Event(name="e", time_unix_nano=1)] * EVENTS_MAX)),
    "a long text": value_of(string_value="x" * VALUE_CHARS_MAX),
    "a longer text": value_of(string_value="ä" * (VALUE_CHARS_MAX + 1)),
    "promoted": traces_data(
        *(
            span(1, i + 1, attrs=dict.fromkeys(keys, i))
            for i, keys in enumerate([*PROMOTED.values(), [k for ks in PROMOTED.values() for k in ks[::-1]]])
        )
    ),
    "exception events": traces_data(
        span(1, 1, events=EXCEPTION),
        span(1, 2, events=EXCEPTION, attrs={"exception.type": "own", "exception": "no type"}),
        span(1, 3, events=[Span.Event(name="e", attributes=attributes({"exception.type": "b"}))]),
        span(1, 4, events=[Span.Event(name="exception"), *EXCEPTION, *EXCEPTION]),
    ),
    "an event's name last": with_span(
        framed(
            11,
            framed(3, attributes({"exception.type": "a"})[0].SerializeToString()) + framed(2, b"exception"),
        )
    ),
    "links": traces_data(
        span(
            links=[
                Span.Link(trace_id=trace_id(i), span_id=span_id(i), trace_state=state, flags=2**32 - i)
                for i, state in ((1, "a=b"), (2, ""))
            ]
        )
    ),
    "states": traces_data(
        *(
            span(1, i + 1, trace_state=s)
            for i, s in enumerate(("ot=th:8", "", "a=b", "ot=th:8", "ot=th:c;rv:1"))
        )
    ),
    "enumerations": traces_data(
        *(span(1, k + 2, kind=k, status=Status(code=k, message="m" * k)) for k in range(-1, 9))  # type: ignore[arg-type]
    ),
    "status twice": with_span(framed(15, framed(2, b"why"), b"\x18\x02")),
    "times": traces_data(
        *(
            span(1, i, start_time_unix_nano=start, end_time_unix_nano=end)
            for i, (start, end) in enumerate(
                ((0, 0), (5, 0), (0, 2**64 - 1), (2**63, 2**63 + 10), (1, 2**53 + 3), (0, 2**53 + 1)), start=1
            )
        )
    ),
    "counts": traces_data(
        span(
            dropped_attributes_count=2**32 - 1,
            dropped_events_count=3,
            dropped_links_count=2**31,
            flags=2**32 - 1,
            events=[Span.Event(dropped_attributes_count=2**32 - 1, time_unix_nano=2**64 - 1)],
        )
    ),
    "parent of zeros": traces_data(span(parent_span_id=bytes(8))),
    "unknown fields": with_span(framed(99, b"\xff"), b"\xf8\x07\x01", framed(11, framed(99, b"\xff"))),
    "sent twice": traces_data(span(), span(), span(name="another of that id"), span(1, 2), span()),
    "no resource": raw_record(span().SerializeToString()),
    "an empty resource": framed(1, framed(1, b"") + framed(2, framed(2, span().SerializeToString()))),
    "empty frames": framed(1, b"") + framed(1, framed(2, b"")) + PLAIN + framed(1, b""),
    "nothing": b"",
    "rich scopes": traces_data(
        resource_spans(
            ScopeSpans(spans=[span(1, 1)]),
            scope_spans(span(1, 2), scope="a", version=""),
            service=None,
            resource={"list": [1.5], "service.name": 7, "n": None},
        ),
        resource_spans(scope_spans(span(1, 3), schema_url="https://s"), service="", schema_url="https://r"),
    ),
}


def payload_of(sample: Any) -> bytes:
    return sample if isinstance(sample, bytes) else bytes(sample.SerializeToString())


@pytest.mark.parametrize("name", PLAIN_ENOUGH)
def test_what_any_producer_may_send_takes_the_fast_path(name: str) -> None:
    """Alone, and between other traces; also a payload there twice, whose spans are then written once."""
    payload = payload_of(PLAIN_ENOUGH[name])
    assert_same([kept(1, payload)])
    assert_same([kept(3, PLAIN), kept(1, payload, payload), kept(2, payload), kept(0, PLAIN)])


BARE = resource_spans(span())
BROKEN = b"\x0a\xff"

ODD = {
    "too many attributes": traces_data(span(attributes=many(ATTRIBUTES_MAX + 1))),
    "too many of an event": traces_data(span(events=[Span.Event(attributes=many(ATTRIBUTES_MAX + 1))])),
    "too many of a link": traces_data(
        span(links=[Span.Link(trace_id=trace_id(1), span_id=span_id(1), attributes=many(ATTRIBUTES_MAX + 1))])
    ),
    "too many events": traces_data(span(events=[Span.Event(name="e")] * (EVENTS_MAX + 1))),
    "too many links": traces_data(
        span(links=[Span.Link(trace_id=trace_id(1), span_id=span_id(1))] * (EVENTS_MAX + 1))
    ),
    "attributes behind events": with_span(
        framed(11, b""), framed(9, attributes({"late": 1})[0].SerializeToString())
    ),
    "a link without ids": traces_data(span(links=[Span.Link(trace_state="a=b")])),
    "a link's id of another length": traces_data(
        span(links=[Span.Link(trace_id=b"x" * 17, span_id=b"y" * 8)])
    ),
    "a parent of another length": traces_data(span(parent_span_id=b"abc")),
    "a span id of another length": traces_data(span(span_id=b"abcdefghij")),
    "a bare ResourceSpans": BARE,
    "a resource twice": framed(
        1, framed(1, Resource(attributes=attributes({"a": 1})).SerializeToString()) * 2 + framed(2, b"")
    ),
    "a value twice": with_span(framed(9, framed(1, b"k") + framed(2, b"\x18\x01", b"\x18\x02"))),
    "a key twice in one attribute": with_span(framed(9, framed(1, b"k", b"l"))),
    "a group": with_span(b"\x93\x06\x94\x06"),
    "deeply nested": with_span(
        framed(9, framed(1, b"k") + framed(2, any_value(nested(43)).SerializeToString()))
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_traces_are_joined_as_if_all_were_slow(name: str) -> None:
    """An odd trace lies between plain ones; order, rows and the count of repeated spans are those of the twin."""
    odd = payload_of(ODD[name])
    traces = [kept(5, PLAIN), kept(1, PLAIN, PLAIN), kept(3, odd, odd), kept(4, odd, PLAIN), kept(2, PLAIN)]
    assert_same(traces, odd=2)


BAD = {
    "a text that is no UTF-8": with_span(framed(5, b"\xff")),
    "a key that is no UTF-8": with_span(framed(9, framed(1, b"\xff"))),
    "a value that is no UTF-8": with_span(framed(9, framed(2, framed(1, b"\xff")))),
    "a listed text that is no UTF-8": with_span(
        framed(9, framed(2, framed(5, framed(1, framed(1, b"\xc3")))))
    ),
    "a deep text that is no UTF-8": with_span(framed(9, framed(2, framed(5, framed(1, framed(1, b"\xff")))))),
    "an event that is no UTF-8": with_span(framed(11, framed(2, b"\xff"))),
    "a resource that is no UTF-8": raw_record(
        span().SerializeToString(), resource=framed(1, framed(1, b"\xff"))
    ),
    "a scope that is no UTF-8": raw_record(span().SerializeToString(), scope=framed(1, b"\xff")),
    "a list with a field cut off at its end": raw_record(
        span().SerializeToString() + framed(9, framed(1, b"k"), framed(2, framed(5, b"\xc2\x00")))
    ),
    "what ends too early": PLAIN[:-3],
    "garbage": BROKEN,
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_twin_refuses_is_refused(name: str) -> None:
    """Nothing that the official class cannot read becomes a row: both raise, and the same."""
    assert gather_fault(Gatherer(), [kept(1, PLAIN), kept(2, BAD[name])]) is None
    with pytest.raises(DecodeError):
        Gatherer().span_table([kept(1, PLAIN), kept(2, BAD[name])], DECIDED_AT)


@pytest.mark.parametrize("take", [[True, False], [False, True], [False, False], [True], [True, True, True]])
def test_masks_say_which_spans_are_written(take: list[bool]) -> None:
    """Also where a mask and its payload do not agree, which is the twin's business."""
    given_: list[list[tuple[bytes, list[bool] | None]]] = [
        [(PLAIN, take)],
        [(PLAIN, None), (PLAIN, take)],
        [(PLAIN, take), (PLAIN, [True, True])],
    ]
    for payloads in given_:
        assert gather_fault(Gatherer(), [(trace_id(1), KEPT, False, Cut(payloads, "", 9, 0))]) is None


def test_a_cut_that_counts_wrong_breaks_nothing() -> None:
    """Its number of spans only says how much room to make."""
    for spans, odd in ((0, 1), (1, 0), (2, 0), (1 << 40, 0)):
        traces = [(trace_id(1), KEPT, False, Cut([(PLAIN, None)], "", spans, 0))]
        assert_same(traces, odd=odd)


def test_spans_of_one_id_by_the_hundred_are_the_twins_business() -> None:
    """A producer without a source of randomness makes nothing quadratic."""
    same = traces_data(*(span(name=f"{i:03}") for i in range(300))).SerializeToString()
    assert_same([kept(1, same), kept(2, PLAIN)], odd=1)


def test_groups_and_columns_are_bounded() -> None:
    """Traces are gathered in groups, those of a column that would be too long in halves, and at last by the twin."""
    traces = kept_traces(generate.records("A", 300), 1)
    for limits in ({"group_bytes_max": 1}, {"group_bytes_max": 20_000}, {"column_bytes_max": 20_000}):
        assert_same(traces, **limits)
    assert_same(traces, odd=len(traces), column_bytes_max=100)
    assert_same([(b"short", KEPT, True, Cut([(PLAIN, None)], "", 2, 0)), kept(1, PLAIN)], odd=1)


def test_threads_may_share_a_gatherer() -> None:
    """Writers of one process gather at the same time."""
    traces = kept_traces(generate.records("C", 600), 2)
    gatherer, expected = Gatherer(), rows.span_table(traces, DECIDED_AT)
    found: list[bool] = []

    def one() -> None:
        for _ in range(5):
            table, repeated = gatherer.span_table(traces, DECIDED_AT)
            found.append(bool(table.equals(expected[0])) and repeated == expected[1])

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


keys = st.sampled_from(
    ["k", "", "ö", "a.long.key.of.more.than.8", *(k for ks in PROMOTED.values() for k in ks)]
)
pairs = st.lists(
    st.builds(lambda key, value: KeyValue(key=key, value=any_value(value)), keys, attribute_values),
    max_size=6,
)
states = st.sampled_from(
    ["", "a=b", "ot=th:8", "ot=th:0", "ot=rv:00000000000001;th:c", "x=y,ot=th:8", "ot=th:zz"]
)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
events = st.builds(
    Span.Event,
    time_unix_nano=u64,
    name=st.sampled_from(["exception", "", "ä"]),
    attributes=pairs,
    dropped_attributes_count=u32,
)
links = st.builds(
    Span.Link,
    trace_id=st.just(trace_id(9)) | st.binary(max_size=20),
    span_id=st.just(span_id(9)) | st.binary(max_size=10),
    trace_state=states,
    attributes=pairs,
    flags=u32,
)
spans = st.builds(
    Span,
    trace_id=st.just(trace_id(1)),
    span_id=st.sampled_from([span_id(1), span_id(2), span_id(3)]),
    parent_span_id=st.sampled_from([b"", span_id(1), bytes(8), b"odd"]),
    trace_state=states,
    name=st.text(max_size=20),
    flags=u32,
    kind=st.integers(-1, 9),
    start_time_unix_nano=st.integers(0, 3) | u64,
    end_time_unix_nano=u64,
    attributes=pairs,
    dropped_attributes_count=u32,
    events=st.lists(events, max_size=3),
    dropped_events_count=u32,
    links=st.lists(links, max_size=2),
    dropped_links_count=u32,
    status=st.builds(Status, code=st.integers(-1, 9), message=st.text(max_size=5)),
)
payloads = st.lists(st.tuples(pairs, st.lists(spans, max_size=4)), min_size=1, max_size=3).map(
    lambda groups: traces_data(*(_resource(about, members) for about, members in groups)).SerializeToString()
)


def _resource(about: Sequence[KeyValue], members: Sequence[Span]) -> Any:
    made = resource_spans(*members[:2], scope_spans(*members[2:], scope=""))
    made.resource.attributes.extend(about)
    return made


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([1.0, 0.5, 0.001, 0.0]),
            st.booleans(),
            st.lists(
                st.tuples(payloads, st.none() | st.lists(st.booleans(), min_size=12, max_size=12)), max_size=3
            ),
        ),
        max_size=4,
    )
)
def test_any_traces_become_the_same_table(
    given_: list[tuple[int, float, bool, list[tuple[bytes, list[bool] | None]]]],
) -> None:
    """Any value, time, state and mask; traces that come twice; spans of one id or even the same."""
    traces = [
        (trace_id(n), Verdict(True, f"r{n}", "p", p, Trigger.LATE, 1), late, Cut(parts, "", 12, 0))
        for n, p, late, parts in given_
    ]
    assert gather_fault(Gatherer(), traces) is None


def test_mutants() -> None:
    """Some thousand of the mutants that `bin/fuzz` makes by the million, most of them changed once."""
    tally = fuzz.run_gather(2000, seed=5)
    assert not tally.faults
    found = tally.sum()
    assert found.mutants == 2000
    assert 0.4 < found.taken / found.mutants < 0.8, "both paths must be tried"


def test_nothing_is_compiled_while_traces_are_written() -> None:
    """After all that these tests did, each kernel knows the one kind of arguments that `warm_up` compiles it for."""
    gather.warm_up()
    assert_same([kept(1, PLAIN), kept(2, payload_of(BARE))], odd=1)
    own = [kernel for kernel in native.KERNELS if kernel.__module__ == gather.__name__]
    assert {kernel.__name__: len(kernel.signatures) for kernel in own if len(kernel.signatures) != 1} == {}


def test_a_store_outside_of_its_buffer_is_refused() -> None:
    """What numba cannot check is checked, in production too."""
    eight, u = np.zeros(8, np.uint8), np.uint64
    store_word = fuzz.from_python(native.store_word)
    store_word(eight, u(0), u(2**64 - 1))
    assert eight.tolist() == [255] * 8
    for at in (1, 8, 2**64 - 8, 2**64 - 1):
        with pytest.raises(IndexError):
            store_word(eight, u(at), u(0))


def test_the_slow_twin_can_be_chosen() -> None:
    """`app.kernels=python` writes by the twin, `numba` by kernels that are ready."""
    assert compiler.load("python").span_table is rows.span_table
    fast = compiler.load("numba").span_table
    assert fast is not rows.span_table
    table, repeated = fast([kept(1, PLAIN, PLAIN)], DECIDED_AT)
    assert (table.num_rows, repeated) == (2, 2)
