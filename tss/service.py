"""One process: an ingest loop, several decide loops, the API and the metrics, started, watched and stopped here.

Loops are threads that call `step` for ever. What waiting can mend (`Unavailable`, `LinkLost`, `Fenced`) makes a loop
forget what it holds, wait a little longer each time, and go on. Anything else is a bug or a setting that cannot
work: the whole process stops and says so, because a half-dead worker would hold the fleet's clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from prometheus_client import start_http_server

from tss import __version__, api, compiler, config, embedded, memory
from tss.buffer import Buffer
from tss.clock import SYSTEM
from tss.decide import Writer
from tss.errors import ConfigError, Fenced, Unavailable
from tss.ingest import Ingest
from tss.metrics import Metrics
from tss.model import Now
from tss.query import QueryEngine, QueryResult
from tss.rule_store import RuleStore
from tss.sink import Sink
from tss.source import Source, lowest_commit

log = logging.getLogger("tss")

BACKOFF_SECS = (0.2, 0.5, 1.0, 2.0, 5.0)
STUCK_SECS = 600.0  # a decide loop that made no step for so long loses its leases, so that another takes over
MONITOR_SECS = 5.0  # between two looks at the catalog
EMBEDDED_PARTITIONS = 8


class Service:
    """A whole worker. `start` returns when everything runs; `wait` returns when it ended and raises what ended it."""

    def __init__(self, settings: config.Config) -> None:
        memory.hold_little()
        self.settings = settings
        self._kafka_embedded = settings.kafka.brokers == config.EMBEDDED
        self._clock = SYSTEM
        self._restoring = threading.Lock()
        self._parts = ExitStack()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._drained = threading.Event()
        self._kernels_known = threading.Event()
        self._fault: BaseException | None = None
        self._steps: dict[str, float] = {}
        self._faults: dict[str, str | None] = {}
        self._queries: QueryEngine | None = None
        self._rule_failures = 0
        self.draining = False
        self.started = False
        self.kernels: Literal["loading", "compiling", "compiled", "python"] = "loading"
        self.metrics = Metrics()
        self.metrics.build.info({"version": __version__})
        self.api_port = self.metrics_port = 0

    # --- start, in the order of the log ---

    def start(self) -> None:
        """Raises ConfigError where a setting cannot work; what is merely not there yet is waited for."""
        log.info("Starting Tail Sampling Selector v%s", __version__)
        self.settings = settings = self._with_embedded_parts()
        self.rules = RuleStore(settings)
        self.sink = Sink(settings.storage, settings.kafka.consumer_group, self.metrics)
        self.ingest = Ingest(
            settings,
            source=self._source,
            connect=self._connect,
            rules=lambda: self.rules.current,
            metrics=self.metrics,
            clock=self._clock,
        )
        self.writers = [self._writer(number) for number in range(settings.app.evaluation_workers)]
        self._run("kernels", self._load_kernels)
        self._serve()

        log.info("Initializing Iceberg storage backend")
        log.info("  Catalog URI: %s", self.sink.catalog_uri)
        if not self._opened():
            return
        log.info("Connected to Iceberg catalog")
        self._queries = QueryEngine(settings.api, self.sink.files, self.sink.s3)
        asyncio.run_coroutine_threadsafe(self._queries.start(), self._api_loop).result()
        self._run("rules", lambda: self.rules.run(self._stop))
        self._run("heartbeat", self._beat)
        self._run("monitor", self._watch)
        self._run("memory", self._give_back)
        for writer in self.writers:
            self._run(f"worker-{writer.name}", functools.partial(self._decide, writer))
        log.info("Started %d evaluation workers", len(self.writers))
        api = settings.observability
        log.info("Health/Admin API server listening on %s:%d", api.health_addr, self.api_port)
        self._run("ingest", self._take_in)
        log.info("Consuming from Kafka topic: %s", settings.kafka.input_topic)
        self.started = True

    def _with_embedded_parts(self) -> config.Config:
        """Starts what is `embedded`, and puts its address into the settings."""
        kafka, redis = self.settings.kafka, self.settings.redis
        if kafka.brokers == config.EMBEDDED:
            topics = {kafka.input_topic: EMBEDDED_PARTITIONS, kafka.dlq: 1}
            broker = self._parts.enter_context(embedded.EmbeddedKafka(topics))
            kafka = kafka.model_copy(update={"brokers": broker.brokers})
        if redis.url == config.EMBEDDED:
            folder = (
                self.settings.storage.local.path if self.settings.storage.storage_type == "local" else None
            )
            server = self._parts.enter_context(embedded.EmbeddedRedis(folder and folder / "redis"))
            redis = redis.model_copy(update={"url": server.url})
        return self.settings.model_copy(update={"kafka": kafka, "redis": redis})

    def _writer(self, number: int) -> Writer:
        return Writer(
            str(number),
            self.settings,
            connect=self._connect,
            sink=self.sink,
            rules=lambda: self.rules.current,
            partitions=lambda: self.ingest.source.partition_count,
            relief=lambda: self.ingest.relief,
            low=lambda: lowest_commit(self.settings.kafka),
            metrics=self.metrics,
            clock=self._clock,
            stop=self._stop,
            restoring=self._restoring,
            adopts=number == 0,
        )

    def _source(self, revoked: Callable[[set[int]], None]) -> Source:
        return Source(
            self.settings.kafka,
            embedded=self._kafka_embedded,
            revoked=revoked,
            verdict_secs=self.settings.redis.trace_ttl_secs,
        )

    def _opened(self) -> bool:
        """Waits for catalog and object store; False when asked to stop meanwhile."""
        for attempt in itertools.count():
            try:
                self.sink.open()
                return True
            except Unavailable as fault:
                log.warning("Waiting for the storage: %s", fault)
            if self._stop.wait(_backoff(attempt)):
                return False
        raise AssertionError

    def _connect(self) -> Buffer:
        buffer = Buffer(self.settings.redis, self._clock)
        for persistence in buffer.persistence:
            for warning in persistence.warnings:
                if warning not in self._faults:
                    self._faults[warning] = None
                    log.warning("Redis: %s", warning)
        return buffer

    # --- loops ---

    def _run(self, name: str, target: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                target()
            except BaseException as fault:  # noqa: BLE001 - whatever it is, it ends the process, aloud
                self._fail(name, fault)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, name: str, fault: BaseException) -> None:
        log.critical("The %s loop ended: %s", name, fault, exc_info=not isinstance(fault, ConfigError))
        self._fault = self._fault or fault
        self._stop.set()
        self._ended.set()

    def _loop(
        self, name: str, step: Callable[[Now], bool], forget: Callable[[Any], None], pause_secs: float
    ) -> None:
        """Steps until the stop; a fault that waiting can mend is waited for."""
        failures = 0
        while not self._stop.is_set():
            try:
                more = step(self._clock.now())
            except (Unavailable, Fenced) as fault:
                if self._faults.get(name) != str(fault):
                    log.warning("%s: %s", name, fault)
                self._faults[name] = str(fault)
                forget(fault)
                self._stop.wait(_backoff(failures))
                failures += 1
            else:
                failures = 0
                self._steps[name] = time.monotonic()
                self._faults[name] = None
                if not more:
                    self._stop.wait(pause_secs)

    def _load_kernels(self) -> None:
        """Both halves begin with the slow twins and change between two batches."""
        try:
            kernels = compiler.load_cached(self.settings.app.kernels)
            if kernels is None:
                self.kernels = "compiling"
                self._kernels_known.set()
                kernels = compiler.compile_apart(self._stop)
            self.ingest.kernels = kernels
            for writer in self.writers:
                writer.kernels = kernels
            memory.forget_code()
            memory.settle()
        finally:
            self._kernels_known.set()
        self.kernels = "python" if kernels is compiler.PYTHON else "compiled"
        self.metrics.kernels_compiled.set(self.kernels == "compiled")
        if not self._stop.is_set():
            log.info("Kernels: %s", self.kernels)

    def _take_in(self) -> None:
        self._kernels_known.wait()  # half a second; compiling is not waited for
        self._loop("ingest", lambda now: self.ingest.step(now) >= 0, self.ingest.recover, 0)
        self.ingest.close()

    def _decide(self, writer: Writer) -> None:
        self._loop(
            f"worker-{writer.name}", writer.step, writer.die, self.settings.app.evaluation_interval_secs
        )
        try:
            writer.flush()
            writer.resign()
        except (Unavailable, Fenced) as fault:
            log.warning("worker-%s leaves its open sequence to others: %s", writer.name, fault)

    def _beat(self) -> None:
        """Extends the leases of writers whose loop still moves."""
        lease_secs = self.settings.app.lease_secs
        buffer: Buffer | None = None

        def beat(_: Now) -> bool:
            nonlocal buffer
            buffer = buffer or self._connect()
            since = time.monotonic() - STUCK_SECS
            moving = [w for w in self.writers if self._steps.get(f"worker-{w.name}", since) >= since]
            lost = buffer.renew([w.id for w in moving if w.id], lease_secs)
            if lost:
                log.warning("Leases were lost: %s", ", ".join(sorted(lost)))
            return False

        def forget(_: Any) -> None:
            nonlocal buffer
            if buffer is not None:
                buffer.close()
            buffer = None

        self._loop("heartbeat", beat, forget, lease_secs / 4)
        while any(w.id for w in self.writers) and not self._drained.wait(lease_secs / 4):
            with contextlib.suppress(Unavailable):
                beat(self._clock.now())
        forget(None)

    def _give_back(self) -> None:
        while not self._stop.wait(memory.GIVE_BACK_SECS):
            memory.give_back()

    def _watch(self) -> None:
        """Asks the catalog now and then, so that readiness is true while nothing is written."""
        self._loop("monitor", self._probe, lambda _: None, MONITOR_SECS)

    def _probe(self, _: Now) -> bool:
        self.metrics.ready.set(self.status().ready)
        self.metrics.force_rules.set(len(self.rules.current))
        self.metrics.rules_refresh_failures.inc(self.rules.failures - self._rule_failures)
        self._rule_failures = self.rules.failures
        self.sink.epochs()
        return False

    # --- API and metrics ---

    def _serve(self) -> None:
        observability = self.settings.observability
        try:
            server, thread = start_http_server(
                observability.metrics_port, observability.metrics_addr, registry=self.metrics.registry
            )
        except OSError as fault:
            raise ConfigError(
                f"observability.metrics_port={observability.metrics_port}: {fault.strerror or fault}; "
                "choose another in TSS__OBSERVABILITY__METRICS_PORT"
            ) from fault
        self.metrics_port = server.server_port
        self._parts.callback(_end_server, server, thread)
        listening = threading.Event()
        self._api_loop = asyncio.new_event_loop()
        self._api_thread = threading.Thread(
            target=self._serve_api, args=(listening,), name="api", daemon=True
        )
        self._api_thread.start()
        listening.wait()
        if self._fault is not None:
            raise self._fault

    def _serve_api(self, listening: threading.Event) -> None:
        observability = self.settings.observability
        app = api.make_app(self.settings, self.rules, self, self.status)
        asyncio.set_event_loop(self._api_loop)
        try:
            runner, self.api_port = self._api_loop.run_until_complete(
                api.serve(app, observability.health_addr, observability.health_port)
            )
        except ConfigError as fault:
            self._fault = fault
            return
        finally:
            listening.set()
        self._api_loop.run_forever()
        self._api_loop.run_until_complete(runner.cleanup())

    async def run(self, sql: str) -> QueryResult:
        """A query, once the storage has been reached."""
        if self._queries is None:
            raise Unavailable("storage", self.sink.where, self.sink.fault or "not connected yet")
        started = time.monotonic()
        try:
            result = await self._queries.run(sql)
        except Exception as fault:
            self.metrics.queries.labels(type(fault).__name__).inc()
            raise
        self.metrics.queries.labels("answered").inc()
        self.metrics.query_seconds.observe(time.monotonic() - started)
        return result

    def status(self) -> api.Status:
        """What `/health` tells."""
        now = time.monotonic()
        source = self.ingest.source
        kafka_fault = source.fault
        redis_fault = self._faults.get("ingest") or self._faults.get("heartbeat")
        if redis_fault and "Redis" not in redis_fault:
            redis_fault = None
        if redis_fault is None and self.ingest.usage is None:
            redis_fault = "not heard of yet"
        moved = [at for name, at in self._steps.items() if name.startswith("worker-")]
        worker_faults = [f"worker-{w.name}: {w.fault}" for w in self.writers if w.fault]
        storage_fault = self.sink.fault
        checks = (
            _check("kafka", kafka_fault, "kafka.brokers", now, source.heard_secs),
            _check("redis", redis_fault, "redis.url", now, self._steps.get("ingest")),
            _check("storage", storage_fault, self.sink.where, now, self.sink.heard_secs),
            _check(
                "workers",
                "; ".join(worker_faults) or None,
                "app.evaluation_workers",
                now,
                min(moved, default=None),
            ),
        )
        ready = self.started and not self.draining and all(check.ok for check in checks)
        return api.Status(ready, self.draining, checks, self._pipeline(now))

    def _pipeline(self, now: float) -> dict[str, Any]:
        usage = self.ingest.usage
        clocks = [w.clock_ms for w in self.writers if w.clock_ms is not None]
        opened = [w.open_since_secs for w in self.writers if w.open_since_secs is not None]
        wall_ms = self._clock.now().wall_ms
        oldest_ms = usage.oldest_ms if usage else None
        return {
            "kernels": self.kernels,
            "paused": self.ingest.source.paused,
            "partitions": self.ingest.source.partition_count,
            "assigned_partitions": sorted(self.ingest.source.assigned),
            "lag_records": sum(self.ingest.lag.values()),
            "pending_traces": usage.pending_traces if usage else None,
            "pending_spans": usage.pending_spans if usage else None,
            "oldest_pending_age_secs": None if oldest_ms is None else round((wall_ms - oldest_ms) / 1000, 3),
            "redis_memory_bytes": usage.memory_bytes if usage else None,
            "redis_budget_bytes": usage.budget_bytes if usage else None,
            "clock_lag_secs": round((wall_ms - max(clocks)) / 1000, 3) if clocks else None,
            "clock_waits_for_partitions": sorted({p for w in self.writers for p in w.waiting}),
            "clock_leaves_out_partitions": sorted({p for w in self.writers for p in w.stalled}),
            "due_traces": max((w.due for w in self.writers), default=0),
            "oldest_open_sequence_age_secs": round(now - min(opened), 3) if opened else None,
            "force_rules": len(self.rules.current),
            "writers": [w.id for w in self.writers if w.id],
        }

    # --- stop (step 16) ---

    def cancel(self) -> None:
        """Asks for the stop and returns at once; for signal handlers. `wait` returns, then call `stop`."""
        self.draining = True
        self._stop.set()
        self._ended.set()

    def stop(self) -> bool:
        """Not ready, stop reading, finish, leave; True when all of it was done within the deadline."""
        deadline = time.monotonic() + self.settings.app.shutdown_timeout_secs
        self.draining = True
        self._stop.set()
        if self.started:
            log.info("Stopping: finishing what is open")
        for thread in self._threads:
            if thread.name != "heartbeat":
                thread.join(max(0.0, deadline - time.monotonic()))
        late = [t.name for t in self._threads if t.is_alive() and t.name != "heartbeat"]
        self._drained.set()
        self._ended.set()
        if self._queries is not None:
            asyncio.run_coroutine_threadsafe(self._queries.close(), self._api_loop).result()
        if self.api_port:
            self._api_loop.call_soon_threadsafe(self._api_loop.stop)
            self._api_thread.join()
        self.rules.close()
        self._parts.close()
        if late:
            log.warning(
                "app.shutdown_timeout_secs=%g passed with %s still at work; nothing is lost, another worker goes on",
                self.settings.app.shutdown_timeout_secs,
                ", ".join(late),
            )
        elif self.started:
            log.info("Stopped")
        return not late

    def wait(self, timeout_secs: float | None = None) -> None:
        """Until a loop fails or `stop` was called; raises what ended it."""
        self._ended.wait(timeout_secs)
        if self._fault is not None:
            raise self._fault


def _check(name: str, fault: str | None, setting: str, now: float, heard: float | None) -> api.Check:
    age = None if heard is None else round(now - heard, 3)
    return api.Check(name, fault is None, fault or "ok", setting, age)


def _end_server(server: Any, thread: threading.Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()


def _backoff(failures: int) -> float:
    return BACKOFF_SECS[min(failures, len(BACKOFF_SECS) - 1)]
