"""Sends a few traces to Kafka, so that there is something to sample: `bin/simple_producer --help`.

Each trace is one record without a key: OTLP `TracesData`, as a Collector's Kafka exporter would send it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status, TracesData

TIMEOUT_SECS = 30.0
"""AutoMQ's first answer about a topic is slow; a broker that stays silent for so long is not there."""

PATIENCE_SECS = 5.0
"""After so much silence the user is told what is being waited for."""

SLOW_MS = 6000.0
"""Above the default of `sampling.latency_threshold_ms`, 5000."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when every trace was delivered, otherwise 1."""
    options = _options(argv)
    print("=== Simple Trace Producer ===")
    try:
        return _Run(options).send()
    except _Failed as failed:
        print(f"simple_producer: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("simple_producer: interrupted", file=sys.stderr)
        return 130


def make_trace(
    rng: random.Random, end_ns: int, *, service: str, spans: int, error: bool, duration_ms: float
) -> bytes:
    """One trace of `service` that ended at `end_ns`, as a record value: a root and `spans` - 1 children, in a row.

    With `error`, the root and its last child have status ERROR.
    """
    trace_id = rng.randbytes(16)
    duration_ns = round(duration_ms * 1e6)
    root = Span(
        trace_id=trace_id,
        span_id=rng.randbytes(8),
        name="GET /demo",
        kind=Span.SPAN_KIND_SERVER,
        start_time_unix_nano=end_ns - duration_ns,
        end_time_unix_nano=end_ns,
        attributes=[
            KeyValue(key="http.request.method", value=AnyValue(string_value="GET")),
            KeyValue(key="http.route", value=AnyValue(string_value="/demo")),
            KeyValue(key="http.response.status_code", value=AnyValue(int_value=500 if error else 200)),
        ],
    )
    step_ns = duration_ns // spans
    children = [
        Span(
            trace_id=trace_id,
            span_id=rng.randbytes(8),
            parent_span_id=root.span_id,
            name=f"step {i}",
            kind=Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=root.start_time_unix_nano + i * step_ns,
            end_time_unix_nano=root.start_time_unix_nano + (i + 1) * step_ns,
        )
        for i in range(1, spans)
    ]
    trace = [root, *children]
    if error:
        for span in {0: root, len(trace) - 1: trace[-1]}.values():
            span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message="simulated failure"))
    resource = Resource(attributes=[KeyValue(key="service.name", value=AnyValue(string_value=service))])
    scope = InstrumentationScope(name="tss.simple_producer")
    return TracesData(
        resource_spans=[ResourceSpans(resource=resource, scope_spans=[ScopeSpans(scope=scope, spans=trace)])]
    ).SerializeToString()


class _Failed(Exception):
    """The message is for the user and names the option."""


@dataclass
class _Delivery:
    """What became of a trace: where it landed, or why it did not; neither while its report is awaited."""

    label: str
    landed: tuple[int, int] | None = None
    error: KafkaError | None = None


class _Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._rng = random.Random(options.seed)
        self._deliveries: list[_Delivery] = []
        self._printed = 0
        self._producer = Producer(
            {
                "bootstrap.servers": options.brokers,
                "client.id": "tss-simple-producer",
                "message.timeout.ms": round(options.timeout * 1000),
                "linger.ms": 5,
                "log_level": 0,  # what matters is said by us, once
            }
        )

    def send(self) -> int:
        options = self._options
        self._connect()
        print("Sending traces...", flush=True)
        started = time.monotonic()
        for i in range(options.traces):
            if options.rate:
                self._report(until=started + i / options.rate)
            self._produce(i)
            self._report(until=0)
        self._report(until=time.monotonic() + options.timeout + 1)
        errors = sum(_every(options.errors_every, i) for i in range(options.traces))
        undelivered = len(self._deliveries) - sum(d.landed is not None for d in self._deliveries)
        if undelivered:
            why = next((d.error.str() for d in self._deliveries if d.error), "no report came back")
            raise _Failed(
                f"{undelivered} of {options.traces} traces were not delivered to topic {options.topic!r} "
                f"at {options.brokers}: {why} (check --topic and --brokers)"
            )
        print(f"Done! Sent {options.traces} traces ({errors} with errors)")
        return 0

    def _connect(self) -> None:
        deadline = time.monotonic() + self._options.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                self._producer.list_topics(timeout=min(PATIENCE_SECS, max(left, 0.1)))
                return
            except KafkaException as e:
                if left <= PATIENCE_SECS:
                    raise _Failed(
                        f"no Kafka broker answered at {self._options.brokers} within {self._options.timeout:g} s "
                        f"({e.args[0].str()}): start it, or name another with --brokers or TSS__KAFKA__BROKERS"
                    ) from None
            print(
                f"Waiting for Kafka at {self._options.brokers} ({left:.0f} s left)",
                file=sys.stderr,
                flush=True,
            )

    def _produce(self, i: int) -> None:
        options = self._options
        error = _every(options.errors_every, i)
        slow = _every(options.slow_every, i)
        duration_ms = options.slow_ms * self._rng.uniform(1.01, 1.3) if slow else self._rng.uniform(20, 200)
        value = make_trace(
            self._rng,
            time.time_ns(),
            service=options.service,
            spans=options.spans,
            error=error,
            duration_ms=duration_ms,
        )
        delivery = _Delivery("ERROR" if error else "SLOW" if slow else "OK")

        def delivered(failure: KafkaError | None, message: Message) -> None:
            if failure:
                delivery.error = failure
            else:
                delivery.landed = (message.partition() or 0, message.offset() or 0)

        while True:
            try:
                self._producer.produce(options.topic, value, on_delivery=delivered)
            except BufferError:  # the local queue is full: let some go out first
                self._producer.poll(0.1)
                continue
            except KafkaException as e:
                raise _Failed(
                    f"trace {i} cannot be sent as one record of {len(value):,} bytes: {e.args[0].str()} "
                    "(use fewer --spans)"
                ) from None
            self._deliveries.append(delivery)
            return

    def _report(self, until: float) -> None:
        """Print what was delivered, in the order of the traces; wait for reports or for `until` to come."""
        while True:
            self._producer.poll(max(0.0, min(0.1, until - time.monotonic())))
            while self._printed < len(self._deliveries):
                delivery = self._deliveries[self._printed]
                if delivery.landed:
                    partition, offset = delivery.landed
                    print(
                        f"  [{delivery.label}] Trace {self._printed} -> partition {partition}, offset {offset}",
                        flush=True,
                    )
                elif delivery.error is None:
                    break
                self._printed += 1
            finished = self._printed == self._options.traces
            if finished or time.monotonic() >= until:
                return


def _every(n: int, i: int) -> bool:
    """Whether trace `i` is one of every `n`, counting from 0; `n` = 0 is never."""
    return n > 0 and i % n == 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="simple_producer", description="Send a few OTLP traces to Kafka, one record each."
    )
    parser.add_argument(
        "--traces", type=_count, default=10, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--spans", type=_count, default=3, metavar="N", help="spans in each trace (default: %(default)s)"
    )
    parser.add_argument(
        "--errors-every",
        type=_count_or_none,
        default=3,
        metavar="N",
        help="every Nth trace has an error, from the first on; 0 = none (default: %(default)s)",
    )
    slow = parser.add_mutually_exclusive_group()
    slow.add_argument(
        "--slow-every",
        type=_count_or_none,
        default=0,
        metavar="N",
        help="every Nth trace is slow (default: none)",
    )
    slow.add_argument("--slow", dest="slow_every", action="store_const", const=1, help="every trace is slow")
    parser.add_argument(
        "--slow-ms",
        type=_positive,
        default=SLOW_MS,
        metavar="MS",
        help="a slow trace lasts longer than this (default: %(default)g)",
    )
    parser.add_argument("--service", default="demo-service", help="service.name (default: %(default)s)")
    parser.add_argument(
        "--rate",
        type=_positive,
        metavar="N",
        help="traces a second (default: as fast as the broker takes them)",
    )
    parser.add_argument(
        "--brokers",
        default=os.environ.get("TSS__KAFKA__BROKERS") or "localhost:9092",
        metavar="HOST:PORT,...",
        help="default: TSS__KAFKA__BROKERS or localhost:9092 (now: %(default)s)",
    )
    parser.add_argument(
        "--topic",
        default=os.environ.get("TSS__KAFKA__INPUT_TOPIC") or "otel-traces-raw",
        help="default: TSS__KAFKA__INPUT_TOPIC or otel-traces-raw (now: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, help="the same seed makes the same traces (default: always others)"
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=TIMEOUT_SECS,
        metavar="SECS",
        help="how long to wait for the broker (default: %(default)g)",
    )
    options = parser.parse_args(argv)
    if options.brokers == "embedded":
        parser.error(
            "the embedded broker lives inside the `tss` that started it: give --brokers the host:port it logged, "
            "or use `tss demo`, which sends traces itself"
        )
    return options


def _count_or_none(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
