"""Does a span cost the same when much is pending, and with several workers or Redis servers?

The state is simulated, as no machine is large enough to let it grow: before the run, Redis is filled with traces that
no timer will reach, by the production append path. They are a span each, some 300 bytes, and each is an entry of its
shard's indexes and in a hash of its own, as any trace is. Then the usual run goes through the same servers.

Redis rewrites its log by itself when that has doubled, which costs a pass over all that is pending. No run here is
long enough to get its fair share of that, so rewriting is off, for all sizes alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from tests.bench import topics
from tests.bench.outside import Outside, Servers, topic_name
from tests.bench.path import Case, env_of, run_with
from tests.bench.report import PathRun, machine, progress
from tests.bench.topics import Filled
from tests.bench.worker import (
    APPEND,
    ARROW,
    CLAIM,
    COMMIT,
    DECIDE,
    DECODE,
    INGEST,
    KAFKA,
    PARQUET,
    REDIS,
    REST,
)
from tests.builders import span, traces_data
from tss import compiler, config
from tss.buffer import Buffer
from tss.model import FACTS, NO_START, ROOT, TRACE_ID_BYTES, Chunks, Origin, encode_origins

BATCH_TRACES = 50_000
FUTURE_MS = 10 * 365 * 86_400_000  # after now, on the log: no timer looks so far
FILLED_MEMORY_BYTES = 18 << 30  # for all nodes together; 10 million traces take 7 GB
NO_LIMITS = {"TSS__APP__MAX_BUFFER_TRACES": str(10**9), "TSS__APP__MAX_BUFFER_SPANS": str(10**11)}


@dataclass(frozen=True, slots=True)
class Size:
    """What a run goes through."""

    pending: int
    workers: int
    nodes: int

    def __str__(self) -> str:
        return f"{self.pending:,} pending, {self.workers} worker(s), {self.nodes} node(s)"


@dataclass(frozen=True, slots=True)
class Sized:
    """One run, and what each trace that waited took in Redis; 0 when none did."""

    size: Size
    run: PathRun
    bytes_per_trace: float


def measure(outside: Outside, layout: str, spans: int, sizes: Sequence[Size], runs: int) -> list[Sized]:
    """10 % kept, five rules, over one topic; size after size, then all again."""
    roomy = replace(outside, env=outside.env | NO_LIMITS)
    found = []
    with outside.topic(topic_name(layout)) as topic:
        filled = topics.fill(outside.brokers, topic, layout, spans)
        for _ in range(runs):
            for size in sizes:
                found.append(_run(roomy, filled, size))
                progress(f"{size}:{found[-1].run}")
    return found


def _run(outside: Outside, filled: Filled, size: Size) -> Sized:
    case = Case(filled.layout, 10, 5)
    with outside.redis(size.nodes) as servers:
        servers.set(maxmemory=FILLED_MEMORY_BYTES // size.nodes, auto_aof_rewrite_percentage=0)
        env = env_of(outside, servers, filled.topic, case)
        # A dictionary made of what waits would fit what is measured badly.
        waiting = Waiting(config.load(env | {"TSS__REDIS__COMPRESSION": "lz4"}).redis, servers)
        outcome = run_with(
            env,
            servers,
            filled,
            outside.folder / "scale.log",
            workers=size.workers,
            before_reading=lambda: waiting.fill(size.pending),
        )
        waiting.check()
    run = PathRun(filled.layout, case.kept_percent, case.rules, outcome)
    return Sized(size, run, waiting.bytes_per_trace)


# --- what is pending ---------------------------------------------------------------------------------------------


class Waiting:
    """Traces in Redis that nobody will decide."""

    def __init__(self, settings: config.Redis, servers: Servers) -> None:
        self._settings = settings
        self._servers = servers
        self._traces = 0
        self.bytes_per_trace = 0.0

    def fill(self, traces: int) -> None:
        """By the production path, so that what waits is what would wait. Wants the worker to have begun an epoch."""
        if traces == 0:
            return
        self._traces = traces
        begun_secs, before_bytes = time.monotonic(), self._servers.memory_bytes
        write = compiler.load("numba").chunk_writes
        rng = np.random.default_rng(1)
        with closing(Buffer(self._settings)) as buffer:
            for first in range(0, traces, BATCH_TRACES):
                chunks = _chunks(rng, first, min(BATCH_TRACES, traces - first))
                buffer.append(chunks, {}, int(time.time() * 1000), root_timer=False, write=write)
        self.check()
        self.bytes_per_trace = (self._servers.memory_bytes - before_bytes) / traces
        progress(f"  {traces:,} traces pending after {time.monotonic() - begun_secs:.0f} s")

    def check(self) -> None:
        """All are still there."""
        with closing(Buffer(self._settings)) as buffer:
            found = buffer.usage().pending_traces
        assert found >= self._traces, (
            f"{found} traces are pending, not the {self._traces} that no timer should reach"
        )


def _chunks(rng: np.random.Generator, first: int, count: int) -> Chunks:
    """Chunks of one span each, of new traces, all as if of one record. The log brings twenty in a millisecond."""
    facts = np.zeros(count, FACTS)
    facts["log_time_ms"] = int(time.time() * 1000) + FUTURE_MS + np.arange(first, first + count) // 20
    facts["spans"], facts["bits"], facts["start_ns"] = 1, ROOT, NO_START
    ids = rng.integers(0, 256, (count, TRACE_ID_BYTES), np.uint8)
    tail = np.frombuffer(ORIGIN + PAYLOAD, np.uint8)
    rows = np.concatenate([facts.view(np.uint8).reshape(count, -1), np.tile(tail, (count, 1))], axis=1)
    id_at = FACTS.itemsize + len(ORIGIN) + PAYLOAD.index(PAYLOAD_ID)
    rows[:, id_at : id_at + TRACE_ID_BYTES] = ids
    field_at = np.arange(count + 1, dtype=np.int64) * rows.shape[1]
    return Chunks(
        ids, facts, memoryview(rows.tobytes()), field_at, field_at[:-1] + FACTS.itemsize + len(ORIGIN)
    )


ORIGIN = encode_origins([Origin(partition=1 << 20, offset=0, spans=1)])  # no topic has so many partitions
PAYLOAD_ID = bytes(range(0xF0, 0x100))
PAYLOAD = traces_data(
    span(
        trace_id=PAYLOAD_ID,
        attrs={"http.route": "/cart/{id}", "http.response.status_code": 200, "server.address": "10.1.2.3"},
    )
).SerializeToString()


# --- what is told ------------------------------------------------------------------------------------------------

CLIENTS = {
    "Kafka client, decode": (KAFKA, DECODE, INGEST),
    "Redis client": (APPEND, CLAIM),
    "decide, write, commit": (DECIDE, ARROW, PARQUET, COMMIT, REST),
    "Redis server": (REDIS,),
}


def markdown(found: Sequence[Sized], versions: Mapping[str, str]) -> str:
    """A row a size: CPU microseconds a span by part, medians of its runs."""
    by_size: dict[Size, list[Sized]] = {}
    for one in found:
        by_size.setdefault(one.size, []).append(one)
    lines = [
        f"| pending traces | workers | Redis nodes | {' | '.join(CLIENTS)} | sum | k spans a second | B in Redis a pending trace |",
        "|---|---|---|" + "---|" * (len(CLIENTS) + 3),
    ]
    for size, mine in by_size.items():
        runs = [one.run for one in mine]
        cells = [_spread([sum(map(run.micros, stages)) for run in runs]) for stages in CLIENTS.values()]
        cells.append(_spread([run.total_micros for run in runs]))
        cells.append(_spread([run.outcome.spans / run.outcome.wall_secs / 1000 for run in runs], digits=0))
        held = statistics.median(one.bytes_per_trace for one in mine)
        cells.append(f"{held:.0f}" if held else "-")
        lines.append(f"| {size.pending:,} | {size.workers} | {size.nodes} | {' | '.join(cells)} |")
    runs_each, spans = min(map(len, by_size.values())), found[0].run.outcome.spans
    where = ", ".join(f"{name} {version}" for name, version in versions.items())
    told = f"CPU microseconds a span, layout {found[0].run.layout}, median of {runs_each} runs of {spans:,} spans"
    return "\n".join([*lines, "", f"{told}. {machine()}; {where}."])


def _spread(values: Sequence[float], *, digits: int = 2) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"
