"""A stream made by OpenTelemetry's own generator, through an OTLP endpoint into Kafka, as a Collector would send it."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from confluent_kafka import Producer

from tests.e2e.conftest import both
from tests.e2e.parts import Parts, total, wait_for
from tests.ports import LOOPBACK, free_port
from tests.stack import Stack

TRACES = 200
SPANS_EACH = 5


@contextmanager
def collector(parts: Parts) -> Iterator[int]:
    """OTLP/HTTP in, the same bytes as a record out, unkeyed; the port it listens on."""
    producer = Producer({"bootstrap.servers": parts.brokers, "log_level": 2})

    class Receiver(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            return

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            producer.produce(parts.topic, body)
            producer.poll(0)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer((LOOPBACK, free_port()), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        producer.flush(30)


@both
@pytest.mark.stack
def test_traces_of_telemetrygen_arrive_whole(parts: Parts, request: pytest.FixtureRequest) -> None:
    """Every failed trace that telemetrygen makes is in the table with all its spans, every ordinary one is decided."""
    stack: Stack = request.getfixturevalue("stack")
    worker = parts.worker().ready()
    with collector(parts) as port:
        for service, status in (("failing", "Error"), ("fine", "Ok")):
            subprocess.run(
                [
                    *(stack.telemetrygen, "traces", "--otlp-http", "--otlp-insecure"),
                    *("--otlp-endpoint", f"{LOOPBACK}:{port}", "--traces", str(TRACES)),
                    *("--child-spans", str(SPANS_EACH - 1), "--status-code", status),
                    *("--service", service, "--rate", "1000"),
                ],
                check=True,
                capture_output=True,
                timeout=120,
            )
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= 2 * TRACES,
        60,
        lambda: worker.log[-3000:],
    )
    rows = worker.query(
        "SELECT service_name, count(DISTINCT trace_id) AS traces, count(*) AS spans FROM spans GROUP BY service_name"
    )
    assert rows == [{"service_name": "failing", "traces": TRACES, "spans": TRACES * SPANS_EACH}]
    (decided,) = worker.query("SELECT count(*) AS n FROM decisions")
    assert decided["n"] == 2 * TRACES
