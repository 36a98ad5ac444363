"""Traces with a known truth: what must be kept, why, and with which spans."""

from __future__ import annotations

import random
from dataclasses import dataclass

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status, TracesData

NS = 1_000_000_000
SLOW_NS = 6 * NS


@dataclass(frozen=True)
class Trace:
    """`reason` is why it must be kept, None when it must be dropped."""

    spans: tuple[Span, ...]
    service: str
    reason: str | None

    @property
    def id(self) -> str:
        return self.spans[0].trace_id.hex()

    @property
    def span_ids(self) -> set[str]:
        return {span.span_id.hex() for span in self.spans}


def make_trace(
    rng: random.Random, start_ns: int, *, reason: str | None = None, service: str = "shop", spans: int = 5
) -> Trace:
    """One whose verdict is known: `error` has a failed span, `latency` lasts 6 s, `force` is of service `forced`.

    Of `all errors` every part is kept, even where it is judged in two halves.
    """
    trace_id = rng.randbytes(16)
    length = SLOW_NS if reason == "latency" else NS // 10
    out: list[Span] = []
    for index in range(spans):
        span = Span(
            trace_id=trace_id,
            span_id=rng.randbytes(8),
            parent_span_id=out[0].span_id if out else b"",
            name=f"step {index}",
            kind=Span.SPAN_KIND_SERVER,
            start_time_unix_nano=start_ns + index * 1000,
            end_time_unix_nano=start_ns + (length if index == 0 else length // 2),
        )
        out.append(span)
    for failed in out if reason == "all errors" else [rng.choice(out)] if reason == "error" else []:
        failed.status.code = Status.STATUS_CODE_ERROR
        failed.status.message = "broken"
    return Trace(tuple(out), "forced" if reason == "force" else service, reason)


def record(service: str, *spans: Span) -> bytes:
    """A record with these spans of one service."""
    resource = ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])
    resource.resource.attributes.append(KeyValue(key="service.name", value=AnyValue(string_value=service)))
    return TracesData(resource_spans=[resource]).SerializeToString()


def scattered(
    rng: random.Random,
    traces: list[Trace],
    base_ms: int,
    *,
    partitions: int,
    spread_ms: int,
    within_ms: int = 10_000,
) -> list[tuple[int, bytes, int | None]]:
    """A record a span, each on any partition and up to `spread_ms` after its trace's begin, in time order."""
    timed = []
    for trace in traces:
        begin = base_ms + rng.randrange(within_ms)
        for span in rng.sample(trace.spans, len(trace.spans)):
            at_ms = begin + rng.randrange(spread_ms)
            timed.append((at_ms, rng.randrange(partitions), record(trace.service, span)))
    timed.sort(key=lambda r: r[0])
    return [(partition, value, at_ms) for at_ms, partition, value in timed]
