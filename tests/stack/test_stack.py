"""The real parts keep what tests rely on: they answer, they are strict, and they survive kill -9 with their data."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from confluent_kafka import Consumer, Producer
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from pyiceberg.catalog import load_catalog
from pyiceberg.exceptions import NoSuchNamespaceError
from pyiceberg.schema import Schema

from tests.ports import LOOPBACK, free_port
from tests.stack import Stack, s3_filesystem
from tests.stack.stack import BUCKET, prometheus_value
from tss.buffer import LAG_SECS

pytestmark = pytest.mark.stack


@pytest.fixture
def name() -> str:
    """For a topic, a key, a namespace: no other test has it."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.mark.parametrize("part", ["redis", "minio", "catalog", "prometheus", "kafka"])
def test_part_serves(stack: Stack, part: str) -> None:
    """Each part of a started stack answers in its own protocol."""
    assert {p.name: p for p in stack.parts}[part].serves()


def test_kafka_keeps_records(stack: Stack, name: str) -> None:
    """Every acknowledged record is there after kill -9."""
    producer = Producer({"bootstrap.servers": stack.kafka.url, "acks": "all"})
    for n in range(100):
        producer.produce(name, str(n).encode())
    assert producer.flush(30) == 0
    stack.kafka.kill()
    stack.kafka.start()
    consumer = Consumer(
        {
            "bootstrap.servers": stack.kafka.url,
            "group.id": name,
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([name])
    seen: set[bytes] = set()
    deadline = time.monotonic() + 30
    while len(seen) < 100 and time.monotonic() < deadline:
        seen |= {m.value() or b"" for m in consumer.consume(100, timeout=1) if m.error() is None}
    consumer.close()
    assert seen == {str(n).encode() for n in range(100)}


def test_redis_keeps_keys(stack: Stack, name: str) -> None:
    """A key that Redis confirmed so long ago as workers wait for is there after kill -9."""
    with redis.Redis.from_url(stack.redis.url) as client:
        client.set(name, "v")
        time.sleep(LAG_SECS)  # a slow disk keeps what is confirmed from the log for two seconds
        with stack.redis.down(), pytest.raises(redis.ConnectionError):
            client.get(name)
        assert client.get(name) == b"v"


def test_minio_keeps_objects(stack: Stack, name: str) -> None:
    """A written object is there after kill -9."""
    files = s3_filesystem(stack.minio)
    with files.open_output_stream(f"{BUCKET}/{name}") as out:
        out.write(b"content")
    stack.minio.kill()
    stack.minio.start()
    with files.open_input_stream(f"{BUCKET}/{name}") as back:
        assert back.read() == b"content"


@pytest.mark.parametrize("wrong", [{"secret": "wrong-secret"}, {"key_id": "nobody"}])
def test_minio_refuses_a_wrong_key(stack: Stack, wrong: dict[str, str]) -> None:
    """Credentials are checked, so a test that passes has sent the right ones."""
    with pytest.raises(OSError, match=r"ACCESS_DENIED|InvalidAccessKeyId|SignatureDoesNotMatch"):
        s3_filesystem(stack.minio, **wrong).get_file_info(f"{BUCKET}/x")


def test_catalog_keeps_tables(stack: Stack, name: str) -> None:
    """A table is there after kill -9."""
    catalog = load_catalog("rest", type="rest", uri=stack.catalog.url)
    catalog.create_namespace(name)
    with stack.catalog.down():
        pass
    assert (name,) in catalog.list_namespaces()


def test_catalog_wants_a_namespace(stack: Stack, name: str) -> None:
    """A table in a namespace that does not exist is refused, as every real catalog does."""
    catalog = load_catalog("rest", type="rest", uri=stack.catalog.url)
    with pytest.raises(NoSuchNamespaceError):
        catalog.create_table(f"{name}.t", Schema())


@pytest.fixture
def metrics_address() -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("tss_stack_test", "served by this test", registry=registry).set(42)
    port = free_port()
    server, thread = start_http_server(port, addr=LOOPBACK, registry=registry)
    yield f"{LOOPBACK}:{port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_prometheus_scrapes_what_it_is_told(stack: Stack, metrics_address: str) -> None:
    """Addresses given to `scrape` are scraped soon, without a restart."""
    stack.scrape(metrics_address)
    deadline = time.monotonic() + 30
    while prometheus_value(stack.prometheus, "tss_stack_test") is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert prometheus_value(stack.prometheus, "tss_stack_test") == 42


def test_telemetrygen_runs(stack: Stack) -> None:
    """The OTLP producer is there."""
    assert subprocess.run([stack.telemetrygen, "traces", "--help"], capture_output=True).returncode == 0


def test_an_abandoned_stack_is_found_and_ended() -> None:
    """A stack whose test run was killed is known to bin/stack; `down` leaves no process, port or file of it."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    made = Stack.new(owner=gone.pid)
    for part in (made.redis, made.minio, made.prometheus):
        part.start()
    pids = [part.pid for part in made.parts if part.pid is not None]

    # As another process sees it: through its folder alone.
    [found] = [stack for stack in Stack.known() if stack.folder == made.folder]
    assert [part.pid for part in found.parts if part.pid is not None] == pids
    found.down()

    assert [part.pid for part in made.parts] == [None] * len(made.parts)
    for part in made.parts:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, part.port))
    assert not made.folder.exists()


def test_a_running_test_is_not_disturbed(stack: Stack) -> None:
    """The stack of a test run that goes on is not among those that `bin/stack down` would end."""
    assert stack.owner == os.getpid()
    assert stack.folder not in [known.folder for known in Stack.known()]


def test_stranger_with_the_same_pid_is_left_alone(stack: Stack, tmp_path: Path) -> None:
    """A pid file left over from a crash never leads to a signal for whoever has that pid now."""
    stranger = subprocess.Popen(["sleep", "60"])
    abandoned = Stack.new()
    try:
        abandoned.redis.folder.mkdir()
        (abandoned.redis.folder / "pid").write_text(str(stranger.pid))
        abandoned.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
