"""Every end-to-end test runs twice: on the embedded parts, and on the real ones when they are demanded."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.e2e.parts import Parts, ended
from tests.stack import Stack
from tss.embedded import EmbeddedKafka, EmbeddedRedis

PARTITIONS = 8
REDIS_DATABASES = 16

# Short waits, so that a test takes seconds; the real defaults are for people.
QUICK = {
    "TSS__APP__INACTIVITY_TIMEOUT_SECS": "3",
    "TSS__APP__EVALUATION_INTERVAL_SECS": "0.2",
    "TSS__APP__LEASE_SECS": "3",
    "TSS__KAFKA__AUTO_OFFSET_RESET": "earliest",
    "TSS__KAFKA__SESSION_TIMEOUT_MS": "6000",
    "TSS__STORAGE__FLUSH_INTERVAL_SECS": "0.5",
}

_databases = iter(range(1, 10_000))


def embedded_parts(folder: Path) -> Iterator[Parts]:
    topic = "otel-traces-raw"
    with (
        EmbeddedKafka({topic: PARTITIONS, f"{topic}.dlq": 1}) as kafka,
        EmbeddedRedis(folder / "redis") as redis,
    ):
        env = QUICK | {
            "TSS__KAFKA__BROKERS": kafka.brokers,
            "TSS__KAFKA__SESSION_TIMEOUT_MS": "2000",  # the mock broker rebalances only after that
            "TSS__REDIS__URL": redis.url,
            "TSS__STORAGE__STORAGE_TYPE": "local",
            "TSS__STORAGE__LOCAL__PATH": str(folder / "table"),
        }
        with ended(Parts("embedded", kafka.brokers, topic, env, folder)) as parts:
            yield parts


def real_parts(stack: Stack, folder: Path, *, topic: str, table: str) -> Iterator[Parts]:
    """The session's stack, with a topic, a group, a Redis database and tables of the test's own."""
    admin = AdminClient({"bootstrap.servers": stack.kafka.url})
    wanted = [NewTopic(topic, PARTITIONS, 1), NewTopic(f"{topic}.dlq", 1, 1)]
    for made in admin.create_topics(wanted).values():
        made.result(20)
    base = stack.redis.url.rsplit("/", 1)[0]
    env = QUICK | stack.environment() | {
        "TSS__REDIS__URL": f"{base}/{next(_databases) % REDIS_DATABASES}",
        "TSS__KAFKA__INPUT_TOPIC": topic,
        "TSS__KAFKA__CONSUMER_GROUP": f"group-{topic}",
        "TSS__STORAGE__ICEBERG__TABLE_NAME": table,
        "TSS__STORAGE__ICEBERG__DECISIONS_TABLE_NAME": f"{table}_decisions",
    }  # fmt: skip
    with ended(Parts("stack", stack.kafka.url, topic, env, folder)) as parts:
        yield parts


both = pytest.mark.parametrize(
    "parts",
    [pytest.param("embedded", marks=pytest.mark.embedded), pytest.param("stack", marks=pytest.mark.stack)],
    indirect=True,
)


@pytest.fixture
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Parts]:
    if request.param == "embedded":
        yield from embedded_parts(tmp_path)
        return
    fresh = uuid.uuid4().hex[:8]
    real: Callable[..., Iterator[Parts]] = real_parts
    yield from real(
        request.getfixturevalue("stack"), tmp_path, topic=f"traces-{fresh}", table=f"spans_{fresh}"
    )
