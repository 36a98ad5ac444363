"""The embedded Kafka and Redis: what the rest of the project and its tests lean on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from tss.embedded import EmbeddedKafka, EmbeddedRedis
from tss.errors import ConfigError, Unavailable

pytestmark = pytest.mark.embedded

WAIT_SECS = 20.0
PARTITIONS = 4


def eventually(condition: Callable[[], bool], secs: float = WAIT_SECS) -> bool:
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


# --- Kafka -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka({"spans": PARTITIONS, "spans.dlq": 1}) as broker:
        yield broker


class Member:
    """A group member with the consumer settings that suit the embedded broker."""

    def __init__(self, brokers: str) -> None:
        self.received: list[Message] = []
        self.consumer = Consumer(
            {
                "bootstrap.servers": brokers,
                "group.id": "group",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 20,
                "session.timeout.ms": 2000,
                "heartbeat.interval.ms": 300,
                "partition.assignment.strategy": "cooperative-sticky",
            }
        )
        self.consumer.subscribe(["spans"], on_assign=self._assigned)

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        committed = consumer.committed(partitions, timeout=5)
        for partition in committed:
            if partition.offset < 0:
                partition.offset = OFFSET_BEGINNING
        consumer.incremental_assign(committed)

    def poll(self) -> None:
        self.received += [m for m in self.consumer.consume(100, timeout=0.05) if m.error() is None]

    def owned(self) -> set[int]:
        return {p.partition for p in self.consumer.assignment()}


def produce(brokers: str, values: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": brokers})
    for i, value in enumerate(values):
        producer.produce("spans", value, partition=i % PARTITIONS, headers={"n": str(i).encode()})
    assert producer.flush(10) == 0


def test_topics_have_the_partitions_asked_for(kafka: EmbeddedKafka) -> None:
    """Topics exist from the start, with exactly their partitions, and the end of each can be asked for."""
    produce(kafka.brokers, [b"x"] * 6)
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    topics = admin.list_topics(timeout=5).topics
    assert {name: len(topic.partitions) for name, topic in topics.items()} == {
        "spans": PARTITIONS,
        "spans.dlq": 1,
    }
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    ends = admin.list_offsets({TopicPartition("spans", p): latest for p in range(PARTITIONS)})
    assert {p.partition: end.result(5).offset for p, end in ends.items()} == {0: 2, 1: 2, 2: 1, 3: 1}


def test_a_group_shares_commits_and_takes_over(kafka: EmbeddedKafka) -> None:
    """Two members split the partitions, see each other's commits with their metadata, and one takes over alone."""
    produce(kafka.brokers, [b"%d" % i for i in range(40)])
    first = Member(kafka.brokers)

    def all_read() -> bool:
        first.poll()
        return len(first.received) == 40

    assert eventually(all_read)
    assert first.received[0].headers()
    first.consumer.commit(
        offsets=[TopicPartition("spans", p, 10, f"clock of {p}") for p in range(PARTITIONS)],
        asynchronous=False,
    )
    second = Member(kafka.brokers)

    def shared() -> bool:
        first.poll()
        second.poll()
        return len(first.owned()) == len(
            second.owned()
        ) == PARTITIONS // 2 and first.owned() | second.owned() == set(range(PARTITIONS))

    assert eventually(shared)
    seen = second.consumer.committed([TopicPartition("spans", p) for p in range(PARTITIONS)], timeout=5)
    assert [(p.offset, p.metadata) for p in seen] == [(10, f"clock of {p}") for p in range(PARTITIONS)]
    second.consumer.close()

    def alone() -> bool:
        first.poll()
        return len(first.owned()) == PARTITIONS

    assert eventually(alone)
    first.consumer.close()
    assert not second.received  # everything had been committed


def test_a_paused_partition_waits_and_nothing_is_lost(kafka: EmbeddedKafka) -> None:
    """What arrives while a member is paused is delivered after it resumes."""
    member = Member(kafka.brokers)

    def assigned() -> bool:
        member.poll()
        return len(member.owned()) == PARTITIONS

    assert eventually(assigned)
    member.consumer.pause(member.consumer.assignment())
    produce(kafka.brokers, [b"x"] * 8)
    for _ in range(10):
        member.poll()
    assert not member.received
    member.consumer.resume(member.consumer.assignment())

    def delivered() -> bool:
        member.poll()
        return len(member.received) == 8

    assert eventually(delivered)
    member.consumer.close()


def test_a_topic_without_partitions_is_refused() -> None:
    """A topic the broker cannot make is an error that names it, not a broker without it."""
    with pytest.raises(ConfigError, match="'spans' with 0 partitions"):
        EmbeddedKafka({"spans": 0})


# --- Redis -----------------------------------------------------------------------------------------------------


def connect(url: str | None) -> redis.Redis:
    assert url
    return redis.Redis.from_url(url, decode_responses=True)


def server_pid(server: EmbeddedRedis) -> int:
    with connect(server.url) as client:
        pid: int = client.info("server")["process_id"]
        return pid


def runs(pid: int) -> bool:
    """Whether `pid` is a live process; one that ended and was not reaped yet does not count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_redis_is_ready_bounded_and_never_evicts() -> None:
    """The server answers at once on both addresses, with a memory limit at which it refuses instead of evicting."""
    with EmbeddedRedis(max_memory_bytes=64 << 20) as server, connect(server.url) as client:
        assert client.ping()
        settings = client.config_get("maxmemory*") | client.config_get("append*") | client.config_get("save")
        assert settings["maxmemory"] == str(64 << 20)
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "everysec"
        assert settings["save"] == ""
        assert client.config_get("hash-max-listpack-value") == {"hash-max-listpack-value": "1024"}
        client.set("key", "value")
        with connect(server.unix_url) as same:
            assert same.get("key") == "value"


def test_redis_without_a_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of its own temporary folder ends without a process or a file left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = EmbeddedRedis()
    pid = server_pid(server)
    assert list(tmp_path.iterdir())
    server.close()
    server.close()
    assert not runs(pid)
    assert not list(tmp_path.iterdir())


def test_redis_with_a_folder_keeps_its_data(tmp_path: Path) -> None:
    """What was written before a close is there after the next start on the same folder."""
    folder = tmp_path / "redis"
    with EmbeddedRedis(folder) as server, connect(server.url) as client:
        client.set("key", "value")
    with EmbeddedRedis(folder) as server, connect(server.url) as client:
        assert client.get("key") == "value"


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    """A second server on a folder in use is refused with the folder's name, and the first is not disturbed."""
    with EmbeddedRedis(tmp_path) as server:
        with pytest.raises(Unavailable, match=f"another server runs on {tmp_path}"):
            EmbeddedRedis(tmp_path)
        assert runs(server_pid(server))


def test_a_long_folder_path_costs_only_the_unix_socket(tmp_path: Path) -> None:
    """Where the socket's path would be too long for the system, the server runs without it."""
    with EmbeddedRedis(tmp_path / ("long" * 30)) as server, connect(server.url) as client:
        assert server.unix_url is None
        assert client.ping()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The reason the server itself gave is in the error."""
    EmbeddedRedis(tmp_path).close()
    manifest = tmp_path / "appendonlydir" / "appendonly.aof.manifest"
    manifest.write_text("nonsense\n")
    with pytest.raises(Unavailable, match=r"redis\.url.*did not start.*manifest"):
        EmbeddedRedis(tmp_path)


OWNER = """
import sys, time
from tss.embedded import EmbeddedRedis
import tempfile
tempfile.tempdir = sys.argv[1]
server = EmbeddedRedis()
print(server._server.pid, flush=True)
time.sleep(60)
"""


def test_kill_9_of_the_owner_ends_the_server_too(tmp_path: Path) -> None:
    """A process that dies without a chance to clean up leaves neither the server nor its temporary folder."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    pid = int(owner.stdout.readline())
    assert runs(pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert eventually(lambda: not runs(pid))
    assert eventually(lambda: not list(tmp_path.iterdir()))
