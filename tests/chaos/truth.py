"""A stream whose truth is known, and the comparison of the tables with it.

Spans are sent one a record, unkeyed, those of one trace over any partitions within two seconds. Three kinds of trace:
`all errors` is kept whole however it is cut, so that a missing span of it is a lost one; `error` has one failed span,
so that judging it in two halves shows; the ordinary ones must be dropped.

What can be wrong, each with a number of its own:

    lost           spans of traces that must be kept, and are not in the table; spans of dropped traces that no
                   decision speaks of
    doubled        spans that are in the table twice; spans of dropped traces that decisions speak of twice
    split          traces with two verdicts, but for the late-error upgrade
    late-upgraded  traces first dropped and then kept because an error came late: stated, and wanted to be none
                   as long as no producer is held up
    cut            traces judged in more than one part: spans came after the decision
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Producer
from pyiceberg.catalog import Catalog

from tests.e2e.traces import Trace, make_trace, record

SPANS_EACH = 4
SPREAD_SECS = 2.0
ALL_ERRORS_SHARE = 0.10
ONE_ERROR_SHARE = 0.05
DELIVERY_SECS = 180  # a broker that is away for a while delays a record, it does not lose it


class Stream:
    """Sends traces at a steady rate from `start` to `stop`; `traces` is what was begun, all of it delivered."""

    def __init__(self, brokers: str, topic: str, partitions: int, traces_per_sec: float, seed: int) -> None:
        self.traces: list[Trace] = []
        self._topic = topic
        self._partitions = partitions
        self._pause_secs = 1 / traces_per_sec
        self._rng = random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream")
        self._errors: list[Any] = []
        self._producer = Producer(
            {
                "bootstrap.servers": brokers,
                "enable.idempotence": True,  # a retry of the client is no second span
                "message.timeout.ms": DELIVERY_SECS * 1000,
                "linger.ms": 5,
                "log_level": 2,
            }
        )

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Begins no more traces, sends what those begun still need, returns when the broker has everything."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        assert self._producer.flush(DELIVERY_SECS) == 0, "the broker did not take the stream"
        assert not self._errors, self._errors[0]

    def _run(self) -> None:
        waiting: list[tuple[float, bytes]] = []
        next_trace = time.monotonic()
        while waiting or not self._stopping.is_set():
            now = time.monotonic()
            while next_trace <= now and not self._stopping.is_set():
                trace = self._make()
                self.traces.append(trace)
                waiting += [
                    (next_trace + self._rng.random() * SPREAD_SECS, record(trace.service, span))
                    for span in trace.spans
                ]
                next_trace += self._pause_secs
            for _, value in [due for due in waiting if due[0] <= now]:
                self._producer.produce(
                    self._topic,
                    value,
                    partition=self._rng.randrange(self._partitions),
                    on_delivery=self._note,
                )
            waiting = [later for later in waiting if later[0] > now]
            self._producer.poll(0.01)

    def _make(self) -> Trace:
        draw = self._rng.random()
        kind = "all errors" if draw < ALL_ERRORS_SHARE else None
        if kind is None and draw < ALL_ERRORS_SHARE + ONE_ERROR_SHARE:
            kind = "error"
        return make_trace(self._rng, time.time_ns(), reason=kind, spans=SPANS_EACH)

    def _note(self, error: Any, _: object) -> None:
        if error is not None:
            self._errors.append(error)


class Tables:
    """Both tables as they are now, read from the files without any code of tss; each file is read once."""

    def __init__(self, connect: Callable[[], Catalog], spans: str, decisions: str) -> None:
        self._connect = connect
        self._names = {"spans": spans, "decisions": decisions}
        self._columns = {
            "spans": ["trace_id", "span_id"],
            "decisions": ["trace_id", "kept", "reason", "late", "span_count"],
        }
        self._files: dict[str, pa.Table] = {}

    def rows(self, kind: str) -> Iterator[dict[str, Any]]:
        table = self._connect().load_table(self._names[kind])
        paths = [task.file.file_path for task in table.scan().plan_files()]
        for path in paths:
            if path not in self._files:
                with table.io.new_input(path).open() as file:
                    self._files[path] = pq.read_table(
                        pa.BufferReader(file.read()), columns=self._columns[kind]
                    )
            yield from self._files[path].to_pylist()


@dataclass
class Outcome:
    """What the comparison says of one run, or of several added up."""

    traces: int = 0
    kept: int = 0
    lost: int = 0
    doubled: int = 0
    split: int = 0
    late_upgraded: int = 0
    cut: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not (self.lost or self.doubled or self.split or self.faults)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def compare(traces: Iterable[Trace], tables: Tables) -> Outcome:
    """The tables against the truth."""
    wanted = {trace.id: trace for trace in traces}
    written: Counter[tuple[str, str]] = Counter()
    for row in tables.rows("spans"):
        if row["trace_id"] in wanted:
            written[row["trace_id"], row["span_id"]] += 1
    decisions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in tables.rows("decisions"):
        if row["trace_id"] in wanted:
            decisions[row["trace_id"]].append(row)

    outcome = Outcome(traces=len(wanted), kept=sum(t.reason is not None for t in wanted.values()))
    for trace in wanted.values():
        rows = decisions[trace.id]
        upgraded = {row["kept"] for row in rows if row["reason"] != "late_error"} == {False} and any(
            row["reason"] == "late_error" for row in rows
        )
        outcome.late_upgraded += upgraded
        outcome.cut += any(row["late"] for row in rows)
        outcome.split += len({(row["kept"], row["reason"]) for row in rows}) > 1 + upgraded
        times = [written[trace.id, span_id] for span_id in trace.span_ids]
        outcome.doubled += sum(max(0, count - 1) for count in times)
        if trace.reason is None:
            spoken_of = sum(row["span_count"] for row in rows)
            outcome.lost += max(0, len(trace.spans) - spoken_of)
            outcome.doubled += max(0, spoken_of - len(trace.spans))
            if any(times):
                outcome.faults.append(f"ordinary trace {trace.id} was kept: {rows}")
        elif not upgraded:
            outcome.lost += times.count(0)
    return outcome
