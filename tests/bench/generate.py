"""Realistic records in the three layouts in which traces arrive, the same for the same seed.

A web shop of 14 services: traces of 5 to 40 spans, about ten attributes and 450 bytes a span, resources of some
350 bytes, 3 % of the traces with an error. What differs is how spans share records:

    A   one trace a record, as an instrumented test or a grouping collector sends them
    B   a collector's batches of 200 spans of seven services, traces moderately interleaved
    C   the same, so many traces at once that 20,000 spans hold six or seven of a trace: the case to plan for
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.builders import LOG_MS, NS_PER_MS, START_MS, attributes, framed
from tss.model import Record

LAYOUTS = ("A", "B", "C")
SPANS_PER_RECORD = (
    200  # B and C: a collector's default is 8192, but records of some 100 kB are what Kafka likes
)
COLLECTORS = 2
SPREAD = {"B": 3_800, "C": 50_000}  # spans of all traces between the first and the last of one
PARTITIONS = 8
ERROR_SHARE = 0.03

SERVICES = (
    *("frontend", "gateway", "catalog", "cart", "checkout", "payment", "shipping"),
    *("currency", "email", "recommendation", "search", "inventory", "accounts", "pricing"),
)
LIBRARIES = tuple(
    InstrumentationScope(name=f"io.opentelemetry.{name}", version="2.21.0-alpha").SerializeToString()
    for name in ("http-server", "http-client", "jdbc")
)
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0 Safari/537.36",
    "ShopApp/7.3.1 (iPhone; iOS 19.1)",
    "kube-probe/1.34",
)
ROUTES = ("/", "/cart", "/checkout", "/products/{id}", "/search", "/orders/{id}/items", "/account/settings")
TABLES = ("orders", "items", "customers", "prices", "stock")


@dataclass(frozen=True, slots=True)
class Emitted:
    """One span as its service sends it; `scope` is a number in LIBRARIES. Bytes, as objects of it take ten times more."""

    service: int
    scope: int
    span: bytes


def records(layout: str, spans: int, *, seed: int = 1) -> list[Record]:
    """Records with at least `spans` spans (at most one record more, but for A), dealt over partitions in turn."""
    rng = random.Random(seed)
    resources = [_resource(rng, name) for name in SERVICES]
    traces = _traces(rng, spans)
    groups = traces if layout == "A" else list(_batches(rng, traces, SPREAD[layout]))
    return [
        Record(i % PARTITIONS, i // PARTITIONS, LOG_MS + i, _export(group, resources))
        for i, group in enumerate(groups)
    ]


def _traces(rng: random.Random, spans: int) -> list[list[Emitted]]:
    traces: list[list[Emitted]] = []
    while spans > 0:
        traces.append(_trace(rng))
        spans -= len(traces[-1])
    return traces


def _batches(rng: random.Random, traces: Sequence[list[Emitted]], spread: int) -> Iterator[list[Emitted]]:
    """What the collectors send: each the spans of its services, in the order of time."""
    total = sum(map(len, traces))
    stream = []
    order = count()
    for trace in traces:
        start = rng.uniform(-spread, total)
        stream += [(start + rng.random() * spread, next(order), one) for one in trace]
    stream.sort()
    waiting: list[list[Emitted]] = [[] for _ in range(COLLECTORS)]
    for _, _, one in stream:
        batch = waiting[one.service % COLLECTORS]
        batch.append(one)
        if len(batch) == SPANS_PER_RECORD:
            yield list(batch)
            batch.clear()
    yield from filter(None, waiting)


def _export(group: Sequence[Emitted], resources: Sequence[bytes]) -> bytes:
    """A resource's spans together, a library's spans together, as collectors send them."""
    parts: dict[int, dict[int, list[bytes]]] = {}
    for one in group:
        parts.setdefault(one.service, {}).setdefault(one.scope, []).append(one.span)
    return b"".join(
        framed(
            1,
            framed(1, resources[service])
            + b"".join(framed(2, framed(1, LIBRARIES[n]) + framed(2, *spans)) for n, spans in scopes.items())
            + framed(3, b"https://opentelemetry.io/schemas/1.37.0"),
        )
        for service, scopes in parts.items()
    )


def _resource(rng: random.Random, name: str) -> bytes:
    pod = f"{name}-{rng.randbytes(5).hex()}-{rng.randbytes(2).hex()}"
    values = {
        "service.name": name,
        "service.version": f"{rng.randint(1, 9)}.{rng.randint(0, 40)}.0",
        "service.namespace": "shop",
        "deployment.environment.name": "production",
        "k8s.pod.name": pod,
        "k8s.node.name": f"node-{rng.randint(1, 60)}",
        "host.name": pod,
        "process.pid": rng.randint(1, 60_000),
        "telemetry.sdk.language": rng.choice(("java", "go", "python")),
        "telemetry.sdk.version": "1.55.0",
    }
    return Resource(attributes=attributes(values)).SerializeToString()


def _trace(rng: random.Random) -> list[Emitted]:
    trace_id = rng.randbytes(16)
    size = rng.randint(5, 40)
    failed = rng.randrange(size) if rng.random() < ERROR_SHARE else None
    at_ns = (START_MS + rng.randrange(1000)) * NS_PER_MS
    ids = [rng.randbytes(8) for _ in range(size)]
    return [
        _emitted(rng, trace_id, ids[i], ids[rng.randrange(i)] if i else b"", at_ns, error=i == failed)
        for i in range(size)
    ]


def _emitted(
    rng: random.Random, trace_id: bytes, span_id: bytes, parent: bytes, at_ns: int, *, error: bool
) -> Emitted:
    scope = rng.randrange(len(LIBRARIES))
    start_ns = at_ns + rng.randrange(200 * NS_PER_MS)
    values = _query(rng) if scope == 2 else _request(rng, error=error)
    span = Span(
        trace_id=trace_id,
        span_id=span_id,
        parent_span_id=parent,
        flags=0x101,
        name=f"{values.get('http.request.method', values.get('db.operation.name'))} {rng.choice(ROUTES)}",
        kind=Span.SPAN_KIND_SERVER if scope == 0 else Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=start_ns,
        end_time_unix_nano=start_ns + int(rng.expovariate(1 / 30) * NS_PER_MS),
        attributes=attributes(values),
    )
    if error:
        span.status.MergeFrom(Status(code=Status.STATUS_CODE_ERROR, message="upstream request timed out"))
        thrown = {"exception.type": "TimeoutError", "exception.message": "deadline exceeded after 2000 ms"}
        span.events.add(name="exception", time_unix_nano=start_ns, attributes=attributes(thrown))
    return Emitted(min(int(rng.expovariate(1 / 5)), len(SERVICES) - 1), scope, span.SerializeToString())


def _request(rng: random.Random, *, error: bool) -> dict[str, object]:
    route = rng.choice(ROUTES)
    return {
        "http.request.method": rng.choice(("GET", "GET", "POST", "PUT")),
        "http.route": route,
        "url.path": route.replace("{id}", str(rng.randrange(100_000))),
        "url.scheme": "https",
        "http.response.status_code": 504 if error else 200,
        "server.address": "shop.example.com",
        "server.port": 443,
        "network.protocol.version": "1.1",
        "client.address": f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}",
        "user_agent.original": rng.choice(AGENTS),
        "thread.id": rng.randrange(200),
    }


def _query(rng: random.Random) -> dict[str, object]:
    table = rng.choice(TABLES)
    return {
        "db.system.name": "postgresql",
        "db.namespace": "shop",
        "db.operation.name": "SELECT",
        "db.collection.name": table,
        "db.query.text": f"SELECT id, name, price, changed_at FROM {table} WHERE id = $1 AND deleted_at IS NULL LIMIT 50",
        "server.address": f"db-{rng.randint(1, 4)}.shop.internal",
        "server.port": 5432,
        "db.response.returned_rows": rng.randrange(50),
        "thread.name": f"worker-{rng.randrange(64)}",
    }
