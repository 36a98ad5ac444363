"""Does a worker stay as it is? A steady stream for as long as one likes, memory and lag looked at all along.

Records are dated when they are sent, so what is pending is what comes within the inactivity timeout. The worker is
`tss run` as users run it; its RSS is that of its process, without the one that waits for queries. The producer is on
this machine, too: near the limit of the machine it takes from what is measured.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import topics
from tests.bench.outside import Outside, Servers, topic_name
from tests.bench.path import Case, env_of
from tests.bench.report import machine, progress
from tests.bench.stages import cpu_seconds, peak_rss_bytes, rss_bytes
from tests.e2e.parts import Worker, total, wait_for

INACTIVITY_SECS = 30
SAMPLE_SECS = 5.0
SAID_SECS = 60.0
DRAINED_SECS = 300.0
KEPT_PERCENT, RULES = 10, 5
# Of a partition: all of half an hour may take 60 GB.
LITTLE_DISK = {"retention_bytes": 1 << 30, "segment_bytes": 64 << 20}


@dataclass(frozen=True, slots=True)
class Sample:
    at_secs: float
    worker_bytes: int
    redis_bytes: int
    lag_records: int
    pending_spans: int
    due_traces: int


@dataclass(frozen=True, slots=True)
class Steady:
    """What became of a stream. `samples` are those while it went on."""

    layout: str
    spans: int
    secs: float
    samples: list[Sample]
    peak_rss_bytes: int
    worker_secs: float
    redis_secs: float


def measure(
    outside: Outside, layout: str, spans_per_sec: int, secs: float, *, inactivity_secs: int = INACTIVITY_SECS
) -> Steady:
    """Raises AssertionError when not every span that was sent has been decided in the end."""
    with outside.topic(topic_name(layout), **LITTLE_DISK) as topic, outside.redis(1) as servers:
        case = Case(layout, KEPT_PERCENT, RULES)
        env = env_of(outside, servers, topic, case)
        env["TSS__APP__INACTIVITY_TIMEOUT_SECS"] = str(inactivity_secs)
        worker = Worker(env, outside.folder / "steady.log")
        try:
            worker.ready()
            return _watched(worker, servers, outside.brokers, topic, layout, spans_per_sec, secs)
        finally:
            worker.kill()


def _watched(
    worker: Worker,
    servers: Servers,
    brokers: str,
    topic: str,
    layout: str,
    spans_per_sec: int,
    secs: float,
) -> Steady:
    sent: list[int] = []
    producer = threading.Thread(
        target=lambda: sent.append(topics.send_paced(brokers, topic, layout, spans_per_sec, secs)),
        name="producer",
    )
    process, (redis_pid,) = Path(f"/proc/{worker.process.pid}"), servers.pids
    redis_process = Path(f"/proc/{redis_pid}")

    def cpu() -> tuple[float, float]:
        return cpu_seconds(process, with_children=False), cpu_seconds(redis_process, with_children=True)

    before = cpu()
    begun = said = time.monotonic()
    samples: list[Sample] = []
    producer.start()
    while producer.is_alive():
        producer.join(SAMPLE_SECS)
        samples.append(_sample(worker, servers, process, time.monotonic() - begun))
        if time.monotonic() - said >= SAID_SECS:
            said = time.monotonic()
            progress(f"  {said - begun:.0f} of {secs:.0f} s: {samples[-1]}")
    took = time.monotonic() - begun
    assert sent, "the producer failed"
    wait_for(
        lambda: total([worker], "tail_sampling_spans_ingested_total") >= sent[0],
        DRAINED_SECS,
        lambda: samples[-1:],
    )
    wait_for(lambda: worker.pipeline()["pending_spans"] == 0, DRAINED_SECS, worker.pipeline)
    worker_secs, redis_secs = (now - then for now, then in zip(cpu(), before, strict=True))
    return Steady(layout, sent[0], took, samples, peak_rss_bytes(process), worker_secs, redis_secs)


def _sample(worker: Worker, servers: Servers, process: Path, at_secs: float) -> Sample:
    pipeline = worker.pipeline()
    return Sample(
        round(at_secs, 1),
        rss_bytes(process),
        servers.memory_bytes,
        pipeline["lag_records"],
        pipeline["pending_spans"] or 0,
        pipeline["due_traces"],
    )


def markdown(found: Steady) -> str:
    """A row a third of the time: medians, and peaks in parentheses."""
    size = max(1, len(found.samples) // 3)
    thirds = [found.samples[:size], found.samples[size : 2 * size], found.samples[2 * size :]]
    columns: dict[str, Callable[[Sample], float]] = {
        "worker RSS, MB": lambda s: s.worker_bytes / 1e6,
        "Redis, MB": lambda s: s.redis_bytes / 1e6,
        "lag, records": lambda s: s.lag_records,
        "pending spans": lambda s: s.pending_spans,
    }
    lines = [f"| third | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for number, third in enumerate(thirds, start=1):
        lines.append(f"| {number} | {' | '.join(_cell(third, of) for of in columns.values())} |")
    micros = 1e6 / found.spans
    told = (
        f"Median (peak). Layout {found.layout}, {found.spans:,} spans in {found.secs:.0f} s "
        f"({found.spans / found.secs / 1000:.1f} k a second), {KEPT_PERCENT} % kept, {RULES} rules, decided after "
        f"{INACTIVITY_SECS} s; peak RSS {found.peak_rss_bytes / 1e6:.0f} MB; CPU a span: worker "
        f"{found.worker_secs * micros:.1f} us, Redis {found.redis_secs * micros:.1f} us. {machine()}."
    )
    return "\n".join([*lines, "", told])


def _cell(samples: Sequence[Sample], of: Callable[[Sample], float]) -> str:
    values = [of(sample) for sample in samples] or [0.0]
    return f"{statistics.median(values):,.0f} ({max(values):,.0f})"
