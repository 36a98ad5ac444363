"""Kafka in memory, beneath the production `Source`: doubles of the clients that it is made of.

A log a partition, one group with cooperative rebalances, commits with metadata. The group notices a silent member
after its session time; then its partitions go to others while it may still hold a batch in hand, and it hears of that
only when it polls again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from tests.sim.world import Process, World
from tss.source import Clients

LATENCY_SECS = (0.001, 0.02)
DOWN_TIMEOUT_SECS = 2.0  # how long a client tries while the brokers are away
NO_OFFSET = -1001


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a log."""

    timestamp_ms: int
    value: bytes


class Broker:
    """The brokers as one."""

    def __init__(self, world: World, partitions: int, session_secs: float) -> None:
        self.world = world
        self.logs: list[list[Entry]] = [[] for _ in range(partitions)]
        self.committed: dict[int, tuple[int, str]] = {}
        self.letters: list[tuple[int, int]] = []
        self.down_until = 0.0
        self.ends_late_secs = 0.0
        self.troubles: deque[str] = (
            deque()
        )  # of commits to come: `lost`, or `unheard` (done, but told as failed)
        self.on_read: Callable[[Process], None] = lambda _: None
        self._session_secs = session_secs
        self._members: list[SimConsumer] = []
        self._owner: dict[int, SimConsumer] = {}
        self._target: dict[int, SimConsumer] = {}
        self._chance = world.chance("brokers")

    def clients(self, process: Process) -> Clients:
        return Clients(
            consumer=lambda options: SimConsumer(self, process, options),
            producer=lambda _: SimProducer(self, process),
            admin=lambda _: SimAdmin(self, process),
        )

    def append(self, partition: int, timestamp_ms: int, value: bytes) -> int:
        self.logs[partition].append(Entry(timestamp_ms, value))
        return len(self.logs[partition]) - 1

    # --- requests ---

    @property
    def down(self) -> bool:
        return self.world.now_secs < self.down_until

    def latency(self) -> float:
        return self._chance.uniform(*LATENCY_SECS)

    def ask(self, process: Process) -> None:
        """The way there."""
        self.world.outside(process)
        self.world.pause(DOWN_TIMEOUT_SECS if self.down else self.latency())
        self.world.outside(process)
        if self.down:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "the brokers are away"))

    def answer(self, process: Process) -> None:
        """The way back."""
        self.world.pause(self.latency())
        self.world.outside(process)

    # --- the group ---

    def join(self, member: SimConsumer) -> None:
        """With static membership a new process takes the place of the one that had its seat."""
        before = next((m for m in self._members if member.seat and m.seat == member.seat), None)
        if before is None:
            self._members.append(member)
            self._balance()
            return
        self.world.tell(f"{member.process.name} takes the seat of {before.process.name}")
        self._members[self._members.index(before)] = member
        self._owner = {p: m for p, m in self._owner.items() if m is not before}
        self._target = {p: member if m is before else m for p, m in self._target.items()}

    def close(self, member: SimConsumer) -> None:
        """A member ends as it should. One with a seat does not leave: its partitions wait for the session time."""
        if member.seat:
            self.watch(member.process)
        else:
            self.leave(member)

    def leave(self, member: SimConsumer) -> None:
        if member in self._members:
            self._members.remove(member)
            self._owner = {p: m for p, m in self._owner.items() if m is not member}
            self._balance()

    def is_member(self, member: SimConsumer) -> bool:
        return member in self._members

    def watch(self, process: Process) -> None:
        """A process went silent: the group goes on without it unless it is heard of within the session time."""

        def check() -> None:
            members = [m for m in self._members if m.process is process]
            if process.alive and process.stopped_until <= self.world.now_secs:
                members = [m for m in members if m.closed]
            for member in members:
                self.world.tell(f"the group goes on without {process.name}")
                self.leave(member)

        self.world.after(self._session_secs, check)

    def evict(self, process: Process) -> bool:
        """The group loses a member that lives, as after a break of the network."""
        members = [m for m in self._members if m.process is process]
        for member in members:
            self.leave(member)
        return bool(members)

    def _balance(self) -> None:
        """Sticky: a partition moves only when its reader is gone or has more than its share."""
        if not self._members:
            self._target = {}
            return
        share = -(-len(self.logs) // len(self._members))
        held: dict[SimConsumer, list[int]] = {m: [] for m in self._members}
        for p, member in sorted(self._target.items()):
            if member in held and len(held[member]) < share:
                held[member].append(p)
        homeless = sorted(set(range(len(self.logs))) - {p for ps in held.values() for p in ps})
        for p in homeless:
            min(self._members, key=lambda m: len(held[m])).adopt(p, held)
        fullest = max(self._members, key=lambda m: len(held[m]))
        emptiest = min(self._members, key=lambda m: len(held[m]))
        if len(held[fullest]) > len(held[emptiest]) + 1:
            held[emptiest].append(held[fullest].pop())
        self._target = {p: m for m, ps in held.items() for p in ps}

    def to_revoke(self, member: SimConsumer, assigned: Sequence[int]) -> list[int]:
        return [p for p in assigned if self._target.get(p) is not member]

    def revoked(self, partitions: Sequence[int]) -> None:
        for p in partitions:
            self._owner.pop(p, None)

    def grant(self, member: SimConsumer) -> list[int]:
        granted = [p for p, m in sorted(self._target.items()) if m is member and p not in self._owner]
        self._owner |= dict.fromkeys(granted, member)
        return granted

    def commit(self, member: SimConsumer, offsets: Sequence[TopicPartition]) -> KafkaError | None:
        """A commit arrives: refused from who is no member, or for a partition that went to another."""
        if any(self._owner.get(tp.partition) is not member for tp in offsets):
            return KafkaError(KafkaError.ILLEGAL_GENERATION, "the group went on")
        trouble = self.troubles.popleft() if self.troubles else ""
        if trouble:
            self.world.inject(f"kafka_commit_{trouble}", member.process.name)
        if trouble != "lost":
            for tp in offsets:
                self.committed[tp.partition] = (tp.offset, tp.metadata or "")
        return KafkaError(KafkaError._TIMED_OUT, "no answer to the commit") if trouble else None


class SimMessage:
    """A record, or the news that a partition has no more of them."""

    def __init__(self, partition: int, offset: int, entry: Entry | None) -> None:
        self._partition = partition
        self._offset = offset
        self._entry = entry

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def error(self) -> KafkaError | None:
        return None if self._entry else KafkaError(KafkaError._PARTITION_EOF, "no more")

    def timestamp(self) -> tuple[int, int]:
        return 1, self._entry.timestamp_ms if self._entry else 0

    def value(self) -> bytes | None:
        return self._entry.value if self._entry else None


class SimConsumer:
    """A member of the group, or a client that only asks."""

    def __init__(self, broker: Broker, process: Process, options: dict[str, Any]) -> None:
        self._broker = broker
        self._world = broker.world
        self.process = process
        self.seat: str = options.get("group.instance.id", "")
        self.closed = False
        self._on_commit: Callable[..., None] = options.get("on_commit", lambda *_: None)
        self._on_assign: Callable[..., None] | None = None
        self._on_revoke: Callable[..., None] | None = None
        self._on_lost: Callable[..., None] | None = None
        self._topic = ""
        self._position: dict[int, int] = {}
        self._paused: set[int] = set()
        self._told_end: dict[int, int] = {}
        self._commits: list[list[TopicPartition]] = []
        self._outcomes: deque[tuple[KafkaError | None, list[TopicPartition]]] = deque()
        self._chance = self._world.chance(f"consumer {process.name} {self._world.now_secs}")

    def adopt(self, partition: int, held: dict[SimConsumer, list[int]]) -> None:
        held[self].append(partition)

    # --- the group ---

    def subscribe(self, topics: list[str], *, on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        self._world.outside(self.process)
        (self._topic,) = topics
        self._on_assign, self._on_revoke, self._on_lost = on_assign, on_revoke, on_lost
        self._broker.join(self)

    def _partitions(self, numbers: Sequence[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, p) for p in numbers]

    def _serve_rebalance(self) -> None:
        if self._on_assign is None or self._broker.down:
            return
        held = sorted(self._position)
        if not self._broker.is_member(self):
            assert self._on_lost is not None
            if held:
                self._on_lost(self, self._partitions(held))
            self._broker.join(self)
            return
        going = self._broker.to_revoke(self, held)
        if going:
            assert self._on_revoke is not None
            self._on_revoke(self, self._partitions(going))
            self._broker.revoked(going)
        coming = self._broker.grant(self)
        if coming:
            self._on_assign(self, self._partitions(coming))

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        for tp in partitions:
            self._position[tp.partition] = tp.offset
            self._told_end.pop(tp.partition, None)

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        for tp in partitions:
            self._position.pop(tp.partition, None)
            self._paused.discard(tp.partition)

    def pause(self, partitions: list[TopicPartition]) -> None:
        self._paused.update(tp.partition for tp in partitions)

    def resume(self, partitions: list[TopicPartition]) -> None:
        self._paused.difference_update(tp.partition for tp in partitions)

    def close(self) -> None:
        self._world.outside(self.process)
        held = sorted(self._position)
        if held and self._on_revoke is not None and self._broker.is_member(self):
            self._on_revoke(self, self._partitions(held))
        self.closed = True
        self._broker.close(self)
        self._position.clear()

    # --- reading ---

    def consume(self, count: int, timeout: float) -> list[SimMessage]:
        self._world.outside(self.process)
        while self._outcomes:
            self._on_commit(*self._outcomes.popleft())
        self._serve_rebalance()
        if timeout and not self._available():
            self._world.pause(timeout)
        self._world.outside(self.process)
        found = [] if self._broker.down else self._fetch(self._chance.randint(1, count))
        if found:
            self._broker.on_read(self.process)
            self._broker.answer(self.process)  # a batch may be in hand for long
        return found

    def _readable(self) -> list[int]:
        return [p for p in sorted(self._position) if p not in self._paused and self._position[p] >= 0]

    def _available(self) -> bool:
        logs = self._broker.logs
        return not self._broker.down and any(self._position[p] < len(logs[p]) for p in self._readable())

    def _fetch(self, count: int) -> list[SimMessage]:
        out: list[SimMessage] = []
        readable = self._readable()
        self._chance.shuffle(readable)
        for p in readable:
            log, at = self._broker.logs[p], self._position[p]
            take = min(count - len(out), len(log) - at)
            out += [SimMessage(p, at + i, log[at + i]) for i in range(take)]
            self._position[p] = at + max(0, take)
            if self._position[p] >= len(log) != self._told_end.get(p):
                self._told_end[p] = len(log)
                out.append(SimMessage(p, len(log), None))
        return out

    # --- offsets ---

    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        self._broker.ask(self.process)
        out = []
        for tp in partitions:
            offset, metadata = self._broker.committed.get(tp.partition, (NO_OFFSET, ""))
            out.append(TopicPartition(tp.topic, tp.partition, offset, metadata=metadata))
        self._broker.answer(self.process)
        return out

    def offsets_for_times(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        self._broker.ask(self.process)
        out = []
        for tp in partitions:
            log = self._broker.logs[tp.partition]
            found = next((i for i, e in enumerate(log) if e.timestamp_ms >= tp.offset), -1)
            out.append(TopicPartition(tp.topic, tp.partition, found))
        self._broker.answer(self.process)
        return out

    def get_watermark_offsets(self, tp: TopicPartition, timeout: float) -> tuple[int, int]:
        self._broker.ask(self.process)
        high = len(self._broker.logs[tp.partition])
        self._broker.answer(self.process)
        return 0, high

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> None:
        if asynchronous:
            self._world.outside(self.process)
            self._commits.append(offsets)
            self._world.after(self._broker.latency(), lambda: self._land_until(offsets))
            return
        self._broker.ask(self.process)
        if self._commits:
            self._land_until(self._commits[-1])
        error = self._broker.commit(self, offsets)
        self._broker.answer(self.process)
        if error is not None:
            raise KafkaException(error)

    def _land_until(self, last: list[TopicPartition]) -> None:
        """Commits of one client go over one connection: none overtakes another."""
        while any(offsets is last for offsets in self._commits):
            self._land(self._commits.pop(0))

    def _land(self, offsets: list[TopicPartition]) -> None:
        if self._broker.down:
            error: KafkaError | None = KafkaError(KafkaError._TRANSPORT, "the brokers are away")
        else:
            error = self._broker.commit(self, offsets)
        self._outcomes.append((error, offsets))

    def seek(self, tp: TopicPartition) -> None:
        raise AssertionError("no record of a simulated log goes away")

    def list_topics(self, topic: str, timeout: float) -> Any:
        return _topics(self._broker, self.process, topic)


def _topics(broker: Broker, process: Process, topic: str) -> Any:
    broker.ask(process)
    about = SimpleNamespace(partitions=dict.fromkeys(range(len(broker.logs))), error=None)
    broker.answer(process)
    return SimpleNamespace(topics={topic: about})


class SimAdmin:
    """Answers where logs end; the answer may come late."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self._broker = broker
        self._process = process

    def list_topics(self, topic: str, timeout: float) -> Any:
        return _topics(self._broker, self._process, topic)

    def list_offsets(
        self, asked: dict[TopicPartition, Any], request_timeout: float
    ) -> dict[TopicPartition, Future[Any]]:
        broker, world = self._broker, self._broker.world
        world.outside(self._process)
        futures: dict[TopicPartition, Future[Any]] = {tp: Future() for tp in asked}

        def arrive() -> None:
            away = broker.down
            highs = {tp: len(broker.logs[tp.partition]) for tp in futures}
            delay = broker.latency() + broker.ends_late_secs
            world.after(delay, lambda: answer(highs, away=away))

        def answer(highs: dict[TopicPartition, int], *, away: bool) -> None:
            for tp, future in futures.items():
                if away:
                    future.set_exception(KafkaException(KafkaError(KafkaError._TRANSPORT, "away")))
                else:
                    future.set_result(SimpleNamespace(offset=highs[tp]))

        world.after(broker.latency(), arrive)
        return futures


class SimProducer:
    """For dead letters."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self._broker = broker
        self._process = process
        self._queued: list[tuple[dict[str, Any], Callable[..., None]]] = []

    def produce(self, topic: str, value: bytes, *, headers: Any, on_delivery: Callable[..., None]) -> None:
        self._queued.append((dict(headers), on_delivery))

    def poll(self, timeout: float) -> int:
        return 0

    def flush(self, timeout: float) -> int:
        queued, self._queued = self._queued, []
        error: KafkaError | None = None
        try:
            self._broker.ask(self._process)
        except KafkaException as fault:
            error = fault.args[0]
        for headers, on_delivery in queued:
            if error is None:
                self._broker.letters.append((int(headers["tss.partition"]), int(headers["tss.offset"])))
            on_delivery(error, None)
        return 0
