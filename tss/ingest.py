"""The first half: records from Kafka into Redis, offsets only after Redis has them.

One round (`step`): take a batch, cut it into chunks, write chunks, indexes and the partitions' clocks in one MULTI a
shard, hand refused bytes to the dead-letter topic, and commit offsets whose spans have been safe for long enough.
The numbers in comments are the steps of docs/protocol.md.

*Log time* is the running maximum of a partition's record timestamps, never later than now. At the end of a partition
it is the moment at which the brokers were asked where the end is: every record older than that has been read. So a
backlog, a paused consumer or a broker that is away never makes a trace look quiet.

Crash-only: when an answer of Redis is missing, the connection and all that was read since the last committed offset
are forgotten, and every partition begins again by the one rule of `Source.begin`. What was written twice is cut away
by its record's offset when it is written out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from confluent_kafka import KafkaError
from numpy.typing import NDArray

from tss import config, crashpoints
from tss.buffer import LAG_SECS, Buffer, Usage
from tss.clock import Clock
from tss.compiler import PYTHON
from tss.errors import LinkLost, Outlived, Unavailable
from tss.metrics import Metrics
from tss.model import Chunks, DeadLetter, Now, Record
from tss.rules import RuleSet
from tss.source import Ends

log = logging.getLogger("tss")

POLL_SECS = 0.2  # longest wait for a first record; bounds how late a rebalance or a stop is noticed
END_CHECK_SECS = 1.0
USAGE_SECS = 1.0
RESUME_SHARE = 0.9  # of the budget: room for some batches before the next pause
SIZES_BITS = 18
SIZES = 1 << SIZES_BITS  # counters for the sizes of traces; traces that share one are taken for one
# A trace id's second half to its counter: multiplied, and of that the first bits.
SPREAD, SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(64 - SIZES_BITS)
SIZES_CHUNKS = SIZES // 2  # counted before the counters are put aside for new ones, so few traces share one
RELIEF_TRACES = 2000  # claimed early in one look while memory is short


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Positions that Redis had at `mono_secs`; `oldest_ms` is the log time of the oldest record before them."""

    mono_secs: float
    positions: dict[int, int]
    oldest_ms: int


class Sizes:
    """How large the traces of the last chunks are, in 8 MB however many there are.

    A chunk counts in the counters now in use and is compared with the sum of these and the ones before: it is
    remembered for SIZES_CHUNKS to twice as many more chunks.
    """

    def __init__(self) -> None:
        self._now, self._before = np.zeros((2, SIZES), np.int64), np.zeros((2, SIZES), np.int64)
        self._chunks = 0

    def add(self, chunks: Chunks) -> NDArray[np.int64]:
        """Spans and bytes, by row, of each chunk's trace with this chunk."""
        if self._chunks >= SIZES_CHUNKS:
            self._now, self._before = self._before, self._now
            self._now[:] = 0
            self._chunks = 0
        self._chunks += len(chunks)
        places = chunks.trace_ids[:, 8:].copy().view(np.uint64)[:, 0] * SPREAD >> SHIFT
        for counters, more in zip(self._now, (chunks.facts["spans"], np.diff(chunks.field_at)), strict=True):
            np.add.at(counters, places, more)
        return self._now[:, places] + self._before[:, places]


class Records(Protocol):
    """Where records come from and offsets go: `source.Source`, whose docstrings are the contract."""

    partition_count: int
    fault: str | None
    heard_secs: float | None
    reached: dict[int, int]
    commits: list[KafkaError | None]

    @property
    def paused(self) -> bool: ...
    @property
    def assigned(self) -> frozenset[int]: ...
    def begin(self, epoch: str) -> None: ...
    def poll(self, timeout_secs: float) -> list[Record]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def ask_ends(self, now_ms: int) -> None: ...
    def ends(self) -> Ends | None: ...
    def refresh_partition_count(self, now_secs: float) -> None: ...
    def dead_letter(self, letters: Sequence[DeadLetter]) -> None: ...
    def commit(self, positions: Mapping[int, int], epoch: str, low_ms: int, *, wait: bool) -> None: ...
    def close(self) -> None: ...


class Ingest:
    """One consumer and its connection to Redis. `step` is called again and again by one thread."""

    def __init__(
        self,
        settings: config.Config,
        *,
        source: Callable[[Callable[[set[int]], None]], Records],
        connect: Callable[[], Buffer],
        rules: Callable[[], RuleSet],
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        """`source` is given what to call before partitions are given up."""
        self._settings = settings
        self._connect = connect
        self._rules = rules
        self._metrics = metrics
        self._clock = clock
        self.kernels = PYTHON  # until they are compiled
        self._root_timer = settings.app.root_wait_secs is not None
        self._buffer: Buffer | None = None
        self._log_time: dict[int, int] = {}
        self._sizes = Sizes()
        self._waiting: deque[Acknowledged] = deque()
        self._stamps: dict[int, int] = {}  # second of log time → oldest time stamp of a record taken in then
        self._safe: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._begun = False
        self._next_commit = self._next_ends = self._next_usage = 0.0
        self.usage: Usage | None = None
        self.relief = 0
        self.lag: dict[int, int] = {}
        self.source = source(self._on_revoked)

    # --- one round ---

    def step(self, now: Now) -> int:
        """Returns how many records were taken in. Raises LinkLost or Unavailable; then call `recover`."""
        try:
            return self._round(now)
        except Outlived as fault:
            log.warning("Redis gets a new life, for which verdicts are read back from the tables: %s", fault)
            if self._buffer is not None:
                self._buffer.end_life()
            raise LinkLost(str(fault)) from fault

    def _round(self, now: Now) -> int:
        self.source.refresh_partition_count(now.mono_secs)
        buffer = self._ready_buffer()
        if buffer is None:
            self.source.poll(POLL_SECS)
            return 0
        records = self.source.poll(POLL_SECS)
        if records:
            self._take_in(buffer, records, self._clock.now())  # connecting and polling took their time
        self._mark_ends(buffer, now)
        if now.mono_secs >= self._next_usage:
            self._next_usage = now.mono_secs + USAGE_SECS
            self._relieve(buffer.usage(), now)
        if now.mono_secs >= self._next_commit:
            self._next_commit = now.mono_secs + self._settings.kafka.commit_interval_secs
            self._commit(buffer, now, wait=False)
        self._count_commits()
        return len(records)

    def _ready_buffer(self) -> Buffer | None:
        """Step 1. None while Redis has no epoch yet: a writer is about to give it one."""
        if self._buffer is None:
            self._buffer = self._connect()
        if self._buffer.epoch is None:
            self._buffer.epoch = self._buffer.read_epoch()
        if self._buffer.epoch is None:
            return None
        if not self._begun:
            self._begin(self._buffer.epoch)
        return self._buffer

    def _begin(self, epoch: str) -> None:
        """Step 2."""
        self._log_time.clear()
        self._sizes = Sizes()
        self._waiting.clear()
        self._stamps.clear()
        self._safe.clear()
        self._committed.clear()
        self.source.begin(epoch)
        self.source.resume()
        self._next_usage = 0.0  # a reader that begins again and again must not pass by a full Redis each time
        self._begun = True

    def recover(self, fault: Unavailable) -> None:
        """Forgets the connection and what was read over it; reading pauses until there is a new one."""
        if isinstance(fault, LinkLost) or self._buffer is None:
            if self._buffer is not None:
                self._buffer.close()
                self._metrics.restarts.inc()
            self._buffer = None
        self._begun = False
        self.source.pause()

    # --- step 3: a batch ---

    def _take_in(self, buffer: Buffer, records: list[Record], now: Now) -> None:
        records = [self._in_log_time(record, now.wall_ms) for record in records]
        batch = self.kernels.decode(records, self._rules())
        clocks = {r.partition: r.timestamp_ms for r in records}
        big = self._oversized(batch.chunks)
        buffer.append(
            *(batch.chunks, clocks, now.wall_ms),
            root_timer=self._root_timer,
            big=big,
            write=self.kernels.chunk_writes,
        )
        crashpoints.passed("after-write")
        self.source.dead_letter(batch.dead)
        positions = {r.partition: r.offset + 1 for r in records}
        oldest_ms = min(r.timestamp_ms for r in records)
        acknowledged_secs = self._clock.now().mono_secs
        self._waiting.append(Acknowledged(acknowledged_secs, positions, oldest_ms))

        metrics = self._metrics
        metrics.batch_seconds.observe(acknowledged_secs - now.mono_secs)
        metrics.records_consumed.inc(len(records))
        metrics.bytes_consumed.inc(sum(len(r.value or b"") for r in records))
        metrics.records_empty.inc(batch.empty)
        metrics.spans_ingested.inc(batch.spans)
        metrics.chunks_written.inc(len(batch.chunks))
        for letter in batch.dead:
            metrics.dead_letters.labels(letter.reason).inc()
            metrics.spans_rejected.labels(letter.reason).inc(letter.spans)

    def _in_log_time(self, record: Record, now_ms: int) -> Record:
        reached = max(self._log_time.get(record.partition, 0), min(record.timestamp_ms, now_ms))
        self._log_time[record.partition] = reached
        if record.timestamp_ms < reached:
            second = reached // 1000
            self._stamps[second] = min(self._stamps.get(second, reached), record.timestamp_ms)
        return record if reached == record.timestamp_ms else replace(record, timestamp_ms=reached)

    def _oversized(self, chunks: Chunks) -> set[int]:
        """Rows of traces that have outgrown a limit, by what this process has seen of them lately.

        A fleet of n readers may so let a trace grow to n times the limit; counting in Redis would cost a command
        a chunk to make an emergency brake exact.
        """
        app = self._settings.app
        spans, sizes = self._sizes.add(chunks)
        big = (spans > app.max_trace_spans) | (sizes > app.max_trace_bytes)
        return set(np.flatnonzero(big).tolist())

    def _mark_ends(self, buffer: Buffer, now: Now) -> None:
        """At the end of a partition its clock is the moment the brokers were asked for it."""
        if now.mono_secs >= self._next_ends:
            self._next_ends = now.mono_secs + END_CHECK_SECS
            self.source.ask_ends(now.wall_ms)
        ends = self.source.ends()
        if ends is None:
            return
        clocks = dict(self._reached_ends(ends))
        if clocks:
            buffer.append(
                self.kernels.decode([], self._rules()).chunks, clocks, now.wall_ms, root_timer=False
            )
        for partition, lag in self.lag.items():
            self._metrics.consumer_lag.labels(partition).set(lag)
        self._metrics.partitions_assigned.set(len(self.source.assigned))

    def _reached_ends(self, ends: Ends) -> Iterable[tuple[int, int]]:
        reached = self.source.reached
        self.lag = {p: max(0, high - reached[p]) for p, high in ends.high.items() if p in reached}
        for partition, lag in self.lag.items():
            if lag == 0:
                self._log_time[partition] = max(self._log_time.get(partition, 0), ends.asked_ms)
                yield partition, self._log_time[partition]

    # --- step 4: offsets ---

    def _commit(self, buffer: Buffer, now: Now, *, wait: bool) -> None:
        while self._waiting and now.mono_secs - self._waiting[0].mono_secs >= LAG_SECS:
            self._safe |= self._waiting.popleft().positions
        low = buffer.confirm()  # also when nothing is new: an idle reader must hear of a new epoch, too
        if self._safe.items() <= self._committed.items():
            return
        if low is None:
            low = min(self._log_time.values(), default=now.wall_ms)
        # What is not committed yet may be delivered again though it landed: a restore must read back that far (16).
        low = min([low, *(batch.oldest_ms for batch in self._waiting)])
        self.source.commit(self._safe, buffer.epoch or "", self._oldest_stamp(low), wait=wait)
        self._committed |= self._safe

    def _oldest_stamp(self, low_ms: int) -> int:
        """The oldest time stamp of what was taken in at `low_ms` of log time or later.

        A new life finds records again by the time stamps in the log, which may be older than the log time that they
        were given here: a producer's batch lingers, a mirror is behind. One entry a second of what Redis holds.
        """
        for second in [second for second in self._stamps if second < low_ms // 1000]:
            del self._stamps[second]
        return min([low_ms, *self._stamps.values()])

    def _on_revoked(self, partitions: set[int]) -> None:
        """What is settled is committed; the rest is read again by the next owner and cut away by its offsets."""
        if self._buffer is not None and self._buffer.epoch is not None:
            try:
                self._commit(self._buffer, self._clock.now(), wait=True)
            except Unavailable as fault:
                log.warning(
                    "Offsets of revoked partitions were not committed; they are read again: %s", fault
                )
        self._waiting = deque(
            replace(a, positions={p: at for p, at in a.positions.items() if p not in partitions})
            for a in self._waiting
        )
        for p in partitions:
            self._log_time.pop(p, None)
            self._safe.pop(p, None)
            self._committed.pop(p, None)
            self.lag.pop(p, None)
            self._metrics.consumer_lag.labels(p).set(0)

    def _count_commits(self) -> None:
        outcomes, self.source.commits = self.source.commits, []
        for error in outcomes:
            self._metrics.offset_commits.labels("failed" if error else "committed").inc()
            if error:
                self._committed.clear()
                log.warning("Offsets were not committed; the next commit tries again: %s", error.str())

    # --- back-pressure ---

    def _relieve(self, usage: Usage, now: Now) -> None:
        """Pauses reading above the fleet's budget. A paused reader holds the clock, so only early decisions drain."""
        self.usage = usage
        app = self._settings.app
        fullness = max(
            usage.memory_bytes / usage.budget_bytes,
            usage.pending_traces / app.max_buffer_traces,
            usage.pending_spans / app.max_buffer_spans,
        )
        if not self.source.paused and fullness >= 1:
            log.warning(
                "Reading is paused: Redis is full; the oldest traces are decided early",
                extra={
                    "memory_bytes": usage.memory_bytes,
                    "budget_bytes": usage.budget_bytes,
                    "traces": usage.pending_traces,
                    "spans": usage.pending_spans,
                },
            )
            self.source.pause()
        elif self.source.paused and fullness < RESUME_SHARE:
            log.info("Reading goes on: Redis has room again")
            self.source.resume()
        self.relief = RELIEF_TRACES if self.source.paused else 0

        metrics = self._metrics
        metrics.consumer_paused.set(self.source.paused)
        metrics.buffer_traces.set(usage.pending_traces)
        metrics.buffer_spans.set(usage.pending_spans)
        metrics.buffer_bytes.set(usage.memory_bytes)
        metrics.buffer_budget_bytes.set(usage.budget_bytes)
        oldest = now.wall_ms if usage.oldest_ms is None else usage.oldest_ms
        metrics.oldest_pending.set(max(0.0, (now.wall_ms - oldest) / 1000))

    # --- step 16 ---

    def close(self) -> None:
        """Commits what Redis has on disk, and leaves the group."""
        try:
            if self._buffer is not None and self._begun:
                self._buffer.wait_durable()
                now = self._clock.now()
                self._commit(self._buffer, replace(now, mono_secs=now.mono_secs + LAG_SECS), wait=True)
                self._count_commits()
        except Unavailable as fault:
            log.warning("Offsets were not committed at the end; records are read again: %s", fault)
        finally:
            self.source.close()
            if self._buffer is not None:
                self._buffer.close()
