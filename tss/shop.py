"""A small shop on the internet, as its traces: what the demo and the tests feed through the pipeline.

Pure: a random generator and a start time in, spans and record values out; the same seed gives the same bytes.

A visit is written like the services' own code would be: nested `with` blocks open and close spans around a clock
that only `work` moves, and a failure is an exception that travels up through them. So parents always enclose their
children, an error reaches the customer unless somebody on the way tolerates it, and a slow call makes slow every
span above it, without any of that being arranged by hand.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status, TracesData

FAST_SECS_MAX = 0.9
"""No visit that is not meant to be slow lasts this long."""

SLOW_SECS = 6.0
"""How long a slow visit hangs at least: above the default `sampling.latency_threshold_ms`."""

SPREAD_SECS = 2.0
"""How long after its end a span may leave its service; export batches of SDKs and Collectors are that far apart."""

RECORD_WINDOW_SECS = 0.2
"""Spans that leave within one window may share a record, as in the batches of a Collector."""

RECORD_SPANS_MAX = 40

_SAMPLED = 0x01
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200  # bits of Span.flags: whether the parent is in another process

Value = str | bool | int | float | Sequence[str]


@dataclass(frozen=True, slots=True)
class TimedSpan:
    """A span, the service it belongs to, and when it leaves there (Unix time, like its own times)."""

    service: str
    span: Span
    emit_at_ns: int


@dataclass(frozen=True, slots=True)
class Visit:
    """A trace and the truth about it."""

    error: bool
    slow: bool
    spans: list[TimedSpan]


@dataclass(frozen=True, slots=True)
class TimedRecord:
    """A Kafka record value (OTLP `TracesData`), and when to send it where."""

    emit_at_ns: int
    partition: int
    value: bytes
    spans: int


def make_trace(
    rng: random.Random,
    start_ns: int,
    *,
    error: bool = False,
    slow: bool = False,
    slow_secs: float = SLOW_SECS,
    spread_secs: float = SPREAD_SECS,
) -> list[TimedSpan]:
    """One visit, in the order in which its spans leave the services.

    `error`: at least one span has status ERROR, otherwise none has. `slow`: it lasts longer than `slow_secs`,
    otherwise less than `FAST_SECS_MAX`.
    """
    kind = rng.choices(_KINDS, [k.weight for k in _KINDS])[0]
    trouble = rng.choice(kind.hazards)
    trace = _Trace(
        rng,
        trace_id=rng.randbytes(16),
        clock_ns=start_ns,
        fails_at=trouble if error else None,
        hangs_at=trouble if slow else None,
        hang_ms=slow_secs * 1000 * rng.uniform(1.02, 1.5),
    )
    with suppress(_Fault):
        kind.play(trace)
    leaving = [
        TimedSpan(service, span, span.end_time_unix_nano + round(rng.uniform(0, spread_secs) * 1e9))
        for service, span in trace.spans
    ]
    return sorted(leaving, key=lambda s: s.emit_at_ns)


def visits(
    rng: random.Random,
    start_ns: int,
    *,
    traces_per_sec: float,
    error_share: float = 0.03,
    slow_share: float = 0.02,
    slow_secs: float = SLOW_SECS,
    spread_secs: float = SPREAD_SECS,
) -> Iterator[Visit]:
    """Visits that begin at random times from `start_ns` on, one after the other, without end."""
    begin_ns = float(start_ns)
    while True:
        error, slow = rng.random() < error_share, rng.random() < slow_share
        spans = make_trace(
            rng, round(begin_ns), error=error, slow=slow, slow_secs=slow_secs, spread_secs=spread_secs
        )
        yield Visit(error, slow, spans)
        begin_ns += rng.expovariate(traces_per_sec) * 1e9


def records(
    rng: random.Random, traces: Iterable[Sequence[TimedSpan]], *, partitions: int
) -> Iterator[TimedRecord]:
    """All spans of these traces as records, in sending order, made as they are asked for.

    Spans that leave in the same moment are shuffled over a few records on random partitions, so that a record
    holds several services and traces, and a trace is spread over partitions and out of order. `traces` come in
    the order of their start.
    """
    window: list[TimedSpan] = []
    for span in _in_order(traces):
        if window and span.emit_at_ns - window[0].emit_at_ns > RECORD_WINDOW_SECS * 1e9:
            yield from _pack(rng, window, partitions)
            window = []
        window.append(span)
    yield from _pack(rng, window, partitions)


def _in_order(traces: Iterable[Sequence[TimedSpan]]) -> Iterator[TimedSpan]:
    """Their spans by the time they leave; no trace is asked for before all that left earlier is handed out."""
    waiting: list[tuple[int, int, TimedSpan]] = []
    tie = count()
    for trace in traces:
        begins_ns = min(s.span.start_time_unix_nano for s in trace)
        while waiting and waiting[0][0] < begins_ns:
            yield heapq.heappop(waiting)[2]
        for span in trace:
            heapq.heappush(waiting, (span.emit_at_ns, next(tie), span))
    while waiting:
        yield heapq.heappop(waiting)[2]


def _pack(rng: random.Random, spans: list[TimedSpan], partitions: int) -> Iterator[TimedRecord]:
    """One window's spans as records that are all sent at its end."""
    shuffled = rng.sample(spans, len(spans))
    while shuffled:
        size = rng.randint(1, RECORD_SPANS_MAX)
        batch, shuffled = shuffled[:size], shuffled[size:]
        yield TimedRecord(
            emit_at_ns=spans[-1].emit_at_ns,
            partition=rng.randrange(partitions),
            value=traces_data(batch),
            spans=len(batch),
        )


def traces_data(spans: Iterable[TimedSpan]) -> bytes:
    """OTLP `TracesData` of these spans, one resource for each service, in order of first appearance."""
    by_service: dict[str, list[Span]] = {}
    for timed in spans:
        by_service.setdefault(timed.service, []).append(timed.span)
    return TracesData(
        resource_spans=[
            ResourceSpans(
                resource=_resource(service),
                scope_spans=[
                    ScopeSpans(
                        scope=InstrumentationScope(name=f"shop/{service}", version=SERVICES[service].version),
                        spans=of_service,
                    )
                ],
            )
            for service, of_service in by_service.items()
        ]
    ).SerializeToString()


# --- the services ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    language: str
    version: str
    rpc: str = ""


SERVICES = {
    "frontend": Service("nodejs", "2.14.0"),
    "checkout": Service("go", "1.9.3", "shop.CheckoutService"),
    "cart": Service("dotnet", "3.0.1", "shop.CartService"),
    "product-catalog": Service("go", "1.22.0", "shop.ProductCatalogService"),
    "recommendation": Service("python", "0.8.5", "shop.RecommendationService"),
    "payment": Service("java", "4.2.7", "shop.PaymentService"),
    "shipping": Service("rust", "0.31.2", "shop.ShippingService"),
    "email": Service("ruby", "1.1.0", "shop.EmailService"),
    "accounting": Service("dotnet", "2.6.0"),
}

PRODUCTS = (
    "telescope",
    "tripod",
    "star-atlas",
    "red-torch",
    "eyepiece-9mm",
    "solar-filter",
    "binoculars",
    "book-mars",
)


def _resource(service: str) -> Resource:
    facts = SERVICES[service]
    return Resource(
        attributes=_attributes(
            {
                "service.name": service,
                "service.namespace": "shop",
                "service.version": facts.version,
                "service.instance.id": f"{service}-7d9c5-1",
                "deployment.environment.name": "demo",
                "telemetry.sdk.name": "opentelemetry",
                "telemetry.sdk.language": facts.language,
            }
        )
    )


class _Fault(Exception):
    """Something broke in a service of the shop."""

    def __init__(self, kind: str, message: str, grpc_status: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.grpc_status = grpc_status


_FAULTS = {
    "catalog query": ("pq.Error", "canceling statement due to lock timeout on relation products", 13),
    "cart store": ("StackExchange.Redis.RedisTimeoutException", "Timeout performing HGETALL cart", 14),
    "card charge": ("PaymentGatewayException", "card issuer did not answer: 504 from gateway", 14),
    "shipping quote": ("reqwest::Error", "connection closed before message completed", 14),
    "order mail": ("Net::SMTPServerBusy", "451 4.3.0 mail server temporarily rejected message", 14),
    "recommendation model": ("ValueError", "model version 41 is not loaded on this replica", 13),
}


@dataclass
class _Trace:
    """A visit in the making: its clock, the spans that are open, the spans that ended."""

    rng: random.Random
    trace_id: bytes
    clock_ns: int
    fails_at: str | None
    hangs_at: str | None
    hang_ms: float
    spans: list[tuple[str, Span]] = field(default_factory=list)
    open: list[tuple[str, Span]] = field(default_factory=list)

    def work(self, low_ms: float, high_ms: float) -> None:
        """Time passes."""
        self.clock_ns += round(self.rng.uniform(low_ms, high_ms) * 1e6)

    def hazard(self, name: str) -> None:
        """A place where this visit may hang (once) or fail."""
        if name == self.hangs_at:
            self.clock_ns += round(self.hang_ms * 1e6)
            self.hangs_at = None
        if name == self.fails_at:
            raise _Fault(*_FAULTS[name])

    @contextmanager
    def span(
        self, service: str, name: str, kind: Span.SpanKind.ValueType, attributes: Mapping[str, Value]
    ) -> Iterator[Span]:
        parent_service, parent = self.open[-1] if self.open else (service, None)
        remote = _HAS_IS_REMOTE | (_IS_REMOTE if parent_service != service else 0) if parent else 0
        span = Span(
            trace_id=self.trace_id,
            span_id=self.rng.randbytes(8),
            parent_span_id=parent.span_id if parent else b"",
            name=name,
            kind=kind,
            start_time_unix_nano=self.clock_ns,
            attributes=_attributes(attributes),
            flags=_SAMPLED | remote,
        )
        self.open.append((service, span))
        try:
            self.work(0.05, 0.4)
            yield span
            self.work(0.05, 0.4)
        except _Fault as fault:
            self._fail(span, fault)
            raise
        finally:
            span.end_time_unix_nano = self.clock_ns
            self.spans.append(self.open.pop())

    def _fail(self, span: Span, fault: _Fault) -> None:
        span.status.code = Status.STATUS_CODE_ERROR
        span.status.message = fault.message
        details = {"exception.type": fault.kind, "exception.message": fault.message}
        if not any(ended.status.code for _, ended in self.spans):
            details["exception.stacktrace"] = f"{fault.kind}: {fault.message}\n  at {span.name} (line 42)"
        span.events.append(
            Span.Event(time_unix_nano=self.clock_ns, name="exception", attributes=_attributes(details))
        )

    @contextmanager
    def http(self, method: str, route: str, path: str, attributes: Mapping[str, Value]) -> Iterator[None]:
        """The visit's root: a request that reaches the frontend."""
        request: dict[str, Value] = {
            "http.request.method": method,
            "http.route": route,
            "url.path": path,
            "url.scheme": "https",
            "server.address": "shop.example",
            "client.address": f"203.0.113.{self.rng.randrange(1, 255)}",
            "user_agent.original": self.rng.choice(
                ("Mozilla/5.0 (iPhone)", "Mozilla/5.0 (X11)", "curl/8.14")
            ),
        }
        with self.span(
            "frontend", f"{method} {route}", Span.SPAN_KIND_SERVER, {**request, **attributes}
        ) as span:
            try:
                self.work(0.5, 3)
                yield
            except _Fault:
                span.attributes.extend(_attributes({"http.response.status_code": 500, "error.type": "500"}))
                raise
            span.attributes.extend(_attributes({"http.response.status_code": 200}))

    @contextmanager
    def rpc(self, callee: str, method: str, attributes: Mapping[str, Value] | None = None) -> Iterator[None]:
        """A call from the service at work to another: a CLIENT span here, a SERVER span there."""
        caller, _ = self.open[-1]
        name = f"{SERVICES[callee].rpc}/{method}"
        call: dict[str, Value] = {
            "rpc.system": "grpc",
            "rpc.service": SERVICES[callee].rpc,
            "rpc.method": method,
        }
        address: dict[str, Value] = {"server.address": callee, "server.port": 8080}
        with self.span(caller, name, Span.SPAN_KIND_CLIENT, call | address) as client:
            self.work(0.2, 1)
            with self.span(callee, name, Span.SPAN_KIND_SERVER, {**call, **(attributes or {})}) as server:
                try:
                    self.work(0.3, 2)
                    yield
                    status = 0
                except _Fault as fault:
                    status = fault.grpc_status
                    raise
                finally:
                    for side in (client, server):
                        side.attributes.extend(_attributes({"rpc.grpc.status_code": status}))
            self.work(0.2, 1)

    def database(self, system: str, operation: str, target: str, text: str, hazard: str) -> None:
        """A query of the service at work."""
        query: dict[str, Value] = {
            "db.system.name": system,
            "db.operation.name": operation,
            "db.collection.name": target,
            "db.query.text": text,
            "server.address": f"{system}.internal",
        }
        service, _ = self.open[-1]
        with self.span(service, f"{operation} {target}", Span.SPAN_KIND_CLIENT, query):
            self.work(0.5, 6)
            self.hazard(hazard)


def _attributes(values: Mapping[str, Value]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any_value(value)) for key, value in values.items()]


def _any_value(value: Value) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case str():
            return AnyValue(string_value=value)
        case _:
            return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=v) for v in value]))


# --- what visitors do --------------------------------------------------------------------------------------------


def _visitor(rng: random.Random) -> dict[str, Value]:
    return {
        "app.user.id": f"u-{rng.randrange(10_000):05d}",
        "app.user.tier": rng.choices(("free", "plus", "business"), (80, 15, 5))[0],
        "app.synthetic": rng.random() < 0.02,
    }


def _product(t: _Trace, product: str) -> None:
    with t.rpc("product-catalog", "GetProduct", {"app.product.id": product}):
        t.database(
            "postgresql", "SELECT", "products", "SELECT * FROM products WHERE id = $1", hazard="catalog query"
        )


def _cart(t: _Trace, items: int) -> None:
    with t.rpc("cart", "GetCart", {"app.cart.items": items}):
        t.database("redis", "HGETALL", "cart", "HGETALL cart:?", hazard="cart store")


def _browse(t: _Trace) -> None:
    with t.http("GET", "/", "/", _visitor(t.rng)):
        with t.rpc("product-catalog", "ListProducts", {"app.products.count": len(PRODUCTS)}):
            t.database(
                "postgresql", "SELECT", "products", "SELECT id, name FROM products", hazard="catalog query"
            )
        _cart(t, t.rng.randrange(5))


def _look_at_product(t: _Trace) -> None:
    product = t.rng.choice(PRODUCTS)
    with t.http(
        "GET", "/product/{id}", f"/product/{product}", {**_visitor(t.rng), "app.product.id": product}
    ):
        _product(t, product)
        # A page without recommendations is still a page: this error never reaches the customer.
        with suppress(_Fault), t.rpc("recommendation", "ListRecommendations"):
            with t.span(
                "recommendation", "rank products", Span.SPAN_KIND_INTERNAL, {"app.model.version": 41}
            ):
                t.work(5, 40)
                t.hazard("recommendation model")
            for other in t.rng.sample(PRODUCTS, t.rng.randint(1, 4)):
                _product(t, other)


def _fill_cart(t: _Trace) -> None:
    product = t.rng.choice(PRODUCTS)
    with t.http("POST", "/api/cart", "/api/cart", {**_visitor(t.rng), "app.product.id": product}):
        _product(t, product)
        _cart(t, t.rng.randint(1, 6))


def _buy(t: _Trace) -> None:
    products = t.rng.sample(PRODUCTS, t.rng.randint(1, 4))
    amount = round(t.rng.uniform(9, 900), 2)
    order: dict[str, Value] = {"app.order.id": t.rng.randbytes(6).hex(), "app.order.amount": amount}
    with (
        t.http("POST", "/api/checkout", "/api/checkout", {**_visitor(t.rng), "app.order.products": products}),
        t.rpc(
            "checkout", "PlaceOrder", order | {"app.payment.currency": t.rng.choice(("EUR", "USD", "JPY"))}
        ),
    ):
        with t.span("checkout", "prepare order", Span.SPAN_KIND_INTERNAL, {"app.cart.items": len(products)}):
            _cart(t, len(products))
            for product in products:
                _product(t, product)
        with t.rpc("shipping", "GetQuote"):
            t.work(2, 15)
            t.hazard("shipping quote")
        with t.rpc(
            "payment", "Charge", {"app.payment.card_type": t.rng.choice(("visa", "mastercard", "amex"))}
        ):
            gateway: dict[str, Value] = {
                "http.request.method": "POST",
                "server.address": "gateway.pay.example",
            }
            with t.span("payment", "POST", Span.SPAN_KIND_CLIENT, gateway) as call:
                t.work(20, 90)
                call.events.add(name="authorization sent", time_unix_nano=t.clock_ns)
                t.hazard("card charge")
        # The order stands even when its mail does not go out.
        with suppress(_Fault), t.rpc("email", "SendOrderConfirmation"):
            t.work(5, 25)
            t.hazard("order mail")
        _publish_order(t)


def _publish_order(t: _Trace) -> None:
    """The order goes to a queue; accounting takes it from there, mostly within the same trace's life."""
    queue: dict[str, Value] = {"messaging.system": "kafka", "messaging.destination.name": "orders"}
    with t.span("checkout", "send orders", Span.SPAN_KIND_PRODUCER, queue) as sent:
        t.work(0.5, 3)
        if t.rng.random() < 0.6:
            with t.span("accounting", "process orders", Span.SPAN_KIND_CONSUMER, queue) as processed:
                t.work(2, 12)
                processed.links.add(
                    trace_id=sent.trace_id,
                    span_id=sent.span_id,
                    attributes=_attributes({"messaging.kafka.offset": t.rng.randrange(1_000_000)}),
                )


@dataclass(frozen=True, slots=True)
class _Kind:
    weight: int
    play: Callable[[_Trace], None]
    hazards: tuple[str, ...]


_KINDS = (
    _Kind(45, _browse, ("catalog query", "cart store")),
    _Kind(30, _look_at_product, ("catalog query", "recommendation model")),
    _Kind(15, _fill_cart, ("catalog query", "cart store")),
    _Kind(10, _buy, ("cart store", "catalog query", "shipping quote", "card charge", "order mail")),
)
