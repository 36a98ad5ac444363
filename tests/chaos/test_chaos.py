"""A few faults of each kind, quick enough for every change; `python -m tests.chaos` does all of them many times.

One fleet on each set of parts meets its faults one after the other: the state that one leaves behind is the state in
which the next strikes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from tests.chaos.faults import BY_NAME
from tests.chaos.fleet import Fleet, embedded_ground, stack_ground
from tests.chaos.report import summary
from tests.chaos.runs import series, settle
from tests.chaos.truth import Stream, Tables, compare
from tests.e2e.conftest import PARTITIONS
from tests.e2e.parts import wait_for
from tests.e2e.traces import Trace, make_trace
from tests.stack import Fault, Stack

SEED = 20261121
WAITED_SECS = 4.0  # more than a sequence is held open for when nothing fails

on_embedded = pytest.mark.embedded
on_stack = pytest.mark.stack


@pytest.fixture(scope="module")
def embedded_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with (
        embedded_ground(tmp_path_factory.mktemp("chaos")) as ground,
        Fleet(ground, random.Random(SEED)) as fleet,
    ):
        yield fleet


@pytest.fixture(scope="module")
def stack_fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    stack: Stack = request.getfixturevalue("stack")
    with (
        stack_ground(stack, tmp_path_factory.mktemp("chaos")) as ground,
        Fleet(ground, random.Random(SEED)) as fleet,
    ):
        yield fleet


def survives(name: str, fleet: Fleet) -> None:
    result = series(BY_NAME[name], fleet, 1, zlib.crc32(name.encode()))  # no two series have traces in common
    logs = "\n".join(worker.log[-1500:] for worker in fleet.workers)
    assert result.right, f"{summary([result])}\n{logs}"
    assert result.total.kept > 0


@on_embedded
@pytest.mark.parametrize("name", ["crash-after-decisions", "kill-all", "sigterm"])
def test_a_fault_costs_nothing(embedded_fleet: Fleet, name: str) -> None:
    """Nothing is lost, doubled, split or left behind when workers die at the worst moment, all at once, or are asked to leave."""
    survives(name, embedded_fleet)


@on_stack
@pytest.mark.parametrize("name", ["redis-wipe", "redis-power-cut", "catalog-commits-lost", "freeze"])
def test_a_fault_of_a_real_part_costs_nothing(stack_fleet: Fleet, name: str) -> None:
    """Nothing is lost, doubled, split or left behind when Redis forgets, the catalog's answers are lost, or a zombie wakes up."""
    survives(name, stack_fleet)


@on_stack
def test_a_decided_batch_that_waits_is_told(stack_fleet: Fleet) -> None:
    """While the catalog refuses, /health and the metric say for how long the oldest open sequence has waited."""
    stack_fleet.scale(1)
    (worker,) = stack_fleet.workers
    proxy = stack_fleet.ground.proxy
    assert proxy is not None

    def told() -> bool:
        age = worker.pipeline()["oldest_open_sequence_age_secs"] or 0
        metrics = worker.metrics()
        ages = [
            v for name, v in metrics.items() if name.startswith("tail_sampling_open_sequence_age_seconds")
        ]
        return age > WAITED_SECS and max(ages) > WAITED_SECS

    with Stream(stack_fleet.ground.brokers, stack_fleet.ground.topic, PARTITIONS, 20, SEED + 2) as stream:
        proxy.fail_next(*[Fault(500, lands="never")] * 10_000, when=lambda _: True)
        wait_for(told, 60, lambda: (worker.request("GET", "/health"), worker.log[-2000:]))
        proxy.mend()
    assert settle(stream.traces, stack_fleet.ground) is not None
    outcome = compare(stream.traces, stack_fleet.ground.tables)
    assert outcome.right, outcome


# --- the harness can fail ----------------------------------------------------------------------------------------


def tables_with(folder: Path, spans: list[tuple[str, str]], decisions: list[dict[str, Any]]) -> Tables:
    def connect() -> SqlCatalog:
        return SqlCatalog("tss", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/files")

    catalog = connect()
    catalog.create_namespace("default")
    span_schema = pa.schema([pa.field("trace_id", pa.string()), pa.field("span_id", pa.string())])
    decision_schema = span_schema.remove(1)
    for name, kind in (
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("late", pa.bool_()),
        ("span_count", pa.int64()),
    ):
        decision_schema = decision_schema.append(pa.field(name, kind))
    rows = [{"trace_id": trace_id, "span_id": span_id} for trace_id, span_id in spans]
    catalog.create_table("default.spans", span_schema).append(pa.Table.from_pylist(rows, span_schema))
    catalog.create_table("default.decisions", decision_schema).append(
        pa.Table.from_pylist(decisions, decision_schema)
    )
    return Tables(connect, "default.spans", "default.decisions")


def decision(trace: Trace, reason: str, span_count: int, *, late: bool = False) -> dict[str, Any]:
    kept = reason != "not_sampled"
    return {"trace_id": trace.id, "kept": kept, "reason": reason, "late": late, "span_count": span_count}


def test_the_comparison_sees_each_kind_of_wrong(tmp_path: Path) -> None:
    """A missing span, one too many, a second verdict, an upgrade and a kept ordinary trace are each counted as such."""
    rng = random.Random(SEED)
    whole, torn, double, split, upgraded = (make_trace(rng, 1, reason="error", spans=4) for _ in range(5))
    dropped, forgotten, stray = (make_trace(rng, 1, spans=4) for _ in range(3))

    def ids(trace: Trace, count: int = 4) -> list[tuple[str, str]]:
        return [(trace.id, span_id) for span_id in sorted(trace.span_ids)[:count]]

    spans = [
        *ids(whole),
        *ids(torn, 3),
        *ids(double),
        *ids(double, 1),
        *ids(split),
        *ids(upgraded, 1),
        *ids(stray, 1),
    ]
    decisions = [
        *(decision(trace, "error", 4) for trace in (whole, torn, double)),
        *(decision(split, "error", 2), decision(split, "not_sampled", 2)),
        *(decision(upgraded, "not_sampled", 3), decision(upgraded, "late_error", 1, late=True)),
        *(decision(dropped, "not_sampled", 4), decision(forgotten, "not_sampled", 2)),
        *(decision(stray, "not_sampled", 3), decision(stray, "not_sampled", 2, late=True)),
    ]
    traces = [whole, torn, double, split, upgraded, dropped, forgotten, stray]
    outcome = compare(traces, tables_with(tmp_path, spans, decisions))
    assert (outcome.traces, outcome.kept) == (8, 5)
    assert outcome.lost == 1 + 2, "a span of `torn`, two of `forgotten`"
    assert outcome.doubled == 1 + 1, "a span of `double`, one of `stray`"
    assert (outcome.split, outcome.late_upgraded, outcome.cut) == (1, 1, 2)
    assert len(outcome.faults) == 1
    assert stray.id in outcome.faults[0]
