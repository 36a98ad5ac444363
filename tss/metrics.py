"""Every Prometheus metric of tss, with its meaning; nothing else.

Conservation, over a fleet and while nothing fails, once counters and gauges are read together:

    spans_ingested = spans_exported + spans_dropped + spans_duplicate + spans_rejected + buffer_spans
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

PREFIX = "tail_sampling"

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for every counter, which says only when this process started

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DECISION_SECONDS = (0.5, 1, 2.5, 5, 10, 30, 60, 90, 120, 300, 600, 1800)


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        # ingest
        self.records_consumed = self._counter("records_consumed", "Kafka records read.")
        self.records_empty = self._counter(
            "records_empty", "Records that hold no span: tombstones, empty exports."
        )
        self.bytes_consumed = self._counter("bytes_consumed", "Bytes of record values read.")
        self.spans_ingested = self._counter(
            "spans_ingested", "Spans read from records, refused ones included."
        )
        self.spans_rejected = self._counter("spans_rejected", "Spans refused, by reason.", "reason")
        self.dead_letters = self._counter(
            "dead_letters", "Records sent to the dead-letter topic, by reason.", "reason"
        )
        self.chunks_written = self._counter(
            "chunks_written", "Chunks, one per trace and batch, that Redis acknowledged."
        )
        self.batch_seconds = self._histogram(
            "batch_seconds", "From the beginning of a batch's poll to the acknowledgement of all it held."
        )
        self.consumer_lag = self._gauge(
            "kafka_consumer_lag", "Records not read yet, by partition.", "partition"
        )
        self.partitions_assigned = self._gauge("kafka_partitions_assigned", "Partitions this process reads.")
        self.consumer_paused = self._gauge(
            "kafka_consumer_paused", "1 while reading is paused by back-pressure."
        )
        self.offset_commits = self._counter("kafka_offset_commits", "Offset commits, by outcome.", "outcome")
        self.restarts = self._counter(
            "reader_restarts", "Times the reader began again at its committed offsets."
        )

        # the buffer, as the whole fleet sees it
        self.buffer_traces = self._gauge(
            "buffer_traces_current", "Traces pending or claimed in Redis, whole fleet."
        )
        self.buffer_spans = self._gauge(
            "buffer_spans_current", "Spans pending or claimed in Redis, whole fleet."
        )
        self.buffer_bytes = self._gauge("buffer_bytes", "Memory Redis uses.")
        self.buffer_budget_bytes = self._gauge("buffer_budget_bytes", "Memory above which consumers pause.")
        self.oldest_pending = self._gauge(
            "oldest_pending_age_seconds", "Log time since the oldest pending trace began."
        )
        self.due_traces = self._gauge(
            "due_traces_current", "Traces that were due at the last look of a worker.", "worker"
        )
        self.clock_lag = self._gauge(
            "clock_lag_seconds", "How far the log's time is behind now; it holds what is due."
        )
        self.clock_waiting = self._gauge(
            "clock_waiting_partitions", "Partitions never heard of, which hold the clock."
        )
        self.clock_stalled = self._gauge(
            "clock_stalled_partitions", "Partitions silent for too long, left out."
        )

        # decide
        self.traces_ingested = self._counter("traces_ingested", "Traces judged for the first time.")
        self.traces_sampled = self._counter("traces_sampled", "Traces kept, by reason.", "reason")
        self.traces_dropped = self._counter("traces_dropped", "Traces dropped.")
        self.traces_forced = self._counter("traces_force_sampled", "Traces kept by a force rule.")
        self.force_rule_matches = self._counter(
            "force_rule_matches",
            "Traces a force rule decided, by rule; ids are bounded by the number of rules.",
            "rule_id",
        )
        self.decisions = self._counter("decisions", "Decisions by trigger.", "trigger")
        self.spans_exported = self._counter("spans_exported", "Spans in the spans table.")
        self.spans_dropped = self._counter("spans_dropped", "Spans of dropped traces.")
        self.spans_duplicate = self._counter(
            "spans_duplicate", "Spans delivered again after they had landed or beside themselves."
        )
        self.late_spans = self._counter(
            "late_spans", "Spans that came after their trace was decided, by verdict.", "verdict"
        )
        self.decision_seconds = self._histogram(
            "decision_latency_seconds",
            "From a trace's newest record to the commit of its decision.",
            DECISION_SECONDS,
        )
        self.takeovers = self._counter("takeovers", "Sequences of dead writers finished by this process.")
        self.writer_deaths = self._counter(
            "writer_deaths", "Writers of this process that began anew, by cause.", "cause"
        )

        # sink
        self.flush_seconds = self._histogram("flush_seconds", "One sequence from flush to release.")
        self.commit_seconds = self._histogram(
            "commit_seconds", "One table commit, retries included.", labels="table"
        )
        self.commit_retries = self._counter("commit_retries", "Table commits tried again, by cause.", "cause")
        self.open_sequence_age = self._gauge(
            "open_sequence_age_seconds", "Age of a worker's open sequence.", "worker"
        )
        self.files_written = self._counter("files_written", "Parquet files committed, by table.", "table")
        self.file_bytes = self._counter("file_bytes", "Bytes of Parquet committed, by table.", "table")

        # rules, queries, process
        self.force_rules = self._gauge("force_rules_active", "Force rules in the set this process applies.")
        self.rules_refresh_failures = self._counter(
            "force_rules_refresh_failures", "Failed attempts to read the rules."
        )
        self.queries = self._counter("queries", "SQL queries, by outcome.", "outcome")
        self.query_seconds = self._histogram("query_seconds", "Time of a SQL query.")
        self.kernels_compiled = self._gauge(
            "kernels_compiled", "1 while the hot path is compiled, 0 while the slow twins do its work."
        )
        self.ready = self._gauge("ready", "1 while this process is ready.")
        self.build = Info(f"{PREFIX}_build", "Version of tss.", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...] = SECONDS, labels: str | None = None
    ) -> Histogram:
        return Histogram(
            f"{PREFIX}_{name}", text, (labels,) if labels else (), buckets=buckets, registry=self.registry
        )


def observe_all(histogram: Histogram, values: NDArray[np.float64]) -> None:
    """`histogram.observe` of each value, for the price of a few: it has no such method of its own."""
    inner: Any = histogram
    counts = np.bincount(np.searchsorted(inner._upper_bounds, values), minlength=len(inner._buckets))
    for bucket, count in zip(inner._buckets, counts.tolist(), strict=True):
        bucket.inc(count)
    inner._sum.inc(float(values.sum()))
