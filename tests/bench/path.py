"""The whole path measured: records of a real Kafka through a worker into Redis, decided, and into the tables.

Each run is a worker process of its own on an empty Redis with new tables and a new consumer group, over the same
topic. How a share is kept: 3 % of the generated traces hold an error and none is slow, so 10 % is all errors and a
base rate for the rest; 0 % and 100 % are base rates with errors counting like any other. The five rules look at
attributes that nearly all spans have, for values that none has: they cost what rules cost, and keep nothing.

The CPU of producers, brokers, catalog and object store is not counted, for tss as for the Collector.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import collector, topics
from tests.bench.generate import ERROR_SHARE
from tests.bench.outside import Outside, Servers, topic_name
from tests.bench.report import CollectorRun, PathRun, Pending, Report, Start, progress
from tests.bench.topics import INACTIVITY_SECS, Filled
from tests.bench.worker import RUN_SECS, Outcome, measured
from tests.e2e.parts import Worker
from tests.fuzz import on_resource, on_span
from tss import config
from tss.rule_store import RuleStore
from tss.rules import new_rule

PENDING_SPANS = 400_000
COLLECTOR_SPANS = 5_000_000  # 40 s of it
NEVER_SECS = 10_000_000
WARM_STARTS = 3
READY_POLL_SECS = 0.02

RULE_VALUES = {
    "db.operation.name": ["DELETE", "TRUNCATE"],
    "http.route": ["/refund", "/chargeback"],
    "db.collection.name": ["audit", "ledger"],
    "url.scheme": ["gopher", "ws"],
    "service.name": ["billing-legacy"],
}


@dataclass(frozen=True, slots=True)
class Case:
    """What is kept of a layout, and past how many rules. Percent, as a share would not be exact in JSON."""

    layout: str
    kept_percent: int
    rules: int

    def env(self) -> dict[str, str]:
        """With its settings exactly `kept_percent` of many traces are kept."""
        errors, base_rate = {0: (False, 0.0), 10: (True, base_rate_of(0.10)), 100: (True, 1.0)}[
            self.kept_percent
        ]
        return {
            "TSS__SAMPLING__ALWAYS_SAMPLE_ERRORS": str(errors).lower(),
            "TSS__SAMPLING__NORMAL_SAMPLE_RATE": str(base_rate),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call measures."""

    cases: list[Case]
    spans: int
    runs: int
    collector: Path | None = None
    starts: bool = True
    pending: bool = True


def base_rate_of(kept_share: float) -> float:
    """Kept of the traces without an error, so that together with all errors it is the share asked for."""
    return round((kept_share - ERROR_SHARE) / (1 - ERROR_SHARE), 6)


def measure(outside: Outside, plan: Plan) -> Report:
    """All of the plan, layout by layout, so that one topic is there at a time."""
    began = datetime.now(UTC)
    report = Report.of_this_machine(outside.versions, began.isoformat(timespec="seconds"), plan.spans)
    log = outside.folder / "bench.log"
    if plan.starts:
        report.start = measure_start(outside)
    for layout in sorted({case.layout for case in plan.cases}):
        with outside.topic(topic_name(layout)) as topic:
            filled = topics.fill(outside.brokers, topic, layout, plan.spans)
            progress(f"layout {layout}: {filled.spans} spans in {filled.records} records")
            for _ in range(plan.runs):
                for case in plan.cases:
                    if case.layout == layout:
                        report.runs.append(
                            PathRun(layout, case.kept_percent, case.rules, run(outside, filled, case, log))
                        )
                        progress(str(report.runs[-1]))
            if plan.pending:
                report.pending.append(measure_pending(outside, filled, log))
            if plan.collector:
                report.collector += _collected(plan.collector, outside, filled)
    return report


def run(outside: Outside, filled: Filled, case: Case, log: Path) -> Outcome:
    with outside.redis(1) as servers:
        return run_with(env_of(outside, servers, filled.topic, case), servers, filled, log)


def env_of(outside: Outside, servers: Servers, topic: str, case: Case) -> dict[str, str]:
    """The settings of this case, its rules stored."""
    env = outside.fresh_env(topic, servers) | case.env()
    env["TSS__APP__INACTIVITY_TIMEOUT_SECS"] = str(INACTIVITY_SECS)
    if case.rules:
        _add_rules(env)
    return env


def run_with(
    env: Mapping[str, str],
    servers: Servers,
    filled: Filled,
    log: Path,
    *,
    workers: int = 1,
    before_reading: Callable[[], None] = lambda: None,
) -> Outcome:
    """So many workers of one group, until all of the topic is decided and in the tables."""
    outcome = measured(
        [env] * workers, servers.pids, lambda count: count.traces >= filled.traces, log, before_reading
    )
    if outcome.spans != filled.spans:
        raise AssertionError(f"read {outcome.spans} spans of {filled.spans}")
    return outcome


def measure_pending(outside: Outside, filled: Filled, log: Path) -> Pending:
    """What Redis and the worker take while nothing of the topic, or of its first part, is due."""
    with outside.redis(1) as servers:
        empty_bytes = servers.memory_bytes
        env = outside.fresh_env(filled.topic, servers) | {
            "TSS__APP__INACTIVITY_TIMEOUT_SECS": str(NEVER_SECS),
            "TSS__APP__MAX_TRACE_DURATION_SECS": str(NEVER_SECS),
        }
        wanted = min(PENDING_SPANS, filled.spans)
        outcome = measured([env], servers.pids, lambda count: count.spans >= wanted, log)
        memory_bytes = servers.memory_bytes - empty_bytes
    return Pending(
        filled.layout,
        outcome.spans,
        memory_bytes / outcome.spans,
        filled.wire_bytes / filled.spans,
        outcome.peak_rss_bytes,
    )


def measure_start(outside: Outside) -> Start:
    """From `tss run` to ready, where nothing is compiled yet, and where all is."""
    with (
        tempfile.TemporaryDirectory(prefix="kernels-") as kernels,
        tempfile.TemporaryDirectory(prefix="logs-") as logs,
        ExitStack() as held,
    ):
        topic = held.enter_context(outside.topic(topic_name("A")))
        servers = held.enter_context(outside.redis(1))
        env = outside.fresh_env(topic, servers) | {"NUMBA_CACHE_DIR": kernels, "TSS__APP__LEASE_SECS": "1"}
        (cold_secs, compiled_secs), *warm = (
            _secs_to_ready_and_compiled(env, Path(logs) / f"{number}.log")
            for number in range(1 + WARM_STARTS)
        )
    return Start(round(cold_secs, 2), [round(secs, 2) for secs, _ in warm], round(compiled_secs, 2))


def _secs_to_ready_and_compiled(env: Mapping[str, str], log: Path) -> tuple[float, float]:
    """From the start of a worker; a warm one has its kernels before it is ready."""
    began_secs = time.monotonic()
    worker = Worker(env, log)

    def secs_until(condition: Callable[[], bool]) -> float:
        while not condition():
            if worker.process.poll() is not None or time.monotonic() - began_secs > RUN_SECS:
                raise SystemExit(f"a worker did not start:\n{worker.log[-2000:]}")
            time.sleep(READY_POLL_SECS)
        return time.monotonic() - began_secs

    try:
        ready_secs = secs_until(lambda: worker.request("GET", "/health/ready")[0] == 200)
        return ready_secs, secs_until(lambda: worker.pipeline()["kernels"] == "compiled")
    finally:
        if worker.process.poll() is None:
            worker.terminate()


def _add_rules(env: Mapping[str, str]) -> None:
    rules = RuleStore(config.load(env))
    for key, values in RULE_VALUES.items():
        match = (on_resource if key == "service.name" else on_span)(key, "in", values)
        rule = {"description": key, "duration_secs": RUN_SECS, "match": match, "action": "force_keep"}
        rules.add(new_rule(rule, rule_id=key.replace(".", "-"), now=datetime.now(UTC)))
    rules.close()


def _collected(binary: Path, outside: Outside, filled: Filled) -> Iterator[CollectorRun]:
    """On the same topic, made longer: a Collector takes long before its heap has its size."""
    missing = COLLECTOR_SPANS - filled.spans
    if missing > 0:
        more = topics.fill(outside.brokers, filled.topic, filled.layout, missing, seed=2)
        filled = replace(filled, spans=filled.spans + more.spans, traces=filled.traces + more.traces)
    for tuning in collector.TUNINGS:
        if tuning.needs_bytes > collector.available_bytes():
            progress(f"Collector, {tuning.name} tuning: left out, it needs {tuning.needs_bytes >> 30} GB")
            continue
        found = collector.measure(
            binary, outside.brokers, filled, tuning, base_rate_of(0.10), RULE_VALUES, outside.folder
        )
        progress(str(found))
        yield found
