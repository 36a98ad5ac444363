"""Kafka as the source uses it: one suite over the embedded broker and over Apache Kafka.

Offsets are looked at with a client of the test's own. Where partitions begin, in short: no commit → a start position
is committed first; a commit of this epoch → there; of another → back to its oldest pending record, never forward.
"""

from __future__ import annotations

import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import ANY

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from tests.ports import LOOPBACK, free_port
from tests.stack import Stack
from tss import config
from tss.embedded import EmbeddedKafka
from tss.errors import Outlived, Unavailable
from tss.model import DeadLetter, Record, epoch_name
from tss.source import CLIENTS_REPLACED_SECS, Clients, Commit, Ends, Source, lowest_commit

EPOCH = "life-1"
TOPIC = "spans"
PARTITIONS = 4
WAIT_SECS = 30.0
VERDICT_SECS = 3600.0
T0_MS = 1_790_000_000_000


@dataclass
class Reader:
    """Polls a source and keeps the batches it gave."""

    source: Source
    batches: list[list[Record]] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return [record for batch in self.batches for record in batch]

    def poll(self) -> None:
        self.batches.append(self.source.poll(0.1))

    def until(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            self.poll()
            return condition()

        eventually(holds)

    def read(self, count: int) -> list[Record]:
        """The next records, once there are so many; then it starts anew."""
        self.until(lambda: len(self.records) >= count)
        records, self.batches = self.records, []
        return records

    def assigned(self, count: int) -> None:
        self.until(lambda: len(self.source.assigned) == count)

    def silence(self, secs: float = 1.0) -> list[Record]:
        """What comes within this time, which should be nothing."""
        deadline = time.monotonic() + secs
        self.until(lambda: time.monotonic() > deadline)
        return self.records


@dataclass
class Kafka:
    """A topic of the test's own on some brokers; sources made here are closed when the test ends."""

    brokers: str
    topic: str
    embedded: bool
    cleanup: ExitStack
    group: str = field(default_factory=lambda: f"g{uuid.uuid4().hex[:8]}")

    def settings(self, **more: Any) -> config.Kafka:
        given = {
            "brokers": self.brokers,
            "input_topic": self.topic,
            "consumer_group": self.group,
            "auto_offset_reset": "earliest",
            "session_timeout_ms": 6000,
        }
        return config.Kafka(**given | more)

    def source(
        self, epoch: str | None = EPOCH, revoked: Callable[[set[int]], None] = lambda lost: None, **more: Any
    ) -> Source:
        """Joined, unless there is no epoch yet."""
        source = Source(
            self.settings(**more), embedded=self.embedded, revoked=revoked, verdict_secs=VERDICT_SECS
        )
        self.cleanup.callback(source.close)
        if epoch is not None:
            source.begin(epoch)
        return source

    def reader(self, epoch: str | None = EPOCH, **more: Any) -> Reader:
        return Reader(self.source(epoch, **more))

    def produce(self, count: int, *, partition: int = 0, first: int = 0, size: int = 0) -> None:
        """Records whose value is their number, a second of log time apart, from `T0_MS` on."""
        producer = Producer({"bootstrap.servers": self.brokers, "linger.ms": 50})
        for n in range(first, first + count):
            value = f"{n}".encode() + b"." * size
            producer.produce(self.topic, value, partition=partition, timestamp=T0_MS + n * 1000)
        assert producer.flush(WAIT_SECS) == 0

    def client(self) -> Consumer:
        """A consumer that looks at the group's offsets without joining it."""
        client = Consumer(
            {"bootstrap.servers": self.brokers, "group.id": self.group, "enable.auto.commit": False}
        )
        self.cleanup.callback(client.close)
        return client

    def committed(self, partition: int = 0) -> tuple[int, str | None]:
        (found,) = self.client().committed([TopicPartition(self.topic, partition)], timeout=WAIT_SECS)
        return found.offset, found.metadata

    def commit(self, offset: int, metadata: str = "", partition: int = 0) -> None:
        position = TopicPartition(self.topic, partition, offset, metadata=metadata)
        self.client().commit(offsets=[position], asynchronous=False)


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.embedded),
        pytest.param("kafka", marks=pytest.mark.stack),
    ]
)
def kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    yield from one_partition_or_more(request, request.param, 1)


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.embedded),
        pytest.param("kafka", marks=pytest.mark.stack),
    ]
)
def wide_kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """With several partitions."""
    yield from one_partition_or_more(request, request.param, PARTITIONS)


@pytest.fixture
def real_kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """For what the embedded broker cannot do."""
    yield from one_partition_or_more(request, "kafka", 1)


def one_partition_or_more(request: pytest.FixtureRequest, kind: str, partitions: int) -> Iterator[Kafka]:
    with ExitStack() as cleanup:
        if kind == "embedded":
            broker = cleanup.enter_context(EmbeddedKafka({TOPIC: partitions, f"{TOPIC}.dlq": 1}))
            yield Kafka(broker.brokers, TOPIC, True, cleanup)
            return
        stack: Stack = request.getfixturevalue("stack")
        kafka = Kafka(stack.kafka.url, f"t{uuid.uuid4().hex[:12]}", False, cleanup)
        make_topic(kafka, kafka.topic, partitions)
        yield kafka


def make_topic(kafka: Kafka, topic: str, partitions: int = 1, settings: dict[str, str] | None = None) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    for future in admin.create_topics([NewTopic(topic, partitions, config=settings or {})]).values():
        future.result(WAIT_SECS)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"


def ends_of(source: Source) -> Ends:
    found: list[Ends] = []

    def answered() -> bool:
        ends = source.ends()
        found.extend([ends] if ends else [])
        return bool(found)

    eventually(answered)
    return found[0]


def numbers(records: Sequence[Record]) -> list[int]:
    return [int((record.value or b"").rstrip(b".")) for record in records]


# --- where partitions begin --------------------------------------------------------------------------------------


def test_a_new_group_reads_from_the_oldest(kafka: Kafka) -> None:
    """With `earliest` everything is read; the position is committed before the first record, as old as can be."""
    kafka.produce(5)
    reader = kafka.reader()
    reader.assigned(1)
    assert Commit.read(*kafka.committed()) == Commit(0, EPOCH, 0, ANY)
    reader.source.close()
    records = kafka.reader().read(5)
    assert [(r.partition, r.offset, r.timestamp_ms) for r in records] == [
        (0, n, T0_MS + n * 1000) for n in range(5)
    ]
    assert numbers(records) == [0, 1, 2, 3, 4]


def test_a_new_group_reads_from_now(kafka: Kafka) -> None:
    """With `latest` old records are left out, but none that came after the group's first look, not even by a crash."""
    kafka.produce(3)
    before_ms = int(time.time() * 1000)
    reader = kafka.reader(auto_offset_reset="latest")
    reader.assigned(1)
    commit = Commit.read(*kafka.committed())
    assert (commit.offset, commit.epoch) == (3, EPOCH)
    assert commit.low_ms is not None
    assert before_ms <= commit.low_ms <= int(time.time() * 1000)
    assert reader.silence() == []
    reader.source.close()
    kafka.produce(2, first=3)
    assert numbers(kafka.reader(auto_offset_reset="latest").read(2)) == [3, 4]


def test_the_same_life_goes_on_at_its_offset(kafka: Kafka) -> None:
    """A commit of this epoch is where reading goes on; its metadata tells what it was true for, and when it was made."""
    kafka.produce(6)
    reader = kafka.reader()
    reader.read(6)
    before_ms = int(time.time() * 1000)
    reader.source.commit({0: 4}, EPOCH, T0_MS + 123, wait=True)
    reader.source.close()
    commit = Commit.read(*kafka.committed())
    assert commit == Commit(4, EPOCH, T0_MS + 123, ANY)
    assert before_ms <= (commit.at_ms or 0) <= int(time.time() * 1000)
    assert lowest_commit(kafka.settings()) == T0_MS + 123
    assert numbers(kafka.reader().read(2)) == [4, 5]


def test_a_commit_of_other_software_is_followed(kafka: Kafka) -> None:
    """An offset that an operator has set with Kafka's own tools counts, in any epoch."""
    kafka.produce(6)
    kafka.commit(5)
    assert numbers(kafka.reader().read(1)) == [5]
    assert lowest_commit(kafka.settings()) is None


@pytest.mark.stack
@pytest.mark.parametrize(
    ("committed", "low_secs", "first"),
    [(8, 3, 3), (8, 2.5, 3), (8, 0, 0), (8, -1000, 0), (2, 5, 2), (8, 9, 8), (8, 5000, 8)],
)
def test_another_life_goes_back(real_kafka: Kafka, committed: int, low_secs: float, first: int) -> None:
    """After Redis was lost, reading begins at the oldest record that it still held, never above the commit."""
    real_kafka.produce(10)
    low_ms = T0_MS + int(low_secs * 1000)
    real_kafka.commit(committed, Commit(committed, "life-0", low_ms, T0_MS).metadata)
    assert numbers(real_kafka.reader().read(10 - first)) == list(range(first, 10))
    assert real_kafka.committed()[0] == committed, "the old commit stands until the new life has something"


@pytest.mark.stack
def test_a_life_that_ends_while_reading(real_kafka: Kafka) -> None:
    """`begin` with another epoch takes the partitions back to their start by the same rule, paused or not."""
    real_kafka.produce(10)
    reader = real_kafka.reader()
    reader.read(10)
    reader.source.commit({0: 7}, EPOCH, T0_MS + 4000, wait=True)
    reader.source.pause()
    reader.source.begin("life-2")
    assert reader.silence() == []
    reader.source.resume()
    assert numbers(reader.read(6)) == [4, 5, 6, 7, 8, 9]
    reader.source.begin("life-3")
    assert numbers(reader.read(6)) == [4, 5, 6, 7, 8, 9]


def test_the_same_life_begins_again(kafka: Kafka) -> None:
    """`begin` after a fault forgets what was polled and not committed."""
    kafka.produce(4)
    reader = kafka.reader()
    reader.read(4)
    reader.source.commit({0: 1}, EPOCH, T0_MS, wait=True)
    reader.source.begin(EPOCH)
    assert numbers(reader.read(3)) == [1, 2, 3]


def hours_ago_ms(hours: float) -> int:
    return int(time.time() * 1000 - hours * 3_600_000)


# When the epoch began and when the offset was committed, in hours, and whether that was in the same epoch.
@pytest.mark.parametrize(
    ("epoch_hours", "commit_hours", "same", "read_on"),
    [
        (9.0, 0.4, True, True),
        (9.0, 0.6, True, False),
        (0.4, 9.0, True, True),
        (0.4, 9.0, False, True),
        (0.6, 0.4, False, False),
    ],
)
def test_what_may_have_been_forgotten_is_not_read(
    kafka: Kafka, epoch_hours: float, commit_hours: float, same: bool, read_on: bool
) -> None:
    """Half a verdict's time after the commit and after the epoch's beginning, nothing is read but in a new epoch."""
    kafka.produce(3)
    epoch = epoch_name(hours_ago_ms(epoch_hours), "a")
    at_ms = hours_ago_ms(commit_hours)
    kafka.commit(1, Commit(1, epoch if same else "life-0", T0_MS + 1000, at_ms).metadata)
    reader = kafka.reader(epoch)
    if not read_on:
        with pytest.raises(Outlived):
            reader.silence(WAIT_SECS)
        assert not reader.records
        with pytest.raises(Outlived):
            reader.source.begin(epoch)
        reader.source.begin(epoch_name(hours_ago_ms(0), "b"))
        reader.source.resume()
    assert numbers(reader.read(2)) == [1, 2]


def test_a_read_log_is_not_forgotten(kafka: Kafka) -> None:
    """An old commit at the end of a partition is no reason for a new epoch: nothing can be delivered again."""
    kafka.produce(3)
    epoch = epoch_name(hours_ago_ms(9), "a")
    kafka.commit(3, Commit(3, epoch, T0_MS, hours_ago_ms(8)).metadata)
    reader = kafka.reader(epoch)
    reader.assigned(1)
    kafka.produce(1, first=3)
    assert numbers(reader.read(1)) == [3]


@pytest.mark.parametrize(
    "metadata",
    [None, "", "hello", "tss1 a", "tss1 a 5", "tss2 a 5 5", "tss1 a x 5", "tss1 a 5 x", "tss1 a None 5"],
)
def test_strange_metadata_is_no_fault(metadata: str | None) -> None:
    """Whatever stands in a commit that is not ours, its offset is taken."""
    assert Commit.read(7, metadata) == Commit(7, None, None, None)


@pytest.mark.stack
def test_records_that_fell_off_are_said(real_kafka: Kafka, caplog: pytest.LogCaptureFixture) -> None:
    """When retention was faster than tss the loss is an error in the log, and reading goes on at the oldest record."""
    real_kafka.produce(10)
    real_kafka.commit(2, Commit(2, EPOCH, T0_MS, T0_MS).metadata)
    admin = AdminClient({"bootstrap.servers": real_kafka.brokers})
    for future in admin.delete_records([TopicPartition(real_kafka.topic, 0, 5)]).values():
        future.result(WAIT_SECS)
    assert numbers(real_kafka.reader().read(5)) == [5, 6, 7, 8, 9]
    (said,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "Records are gone" in said.getMessage()
    assert "partition 0" in said.getMessage()


# --- reading -----------------------------------------------------------------------------------------------------


def test_batches_are_bounded_by_records(kafka: Kafka) -> None:
    """No batch is larger than asked for, none is lost between two, and the order stays."""
    kafka.produce(1000)
    reader = kafka.reader(batch_max_records=70)
    reader.until(lambda: len(reader.records) == 1000)
    assert max(map(len, reader.batches)) == 70
    assert numbers(reader.records) == list(range(1000))


def test_batches_are_bounded_by_bytes(kafka: Kafka) -> None:
    """Large records make small batches: the bound is passed by a record or so, whatever waits in the client."""
    kafka.produce(200, size=20_000)
    reader = kafka.reader(batch_max_bytes=1 << 20)
    reader.until(lambda: len(reader.records) == 200)
    sizes = [sum(len(record.value or b"") for record in batch) for batch in reader.batches]
    assert max(sizes) <= (1 << 20) + 20_010
    assert numbers(reader.records) == list(range(200))


def test_partitions_of_a_backlog_are_read_side_by_side(wide_kafka: Kafka) -> None:
    """None is read to its end before another has begun: pieces of a trace on several of them meet in a batch."""
    for partition in range(PARTITIONS):
        wide_kafka.produce(1, partition=partition)
    reader = wide_kafka.reader()
    reader.read(PARTITIONS)  # all have found their positions, so all begin with the backlog at the same time
    reader.source.pause()
    for partition in range(PARTITIONS):
        wide_kafka.produce(200, partition=partition, size=20_000)
    reader.source.resume()
    order = [record.partition for record in reader.read(200 * PARTITIONS)]
    begun = [order.index(partition) for partition in range(PARTITIONS)]
    ended = [len(order) - order[::-1].index(partition) for partition in range(PARTITIONS)]
    assert max(begun) < min(ended)


def test_tombstones_are_records(kafka: Kafka) -> None:
    """A record without a value is read like any other: its offset counts."""
    producer = Producer({"bootstrap.servers": kafka.brokers})
    producer.produce(kafka.topic, None, key=b"k", partition=0)
    producer.flush(WAIT_SECS)
    (record,) = kafka.reader().read(1)
    assert (record.offset, record.value) == (0, None)


def test_a_paused_source_stays_in_the_group(wide_kafka: Kafka) -> None:
    """While paused nothing is read and nothing is lost; partitions that come meanwhile are paused, too."""
    wide_kafka.produce(3)
    reader = wide_kafka.reader()
    reader.source.pause()
    reader.assigned(PARTITIONS)
    assert reader.silence(2.5) == []
    assert reader.source.paused
    assert len(reader.source.assigned) == PARTITIONS
    reader.source.resume()
    assert numbers(reader.read(3)) == [0, 1, 2]


def test_the_end_is_known(wide_kafka: Kafka) -> None:
    """`ends` tells, once the brokers have answered, where each partition ends; `reached` how far reading has come."""
    wide_kafka.produce(3, partition=1)
    reader = wide_kafka.reader()
    source = reader.source
    assert source.ends() is None, "nothing was asked"
    reader.assigned(PARTITIONS)
    reader.read(3)
    source.ask_ends(77)
    source.ask_ends(88)
    ends = ends_of(source)
    assert ends.asked_ms == 77, "one question at a time"
    assert ends.high == {0: 0, 1: 3, 2: 0, 3: 0} == source.reached
    assert source.ends() is None
    wide_kafka.produce(1, partition=2)
    source.ask_ends(99)
    assert (ends_of(source).high[2], source.reached[2]) == (1, 0)


# --- the group ---------------------------------------------------------------------------------------------------


def test_two_share_the_partitions(wide_kafka: Kafka) -> None:
    """A second process takes half; the first is told before it gives up; what it could commit is not read twice."""
    wide_kafka.produce(5, partition=0)
    wide_kafka.produce(5, partition=3)
    told: set[int] = set()

    def revoked(partitions: set[int]) -> None:
        assert partitions <= one.source.assigned
        told.update(partitions)
        one.source.commit({p: one.source.reached[p] for p in partitions}, EPOCH, T0_MS, wait=True)

    one = wide_kafka.reader(revoked=revoked)
    one.until(lambda: len(one.records) == 10)
    two = wide_kafka.reader()

    def until(condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            one.poll()
            return condition()

        two.until(holds)

    until(lambda: (len(one.source.assigned), len(two.source.assigned)) == (2, 2))
    assert told == two.source.assigned
    assert one.source.assigned | two.source.assigned == set(range(PARTITIONS))
    wide_kafka.produce(2, partition=0, first=5)
    wide_kafka.produce(2, partition=3, first=5)
    everything = [(p, n) for p in (0, 3) for n in range(7)]

    def seen() -> list[tuple[int, int]]:
        return sorted((r.partition, r.offset) for r in one.records + two.records)

    until(lambda: set(seen()) >= set(everything))
    if not one.source.commits:  # the mock broker may refuse, as the rebalance has begun
        assert seen() == everything


def test_who_leaves_is_not_waited_for(wide_kafka: Kafka) -> None:
    """`close` hands the partitions over at once, not after a session timeout."""
    one = wide_kafka.reader(session_timeout_ms=30_000)
    one.assigned(PARTITIONS)
    one.source.close()
    started = time.monotonic()
    wide_kafka.reader(session_timeout_ms=30_000).assigned(PARTITIONS)
    assert time.monotonic() - started < 10


def test_commits_are_counted(kafka: Kafka) -> None:
    """The outcome of a commit that was not waited for is reported; one for a partition of another is not sent."""
    kafka.produce(2)
    reader = kafka.reader()
    reader.read(2)
    reader.source.commit({0: 2}, EPOCH, T0_MS, wait=False)
    reader.until(lambda: bool(reader.source.commits))
    assert reader.source.commits == [None]
    assert Commit.read(*kafka.committed()) == Commit(2, EPOCH, T0_MS, ANY)
    reader.source.commit({7: 2}, EPOCH, T0_MS, wait=True)
    assert kafka.committed(7)[0] < 0


@pytest.mark.stack
def test_lost_partitions_are_told(real_kafka: Kafka) -> None:
    """A member that the group went on without is told, commits nothing any more, and reads again from the commit."""
    real_kafka.produce(3)
    told: list[set[int]] = []

    def revoked(partitions: set[int]) -> None:
        told.append(partitions)
        reader.source.commit(dict.fromkeys(partitions, 3), EPOCH, T0_MS, wait=True)

    reader = real_kafka.reader(revoked=revoked)
    reader.read(3)
    expel_member(real_kafka)
    assert numbers(reader.read(3)) == [0, 1, 2]
    assert told == [{0}]
    assert real_kafka.committed()[0] == 0


def expel_member(kafka: Kafka) -> None:
    """Tells the coordinator that the group's only member has left, as it decides by itself about a silent one."""
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    (member,) = admin.describe_consumer_groups([kafka.group])[kafka.group].result(WAIT_SECS).members
    texts = [text.encode() for text in ("test", kafka.group, member.member_id)]
    leave_group, version, correlation = 13, 1, 1
    request = struct.pack(">hhi", leave_group, version, correlation)
    request += b"".join(struct.pack(">h", len(text)) + text for text in texts)
    host, _, port = kafka.brokers.partition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_SECS) as broker:
        broker.sendall(struct.pack(">i", len(request)) + request)
        answer = broker.makefile("rb").read(4 + 4 + 4 + 2)
    assert struct.unpack(">iiih", answer)[3] == 0


# --- topics ------------------------------------------------------------------------------------------------------


def test_the_partitions_are_counted(wide_kafka: Kafka) -> None:
    """How many partitions the topic has, before and without joining the group."""
    source = wide_kafka.source(epoch=None)
    assert source.partition_count == 0
    source.refresh_partition_count(0.0)
    assert source.partition_count == PARTITIONS
    assert source.fault is None


@pytest.mark.stack
def test_a_missing_topic_is_named(real_kafka: Kafka) -> None:
    """A topic that is not there is said by name, is not made by looking, and is read once it exists."""
    topic = f"{real_kafka.topic}-later"
    reader = real_kafka.reader(input_topic=topic)
    for second in range(3):
        assert reader.silence() == []
        reader.source.refresh_partition_count(float(second))
        said = reader.source.fault or ""
        assert topic in said
        assert "kafka.input_topic" in said
    admin = AdminClient({"bootstrap.servers": real_kafka.brokers})
    assert topic not in admin.list_topics(timeout=WAIT_SECS).topics
    make_topic(real_kafka, topic, 2)
    later = Kafka(real_kafka.brokers, topic, False, real_kafka.cleanup)
    later.produce(3)
    assert numbers(reader.read(3)) == [0, 1, 2]
    reader.source.refresh_partition_count(100.0)
    assert reader.source.partition_count == 2
    assert not reader.source.fault


def test_no_broker_is_said() -> None:
    """While nobody listens, polling gives nothing and `fault` says why."""
    settings = config.Kafka(brokers=f"{LOOPBACK}:{free_port()}", input_topic=TOPIC)
    source = Source(settings, embedded=False, revoked=lambda partitions: None, verdict_secs=VERDICT_SECS)
    reader = Reader(source)
    reader.source.begin(EPOCH)
    reader.until(lambda: "refused" in (reader.source.fault or ""))
    assert reader.records == []
    reader.source.close()


class Forgetful(Consumer):
    """Has lost all brokers, once `forgets` is set on it."""

    forgets = False

    def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Message]:
        return [] if self.forgets else super().consume(num_messages, timeout)

    def list_topics(self, topic: str | None = None, timeout: float = -1) -> Any:
        if self.forgets:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        return super().list_topics(topic, timeout=timeout)


def test_a_client_without_brokers_is_replaced(kafka: Kafka) -> None:
    """A client that gets no answer for long is replaced; the next one goes on where the group was."""
    made: list[Forgetful] = []

    def consumer(options: dict[str, Any]) -> Forgetful:
        made.append(Forgetful(options))
        return made[-1]

    source = Source(
        kafka.settings(),
        embedded=kafka.embedded,
        revoked=lambda lost: None,
        verdict_secs=VERDICT_SECS,
        clients=Clients(consumer=consumer),
    )
    kafka.cleanup.callback(source.close)
    source.begin(EPOCH)
    reader = Reader(source)
    kafka.produce(3)
    reader.read(3)
    source.commit({0: 2}, EPOCH, T0_MS, wait=True)

    made[0].forgets = True
    source.refresh_partition_count(now_secs=1000)
    source.refresh_partition_count(now_secs=1000 + CLIENTS_REPLACED_SECS - 1)
    assert len(made) == 1
    with pytest.raises(Unavailable):
        source.refresh_partition_count(now_secs=1000 + CLIENTS_REPLACED_SECS + 30)
    assert not source.assigned
    source.begin(EPOCH)
    assert [record.offset for record in reader.read(1)] == [2]


@pytest.mark.stack
def test_a_broker_comes_back(stack: Stack, real_kafka: Kafka) -> None:
    """A source outlives its broker: `begin` says Unavailable, then reading goes on where it was committed."""
    real_kafka.produce(4)
    reader = real_kafka.reader()
    reader.read(4)
    reader.source.commit({0: 2}, EPOCH, T0_MS, wait=True)
    with stack.kafka.down():
        assert reader.silence() == []
        assert reader.source.fault
        with pytest.raises(Unavailable, match=r"kafka\.brokers"):
            reader.source.begin(EPOCH)

    def begins() -> bool:
        try:
            reader.source.begin(EPOCH)
        except Unavailable:
            return False
        return True

    eventually(begins)
    assert numbers(reader.read(2)) == [2, 3]


@pytest.mark.stack
def test_the_end_is_known_after_a_restart_of_the_broker(stack: Stack, real_kafka: Kafka) -> None:
    """Partitions come back with another leader epoch; the question where they end is answered again all the same."""
    real_kafka.produce(2)
    reader = real_kafka.reader()
    reader.read(2)
    reader.source.ask_ends(1)
    assert ends_of(reader.source).high == {0: 2}
    stack.kafka.kill()
    stack.kafka.start()

    def answered() -> bool:
        reader.source.ask_ends(2)
        return ends_of(reader.source).high == {0: 2}

    eventually(answered)


# --- dead letters ------------------------------------------------------------------------------------------------


def dead_letters(kafka: Kafka, count: int) -> list[Message]:
    """What is in the dead-letter topic."""
    client = kafka.client()
    client.assign([TopicPartition(f"{kafka.topic}.dlq", 0, OFFSET_BEGINNING)])
    found: list[Message] = []

    def holds() -> bool:
        found.extend(client.consume(10, 0.2))
        return len(found) >= count

    eventually(holds)
    return found


def letter(offset: int, value: bytes) -> DeadLetter:
    return DeadLetter(
        Record(0, offset, T0_MS, value), "undecodable", "Error at byte 7 " + "…" * 1000, value, 0
    )


def test_dead_letters_name_their_origin(kafka: Kafka) -> None:
    """The refused bytes go to `<topic>.dlq`, acknowledged, with where they came from and why in the headers."""
    if not kafka.embedded:
        make_topic(kafka, f"{kafka.topic}.dlq")
    source = kafka.source(epoch=None)
    source.dead_letter([])
    source.dead_letter([letter(5, b"\xff\x00broken"), letter(6, b"")])
    one, two = dead_letters(kafka, 2)
    assert (one.value(), two.value() or b"") == (b"\xff\x00broken", b"")
    headers = dict(one.headers() or [])
    detail = headers.pop("tss.detail")
    assert headers == {
        "tss.reason": b"undecodable",
        "tss.topic": kafka.topic.encode(),
        "tss.partition": b"0",
        "tss.offset": b"5",
        "tss.value_omitted": b"false",
    }
    assert isinstance(detail, bytes)
    assert detail.decode().startswith("Error at byte 7 …")
    assert len(detail.decode()) == 500


@pytest.mark.stack
def test_a_dead_letter_too_large_goes_without_its_value(real_kafka: Kafka) -> None:
    """What the topic would not take for its size leaves its origin there, and its neighbours whole."""
    make_topic(real_kafka, f"{real_kafka.topic}.dlq", settings={"max.message.bytes": "20000"})
    source = real_kafka.source(epoch=None)
    source.dead_letter([letter(1, b"small"), letter(2, bytes(50_000)), letter(3, b"small, too")])
    found = {str(dict(m.headers() or [])["tss.offset"]): m for m in dead_letters(real_kafka, 3)}
    values = {offset: message.value() or b"" for offset, message in found.items()}
    assert values == {"b'1'": b"small", "b'2'": b"", "b'3'": b"small, too"}
    assert dict(found["b'2'"].headers() or [])["tss.value_omitted"] == b"true"


@pytest.mark.stack
def test_a_dead_letter_that_is_not_taken_is_said(real_kafka: Kafka) -> None:
    """A dead-letter topic that cannot exist is Unavailable with its setting: the offset must not count."""
    source = real_kafka.source(epoch=None, dead_letter_topic="no such/topic")
    with pytest.raises(Unavailable, match=r"kafka\.dead_letter_topic"):
        source.dead_letter([letter(1, b"x")])


# --- commits of all ----------------------------------------------------------------------------------------------


def test_the_lowest_commit_of_all_partitions(wide_kafka: Kafka) -> None:
    """A restore reads back from the oldest time that any partition was committed with; nothing committed is None."""
    assert lowest_commit(wide_kafka.settings()) is None
    wide_kafka.commit(0, Commit(0, EPOCH, T0_MS + 5000, T0_MS).metadata, partition=1)
    wide_kafka.commit(0, Commit(0, "life-0", T0_MS + 2000, T0_MS).metadata, partition=3)
    wide_kafka.commit(0, partition=2)
    assert lowest_commit(wide_kafka.settings()) == T0_MS + 2000
