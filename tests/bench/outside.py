"""What a measured worker runs on: a broker, a catalog, an object store, and for every run a Redis of its own."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import redis
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.bench.generate import LAYOUTS, PARTITIONS
from tests.ports import LOOPBACK, free_port
from tests.stack import Stack, install, redis_part
from tests.stack.install import locate
from tss.embedded import EmbeddedKafka, EmbeddedRedis

REDIS_LOG_BYTES = 1 << 30  # before it is rewritten: as docker-compose.yml has it
REDIS_MAX_BYTES = 8 << 30  # never reached at the default size; a topic of millions may pile up in it
WORKER = {
    "TSS__KAFKA__AUTO_OFFSET_RESET": "earliest",
    "TSS__OBSERVABILITY__HEALTH_ADDR": LOOPBACK,
    "TSS__OBSERVABILITY__HEALTH_PORT": "0",
    "TSS__OBSERVABILITY__METRICS_ADDR": LOOPBACK,
    "TSS__OBSERVABILITY__METRICS_PORT": "0",
    "TSS__OBSERVABILITY__LOG_LEVEL": "warning",
}


@dataclass(frozen=True)
class Outside:
    """`redis` starts an empty server and yields its URL; `topic` makes one and removes it in the end."""

    brokers: str
    env: dict[str, str]
    folder: Path
    versions: dict[str, str]
    redis: Callable[[], AbstractContextManager[str]]
    topic: Callable[[str], AbstractContextManager[str]]

    def fresh_env(self, topic: str, redis_url: str) -> dict[str, str]:
        """A worker's settings, with a group and tables that nobody had before."""
        name = f"bench_{uuid.uuid4().hex[:8]}"
        return self.env | {
            "TSS__REDIS__URL": redis_url,
            "TSS__KAFKA__INPUT_TOPIC": topic,
            "TSS__KAFKA__CONSUMER_GROUP": name,
            "TSS__STORAGE__ICEBERG__TABLE_NAME": name,
            "TSS__STORAGE__ICEBERG__DECISIONS_TABLE_NAME": f"{name}_decisions",
            "TSS__STORAGE__LOCAL__PATH": str(self.folder / name),
        }


@contextmanager
def real(catalog: Literal["rest", "local"]) -> Iterator[Outside]:
    """The parts of `bin/stack`. A local catalog is SQLite and files instead of REST and MinIO."""
    install()
    stack = Stack.new(owner=os.getpid())
    stack.up()
    try:
        env = WORKER | stack.environment()
        if catalog == "local":
            env["TSS__STORAGE__STORAGE_TYPE"] = "local"
        yield Outside(
            stack.kafka.url,
            env,
            stack.folder,
            {"Kafka": _kafka_version(), "Redis": _redis_version(stack.redis.url)},
            lambda: _redis(stack.folder),
            lambda name: _topic(stack.kafka.url, name),
        )
    finally:
        stack.down()


@contextmanager
def embedded(folder: Path) -> Iterator[Outside]:
    """Nothing to install, and for small runs only: the broker drops what is over 5 MB a partition."""
    topics = dict.fromkeys(map(topic_name, LAYOUTS), PARTITIONS)
    with EmbeddedKafka(topics | {f"{name}.dlq": 1 for name in topics}) as kafka:
        env = WORKER | {
            "TSS__KAFKA__BROKERS": kafka.brokers,
            "TSS__KAFKA__SESSION_TIMEOUT_MS": "2000",
            "TSS__STORAGE__STORAGE_TYPE": "local",
        }
        yield Outside(kafka.brokers, env, folder, {"Kafka": "mock"}, _embedded_redis, _known_topic)


def topic_name(layout: str) -> str:
    return f"bench-{layout}"


def redis_info(url: str, section: str) -> dict[str, Any]:
    with redis.Redis.from_url(url, socket_timeout=10) as client:
        info: dict[str, Any] = client.info(section)
    return info


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="redis-", dir=folder) as own:
        server = redis_part(Path(own), free_port())
        server.start()
        try:
            with redis.Redis.from_url(server.url, socket_timeout=10) as client:
                client.config_set("maxmemory", REDIS_MAX_BYTES)
                client.config_set("auto-aof-rewrite-min-size", REDIS_LOG_BYTES)
            yield server.url
        finally:
            server.kill()


@contextmanager
def _embedded_redis() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@contextmanager
def _topic(brokers: str, name: str) -> Iterator[str]:
    admin = AdminClient({"bootstrap.servers": brokers, "log_level": 2})
    wanted = [NewTopic(name, PARTITIONS, 1), NewTopic(f"{name}.dlq", 1, 1)]
    for made in admin.create_topics(wanted).values():
        made.result(20)
    try:
        yield name
    finally:
        for gone in admin.delete_topics([name, f"{name}.dlq"]).values():
            gone.result(20)


@contextmanager
def _known_topic(name: str) -> Iterator[str]:
    yield name


def _redis_version(url: str) -> str:
    return str(redis_info(url, "server")["redis_version"])


def _kafka_version() -> str:
    (jar,) = (locate().kafka / "libs").glob("kafka-clients-*.jar")
    return jar.stem.removeprefix("kafka-clients-")
