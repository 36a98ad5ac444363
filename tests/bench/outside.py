"""What a measured worker runs on: a broker, a catalog, an object store, and for every run a Redis of its own."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import redis
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.bench.generate import LAYOUTS, PARTITIONS
from tests.ports import LOOPBACK, free_port
from tests.stack import Stack, cluster_options, install, join_cluster, redis_part
from tests.stack.install import locate
from tss.embedded import EmbeddedKafka, EmbeddedRedis

REDIS_LOG_BYTES = 1 << 30  # before it is rewritten: as docker-compose.yml has it
REDIS_LISTPACK_BYTES = 1024  # of a value: as docker-compose.yml has it
REDIS_MAX_BYTES = 8 << 30  # never reached at the default size; a topic of millions may pile up in it
WORKER = {
    "TSS__KAFKA__AUTO_OFFSET_RESET": "earliest",
    "TSS__OBSERVABILITY__HEALTH_ADDR": LOOPBACK,
    "TSS__OBSERVABILITY__METRICS_ADDR": LOOPBACK,
    "TSS__OBSERVABILITY__LOG_LEVEL": "warning",
}


@dataclass(frozen=True, slots=True)
class Servers:
    """Redis of one run."""

    urls: list[str]

    def infos(self, section: str) -> list[dict[str, Any]]:
        return [redis_info(url, section) for url in self.urls]

    @property
    def pids(self) -> list[int]:
        return [int(info["process_id"]) for info in self.infos("server")]

    @property
    def memory_bytes(self) -> int:
        return sum(int(info["used_memory"]) for info in self.infos("memory"))

    def set(self, **options: int) -> None:
        for url in self.urls:
            with redis.Redis.from_url(url, socket_timeout=10) as client:
                for name, value in options.items():
                    client.config_set(name.replace("_", "-"), value)


@dataclass(frozen=True)
class Outside:
    """`redis` starts so many empty servers, a cluster if more than one; `topic` makes one, and removes it in the end.

    A topic's settings come after its name.
    """

    brokers: str
    env: dict[str, str]
    folder: Path
    versions: dict[str, str]
    redis: Callable[[int], AbstractContextManager[Servers]]
    topic: Callable[..., AbstractContextManager[str]]

    def fresh_env(self, topic: str, servers: Servers) -> dict[str, str]:
        """A worker's settings, with a group and tables that nobody had before."""
        name = f"bench_{uuid.uuid4().hex[:8]}"
        return self.env | {
            "TSS__REDIS__URL": servers.urls[0],
            "TSS__REDIS__CLUSTER_ENABLED": str(len(servers.urls) > 1).lower(),
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
            lambda nodes: _redis(stack.folder, nodes),
            lambda name, **settings: _topic(stack.kafka.url, name, settings),
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
def _redis(folder: Path, nodes: int) -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="redis-", dir=folder) as own, ExitStack() as ends:
        parts = [redis_part(Path(own, str(n)), free_port()) for n in range(nodes)]
        for part in parts:
            if nodes > 1:
                part.command += cluster_options()
            ends.callback(part.kill)
            part.start()
        if nodes > 1:
            join_cluster(parts)
        servers = Servers([part.url for part in parts])
        servers.set(
            maxmemory=REDIS_MAX_BYTES // nodes,
            auto_aof_rewrite_min_size=REDIS_LOG_BYTES,
            hash_max_listpack_value=REDIS_LISTPACK_BYTES,
        )
        yield servers


@contextmanager
def _embedded_redis(nodes: int) -> Iterator[Servers]:
    assert nodes == 1, "the embedded server is no cluster"
    with EmbeddedRedis() as server:
        yield Servers([server.url])


@contextmanager
def _topic(brokers: str, name: str, settings: Mapping[str, int]) -> Iterator[str]:
    admin = AdminClient({"bootstrap.servers": brokers, "log_level": 2})
    own = {key.replace("_", "."): str(value) for key, value in settings.items()}
    wanted = [NewTopic(name, PARTITIONS, 1, config=own), NewTopic(f"{name}.dlq", 1, 1)]
    for made in admin.create_topics(wanted).values():
        made.result(20)
    try:
        yield name
    finally:
        for gone in admin.delete_topics([name, f"{name}.dlq"]).values():
            gone.result(20)


@contextmanager
def _known_topic(name: str, **_: int) -> Iterator[str]:
    yield name


def _redis_version(url: str) -> str:
    return str(redis_info(url, "server")["redis_version"])


def _kafka_version() -> str:
    (jar,) = (locate().kafka / "libs").glob("kafka-clients-*.jar")
    return jar.stem.removeprefix("kafka-clients-")
