"""The shop: what the demo shows and what end-to-end tests take as their known truth."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData

from tss import shop

START_NS = 1_790_000_000_000_000_000
PARTITIONS = 8
SEEDS = range(60)


def trace(seed: int, *, error: bool = False, slow: bool = False) -> list[shop.TimedSpan]:
    return shop.make_trace(random.Random(seed), START_NS, error=error, slow=slow)


def duration_secs(spans: list[shop.TimedSpan]) -> float:
    ends = max(s.span.end_time_unix_nano for s in spans)
    return (ends - min(s.span.start_time_unix_nano for s in spans)) / 1e9


def spans_of(value: bytes) -> list[tuple[str, Span]]:
    decoded = TracesData.FromString(value)
    return [
        (resource.resource.attributes[0].value.string_value, span)
        for resource in decoded.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("error", [False, True])
def test_a_trace_is_what_was_asked_for(error: bool, slow: bool) -> None:
    """A trace has an error exactly when asked to, and is slow exactly when asked to."""
    for seed in SEEDS:
        spans = trace(seed, error=error, slow=slow)
        assert error == any(s.span.status.code == Status.STATUS_CODE_ERROR for s in spans)
        if slow:
            assert duration_secs(spans) > shop.SLOW_SECS
        else:
            assert duration_secs(spans) < shop.FAST_SECS_MAX


def test_a_trace_is_one_tree_in_time() -> None:
    """One SERVER root, ids unique, every parent there and enclosing its children."""
    for seed in SEEDS:
        spans = [s.span for s in trace(seed, error=seed % 2 == 0)]
        by_id = {s.span_id: s for s in spans}
        assert len(by_id) == len(spans)
        assert {s.trace_id for s in spans} == {spans[0].trace_id}
        (root,) = [s for s in spans if not s.parent_span_id]
        assert root.kind == Span.SPAN_KIND_SERVER
        for span in spans:
            assert len(span.span_id) == 8
            assert START_NS <= span.start_time_unix_nano < span.end_time_unix_nano
            if span is not root:
                parent = by_id[span.parent_span_id]
                assert parent.start_time_unix_nano <= span.start_time_unix_nano
                assert span.end_time_unix_nano <= parent.end_time_unix_nano


def test_error_spans_tell_what_happened() -> None:
    """Each span with an error carries an exception event, and some errors never reach the root."""
    reached = set()
    for seed in SEEDS:
        spans = [s.span for s in trace(seed, error=True)]
        for span in spans:
            if span.status.code == Status.STATUS_CODE_ERROR:
                assert [e.name for e in span.events if e.name == "exception"]
                assert span.status.message
        (root,) = [s for s in spans if not s.parent_span_id]
        reached.add(root.status.code == Status.STATUS_CODE_ERROR)
    assert reached == {True, False}


def test_traces_have_variety() -> None:
    """Several services, every span kind, links, and attributes of all the usual conventions occur."""
    spans = [s for seed in range(200) for s in trace(seed)]
    assert {s.service for s in spans} == set(shop.SERVICES)
    assert {s.span.kind for s in spans} == {1, 2, 3, 4, 5}
    assert any(s.span.links for s in spans)
    keys = {a.key.split(".")[0] for s in spans for a in s.span.attributes}
    assert {"http", "db", "rpc", "messaging", "app"} <= keys


def test_records_hold_every_span_once_and_mix_them() -> None:
    """Records carry exactly the spans given, each with its service, and spread a trace over partitions."""
    traces = [trace(seed) for seed in range(20)]
    made = [s for spans in traces for s in spans]
    packed = list(shop.records(random.Random(1), traces, partitions=PARTITIONS))
    seen = [
        (service, span.SerializeToString()) for record in packed for service, span in spans_of(record.value)
    ]
    assert sorted(seen) == sorted((s.service, s.span.SerializeToString()) for s in made)
    assert [r.emit_at_ns for r in packed] == sorted(r.emit_at_ns for r in packed)
    assert sum(r.spans for r in packed) == len(made)

    partitions: defaultdict[bytes, set[int]] = defaultdict(set)
    mixed = children_first = 0
    for record in packed:
        spans = spans_of(record.value)
        mixed += len({service for service, _ in spans}) > 1 and len({s.trace_id for _, s in spans}) > 1
        for _, span in spans:
            children_first += bool(span.parent_span_id) and not partitions[span.trace_id]
            partitions[span.trace_id].add(record.partition)
    assert mixed > len(packed) / 4
    assert children_first > 5
    assert all(len(of_trace) > 1 for of_trace in partitions.values())


def test_no_span_leaves_before_it_ended() -> None:
    """A span is sent after its end and within the spread."""
    for s in trace(3, slow=True):
        assert 0 <= s.emit_at_ns - s.span.end_time_unix_nano <= shop.SPREAD_SECS * 1e9


def test_endless_visits_become_records_as_they_are_asked_for() -> None:
    """Records of an endless shop can be taken one by one, in sending order, and hold whole traces in the end."""

    def start(traces: int | None) -> Iterator[shop.TimedRecord]:
        visits = shop.visits(random.Random(5), START_NS, traces_per_sec=50)
        return shop.records(
            random.Random(6), (v.spans for v in islice(visits, traces)), partitions=PARTITIONS
        )

    some = list(start(40))
    assert [r.value for r in islice(start(None), 5)] == [r.value for r in some[:5]]
    assert [r.emit_at_ns for r in some] == sorted(r.emit_at_ns for r in some)
    spans = [span for record in some for _, span in spans_of(record.value)]
    assert len({s.trace_id for s in spans if not s.parent_span_id}) == 40
    assert {s.parent_span_id for s in spans if s.parent_span_id} <= {s.span_id for s in spans}


def test_visits_tell_the_truth_about_their_traces() -> None:
    """The shares of errors and slow traces are about those asked for, and each visit says what its trace is."""
    visits = list(islice(shop.visits(random.Random(2), START_NS, traces_per_sec=100, error_share=0.2), 500))
    for visit in visits:
        assert visit.error == any(s.span.status.code == Status.STATUS_CODE_ERROR for s in visit.spans)
        assert visit.slow == (duration_secs(visit.spans) > shop.SLOW_SECS)
    assert 60 < sum(v.error for v in visits) < 140
    assert 1 <= sum(v.slow for v in visits) < 30
    starts = [min(s.span.start_time_unix_nano for s in v.spans) for v in visits]
    assert starts == sorted(starts)
    assert 3 < (starts[-1] - START_NS) / 1e9 < 7


def test_a_seed_gives_the_same_bytes() -> None:
    """The same seed and start give the same records; another seed gives others."""

    def values(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [r.value for r in shop.records(rng, [shop.make_trace(rng, START_NS)], partitions=PARTITIONS)]

    assert values(7) == values(7)
    assert values(7) != values(8)
