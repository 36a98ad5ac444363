"""A worker, the production one, in a process of its own that times it from within, and how a run of some is led.

The settings come as a worker's do, by the environment. What it is to do comes line by line on standard input, each
answered with a line of JSON: `start` when everything but reading has started, `assigned` for how many partitions it
has, `read`, `count` as often as one likes, `end`. The time that counts is that from `read` to `end`. So neither imports
nor compiling count, and the wait for the last flush costs next to nothing. Nor does sharing the partitions count: who
comes first would have read most of them before the second one reads its share anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from tests.bench.generate import PARTITIONS
from tests.bench.stages import LIBRDKAFKA, Moment, Stages, cpu_seconds, peak_rss_bytes, thread_name
from tests.e2e.parts import environment_with
from tss import compiler, config, decide, logs
from tss.buffer import Buffer
from tss.compiler import Choice, Kernels
from tss.decide import Writer
from tss.ingest import Ingest
from tss.model import Record
from tss.service import Service
from tss.sink import Sink
from tss.source import Source

ROOT = Path(__file__).parent.parent.parent
POLL_SECS = 0.1  # between two counts: fine enough for a run's wall time, and next to no work for the worker
RUN_SECS = 900
START_SECS = 120  # on a busy machine
SELF = Path("/proc/self")
# Workers run side by side, and nobody asks them over HTTP.
ANY_PORTS = {f"TSS__OBSERVABILITY__{name}_PORT": "0" for name in ("HEALTH", "METRICS")}

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
class Outcome:
    """CPU seconds by stage from the first record on, and what came of it; of several workers, their sum."""

    seconds: dict[str, float]
    spans: int
    kept_spans: int
    wall_secs: float
    peak_rss_bytes: int  # of the largest
    load: float


@dataclass(frozen=True, slots=True)
class Count:
    """Of one worker, so far."""

    spans: int
    kept_spans: int
    refused_spans: int
    traces: int  # decided


# --- in the worker's process -------------------------------------------------------------------------------------


class Run:
    """A service whose reading waits until it is told to begin."""

    def __init__(self) -> None:
        self._stages = Stages()
        self._poll = Source.poll
        Source.poll = lambda *given: self._poll_when_told(*given)  # type: ignore[method-assign]
        for owner, name, stage in SEAMS:
            self._stages.wrap(owner, name, stage)
        self._loaded = threading.Event()
        self._reading = threading.Event()
        self._held: Source | None = None
        settings = config.load(os.environ)
        compiler.load(settings.app.kernels)  # so that the service finds them compiled
        self._load = compiler.load_cached
        compiler.load_cached = self._timed_kernels
        logs.setup(settings.observability, settings.app.instance_id)
        self._service = Service(settings)

    def _poll_when_told(self, source: Source, timeout_secs: float) -> list[Record]:
        """Joins the group at once, but what it is given there is paused. To ingest it is not: it would make room."""
        if self._reading.is_set():
            if self._held is not None:
                self._held = None
                source.resume()
            return self._poll(source, timeout_secs)
        self._held, source._paused = source, True
        try:
            return self._poll(source, timeout_secs)
        finally:
            source._paused = False

    def _timed_kernels(self, kernels: Choice) -> Kernels | None:
        loaded = self._load(kernels)
        assert loaded is not None
        self._loaded.set()
        return replace(
            loaded,
            decode=self._stages.timed(DECODE, loaded.decode),
            span_table=self._stages.timed(ARROW, loaded.span_table),
        )

    def start(self) -> object:
        """Returns when only reading is left to begin."""
        service = self._service
        service.start()
        deadline = time.monotonic() + START_SECS
        while not (self._loaded.is_set() and service.started and all(w.id for w in service.writers)):
            service.wait(POLL_SECS)  # raises what ended it
            if time.monotonic() > deadline:
                raise TimeoutError(f"not started within {START_SECS} s: {service.status()}")
        return None

    def assigned(self) -> object:
        return 0 if self._held is None else len(self._held.assigned)

    def read(self) -> object:
        self._before = self._stages.moment()
        self._reading.set()
        return None

    def count(self) -> object:
        self._service.wait(0)
        found = {
            name: self._sum(f"{name}_total")
            for name in ("spans_ingested", "spans_exported", "spans_rejected", "traces_ingested")
        }
        return list(found.values())

    def end(self) -> object:
        """CPU seconds by stage, and the most memory it took. Ends the service, too."""
        seconds = self._by_stage(self._before, self._stages.moment())
        peak = peak_rss_bytes(SELF)
        self._service.cancel()
        self._service.stop()
        return [seconds, peak]

    def _sum(self, name: str) -> int:
        """A counter of tss, over its labels."""
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
    run = Run()
    for line in sys.stdin:
        print(json.dumps(getattr(run, line.strip())()), flush=True)
    os._exit(0)  # whoever led it is gone, and threads may still wait to be told


# --- who leads it ------------------------------------------------------------------------------------------------


class Measured:
    """A worker's process, started; its log is at hand when it fails."""

    def __init__(self, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                cwd=ROOT,
                env=environment_with(ANY_PORTS | dict(env)),
            )

    def send(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            print(word, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._failed()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._failed()

    def _failed(self) -> NoReturn:
        self._process.wait()
        raise SystemExit(f"a measured worker failed:\n{self._log.read_text()[-4000:]}")

    def count(self) -> Count:
        self.send("count")
        return Count(*self.answer())

    def close(self) -> None:
        """Kills it where it has not ended by itself."""
        with self._process:
            self._process.kill()


def measured(
    envs: Sequence[Mapping[str, str]],
    redis_pids: Sequence[int],
    done: Callable[[Count], bool],
    log: Path,
    before_reading: Callable[[], None] = lambda: None,
) -> Outcome:
    """Workers of these settings read from the same moment on, until `done` with what they counted together."""
    with ExitStack() as ends:
        workers = []
        for number, env in enumerate(envs):
            workers.append(Measured(env, log.with_suffix(f".{number}.log")))
            ends.callback(workers[-1].close)
        _all(workers, "start")
        _share(workers)
        before_reading()
        begun_secs, redis_before = time.monotonic(), _redis_seconds(redis_pids)
        _all(workers, "read")
        while not done(counted := _sum_of([worker.count() for worker in workers])):
            if time.monotonic() - begun_secs > RUN_SECS:
                raise SystemExit(f"not done within {RUN_SECS} s: {counted}")
            time.sleep(POLL_SECS)
        wall_secs = time.monotonic() - begun_secs
        redis_seconds = _redis_seconds(redis_pids) - redis_before
        load = os.getloadavg()[0]
        found = _all(workers, "end")
    if counted.refused_spans:
        raise AssertionError(f"refused {counted.refused_spans} spans")
    seconds = {stage: round(sum(mine[stage] for mine, _ in found), 4) for stage in CLIENT_STAGES}
    return Outcome(
        seconds=seconds | {REDIS: round(redis_seconds, 4)},
        spans=counted.spans,
        kept_spans=counted.kept_spans,
        wall_secs=round(wall_secs, 3),
        peak_rss_bytes=max(peak for _, peak in found),
        load=load,
    )


def _share(workers: Sequence[Measured]) -> None:
    """Returns when each has its part of the partitions."""
    deadline, share = time.monotonic() + START_SECS, -(-PARTITIONS // len(workers))
    while sum(counts := _all(workers, "assigned")) < PARTITIONS or max(counts) > share:
        if time.monotonic() > deadline:
            raise SystemExit(f"the partitions are not shared within {START_SECS} s: {counts} of {PARTITIONS}")
        time.sleep(POLL_SECS)  # a rebalance takes seconds, and tells nobody outside when it is done


def _all(workers: Sequence[Measured], word: str) -> list[Any]:
    """To each at once."""
    for worker in workers:
        worker.send(word)
    return [worker.answer() for worker in workers]


def _sum_of(counts: Sequence[Count]) -> Count:
    return Count(*(sum(getattr(c, name) for c in counts) for name in Count.__slots__))


def _redis_seconds(pids: Sequence[int]) -> float:
    """With the children that rewrote its log."""
    return sum(cpu_seconds(Path(f"/proc/{pid}"), with_children=True) for pid in pids)


if __name__ == "__main__":
    main()
