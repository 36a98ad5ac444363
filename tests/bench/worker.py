"""One run of a worker, the production one, in a process of its own that times it from within.

The settings come as a worker's do, by the environment; the order as JSON on standard input, the outcome as JSON on
standard output. Reading begins when everything else has started, and with it the time that counts; it ends when all
that was ordered is in the tables. So neither imports nor compiling count, and the wait for the last flush costs
next to nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tests.bench.stages import LIBRDKAFKA, Moment, Stages, cpu_seconds, peak_rss_bytes, thread_name
from tss import compiler, config, decide, logs
from tss.buffer import Buffer
from tss.compiler import Kernels
from tss.decide import Writer
from tss.ingest import Ingest
from tss.service import Service
from tss.sink import Sink
from tss.source import Source

POLL_SECS = 0.1
START_SECS = 120  # a cold start compiles
SELF = Path("/proc/self")

KAFKA = "Kafka client"
DECODE = "scan, match, group, pack"
APPEND = "Redis client, append"
INGEST = "ingest, other"
CLAIM = "Redis client, claim and release"
DECIDE = "decide"
ARROW = "Arrow"
PARQUET = "Parquet, upload"
COMMIT = "commit"
REST = "rest"
REDIS = "Redis server"
CLIENT_STAGES = (KAFKA, DECODE, APPEND, INGEST, CLAIM, DECIDE, ARROW, PARQUET, COMMIT, REST)
STAGES = (*CLIENT_STAGES, REDIS)

SEAMS: tuple[tuple[Any, str, str], ...] = (
    (Ingest, "step", INGEST),
    *((Source, name, KAFKA) for name in ("poll", "commit", "ask_ends", "ends", "refresh_partition_count")),
    (Buffer, "append", APPEND),
    (Writer, "step", DECIDE),
    *((Buffer, name, CLAIM) for name in ("claim", "facts", "record", "payloads", "wait_durable", "release")),
    (decide, "decision_table", ARROW),
    (Sink, "upload", PARQUET),
    (Sink, "commit", COMMIT),
)


@dataclass(frozen=True, slots=True)
class Order:
    """`traces` to decide before the run ends; or `pending_spans` to have in Redis, none of them ever due."""

    spans: int
    traces: int
    redis_pid: int
    pending_spans: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """CPU seconds by stage from the first record on, and what came of it."""

    seconds: dict[str, float]
    spans: int
    kept_spans: int
    wall_secs: float
    peak_rss_bytes: int
    load: float


class Run:
    """A service whose reading waits until all else has started."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._stages = Stages()
        for owner, name, stage in SEAMS:
            self._stages.wrap(owner, name, stage)
        self._load = compiler.load
        compiler.load = self._kernels_when_started  # the ingest loop's first call
        self._reading = threading.Event()
        settings = config.load(os.environ)
        logs.setup(settings.observability, settings.app.instance_id)
        self._service = Service(settings)

    def _kernels_when_started(self, kernels: Literal["numba", "python"]) -> Kernels:
        loaded = self._load(kernels)
        deadline = time.monotonic() + START_SECS
        while not (self._service.started and all(writer.id for writer in self._service.writers)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not started within {START_SECS} s: {self._service.status()}")
            time.sleep(POLL_SECS)
        self._begun_secs = time.monotonic()
        self._redis_before = self._redis_seconds()
        self._before = self._stages.moment()
        self._reading.set()
        return replace(
            loaded,
            decode=self._stages.timed(DECODE, loaded.decode),
            span_table=self._stages.timed(ARROW, loaded.span_table),
        )

    def _redis_seconds(self) -> float:
        return cpu_seconds(Path(f"/proc/{self._order.redis_pid}"), with_children=True)

    def go(self) -> Outcome:
        """Ends the service, too."""
        order = self._order
        self._service.start()
        while not self._reading.wait(POLL_SECS):
            self._service.wait(0)  # raises what ended it
        while not self._done():
            self._service.wait(POLL_SECS)
        wall_secs = time.monotonic() - self._begun_secs
        after = self._stages.moment()
        redis_seconds = self._redis_seconds() - self._redis_before
        seconds = self._by_stage(self._before, after) | {REDIS: redis_seconds}
        outcome = Outcome(
            seconds={stage: round(secs, 4) for stage, secs in seconds.items()},
            spans=self._count("spans_ingested_total"),
            kept_spans=self._count("spans_exported_total"),
            wall_secs=round(wall_secs, 3),
            peak_rss_bytes=peak_rss_bytes(SELF),
            load=os.getloadavg()[0],
        )
        lost = self._count("spans_rejected_total")
        if lost or not (order.pending_spans or outcome.spans == order.spans):
            raise AssertionError(f"read {outcome.spans} spans of {order.spans}, refused {lost}")
        self._service.cancel()
        self._service.stop()
        return outcome

    def _done(self) -> bool:
        if self._order.pending_spans:
            return self._count("spans_ingested_total") >= self._order.pending_spans
        return self._count("traces_ingested_total") >= self._order.traces

    def _count(self, name: str) -> int:
        """A counter of tss, summed over its labels."""
        metric = getattr(self._service.metrics, name.removesuffix("_total"))
        return int(sum(s.value for family in metric.collect() for s in family.samples if "_total" in s.name))

    def _by_stage(self, before: Moment, after: Moment) -> dict[str, float]:
        seconds = dict.fromkeys(CLIENT_STAGES, 0.0)
        for stage, secs in after.stages.items():
            seconds[stage] += secs - before.stages.get(stage, 0.0)
        python = {thread.native_id: thread.name for thread in threading.enumerate()}
        for number in after.threads.keys() - self._stages.threads:
            secs = after.threads[number] - before.threads.get(number, 0.0)
            if number in python:
                if python[number].startswith("ThreadPoolExecutor"):
                    seconds[COMMIT] += secs  # pyiceberg reads and writes manifests in them
            elif thread_name(number).startswith(LIBRDKAFKA):
                seconds[KAFKA] += secs
            else:
                seconds[PARQUET] += secs  # Arrow's pools
        seconds[REST] = max(0.0, after.process - before.process - sum(seconds.values()))
        return seconds


def main() -> None:
    outcome = Run(Order(**json.load(sys.stdin))).go()
    json.dump(asdict(outcome), sys.stdout)


if __name__ == "__main__":
    main()
