"""A new life of Redis: what the tables remember decides records that are delivered again.

One Redis of the test's own, and the embedded tables. Each `Process` is what one worker holds: its connection, its
sink, and a writer's id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis

from tests.builders import record, resource_spans, span, trace_id
from tests.stack import Part
from tss import config
from tss.buffer import LANDING_HEAD, SIZE, Buffer, Held, Recorded, Timers
from tss.errors import Fenced, LinkLost, Unavailable
from tss.metrics import Metrics
from tss.model import NO_START, Origin, Record, Trigger, Verdict, encode_origins, format_records
from tss.restore import is_current, restore
from tss.rows import SPANS, Decision, decision_table
from tss.rules import RuleSet
from tss.sink import Sink
from tss.wire import decode

pytestmark = pytest.mark.embedded

T0_MS = 1_760_000_000_000
TTL_SECS = 100.0
LEASE_SECS = 60.0
TIMERS = Timers(inactivity_ms=1_000, root_wait_ms=None, max_duration_ms=60_000, stall_ms=300_000)
DECIDED_AT = datetime(2025, 10, 9, tzinfo=UTC)

KEEP = Verdict(True, "error", "", 1.0, Trigger.INACTIVITY, 7)
DROP = Verdict(False, "not_sampled", "", 0.0, Trigger.INACTIVITY, 7)
LATE_ERROR = Verdict(True, "late_error", "", 1.0, Trigger.LATE, 7)


@dataclass
class Process:
    """One worker: it lives from `connect` to the loss of its connection."""

    redis: config.Redis
    storage: config.Storage
    writer: str
    buffer: Buffer = field(init=False)
    sink: Sink = field(init=False)

    def __post_init__(self) -> None:
        self.sink = Sink(self.storage, "fleet", Metrics())
        self.sink.open()
        self.connect()

    def connect(self) -> None:
        self.buffer = Buffer(self.redis)

    def restore(self, low_ms: int | None = None) -> None:
        restore(self.buffer, self.sink, low_ms, TTL_SECS)

    def settle(self, low_ms: int | None = None) -> None:
        """What a worker does until it may write: look, restore if need be, and look again when another was faster."""
        while not is_current(self.buffer, self.sink):
            try:
                self.restore(low_ms)
            except LinkLost:
                self.buffer.close()
                self.connect()

    def epochs(self) -> set[str | None]:
        """All that there are, in Redis and in both tables."""
        return {self.buffer.read_epoch(), *self.sink.epochs()}

    def take_in(self, *records: Record) -> None:
        self.buffer.append(decode(records, RuleSet()).chunks, {0: T0_MS + 50_000}, now_ms(), root_timer=False)

    def claim(self, sequence: int) -> set[bytes]:
        result = self.buffer.claim(self.writer, sequence, TIMERS, 1, 1000, pressure=0)
        return {trace for trace, _ in result.traces}

    def record(self, sequence: int, trace: int, verdict: Verdict, upgrade: Verdict | None = None) -> Recorded:
        """With an upgrade: as it is where late spans hold a new error."""
        (recorded,) = self.buffer.record(self.writer, self.writer, sequence, [(trace_id(trace), verdict)])
        assert recorded is not None
        if upgrade is not None:
            (turned,) = self.buffer.turn(self.writer, self.writer, sequence, [(trace_id(trace), upgrade)])
            assert turned is not None
            return Recorded(turned, recorded.coverage)
        return recorded

    def land_decision(
        self,
        sequence: int,
        trace: int,
        verdict: Verdict,
        *offsets: int,
        log_ms: int = T0_MS,
        decided_at: datetime = DECIDED_AT,
    ) -> bool:
        records = format_records((0, offset) for offset in offsets)
        decision = Decision(
            trace_id(trace), verdict, verdict.trigger, False, 1, True, NO_START, 0.0, log_ms, records
        )
        rows = decision_table([decision], decided_at, self.writer, sequence)
        return self.sink.commit(self.sink.upload("decisions", [rows]), self.writer, sequence, self.epoch)

    def land_spans(self, sequence: int) -> bool:
        rows = pa.Table.from_pylist([{"trace_id": "00", "span_id": "00", "start_time": DECIDED_AT}], SPANS)
        return self.sink.commit(self.sink.upload("spans", [rows]), self.writer, sequence, self.epoch)

    @property
    def epoch(self) -> str:
        return self.buffer.epoch or ""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def spans_of(trace: int, offset: int) -> Record:
    return record(resource_spans(span(trace, offset + 1)), offset=offset, timestamp_ms=T0_MS + offset)


@pytest.fixture
def start(redis_server: Part, tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    """Starts processes that share one Redis and one pair of tables."""
    started = []

    def process(writer: str) -> Process:
        settings = config.Storage(local=config.Local(path=tmp_path / "tables"))
        started.append(Process(config.Redis(url=redis_server.url), settings, writer))
        return started[-1]

    yield process
    for one in started:
        one.buffer.close()


@pytest.fixture
def behind(redis_server: Part) -> Iterator[Any]:
    """A client behind everybody's back."""
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


# --- the first life ----------------------------------------------------------------------------------------------


def test_a_fresh_start_gets_an_epoch(start: Callable[[str], Process]) -> None:
    """An empty Redis and empty tables end with one and the same epoch, which the next process finds."""
    one = start("w1")
    assert not is_current(one.buffer, one.sink)
    one.restore()
    assert is_current(one.buffer, one.sink)
    assert one.epochs() == {one.epoch}
    two = start("w2")
    assert is_current(two.buffer, two.sink)
    two.buffer.enroll("w2", LEASE_SECS)


def test_a_redis_of_other_tables_is_no_match(start: Callable[[str], Process], behind: Any) -> None:
    """An epoch that the tables do not know, or one shard without it, is a new life, too."""
    one = start("w1")
    one.settle()
    first = one.epoch
    behind.delete("{tss:3}:epoch")
    two = start("w2")
    assert not is_current(two.buffer, two.sink)
    two.settle()
    assert two.epoch != first
    two.sink.enter_epoch("of somebody else")
    three = start("w3")
    assert not is_current(three.buffer, three.sink)
    three.settle()
    assert three.epochs() == {three.epoch}


# --- what is remembered ------------------------------------------------------------------------------------------


def test_what_landed_is_recognised_after_a_wipe(start: Callable[[str], Process], behind: Any) -> None:
    """Records delivered again meet their verdict and their coverage; where the spans are missing, they are written."""
    one = start("w1")
    one.settle()
    assert one.land_decision(1, 1, KEEP, 0, 2)
    assert one.land_spans(1)
    assert one.land_decision(2, 2, DROP, 1)
    assert one.land_decision(3, 3, KEEP, 3), "and then it was killed, before the spans of 3"
    behind.flushall()
    two = start("w2")
    two.settle(low_ms=T0_MS)
    two.buffer.enroll("w2", LEASE_SECS)
    two.take_in(spans_of(1, 0), spans_of(2, 1), spans_of(1, 2), spans_of(3, 3), spans_of(4, 4))
    assert two.claim(1) == {trace_id(t) for t in (1, 2, 3, 4)}
    assert two.record(1, 1, DROP) == Recorded(KEEP, frozenset({(0, 0), (0, 2)}))
    assert two.record(1, 2, KEEP) == Recorded(DROP, frozenset({(0, 1)}))
    assert two.record(1, 3, DROP) == Recorded(KEEP, frozenset())
    assert two.record(1, 4, DROP) == Recorded(DROP, frozenset()), "never decided before"


def test_a_late_error_stays_kept(start: Callable[[str], Process], behind: Any) -> None:
    """Of a trace that was dropped and later kept, kept is remembered, and everything of both that landed."""
    one = start("w1")
    one.settle()
    one.land_decision(1, 1, DROP, 0, 1)
    one.land_decision(2, 1, LATE_ERROR, 5)
    one.land_spans(2)
    behind.flushall()
    two = start("w2")
    two.settle(low_ms=T0_MS)
    two.buffer.enroll("w2", LEASE_SECS)
    two.take_in(spans_of(1, 6))
    two.claim(1)
    assert two.record(1, 1, DROP) == Recorded(LATE_ERROR, frozenset({(0, 0), (0, 1), (0, 5)}))


def test_a_dropped_trace_can_still_turn(start: Callable[[str], Process], behind: Any) -> None:
    """A verdict read back is as good as one of before: an error after it turns a dropped trace to kept."""
    one = start("w1")
    one.settle()
    one.land_decision(1, 1, DROP, 0)
    behind.flushall()
    two = start("w2")
    two.settle(low_ms=T0_MS)
    two.buffer.enroll("w2", LEASE_SECS)
    two.take_in(spans_of(1, 1))
    two.claim(1)
    assert two.record(1, 1, KEEP, LATE_ERROR) == Recorded(LATE_ERROR, frozenset({(0, 0)}))


def test_only_what_can_come_again_is_read(start: Callable[[str], Process], behind: Any) -> None:
    """Decisions older than the memory of a verdict before the oldest record are left alone; all others expire."""
    one = start("w1")
    one.settle()
    one.land_decision(1, 1, KEEP, 0, log_ms=T0_MS - 1)
    one.land_decision(2, 2, KEEP, 1, log_ms=T0_MS)
    behind.flushall()
    start("w2").settle(low_ms=T0_MS + int(TTL_SECS * 1000))
    (remembered,) = behind.scan_iter("*:d:*")
    assert remembered.endswith(trace_id(2)), "decided long ago, too"
    assert 0 < behind.pttl(remembered) <= TTL_SECS * 1000


def test_what_was_decided_lately_is_remembered(start: Callable[[str], Process], behind: Any) -> None:
    """In a backlog records are old, but their trace's verdict is not: late spans still find it after a wipe."""
    one = start("w1")
    one.settle()
    now = datetime.now(UTC)
    ages_secs = {1: TTL_SECS * 2, 2: TTL_SECS / 2}
    for trace, age_secs in ages_secs.items():
        decided_at = now - timedelta(seconds=age_secs)
        one.land_decision(trace, trace, DROP, trace, log_ms=T0_MS, decided_at=decided_at)
    behind.flushall()
    start("w2").settle(low_ms=T0_MS + int(TTL_SECS * 5000))
    (remembered,) = behind.scan_iter("*:d:*")
    assert remembered.endswith(trace_id(2))


def test_a_group_that_read_nothing_remembers_nothing(start: Callable[[str], Process], behind: Any) -> None:
    """Without a commit in Kafka no record can come again: the tables are not read back."""
    one = start("w1")
    one.settle()
    one.land_decision(1, 1, KEEP, 0)
    behind.flushall()
    start("w2").settle(low_ms=None)
    assert list(behind.scan_iter("*:d:*")) == []


def test_what_survived_goes_on(start: Callable[[str], Process], behind: Any) -> None:
    """Pending traces and open claims outlive a new epoch: traces are claimed, claims adopted, nothing is doubled."""
    one = start("w1")
    one.settle()
    one.buffer.enroll("w1", LEASE_SECS)
    one.take_in(spans_of(1, 0))
    assert one.claim(1) == {trace_id(1)}
    one.record(1, 1, KEEP)
    one.land_decision(1, 1, KEEP, 0)
    one.take_in(spans_of(2, 1))
    behind.delete("{tss:0}:epoch")
    two = start("w2")
    two.settle(low_ms=T0_MS)
    two.buffer.enroll("w2", LEASE_SECS)
    assert two.buffer.abandoned() == [("w1", 1)]
    (adopted,) = two.buffer.record("w2", "w1", 1, [(trace_id(1), DROP)])
    assert adopted == Recorded(KEEP, frozenset())
    assert two.sink.landed("decisions") == {"w1": 1}, "so its decision is not written again"
    (held,) = two.buffer.facts([(trace_id(1), Trigger.INACTIVITY)])
    told = Held(int(held.facts["spans"].sum()), held.coded_records)
    assert two.buffer.release("w2", "w1", 1, {trace_id(1): told}, TTL_SECS) == 1
    two.take_in(spans_of(2, 1))
    assert two.claim(1) == {trace_id(2)}
    two.take_in()  # a chunk that was there before is counted off by the next batch
    assert two.buffer.usage().pending_spans == 1


# --- others at the same time -------------------------------------------------------------------------------------


def test_an_old_writer_can_do_nothing(start: Callable[[str], Process], behind: Any) -> None:
    """A writer that slept through the wipe is refused by Redis and by both tables, with what it had prepared."""
    old = start("w1")
    old.settle()
    old.buffer.enroll("w1", LEASE_SECS)
    old.take_in(spans_of(1, 0))
    old.claim(1)
    behind.flushall()
    new = start("w2")
    new.settle(low_ms=T0_MS)
    attempts: list[Callable[[], object]] = [
        lambda: old.land_decision(1, 1, KEEP, 0),
        lambda: old.land_spans(1),
        lambda: old.claim(2),
        lambda: old.record(1, 1, KEEP),
        lambda: old.buffer.enroll("w1", LEASE_SECS),
    ]
    for attempt in attempts:
        with pytest.raises(Fenced):
            attempt()
    with pytest.raises(LinkLost):
        old.buffer.confirm()
    assert new.sink.landed("decisions") == new.sink.landed("spans") == {}


def test_an_old_reader_does_not_move_the_clock(start: Callable[[str], Process], behind: Any) -> None:
    """What a reader of the former life still appends is kept, but its clock makes nothing due."""
    old = start("w1")
    old.settle()
    behind.flushall()
    new = start("w2")
    new.settle()
    new.buffer.enroll("w2", LEASE_SECS)
    old.take_in(spans_of(1, 0))
    assert new.claim(1) == set()
    new.take_in()
    assert new.claim(1) == {trace_id(1)}


def test_many_restore_at_once(start: Callable[[str], Process], behind: Any) -> None:
    """However many processes find an empty Redis, they end with one epoch everywhere and one memory."""
    processes = [start(f"w{i}") for i in range(3)]
    processes[0].settle()
    processes[0].land_decision(1, 1, KEEP, 0)
    processes[0].land_spans(1)
    for _ in range(4):
        behind.flushall()
        for process in processes:
            process.buffer.close()
            process.connect()
        with ThreadPoolExecutor(len(processes)) as pool:
            list(pool.map(lambda process: process.settle(T0_MS), processes))
        assert len({process.epoch for process in processes}) == 1
        assert set().union(*(process.epochs() for process in processes)) == {processes[0].epoch}
        assert behind.exists("{tss:0}:next-epoch") == 0
        (remembered,) = behind.scan_iter("*:d:*")
        once = LANDING_HEAD.size + len(encode_origins([Origin(0, 0, 0)]))
        assert len(behind.get(remembered)) == SIZE.size + len(KEEP.encode()) + once


@pytest.mark.parametrize("killed_after", ["propose", "forget", "enter"])
def test_a_restore_that_dies_is_finished(
    start: Callable[[str], Process], behind: Any, killed_after: str
) -> None:
    """Killed after any of its steps, it leaves nobody able to write; the next process finishes under the same epoch."""
    one = start("w1")
    one.settle()
    behind.flushall()
    dying = start("w2")
    assert dying.buffer.propose_epoch("life-2") == "life-2"
    if killed_after in ("forget", "enter"):
        dying.buffer.forget_epoch("life-2")
    if killed_after == "enter":
        dying.sink.enter_epoch("life-2")
    three = start("w3")
    with pytest.raises(Fenced):
        three.buffer.enroll("w3", LEASE_SECS)
    three.settle(T0_MS)
    assert three.epochs() == {"life-2"}
    three.buffer.enroll("w3", LEASE_SECS)


def test_tables_out_of_reach_leave_redis_closed(start: Callable[[str], Process], tmp_path: Path) -> None:
    """While the tables cannot be asked, no epoch is set, so nobody writes what could not be remembered."""
    one = start("w1")
    closed = Sink(config.Storage(local=config.Local(path=tmp_path / "elsewhere")), "fleet", Metrics())
    with pytest.raises(Unavailable):
        restore(one.buffer, closed, T0_MS, TTL_SECS)
    assert one.buffer.read_epoch() is None
    with pytest.raises(Fenced):
        one.buffer.enroll("w1", LEASE_SECS)
