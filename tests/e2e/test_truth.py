"""A thousand traces whose verdicts are known, torn apart on the way in."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from tests.e2e.conftest import PARTITIONS, both
from tests.e2e.parts import Parts, Worker, total, wait_for
from tests.e2e.traces import Trace, make_trace, scattered
from tss import config
from tss.rule_store import RuleStore
from tss.rules import new_rule

SEED = 20261121
ROUNDS_MAX = 5  # whoever is quicker takes what is due, so one may go empty-handed for a while
REASONS = {"error": 100, "latency": 50, "force": 50}

FORCE_RULE = {
    "description": "everything of the service forced",
    "duration_secs": 600,
    "priority": 100,
    "match": {"resource": [{"key": "service.name", "op": "eq", "value": "forced"}]},
    "action": "force_keep",
}


def thousand(rng: random.Random, count: int = 1000, reasons: Mapping[str, int] = REASONS) -> list[Trace]:
    start_ns = time.time_ns() - 60 * 1_000_000_000
    wanted = [reason for reason, share in reasons.items() for _ in range(count * share // 1000)]
    truth: list[str | None] = [*wanted, *([None] * (count - len(wanted)))]
    rng.shuffle(truth)
    return [make_trace(rng, start_ns, reason=reason, spans=rng.randint(2, 9)) for reason in truth]


def check_truth(worker: Worker, traces: list[Trace]) -> None:
    """The table holds exactly the kept traces with exactly their spans; every trace has one decision."""
    decided = worker.query("SELECT trace_id, kept, reason, span_count, trigger FROM decisions")
    assert len(decided) == len(traces), Counter(Counter(d["trace_id"] for d in decided).values())
    by_id = {row["trace_id"]: row for row in decided}
    for trace in traces:
        row = by_id[trace.id]
        assert row["kept"] == (trace.reason is not None), (trace.reason, row)
        assert row["reason"] == (trace.reason or "not_sampled"), (trace.reason, row)
        assert row["span_count"] == len(trace.spans), row
    rows = worker.query("SELECT trace_id, span_id FROM spans")
    expected = Counter((t.id, s) for t in traces if t.reason for s in t.span_ids)
    assert Counter((row["trace_id"], row["span_id"]) for row in rows) == expected


def decided_all(workers: list[Worker], count: int) -> bool:
    return total(workers, "tail_sampling_traces_ingested_total") >= count


@both
def test_a_thousand_scattered_traces_end_as_their_truth_says(parts: Parts) -> None:
    """Error, slow and forced traces are kept whole and nothing else is, however their spans were scattered."""
    rng = random.Random(SEED)
    traces = thousand(rng)
    # Rule and records are there before the worker: its clock must not be ahead of records dated back.
    rules = RuleStore(config.load(parts.env))
    rules.add(new_rule(FORCE_RULE, rule_id="forced", now=datetime.now(UTC)))
    rules.close()
    base_ms = int(time.time() * 1000) - 60_000
    parts.produce(scattered(rng, traces, base_ms, partitions=PARTITIONS, spread_ms=20_000))

    worker = parts.worker(app__inactivity_timeout_secs=22).ready()
    wait_for(lambda: decided_all([worker], len(traces)), 60, lambda: worker.log[-2000:])
    check_truth(worker, traces)


@both
def test_an_hour_of_backlog_is_judged_as_it_would_have_been_live(parts: Parts) -> None:
    """Read at full speed and in small batches, an hour of records cuts no trace: the log's own time counts."""
    rng = random.Random(SEED + 2)
    traces = thousand(rng, reasons={"error": 100, "latency": 50})
    base_ms = int(time.time() * 1000) - 3_700_000
    hour = scattered(rng, traces, base_ms, partitions=PARTITIONS, spread_ms=20_000, within_ms=3_580_000)
    parts.produce(hour)
    worker = parts.worker(app__inactivity_timeout_secs=25, kafka__batch_max_records=100)
    worker.ready()
    wait_for(lambda: decided_all([worker], len(traces)), 90, lambda: worker.log[-2000:])
    check_truth(worker, traces)
    triggers = worker.query("SELECT DISTINCT trigger FROM decisions")
    assert triggers == [{"trigger": "inactivity"}]


@both
def test_two_workers_share_the_work_and_their_metrics_agree_with_the_table(parts: Parts) -> None:
    """Two workers of one group both read and both decide, and the sums of their metrics are what the tables hold."""
    rng = random.Random(SEED + 1)
    workers = [parts.worker(app__evaluation_workers=2, app__claim_max_traces=10) for _ in range(2)]
    for worker in workers:
        worker.ready()
    workers[0].request("POST", "/admin/force-rules", FORCE_RULE)
    wait_for(
        lambda: all(w.metrics()["tail_sampling_kafka_partitions_assigned"] == 4 for w in workers),
        60,
        lambda: [w.log[-1500:] for w in workers],
    )
    traces: list[Trace] = []
    for _ in range(ROUNDS_MAX):
        more = thousand(rng, 400)
        traces += more
        base_ms = int(time.time() * 1000)
        parts.produce(scattered(rng, more, base_ms, partitions=PARTITIONS, spread_ms=2_000, within_ms=3_000))
        done = partial(decided_all, workers, len(traces))
        wait_for(done, 60, lambda: [w.log[-2000:] for w in workers])
        assert all(worker.metrics()["tail_sampling_records_consumed_total"] for worker in workers)
        decided_by_each = [worker.metrics()["tail_sampling_traces_ingested_total"] for worker in workers]
        if all(decided_by_each):
            break
    assert all(decided_by_each), decided_by_each
    check_truth(workers[1], traces)

    sums = {
        name: total(workers, f"tail_sampling_{name}")
        for name in (
            "spans_ingested_total",
            "spans_exported_total",
            "spans_dropped_total",
            "spans_duplicate_total",
        )
    }
    (row,) = workers[0].query("SELECT count(*) AS spans FROM spans")
    assert sums["spans_exported_total"] == row["spans"]
    assert sums["spans_ingested_total"] == sum(len(t.spans) for t in traces)
    assert sums["spans_ingested_total"] == (
        sums["spans_exported_total"] + sums["spans_dropped_total"] + sums["spans_duplicate_total"]
    )
    (decided,) = workers[0].query("SELECT count(*) AS decided FROM decisions WHERE kept")
    assert total(workers, "tail_sampling_traces_sampled_total") == decided["decided"]
