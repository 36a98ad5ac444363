"""The second half: claim traces that have gone quiet, judge each once, write, release.

A *writer* has a fresh id, a lease in Redis, and one open *sequence* at a time. While a sequence is open, every round
claims what is due and records its verdicts; when it is old or large enough it is flushed: wait until Redis has it on
disk, upload, commit `decisions`, commit `spans`, release. The numbers in comments are the steps of docs/protocol.md;
their order is the guarantee, so none may be moved.

Crash-only. A missing answer of Redis, a lost lease or another epoch makes the writer forget everything and be born
again under a new id; its claims stay in Redis, and whoever finds them without a live owner finishes them with the
same code and under the same (writer, sequence), so the table lets them land once. A catalog that is away is waited
for: the sequence stays open, with the payloads of dropped traces freed.

A writer's memory is what is decided, not what it is decided of: payloads stay in Redis until they are written, and then
come a part at a time (`_parts`), from Redis to the file. So a sequence may be large, which makes commits rare, and
what waits for a slow catalog takes no memory here.
"""

from __future__ import annotations

import itertools
import logging
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

import numpy as np
import pyarrow as pa

from tss import config, crashpoints, restore
from tss.buffer import Buffer, Held, Recorded, Timers
from tss.clock import Clock
from tss.compiler import PYTHON
from tss.errors import Fenced, LinkLost, Released, Unavailable
from tss.judge import LATE_ERROR, Policies, Summary, judge, late_upgrade, summarise
from tss.metrics import Metrics, observe_all
from tss.model import Claimed, Now, Trigger, Verdict, epoch_name
from tss.rows import Cut, Decision, KeptTrace, cut, decision_table, from_millis, in_order
from tss.rules import RuleSet
from tss.sink import Kind, Upload
from tss.wire import new_error, payload_mask

log = logging.getLogger("tss")

PART_BYTES = 4 << 20  # payloads on their way to a file at once; as rows they take some six times as much
SPAN_BYTES_GUESS = 2 << 10  # of a payload, before the first part has told
RETRY_SECS = (0.5, 1.0, 2.0, 5.0)  # between tries while the catalog is away; the last repeats
NOTHING_HELD = Held(0, b"")
SEQUENCE_TRACES_MAX = 20_000  # decided traces a sequence holds before it is flushed, for its memory's sake


class Tables(restore.Memory, Protocol):
    """Where decisions and spans land: `sink.Sink`."""

    def upload(self, kind: Kind, parts: Iterable[pa.Table]) -> Upload: ...

    def commit(self, upload: Upload, writer: str, sequence: int, epoch: str) -> bool: ...


@dataclass(slots=True)
class OpenSequence:
    """What one open sequence holds. `cuts` are the kept traces, with names of fields where their payloads will be."""

    owner: str
    number: int
    opened_secs: float
    traces: dict[bytes, Held] = field(default_factory=dict)
    dropped: list[bytes] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    cuts: list[KeptTrace] = field(default_factory=list)
    spans: int = 0
    repeated: int = 0  # spans that were left out as sent twice


class Writer:
    """One decide loop. `step` is called again and again by one thread; `stop` is looked at while it waits."""

    def __init__(
        self,
        name: str,
        settings: config.Config,
        *,
        connect: Callable[[], Buffer],
        sink: Tables,
        rules: Callable[[], RuleSet],
        partitions: Callable[[], int],
        relief: Callable[[], int],
        low: Callable[[], int | None],
        metrics: Metrics,
        clock: Clock,
        stop: threading.Event,
        restoring: AbstractContextManager[object],
        adopts: bool = True,
        fresh_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """With `adopts` off, abandoned claims are left to others: one writer a process is enough to look for them."""
        app, sampling = settings.app, settings.sampling
        self.name = name
        self._settings = settings
        self._connect = connect
        self._sink = sink
        self._rules = rules
        self._partitions = partitions
        self._relief = relief
        self._low = low
        self._metrics = metrics
        self._clock = clock
        self._stop = stop
        self._adopts = adopts
        self._restoring = restoring  # one restore at a time in a process; across processes two end well, too
        self._fresh_id = fresh_id
        self._part_bytes = part_bytes
        self._timers = Timers(
            inactivity_ms=int(app.inactivity_timeout_secs * 1000),
            root_wait_ms=None if app.root_wait_secs is None else int(app.root_wait_secs * 1000),
            max_duration_ms=int(app.max_trace_duration_secs * 1000),
            stall_ms=int(settings.kafka.partition_stall_secs * 1000),
        )
        self._policies = Policies(
            error_rate=sampling.error_sample_rate if sampling.always_sample_errors else 0.0,
            latency_rate=sampling.latency_sample_rate if sampling.sample_latency else 0.0,
            latency_threshold_ms=sampling.latency_threshold_ms,
            base_rate=sampling.normal_sample_rate,
        )
        self._buffer: Buffer | None = None
        self._number = 0
        self._average_spans = 1.0
        self._span_bytes = SPAN_BYTES_GUESS
        self._open: OpenSequence | None = None
        self._landing: OpenSequence | None = None
        self._next_adoption = 0.0
        self.id: str | None = None
        self.fault: str | None = "not born yet"
        self.waiting: tuple[int, ...] = ()
        self.stalled: tuple[int, ...] = ()
        self.clock_ms: int | None = None
        self.due = 0
        self.kernels = PYTHON  # until they are compiled
        metrics.open_sequence_age.labels(name).set_function(self._open_age_secs)

    @property
    def open_since_secs(self) -> float | None:
        """Of what is claimed or on its way to the tables: it grows while the storage is away."""
        sequence = self._landing or self._open
        return sequence.opened_secs if sequence else None

    def _open_age_secs(self) -> float:
        since_secs = self.open_since_secs
        return 0.0 if since_secs is None else self._clock.now().mono_secs - since_secs

    # --- one round ---

    def step(self, now: Now) -> bool:
        """Returns whether there is more to do at once. Raises LinkLost, Fenced or Unavailable; then call `die`."""
        buffer = self._living()
        if self._adopts and self._open is None and now.mono_secs >= self._next_adoption:
            self._next_adoption = now.mono_secs + self._settings.app.lease_secs / 3
            self._adopt(buffer, now)
        more = self._claim(buffer, now)
        if self._open is not None:
            age = now.mono_secs - self._open.opened_secs
            storage = self._settings.storage
            full = (
                self._open.spans >= storage.flush_max_spans or len(self._open.traces) >= SEQUENCE_TRACES_MAX
            )
            if full or age >= storage.flush_interval_secs:
                sequence, self._open = self._open, None
                self._finish(buffer, sequence)
        return more

    def flush(self) -> None:
        """Finishes the open sequence, if there is one: the end of a graceful stop."""
        if self._buffer is not None and self._open is not None:
            sequence, self._open = self._open, None
            self._finish(self._buffer, sequence)

    def resign(self) -> None:
        """Step 16, last: whatever is left is adopted at once."""
        if self._buffer is not None and self.id is not None:
            self._buffer.resign(self.id)
            self._buffer.close()
        self.id = self._buffer = None

    def die(self, fault: Unavailable | Fenced) -> None:
        """Forgets everything; the claims stay in Redis for whoever adopts them."""
        if self.id is not None:
            cause = "fenced" if isinstance(fault, Fenced) else "link_lost"
            self._metrics.writer_deaths.labels(cause).inc()
            log.warning("Writer %s begins anew: %s", self.id, fault)
        if self._buffer is not None:
            self._buffer.close()
        self.id = self._buffer = self._open = self._landing = None
        self.fault = str(fault)

    # --- step 6: birth ---

    def _living(self) -> Buffer:
        if self._buffer is not None and self.id is not None:
            return self._buffer
        self._buffer = self._connect()
        with self._restoring:
            self._buffer.epoch = self._buffer.read_epoch()
            if not restore.is_current(self._buffer, self._sink):
                ttl_secs = self._settings.redis.trace_ttl_secs
                epoch = epoch_name(self._clock.now().wall_ms, self._fresh_id())
                restore.restore(self._buffer, self._sink, self._low(), ttl_secs, epoch)
        fresh = self._fresh_id()[:16]
        self._buffer.enroll(fresh, self._settings.app.lease_secs)
        self.id, self._number, self.fault = fresh, 0, None
        log.debug("Writer %s is born", fresh)
        return self._buffer

    # --- steps 7 to 9: claim, judge, record ---

    def _claim(self, buffer: Buffer, now: Now) -> bool:
        assert self.id is not None
        # As many traces as fill one flush if all are kept, going by the last ones.
        fitting = int(self._settings.storage.flush_max_spans / self._average_spans)
        limit = max(1, min(self._settings.app.claim_max_traces, fitting))
        number = self._open.number if self._open else self._number + 1
        result = buffer.claim(
            self.id, number, self._timers, self._partitions(), limit, pressure=self._relief()
        )
        self._note_clock(result.clock_ms, result.waiting, result.stalled, now)
        self.due = result.due
        self._metrics.due_traces.labels(self.name).set(result.due)
        if not result.traces:
            return False
        crashpoints.passed("after-claim")
        if self._open is None:
            self._number = number
            self._open = OpenSequence(self.id, number, now.mono_secs)
        self._decide(buffer, self._open, result.traces)
        return result.due > len(result.traces)

    def _note_clock(
        self, clock_ms: int | None, waiting: tuple[int, ...], stalled: tuple[int, ...], now: Now
    ) -> None:
        if stalled and stalled != self.stalled:
            log.warning(
                "Partitions %s were silent for longer than kafka.partition_stall_secs; their traces may be cut",
                stalled,
            )
        self.clock_ms, self.waiting, self.stalled = clock_ms, waiting, stalled
        self._metrics.clock_waiting.set(len(waiting))
        self._metrics.clock_stalled.set(len(stalled))
        if clock_ms is not None:
            self._metrics.clock_lag.set(max(0.0, (now.wall_ms - clock_ms) / 1000))

    def _decide(
        self, buffer: Buffer, sequence: OpenSequence, claimed: Sequence[tuple[bytes, Trigger]]
    ) -> None:
        """Steps 8 and 9 for claimed traces; what they come to is added to the sequence."""
        assert self.id is not None
        rules = self._rules()
        traces = buffer.facts(claimed)
        if len(traces) < len(claimed):  # a claim whose hash is gone still has an entry to release
            found = {trace.trace_id for trace in traces}
            sequence.traces |= {trace_id: NOTHING_HELD for trace_id, _ in claimed if trace_id not in found}
        if not traces:
            return
        summary = summarise(traces, rules, self.kernels.list_records)
        self._average_spans = max(1.0, float(summary.spans.mean()))
        masks = self._fresh_masks(buffer, traces, summary, rules)
        active = rules.active(from_millis(self._clock.now().wall_ms))
        candidates = judge(traces, summary, self._policies, rules, active, masks)
        recorded = buffer.record(
            self.id,
            sequence.owner,
            sequence.number,
            [(trace.trace_id, candidate) for trace, candidate in zip(traces, candidates, strict=True)],
        )
        self._turn(buffer, sequence, traces, candidates, recorded, summary)
        crashpoints.passed("after-record")
        self._add(sequence, traces, recorded, summary)

    def _turn(
        self,
        buffer: Buffer,
        sequence: OpenSequence,
        traces: Sequence[Claimed],
        candidates: Sequence[Verdict],
        recorded: list[Recorded | None],
        summary: Summary,
    ) -> None:
        """Late errors among dropped traces: what was only delivered again turns nothing."""
        assert self.id is not None
        late = {i: r for i, r in enumerate(recorded) if r is not None and r.coverage and not r.verdict.kept}
        if not late:
            return
        upgrades = {row: late_upgrade(candidates[row], bool(summary.errors[row])) for row in late}
        failing = [row for row, upgrade in upgrades.items() if upgrade is not None]
        payloads = buffer.payloads([traces[row].trace_id for row in failing])
        for row, chunks in zip(failing, payloads, strict=True):
            if not new_error(chunks, late[row].coverage):
                upgrades[row] = None
        settled = [(traces[row].trace_id, upgrade) for row, upgrade in upgrades.items()]
        verdicts = buffer.turn(self.id, sequence.owner, sequence.number, settled)
        for row, verdict in zip(late, verdicts, strict=True):
            recorded[row] = None if verdict is None else Recorded(verdict, late[row].coverage)

    def _fresh_masks(
        self, buffer: Buffer, traces: Sequence[Claimed], summary: Summary, rules: RuleSet
    ) -> dict[int, int]:
        """Rules changed since a chunk came in: its payload is matched against today's."""
        stale = [row for row in range(len(traces)) if summary.stale[row]]
        if not rules.rules:
            return dict.fromkeys(stale, 0)
        payloads = buffer.payloads([traces[row].trace_id for row in stale])
        masks = {}
        for row, chunks in zip(stale, payloads, strict=True):
            masks[row] = 0
            for payload in chunks.values():
                masks[row] |= payload_mask(payload, rules)
        return masks

    def _add(
        self,
        sequence: OpenSequence,
        traces: Sequence[Claimed],
        recorded: Sequence[Recorded | None],
        summary: Summary,
    ) -> None:
        """Most traces are new and have nothing twice: nothing is cut there."""
        columns = (
            *(traces, recorded, summary.records, summary.repeated),
            *(summary.spans.tolist(), summary.errors.tolist(), summary.start_ns.tolist()),
            *(summary.duration_ms.tolist(), summary.last_log_ms.tolist()),
        )
        for values in zip(*columns, strict=True):
            trace, outcome, records, again, spans, error, start_ns, duration_ms, last_log_ms = values
            if outcome is None:
                continue
            verdict, coverage = outcome.verdict, outcome.coverage
            late = bool(coverage)
            sequence.traces[trace.trace_id] = Held(spans, trace.coded_records)
            if late or again:
                pieces = cut({name: name for name in trace.fields}, coverage)
                records, spans = pieces.records, pieces.spans
                self._metrics.spans_duplicate.inc(pieces.duplicates)
                if not records:
                    continue
            elif verdict.kept:
                pieces = Cut([(name, None) for name in sorted(trace.fields)], records, spans, 0)
            if verdict.kept:
                sequence.cuts.append((trace.trace_id, verdict, late, pieces))
                sequence.spans += spans
            else:
                sequence.dropped.append(trace.trace_id)
            trigger = Trigger.LATE if late else trace.trigger
            sequence.decisions.append(
                Decision(
                    *(trace.trace_id, verdict, trigger, late, spans, error),
                    *(start_ns, duration_ms, last_log_ms, records),
                )
            )

    # --- steps 10 to 13: durable, upload, commit, release ---

    def _finish(self, buffer: Buffer, sequence: OpenSequence) -> bool:
        """False when another had finished it already."""
        assert self.id is not None
        self._landing = sequence
        epoch = buffer.epoch or ""
        started = self._clock.now().mono_secs
        buffer.wait_durable()  # step 10
        decided_at = from_millis(self._clock.now().wall_ms)
        self._land(buffer, sequence, epoch, decided_at)
        crashpoints.passed("before-release")
        released = buffer.release(  # step 13
            self.id, sequence.owner, sequence.number, sequence.traces, self._settings.redis.trace_ttl_secs
        )
        self._landing = None
        self._metrics.flush_seconds.observe(self._clock.now().mono_secs - started)
        if not released and sequence.traces:
            log.info("Sequence %d of writer %s was finished by another", sequence.number, sequence.owner)
            return False
        self._count(sequence)
        log.info(
            "Decided %d traces, kept %d",
            len(sequence.decisions),
            len(sequence.cuts),
            extra={
                "spans": sequence.spans,
                "writer": sequence.owner,
                "sequence": sequence.number,
                "released": released,
            },
        )
        return True

    def _land(self, buffer: Buffer, sequence: OpenSequence, epoch: str, decided_at: datetime) -> None:
        """Steps 11 and 12, again and again until both tables have the sequence."""
        assert self.id is not None
        if not sequence.decisions:
            return
        author = author_of(sequence.owner, epoch)
        decisions = decision_table(sequence.decisions, decided_at, author, sequence.number)

        wanted: list[tuple[Kind, Callable[[], Iterable[pa.Table]]]] = [  # the order of step 12
            ("decisions", lambda: [decisions])
        ]
        if sequence.spans:
            wanted.append(("spans", lambda: self._parts(buffer, sequence, decided_at)))
        uploads: dict[Kind, Upload] = {}
        for attempt in itertools.count():
            try:
                for kind, parts in wanted:
                    if kind not in uploads:
                        uploads[kind] = self._sink.upload(kind, parts())
                crashpoints.passed("after-upload")
                for kind, _ in wanted:
                    self._sink.commit(uploads[kind], author, sequence.number, epoch)
                    crashpoints.passed(f"after-{kind}")
                break
            except LinkLost:
                raise
            except Unavailable as fault:
                if attempt == 0:
                    log.warning("An open sequence waits: %s", fault, extra={"traces": len(sequence.traces)})
                    buffer.free(self.id, sequence.owner, sequence.number, sequence.dropped)
                self.fault = str(fault)
                if self._clock.wait(self._stop, RETRY_SECS[min(attempt, len(RETRY_SECS) - 1)]):
                    raise
        self.fault = None

    def _parts(self, buffer: Buffer, sequence: OpenSequence, decided_at: datetime) -> Iterator[pa.Table]:
        """The rows of `spans`, in the order of the table; no more payloads are held than one part is made of."""
        sequence.repeated = 0
        traces = in_order(sequence.cuts)
        begin = 0
        while begin < len(traces):
            end, spans = begin, 0
            while end < len(traces) and (end == begin or spans * self._span_bytes < self._part_bytes):
                spans += traces[end][3].spans
                end += 1
            part = _filled(traces[begin:end], buffer.payloads([trace[0] for trace in traces[begin:end]]))
            size = sum(len(payload) for trace in part for payload, _ in trace[3].payloads)
            self._span_bytes = 1 + size // max(1, spans)
            table, repeated = self.kernels.span_table(part, decided_at)
            del part  # before the table becomes a file
            sequence.repeated += repeated
            yield table
            del table  # before the next one is made
            begin = end

    def _count(self, sequence: OpenSequence) -> None:
        metrics = self._metrics
        waited_ms = self._clock.now().wall_ms - np.array(
            [d.last_log_ms for d in sequence.decisions], np.int64
        )
        observe_all(metrics.decision_seconds, np.maximum(waited_ms, 0) / 1000)
        for verdict, trigger, late, traces, spans in _tally(sequence.decisions):
            metrics.decisions.labels(trigger.label).inc(traces)
            if not verdict.kept:
                metrics.spans_dropped.inc(spans)
            if late:
                metrics.late_spans.labels("kept" if verdict.kept else "dropped").inc(spans)
                if verdict.reason != LATE_ERROR:
                    continue
            else:
                metrics.traces_ingested.inc(traces)
            if verdict.kept:
                metrics.traces_sampled.labels(verdict.reason).inc(traces)
            else:
                metrics.traces_dropped.inc(traces)
            if verdict.reason.startswith("force"):
                metrics.force_rule_matches.labels(verdict.policy).inc(traces)
                if verdict.kept:
                    metrics.traces_forced.inc(traces)
        metrics.spans_exported.inc(sequence.spans - sequence.repeated)
        metrics.spans_duplicate.inc(sequence.repeated)

    # --- step 14: takeover ---

    def _adopt(self, buffer: Buffer, now: Now) -> None:
        """Finishes sequences whose owner is not live. Any number of adopters at once is safe: the release decides.

        Lowest numbers first; among equals each adopter has an order of its own, so that several share the work.
        """
        me = self.id
        assert me is not None
        for owner, number in sorted(
            buffer.abandoned(), key=lambda claim: (claim[1], zlib.crc32(f"{me} {claim[0]}".encode()))
        ):
            traces = buffer.claimed_by(owner, number)
            if not traces:
                continue  # another adopter has released it meanwhile
            log.info("Taking over sequence %d of writer %s", number, owner, extra={"traces": len(traces)})
            sequence = OpenSequence(owner, number, now.mono_secs)
            self._decide(buffer, sequence, traces)
            try:
                finished = self._finish(buffer, sequence)
            except Released as fault:
                self._landing = None
                log.info("Sequence %d of writer %s: %s", number, owner, fault)
                continue
            if finished:
                self._metrics.takeovers.inc()


def author_of(owner: str, epoch: str) -> str:
    """Under which name a claim lands: another one in each life of Redis.

    Of a claim that outlived a part of Redis some traces may be gone. If what is left landed under the name of before,
    rows of the lost ones, whose spans never landed, would count as landed, too.
    """
    return f"{owner}.{zlib.crc32(epoch.encode()):08x}"


def _filled(traces: Sequence[KeptTrace], payloads: Sequence[Mapping[bytes, bytes]]) -> list[KeptTrace]:
    """The traces with what their fields hold. Raises Released where one of them is gone."""
    filled = []
    for (trace_id, verdict, late, pieces), fields in zip(traces, payloads, strict=True):
        if any(name not in fields for name, _ in pieces.payloads):
            raise Released(f"another has released trace {trace_id.hex()}")
        taken = [(fields[name], take) for name, take in pieces.payloads]
        filled.append((trace_id, verdict, late, replace(pieces, payloads=taken)))
    return filled


def _tally(decisions: Sequence[Decision]) -> Iterator[tuple[Verdict, Trigger, bool, int, int]]:
    """(verdict, trigger, late, traces, spans) of decisions that count alike: few, as traces share their verdicts."""
    found: dict[tuple[int, Trigger, bool], list[Decision]] = {}
    for d in decisions:
        found.setdefault((id(d.verdict), d.trigger, d.late), []).append(d)
    for (_, trigger, late), alike in found.items():
        yield alike[0].verdict, trigger, late, len(alike), sum(d.span_count for d in alike)
