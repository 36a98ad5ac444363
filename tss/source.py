"""Kafka: records in, offsets out, bad records to the dead-letter topic.

Every commit carries `tss1 <epoch> <low> <time>` as its metadata: the life of Redis that the position is true for, the
oldest log time that Redis still held, and when it was made. Where a partition begins is one rule, whatever happened before: in the same
epoch at the committed offset; else at the first offset with a time of `low` or later, but never above the committed
one. A partition without a commit gets one before its first record is read, or a crash in between would skip what
arrived meanwhile. A commit may be so old that verdicts have expired meanwhile on what follows it: then nothing is
read in this epoch (`Outlived`).

A client of librdkafka can end up without any broker and then never looks for one again, as when a lone broker that
restarts names no brokers (its issue 5301; seen here as a worker that stayed out of the group until it was restarted).
So clients that get no answer for long are replaced. Where Kafka itself is away, that changes nothing.

All methods belong to one thread: rebalances are served inside `poll`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import (
    OFFSET_STORED,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from tss import config
from tss.clock import SYSTEM, Clock
from tss.errors import ConfigError, Outlived, Unavailable
from tss.model import DeadLetter, Record, epoch_born_ms

log = logging.getLogger("tss")

FETCH_RECORDS = 500  # taken from the client at a time; fewer where they are so large that a batch would burst
RECORD_BYTES_GUESS = 64 << 10  # before the first batch has told
REQUEST_TIMEOUT_SECS = 10.0
PARTITIONS_REFRESH_SECS = 30.0
CLIENTS_REPLACED_SECS = 60.0  # without an answer; most restarts of a broker take less
DEAD_LETTER_TIMEOUT_SECS = 30.0
PREFETCH_BYTES = 8 << 20  # in librdkafka's own queue, two batches; what one answer brings comes on top
FETCH_BYTES = 8 << 20  # one answer; its default of 50 MB would be what a reader holds
# Of one partition in it. A trace's spans are spread over partitions, so a batch of few of them has it in more pieces:
# 4 MB here cost half as much again for each span. Less is not to be had: Kafka gives whole batches of up to 1 MB.
PARTITION_FETCH_BYTES = 1 << 20
REFILL_MS = (
    20  # until a full queue is looked at again; after a second, the default, a reader would wait for it
)
DETAIL_CHARS_MAX = 500
CLOCKS_APART_MS = 10_000  # by how much clocks of processes may differ
OUTLIVED_SHARE = 0.5  # of a verdict's time: the rest is for reading again what follows the commit

_FATAL_FOR_CONFIG = {
    KafkaError._AUTHENTICATION: "kafka.sasl_username / kafka.sasl_password",
    KafkaError.SASL_AUTHENTICATION_FAILED: "kafka.sasl_username / kafka.sasl_password",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "kafka.input_topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "kafka.consumer_group",
}

# After a restart of a broker its partitions have another leader or epoch. A consumer notices; the client that asks for
# ends does not, and would be refused for ever, until it looks the topic up again.
_LEADER_MOVED = {
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.NOT_LEADER_FOR_PARTITION,
}


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed position, what it was true for, and when it was made."""

    offset: int
    epoch: str | None
    low_ms: int | None
    at_ms: int | None

    @classmethod
    def read(cls, offset: int, metadata: str | None) -> Commit:
        parts = (metadata or "").split(" ")
        if len(parts) == 4 and parts[0] == "tss1" and parts[2].isdecimal() and parts[3].isdecimal():
            return cls(offset, parts[1], int(parts[2]), int(parts[3]))
        return cls(offset, None, None, None)

    @property
    def metadata(self) -> str:
        return f"tss1 {self.epoch} {self.low_ms} {self.at_ms}"


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the log of each partition ended at `asked_ms`."""

    asked_ms: int
    high: dict[int, int]


@dataclass(frozen=True, slots=True)
class Clients:
    """How the brokers are reached; a simulation brings its own."""

    consumer: Callable[[dict[str, Any]], Any] = Consumer
    producer: Callable[[dict[str, Any]], Any] = Producer
    admin: Callable[[dict[str, Any]], Any] = AdminClient


# At librdkafka's own level an absent broker is a line every 50 ms; `error_cb` says it once.
QUIET = {"log_level": 2}


class Source:
    """The consumer of one process.

    `revoked` is told which partitions go: before they are given up, so that it can still commit them; or after, where
    the group did not ask.
    """

    def __init__(
        self,
        settings: config.Kafka,
        *,
        embedded: bool,
        revoked: Callable[[set[int]], None],
        verdict_secs: float,
        clients: Clients = Clients(),
        clock: Clock = SYSTEM,
    ) -> None:
        """`verdict_secs` is how long Redis remembers what has landed."""
        self._settings = settings
        self._verdict_secs = verdict_secs
        self._clients = clients
        self._clock = clock
        self._topic = settings.input_topic
        self._revoked = revoked
        self._assigned: set[int] = set()
        self._paused = False
        self._epoch: str | None = None
        self._ends_request: tuple[int, dict[TopicPartition, Future[Any]]] | None = None
        self._partitions_read_at = -PARTITIONS_REFRESH_SECS
        self._producer: Any = None
        self._record_bytes = RECORD_BYTES_GUESS
        self._polled: list[Record] = []
        self.partition_count = 0
        self.reached: dict[int, int] = {}
        self.fault: str | None = "not heard of yet"
        self.heard_secs: float | None = None
        self.commits: list[KafkaError | None] = []
        self._embedded = embedded
        self._deaf_since_secs: float | None = None
        self._inherited: dict[int, tuple[int, int]] = {}
        self._unplaced: Unavailable | None = None
        self._make_clients()

    def _make_clients(self) -> None:
        """Of the group they are no part yet: `begin` joins it."""
        self._subscribed = False
        settings = self._settings
        common: dict[str, Any] = settings.client_properties() | QUIET
        options = {
            "group.id": settings.consumer_group,
            "session.timeout.ms": settings.session_timeout_ms,
            "heartbeat.interval.ms": max(100, settings.session_timeout_ms // 10),
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # every start is explicit; falling off the log's end is said aloud
            "enable.partition.eof": True,
            "queued.max.messages.kbytes": PREFETCH_BYTES >> 10,
            "fetch.max.bytes": FETCH_BYTES,
            "fetch.message.max.bytes": PARTITION_FETCH_BYTES,
            "fetch.queue.backoff.ms": REFILL_MS,
            "error_cb": self._on_error,
            "on_commit": self._on_commit,
        }
        if settings.group_instance_id:
            options["group.instance.id"] = settings.group_instance_id
        if self._embedded:
            # The mock broker answers an empty fetch only after its whole wait, and rebalances as slowly.
            options |= {"fetch.wait.max.ms": 20, "session.timeout.ms": 2000, "heartbeat.interval.ms": 300}
        try:
            self._consumer = self._clients.consumer(common | options)
            self._admin = self._clients.admin(common | {"error_cb": self._on_error})
        except KafkaException as fault:
            raise ConfigError(f"kafka: the client refused its settings: {fault.args[0]}") from fault

    # --- where partitions begin (step 2) ---

    def begin(self, epoch: str) -> None:
        """All partitions start (again) by the one rule, in this epoch; what was polled before must be forgotten.

        The group is joined here, not before: a position cannot be chosen without an epoch. Raises Outlived when this
        epoch may not be read on: begin with a new one. `poll` may raise it for partitions that come later.
        """
        self._epoch = epoch
        if not self._subscribed:
            self._subscribed = True
            self._consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
        try:
            if self._unplaced is not None:
                # The group may have gone on without us: until we hear of that, it refuses every commit. What this
                # reads is read again.
                self._consumer.consume(1, 0)
            self._unplaced = None
            held = sorted(self._assigned)
            if held:
                starts = self._starts(held)
                self._consumer.incremental_unassign([TopicPartition(self._topic, p) for p in held])
                self._place(starts)
        except KafkaException as fault:
            self._unplaced = self._unavailable(fault)
            raise self._unplaced from fault

    def _unavailable(self, fault: KafkaException) -> Unavailable:
        self._note_fault(fault.args[0].str())
        return Unavailable("Kafka", "kafka.brokers", fault.args[0].str())

    def _place(self, starts: Mapping[int, int]) -> None:
        self._consumer.incremental_assign([TopicPartition(self._topic, p, at) for p, at in starts.items()])
        self._assigned.update(starts)
        self.reached.update(starts)
        if self._paused:
            self._consumer.pause([TopicPartition(self._topic, p) for p in starts])

    def _starts(self, partitions: Sequence[int]) -> dict[int, int]:
        wanted = [TopicPartition(self._topic, p) for p in partitions]
        commits = self._consumer.committed(wanted, timeout=REQUEST_TIMEOUT_SECS)
        starts: dict[int, int] = {}
        fresh = []
        for tp in commits:
            if tp.offset < 0:
                fresh.append(tp.partition)
                continue
            commit = Commit.read(tp.offset, tp.metadata)
            starts[tp.partition] = commit.offset
            if commit.epoch != self._epoch and commit.low_ms is not None:
                starts[tp.partition] = self._rewound(tp.partition, commit.offset, commit.low_ms)
            self._check_age(tp.partition, starts[tp.partition], commit)
            self._inherit(tp.partition, commit)
        if fresh:
            starts |= self._first_starts(fresh)
        return starts

    def _rewound(self, partition: int, committed: int, low_ms: int) -> int:
        asked = TopicPartition(self._topic, partition, low_ms)
        (found,) = self._consumer.offsets_for_times([asked], timeout=REQUEST_TIMEOUT_SECS)
        start = min(found.offset, committed) if found.offset >= 0 else committed
        if start < committed:
            log.warning(
                "Redis began a new life: reading partition %d again from offset %d (committed: %d)",
                partition,
                start,
                committed,
            )
        return int(start)

    def _inherit(self, partition: int, commit: Commit) -> None:
        """Redis may hold records before the commit, whose time stamps only their reader knew: its `low` goes on.

        It does so until all that Redis holds is from later than now by log time.
        """
        if commit.epoch == self._epoch and commit.low_ms is not None:
            self._inherited[partition] = (self._clock.now().wall_ms + CLOCKS_APART_MS, commit.low_ms)
        else:
            self._inherited.pop(partition, None)

    def _low_of(self, partition: int, low_ms: int) -> int:
        until_ms, inherited_ms = self._inherited.get(partition, (0, low_ms))
        if low_ms > until_ms:
            self._inherited.pop(partition, None)
            return low_ms
        return min(low_ms, inherited_ms)

    def _check_age(self, partition: int, start: int, commit: Commit) -> None:
        """Raises Outlived when records follow whose verdicts were last known to be in Redis too long ago.

        That was when the commit was made, or at the beginning of the epoch, when all were read back.
        """
        born_ms = epoch_born_ms(self._epoch or "")
        if commit.at_ms is None or born_ms is None:
            return
        known_ms = max(born_ms, commit.at_ms) if commit.epoch == self._epoch else born_ms
        age_secs = (self._clock.now().wall_ms - known_ms) / 1000
        if age_secs <= self._verdict_secs * OUTLIVED_SHARE:
            return
        _, end = self._consumer.get_watermark_offsets(
            TopicPartition(self._topic, partition), timeout=REQUEST_TIMEOUT_SECS
        )
        if start < end:
            raise Outlived(f"offset {start} of partition {partition} was committed {age_secs:.0f} s ago")

    def _first_starts(self, partitions: Sequence[int]) -> dict[int, int]:
        starts = {}
        for p in partitions:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self._topic, p), timeout=REQUEST_TIMEOUT_SECS
            )
            starts[p] = low if self._settings.auto_offset_reset == "earliest" else high
        now_ms = self._clock.now().wall_ms
        low_ms = 0 if self._settings.auto_offset_reset == "earliest" else now_ms
        if self._epoch is not None:
            positions = [
                TopicPartition(self._topic, p, at, metadata=Commit(at, self._epoch, low_ms, now_ms).metadata)
                for p, at in starts.items()
            ]
            self._consumer.commit(offsets=positions, asynchronous=False)
        return starts

    # --- rebalances ---

    def _on_assign(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        try:
            self._place(self._starts([tp.partition for tp in partitions]))
        except (KafkaException, Outlived) as fault:
            # Without positions the client would choose its own; hold the partitions until `begin` has chosen.
            if isinstance(fault, Outlived):
                self._unplaced = fault
            else:
                detail = f"no start position: {fault.args[0].str()}"
                self._unplaced = Unavailable("Kafka", "kafka.brokers", detail)
            held = [TopicPartition(self._topic, tp.partition, OFFSET_STORED) for tp in partitions]
            self._consumer.incremental_assign(held)
            self._consumer.pause(held)
            self._assigned.update(tp.partition for tp in partitions)
        log.info("Partitions assigned", extra={"partitions": sorted(self._assigned)})

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._revoked({tp.partition for tp in partitions})
        self._forget(partitions)

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        log.warning(
            "Partitions lost: the group went on without this process; is kafka.session_timeout_ms too short?"
        )
        self._forget(partitions)  # first: what is no longer ours must not be committed
        self._revoked({tp.partition for tp in partitions})

    def _forget(self, partitions: Iterable[TopicPartition]) -> None:
        self._consumer.incremental_unassign(list(partitions))
        for tp in partitions:
            self._assigned.discard(tp.partition)
            self.reached.pop(tp.partition, None)
        # A batch goes on over a rebalance: what it holds of these is the next owner's.
        self._polled = [record for record in self._polled if record.partition in self._assigned]

    # --- reading ---

    def poll(self, timeout_secs: float) -> list[Record]:
        """A batch, in the order of each partition. Serves rebalances, so it must be called while paused too.

        Raises Unavailable when it is not known where a partition begins; then call `begin`.
        """
        try:
            records = self._batch(timeout_secs)
        except KafkaException as fault:
            raise self._unavailable(fault) from fault
        if self._unplaced is not None:
            raise self._unplaced
        return records

    def _batch(self, timeout_secs: float) -> list[Record]:
        self._polled = []
        count = size = 0
        room = self._settings.batch_max_bytes
        while count < self._settings.batch_max_records and size < room:
            if size:
                self._record_bytes = 1 + size // count
            fitting = 1 + (room - size) // self._record_bytes
            wanted = min(FETCH_RECORDS, fitting, self._settings.batch_max_records - count)
            messages = self._consumer.consume(wanted, 0 if count else timeout_secs)
            for message in messages:
                record = self._record(message)
                if record is not None:
                    self._polled.append(record)
                    count += 1
                    size += len(record.value or b"")
            if len(messages) < wanted:
                break
        return self._polled

    def _record(self, message: Any) -> Record | None:
        partition: int = message.partition()
        error: KafkaError | None = message.error()
        if error is None:
            kind, at_ms = message.timestamp()
            offset = message.offset()
            self.reached[partition] = offset + 1
            return Record(partition, offset, at_ms if kind else 0, message.value())
        if error.code() == KafkaError._PARTITION_EOF:
            self.reached[partition] = max(self.reached.get(partition, 0), message.offset())
        elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            log.error(
                "Records are gone: the next offset of partition %s is no longer in the topic; going on at its oldest. "
                "Raise the topic's retention above the longest stop of tss.",
                partition,
            )
            self._restart_at_oldest(partition)
        elif error.code() in _FATAL_FOR_CONFIG:
            raise ConfigError(f"{_FATAL_FOR_CONFIG[error.code()]}: {error.str()}")
        elif error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
            self._note_fault(f"topic {self._topic} does not exist; create it or set kafka.input_topic")
        else:
            self._note_fault(error.str())
        return None

    def _restart_at_oldest(self, partition: int) -> None:
        """A partition that fell off its log has stopped, and can only be assigned anew."""
        fallen = TopicPartition(self._topic, partition)
        oldest, _ = self._consumer.get_watermark_offsets(fallen, timeout=REQUEST_TIMEOUT_SECS)
        self._consumer.incremental_unassign([fallen])
        self._place({partition: oldest})

    def pause(self) -> None:
        self._paused = True
        self._consumer.pause([TopicPartition(self._topic, p) for p in self._assigned])

    def resume(self) -> None:
        self._paused = False
        self._consumer.resume([TopicPartition(self._topic, p) for p in self._assigned])

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def assigned(self) -> frozenset[int]:
        return frozenset(self._assigned)

    # --- the end of the log ---

    def ask_ends(self, now_ms: int) -> None:
        """Asks the brokers where the assigned partitions end; one question at a time, answered by `ends`."""
        if self._ends_request is None and self._assigned:
            latest = {TopicPartition(self._topic, p): OffsetSpec.latest() for p in self._assigned}  # type: ignore[no-untyped-call]
            futures = self._admin.list_offsets(latest, request_timeout=REQUEST_TIMEOUT_SECS)
            self._ends_request = (now_ms, futures)

    def ends(self) -> Ends | None:
        """The answer, once it is there. A partition that could not be asked is left out."""
        if self._ends_request is None or not all(f.done() for f in self._ends_request[1].values()):
            return None
        asked_ms, futures = self._ends_request
        self._ends_request = None
        high: dict[int, int] = {}
        moved = False
        for tp, future in futures.items():
            try:
                high[tp.partition] = future.result().offset
            except KafkaException as fault:
                self._note_fault(fault.args[0].str())
                moved |= fault.args[0].code() in _LEADER_MOVED
        if moved:
            with contextlib.suppress(KafkaException):
                self._admin.list_topics(self._topic, timeout=REQUEST_TIMEOUT_SECS)
        if high:
            self._heard()
        return Ends(asked_ms, high)

    def refresh_partition_count(self, now_secs: float) -> None:
        """How many partitions the topic has; a claim needs to hear of each. `now_secs` is monotonic.

        Raises Unavailable when no answer came for so long that the clients were replaced; then call `begin`.
        """
        wait = PARTITIONS_REFRESH_SECS if self.partition_count else 1.0
        if now_secs - self._partitions_read_at < wait:
            return
        self._partitions_read_at = now_secs
        try:
            # Asked by the consumer: brokers make a topic that another kind of client asks for.
            topic = self._consumer.list_topics(self._topic, timeout=REQUEST_TIMEOUT_SECS).topics[self._topic]
        except KafkaException as fault:
            self._note_fault(fault.args[0].str())
            self._deaf_since_secs = self._deaf_since_secs or now_secs
            if now_secs - self._deaf_since_secs >= CLIENTS_REPLACED_SECS:
                self._replace_clients()
                raise self._unavailable(fault) from fault
            return
        self._deaf_since_secs = None
        if topic.error is not None:
            self._note_fault(f"topic {self._topic}: {topic.error.str()}; create it or set kafka.input_topic")
            return
        self.partition_count = len(topic.partitions)
        self._heard()

    def _replace_clients(self) -> None:
        log.warning("No answer from Kafka for %d s: connecting anew", CLIENTS_REPLACED_SECS)
        self._deaf_since_secs = None
        self._consumer.close()  # gives up what it holds
        self._assigned.clear()
        self.reached.clear()
        self._ends_request = self._producer = self._unplaced = None
        self._make_clients()

    # --- offsets and dead letters (step 4) ---

    def commit(self, positions: Mapping[int, int], epoch: str, low_ms: int, *, wait: bool) -> None:
        """Commits positions of partitions that are still assigned; outcomes are appended to `commits`."""
        mine = {p: at for p, at in positions.items() if p in self._assigned}
        if not mine:
            return
        now_ms = self._clock.now().wall_ms
        offsets = [
            TopicPartition(
                self._topic, p, at, metadata=Commit(at, epoch, self._low_of(p, low_ms), now_ms).metadata
            )
            for p, at in mine.items()
        ]
        try:
            if wait:
                self._consumer.commit(offsets=offsets, asynchronous=False)
            else:
                self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as fault:
            self.commits.append(fault.args[0])

    def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Returns once the brokers have acknowledged all; raises Unavailable when they did not in time.

        A letter that the topic will not take for its size goes without its value: its origin still names the record.
        """
        refused = self._deliver([(letter, letter.value, False) for letter in letters])
        faults = [error for _, error in refused if error.code() != KafkaError.MSG_SIZE_TOO_LARGE]
        for letter, error in refused:
            if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                faults += self._deliver_alone(letter)
        if faults:
            raise Unavailable("Kafka", "kafka.dead_letter_topic", f"{self._settings.dlq}: {faults[0].str()}")

    def _deliver_alone(self, letter: DeadLetter) -> list[KafkaError]:
        """Brokers judge letters that were sent together by the size of all: alone it may fit."""
        for value, cut in ((letter.value, False), (b"", True)):
            faults = [error for _, error in self._deliver([(letter, value, cut)])]
            if not faults or faults[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                break
        return faults

    def _deliver(
        self, letters: Sequence[tuple[DeadLetter, bytes, bool]]
    ) -> list[tuple[DeadLetter, KafkaError]]:
        if not letters:
            return []
        if self._producer is None:
            self._producer = self._clients.producer(
                self._settings.client_properties()
                | QUIET
                | {
                    "acks": "all",
                    "enable.idempotence": True,
                    "message.max.bytes": 1_000_000_000,  # the broker decides what is too large
                    "message.timeout.ms": int(DEAD_LETTER_TIMEOUT_SECS * 1000),
                    "error_cb": self._on_error,
                }
            )
        failed: list[tuple[DeadLetter, KafkaError]] = []
        for letter, value, cut in letters:
            record = letter.record
            headers: list[tuple[str, str | bytes | None]] = [
                ("tss.reason", letter.reason),
                ("tss.detail", letter.detail[:DETAIL_CHARS_MAX]),
                ("tss.topic", self._topic),
                ("tss.partition", str(record.partition)),
                ("tss.offset", str(record.offset)),
                ("tss.value_omitted", str(cut).lower()),
            ]

            def reported(error: KafkaError | None, _: Message, letter: DeadLetter = letter) -> None:
                if error is not None:
                    failed.append((letter, error))

            while True:
                try:
                    self._producer.produce(self._settings.dlq, value, headers=headers, on_delivery=reported)
                    break
                except BufferError:
                    self._producer.poll(0.1)
                except KafkaException as fault:
                    failed.append((letter, fault.args[0]))
                    break
        self._producer.flush(DEAD_LETTER_TIMEOUT_SECS + REQUEST_TIMEOUT_SECS)
        return failed

    # --- what the client tells ---

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in _FATAL_FOR_CONFIG:
            log.error("Kafka refused us (%s): %s", _FATAL_FOR_CONFIG[error.code()], error.str())
        self._note_fault(error.str())

    def _heard(self) -> None:
        self.fault, self.heard_secs = None, self._clock.now().mono_secs

    def _note_fault(self, text: str) -> None:
        if self.fault != text:
            self.fault = text
            log.warning("Kafka is not usable (kafka.brokers=%s): %s", self._settings.brokers, text)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self.commits.append(error or next((tp.error for tp in partitions if tp.error), None))

    def close(self) -> None:
        """Leaves the group."""
        self._consumer.close()


def lowest_commit(settings: config.Kafka, clients: Clients = Clients()) -> int | None:
    """The oldest `low` committed for any partition of the input topic; None when nothing was. For a restore."""
    try:
        consumer = clients.consumer(
            settings.client_properties() | QUIET | {"group.id": settings.consumer_group}
        )
        try:
            topic = consumer.list_topics(settings.input_topic, timeout=REQUEST_TIMEOUT_SECS)
            partitions = [
                TopicPartition(settings.input_topic, p) for p in topic.topics[settings.input_topic].partitions
            ]
            commits = consumer.committed(partitions, timeout=REQUEST_TIMEOUT_SECS) if partitions else []
        finally:
            consumer.close()
    except KafkaException as fault:
        raise Unavailable("Kafka", "kafka.brokers", fault.args[0].str()) from fault
    lows = [Commit.read(tp.offset, tp.metadata).low_ms for tp in commits if tp.offset >= 0]
    return min((low for low in lows if low is not None), default=None)
