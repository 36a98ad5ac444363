"""Bad input and bad days: nothing crashes, nothing stalls, nothing that was kept is lost."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status, TracesData

from tests.e2e.conftest import PARTITIONS, both
from tests.e2e.parts import Parts, Worker, total, wait_for
from tests.e2e.traces import make_trace, record, scattered
from tests.ports import free_port

SEED = 7


def test_wrong_settings_end_the_start_with_all_faults(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exit code 78, one line for every fault: setting, value seen, and the nearest known name."""
    log = tmp_path_factory.mktemp("wrong") / "log"
    worker = Worker({"TSS__APP__INACTIVITY_TIMEOUT_SEC": "5", "TSS__SAMPLING__ERROR_SAMPLE_RATE": "2"}, log)
    assert worker.process.wait(30) == 78
    assert "inactivity_timeout_secs" in worker.log
    assert "TSS__SAMPLING__ERROR_SAMPLE_RATE" in worker.log
    assert "Traceback" not in worker.log


@both
def test_bad_records_are_dead_lettered_and_good_ones_go_on(parts: Parts) -> None:
    """Garbage, cut, empty and wrong-id records never stop a worker; what they hold is counted and kept aside."""
    rng = random.Random(SEED)
    start_ns = time.time_ns()
    good = [make_trace(rng, start_ns, reason="error") for _ in range(5)]
    wrong = make_trace(rng, start_ns, reason="error", spans=3)
    wrong.spans[1].trace_id = b"short"
    wrong.spans[2].span_id = bytes(8)
    backwards = make_trace(rng, start_ns, reason="error", spans=2)
    for span in backwards.spans:
        span.end_time_unix_nano = span.start_time_unix_nano - 1_000_000
    many = make_trace(rng, start_ns, reason="error", spans=1)
    many.spans[0].attributes.extend(
        KeyValue(key=f"key.{i}", value=AnyValue(string_value="v" * 20)) for i in range(10_000)
    )
    not_text = record("shop", *make_trace(rng, start_ns, spans=1).spans).replace(
        b"step 0", b"\xff\xfe\xfd\xfc\xfb\xfa"
    )
    huge = make_trace(rng, start_ns, reason="error", spans=1)
    huge.spans[0].attributes.append(KeyValue(key="body", value=AnyValue(string_value="x" * 900_000)))

    whole = record("shop", *good[0].spans)
    records = [
        *(b"\xff\xff garbage", whole[: len(whole) // 2], b"{not json", b"", not_text),
        *(record("shop", *t.spans) for t in (*good, wrong, backwards, many, huge)),
    ]
    worker = parts.worker().ready()
    parts.produce([(i % PARTITIONS, value, None) for i, value in enumerate(records)])
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= 9, 60, lambda: worker.log[-3000:]
    )

    rows = worker.query(
        "SELECT trace_id, count(*) AS spans, max(dropped_attributes_count) AS cut FROM spans GROUP BY trace_id"
    )
    found = {row["trace_id"]: row for row in rows}
    assert set(found) == {t.id for t in (*good, backwards, many, huge)} | (
        {wrong.id} if wrong.spans[0].status.code else set()
    )
    assert found[many.id]["cut"] == 10_000 - 1024
    reasons = Counter(headers["tss.reason"] for headers, _ in parts.dead_letters(6))
    assert reasons == {
        "undecodable": 2,
        "invalid_json": 1,
        "bad_span": 1,
        "bad_trace_id": 1,
        "bad_span_id": 1,
    }
    assert total([worker], "tail_sampling_dead_letters_total") == 6
    assert total([worker], "tail_sampling_spans_rejected_total") == 3
    assert worker.request("GET", "/health/ready")[0] == 200


@both
def test_a_trace_of_a_hundred_thousand_spans_is_written_whole(parts: Parts) -> None:
    """A huge trace passes like any other, and the worker stays ready."""
    rng = random.Random(SEED)
    trace = make_trace(rng, time.time_ns(), reason="error", spans=100_000)
    worker = parts.worker(app__inactivity_timeout_secs=8).ready()
    pieces = [trace.spans[i : i + 4000] for i in range(0, len(trace.spans), 4000)]
    for number, piece in enumerate(pieces):
        parts.produce([(number % PARTITIONS, record("shop", *piece), None)])
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= 1, 90, lambda: worker.log[-3000:]
    )
    (row,) = worker.query("SELECT count(*) AS spans, count(DISTINCT span_id) AS ids FROM spans")
    assert (row["spans"], row["ids"]) == (100_000, 100_000)
    assert worker.request("GET", "/health/ready")[0] == 200


@both
def test_a_killed_worker_loses_nothing_that_is_kept(parts: Parts) -> None:
    """kill -9 again and again while traces come in: after a restart each kept trace is there, whole and once."""
    rng = random.Random(SEED)
    traces = [make_trace(rng, time.time_ns(), reason=rng.choice(["all errors", None])) for _ in range(300)]
    records = scattered(rng, traces, int(time.time() * 1000) - 3000, partitions=PARTITIONS, spread_ms=2000)
    worker = parts.worker().ready()
    for part in range(3):
        parts.produce(records[part::3])
        time.sleep(rng.uniform(0.5, 6))
        worker.kill()
        worker = parts.worker()
    worker.ready()
    kept = Counter((t.id, s) for t in traces if t.reason for s in t.span_ids)

    def written() -> Counter[tuple[str, str]]:
        return Counter(
            (r["trace_id"], r["span_id"]) for r in worker.query("SELECT trace_id, span_id FROM spans")
        )

    wait_for(lambda: written() == kept, 60, lambda: (len(kept), len(written()), worker.log[-3000:]))


@both
def test_late_spans_follow_the_verdict_of_their_trace(parts: Parts) -> None:
    """Late spans of a kept trace are written with its reason; of a dropped one they are dropped, unless in error."""
    rng = random.Random(SEED)
    now_ns = time.time_ns()
    kept, dropped, turned = (make_trace(rng, now_ns, reason=r, spans=4) for r in ("latency", None, None))
    early = [record("shop", *t.spans[:2]) for t in (kept, dropped, turned)]
    worker = parts.worker().ready()
    parts.produce([(i, value, None) for i, value in enumerate(early)])
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= 3, 60, lambda: worker.log[-3000:]
    )

    turned.spans[3].status.code = Status.STATUS_CODE_ERROR
    parts.produce(
        [(i + 3, record("shop", *t.spans[2:]), None) for i, t in enumerate((kept, dropped, turned))]
    )
    wait_for(
        lambda: worker.metrics().get('tail_sampling_decisions_total{trigger="late"}', 0) >= 3,
        60,
        lambda: worker.log[-3000:],
    )
    rows = worker.query("SELECT trace_id, sampling_reason, late, count(*) AS n FROM spans GROUP BY 1, 2, 3")
    assert {(r["trace_id"], r["sampling_reason"], r["late"], r["n"]) for r in rows} == {
        (kept.id, "latency", False, 2),
        (kept.id, "latency", True, 2),
        (turned.id, "late_error", True, 2),
    }


@both
def test_a_worker_waits_for_what_is_not_there_and_says_so(parts: Parts) -> None:
    """Without Redis at start the API listens, readiness is 503 and names part and setting, and the process stays."""
    worker = parts.worker(redis__url=f"redis://127.0.0.1:{free_port()}")
    wait_for(lambda: worker.request("GET", "/health/ready")[0] == 503, 30, lambda: worker.log)
    wait_for(
        lambda: "redis.url" in str(worker.request("GET", "/health/ready")[1]),
        20,
        lambda: worker.request("GET", "/health"),
    )
    assert worker.request("GET", "/health/live")[0] == 200
    assert worker.process.poll() is None
    assert worker.terminate() == 0


@both
def test_a_stop_finishes_what_is_open_and_a_restart_goes_on(parts: Parts) -> None:
    """SIGTERM ends a busy worker with exit code 0 within its deadline; the next one completes the work, each span once."""
    rng = random.Random(SEED)
    traces = [make_trace(rng, time.time_ns(), reason="all errors") for _ in range(200)]
    records = scattered(rng, traces, int(time.time() * 1000) - 3000, partitions=PARTITIONS, spread_ms=2000)
    first = parts.worker(app__shutdown_timeout_secs=20).ready()
    parts.produce(records[::2])
    time.sleep(3.5)
    assert first.terminate(timeout_secs=25) == 0, first.log[-3000:]
    parts.produce(records[1::2])
    second = parts.worker().ready()
    expected = Counter((t.id, s) for t in traces for s in t.span_ids)

    def written() -> Counter[tuple[str, str]]:
        return Counter(
            (r["trace_id"], r["span_id"]) for r in second.query("SELECT trace_id, span_id FROM spans")
        )

    wait_for(lambda: written() == expected, 60, lambda: (len(written()), second.log[-3000:]))


def test_json_and_bare_resource_spans_are_understood_beside_protobuf() -> None:
    """The truncated record used above really is undecodable, and a bare ResourceSpans really is not TracesData."""
    span = make_trace(random.Random(1), 1).spans[0]
    bare = ResourceSpans(scope_spans=[ScopeSpans(spans=[span])]).SerializeToString()
    assert TracesData.FromString(bare).resource_spans == []


@both
def test_a_trace_over_its_limit_is_judged_early_and_the_rest_follows(parts: Parts) -> None:
    """Past app.max_trace_spans a trace is judged at once (max_size); what comes after is written under that verdict."""
    rng = random.Random(SEED)
    trace = make_trace(rng, time.time_ns(), reason="error", spans=900)
    trace.spans[0].status.code = Status.STATUS_CODE_ERROR
    worker = parts.worker(app__inactivity_timeout_secs=30, app__max_trace_spans=500).ready()
    for begin in range(0, 900, 100):
        parts.produce([(begin // 100 % PARTITIONS, record("shop", *trace.spans[begin : begin + 100]), None)])
        time.sleep(0.3)
    wait_for(
        lambda: worker.query("SELECT count(*) AS n FROM spans")[0]["n"] >= 600, 20, lambda: worker.log[-3000:]
    )
    first = worker.query("SELECT trigger, kept, late FROM decisions ORDER BY decided_at LIMIT 1")
    assert first == [{"trigger": "max_size", "kept": True, "late": False}]
    wait_for(
        lambda: worker.query("SELECT count(DISTINCT span_id) AS n FROM spans")[0]["n"] == 900,
        60,
        lambda: worker.query("SELECT trigger, late, span_count FROM decisions"),
    )
