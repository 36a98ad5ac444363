"""What users already run, from top to bottom: the commands, names and outputs that tss promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import embedded_parts, real_parts
from tests.e2e.parts import ROOT, START_SECS, Parts, Worker, total, wait_for
from tests.stack import Stack, s3_filesystem
from tests.stack.stack import BUCKET, prometheus_value
from tss import __version__

PROJECT = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("embedded", marks=pytest.mark.embedded),
        pytest.param("stack", marks=pytest.mark.stack),
    ],
)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("acceptance")
    if request.param == "embedded":
        yield from embedded_parts(folder)
    else:
        stack: Stack = request.getfixturevalue("stack")
        # The plan's own names, so that its commands can be used word for word.
        yield from real_parts(stack, folder, topic="otel-traces-raw", table="spans")


@pytest.fixture(scope="module")
def worker(parts: Parts) -> Worker:
    return parts.worker(storage__iceberg__project_id=PROJECT).ready()


def produce(parts: Parts, *options: str) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tss.simple_producer",
            "--brokers",
            parts.brokers,
            "--topic",
            parts.topic,
            *options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept(worker: Worker, service: str) -> list[dict[str, Any]]:
    return worker.query(
        "SELECT trace_id, count(*) AS spans, min(sampling_reason) AS reason FROM spans "
        f"WHERE service_name = '{service}' GROUP BY trace_id"
    )


def produce_and_settle(parts: Parts, worker: Worker, *options: str) -> str:
    """Sends ten traces of a service of their own and returns its name once all ten are decided."""
    service = f"service-{uuid.uuid4().hex[:8]}"
    before = total([worker], "tail_sampling_traces_ingested_total")
    produce(parts, "--service", service, *options)
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= before + 10,
        60,
        lambda: worker.log[-2000:],
    )
    return service


def test_start_up_says_each_promised_line_in_order(parts: Parts, worker: Worker) -> None:
    """The log holds the eight start-up lines, in their order, at INFO."""
    expected = [
        f"Starting Tail Sampling Selector v{__version__}",
        "Initializing Iceberg storage backend",
        "  Catalog URI: " + parts.env.get("TSS__STORAGE__ICEBERG__CATALOG_URI", "sqlite:///"),
        "Connected to Iceberg catalog",
        "DataFusion session initialized",
        "Started 4 evaluation workers",
        f"Health/Admin API server listening on 127.0.0.1:{worker.api_port}",
        f"Consuming from Kafka topic: {parts.topic}",
    ]
    lines = [line.split(" INFO  ", 1)[1] for line in worker.log.splitlines() if " INFO  " in line]
    positions = [next(i for i, line in enumerate(lines) if line.startswith(text)) for text in expected]
    assert positions == sorted(positions), lines
    assert [text for text in expected if sum(line.startswith(text) for line in lines) != 1] == []


def test_the_producer_prints_what_the_plan_shows(parts: Parts, worker: Worker) -> None:
    """Ten traces, every third with an error, one line each with partition and offset, and the sum."""
    before = total([worker], "tail_sampling_traces_ingested_total")
    lines = produce(parts).splitlines()
    assert lines[:2] == ["=== Simple Trace Producer ===", "Sending traces..."]
    for number, line in enumerate(lines[2:12]):
        kind = "ERROR" if number % 3 == 0 else "OK"
        assert re.fullmatch(rf"  \[{kind}\] Trace {number} -> partition \d+, offset \d+", line), line
    assert lines[12:] == ["Done! Sent 10 traces (4 with errors)"]
    # The next tests count what they send themselves.
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= before + 10,
        60,
        lambda: worker.log[-2000:],
    )


def test_scenario_a_errors_are_kept(parts: Parts, worker: Worker) -> None:
    """Traces with status ERROR are all kept, counted with reason="error", and can be selected."""
    before = worker.metrics().get('tail_sampling_traces_sampled_total{reason="error"}', 0)
    service = produce_and_settle(parts, worker)
    rows = kept(worker, service)
    assert len(rows) == 4
    assert {row["reason"] for row in rows} == {"error"}
    assert worker.metrics()['tail_sampling_traces_sampled_total{reason="error"}'] >= before + 4


def test_scenario_b_slow_traces_are_kept(parts: Parts, worker: Worker) -> None:
    """Traces longer than latency_threshold_ms are kept with reason latency."""
    service = produce_and_settle(parts, worker, "--errors-every", "0", "--slow-every", "2")
    rows = kept(worker, service)
    assert len(rows) == 5
    assert {row["reason"] for row in rows} == {"latency"}
    assert 'tail_sampling_traces_sampled_total{reason="latency"}' in worker.metrics()


def test_scenario_c_ordinary_traces_are_dropped(parts: Parts, worker: Worker) -> None:
    """Fast traces without errors are dropped and counted; a decision row says so."""
    before = total([worker], "tail_sampling_traces_dropped_total")
    service = produce_and_settle(parts, worker, "--errors-every", "0")
    assert kept(worker, service) == []
    assert total([worker], "tail_sampling_traces_dropped_total") == before + 10
    (row,) = worker.query("SELECT count(*) AS n FROM decisions WHERE NOT kept AND reason = 'not_sampled'")
    assert row["n"] >= 10


def test_scenario_d_a_force_rule_keeps_ordinary_traces(parts: Parts, worker: Worker) -> None:
    """A force rule for a service, made with the plan's body, keeps its normal traces; deleting it ends that."""
    service = f"service-{uuid.uuid4().hex[:8]}"
    body = {
        "description": "Force sample all demo-service traces",
        "duration_secs": 300,
        "priority": 100,
        "match": {"resource": [{"key": "service.name", "op": "eq", "value": service}]},
        "action": "force_keep",
    }
    status, answer = worker.request("POST", "/admin/force-rules", body)
    assert (status, answer["success"], answer["error"]) == (201, True, None)
    rule_id = answer["data"]["id"]
    status, listed = worker.request("GET", "/admin/force-rules")
    assert rule_id in json.dumps(listed["data"])

    before = total([worker], "tail_sampling_traces_ingested_total")
    produce(parts, "--service", service, "--errors-every", "0")
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= before + 10,
        60,
        lambda: worker.log[-2000:],
    )
    rows = kept(worker, service)
    assert len(rows) == 10
    assert {row["reason"] for row in rows} == {"force"}
    forced = worker.metrics()
    assert forced["tail_sampling_traces_force_sampled_total"] >= 10
    assert forced[f'tail_sampling_force_rule_matches_total{{rule_id="{rule_id}"}}'] == 10

    assert worker.request("DELETE", f"/admin/force-rules/{rule_id}")[0] == 200
    assert worker.request("GET", f"/admin/force-rules/{rule_id}")[0] == 404


def test_a_rule_reaches_traces_that_were_already_pending(parts: Parts, worker: Worker) -> None:
    """A rule made after a trace's spans came in still keeps it."""
    service = f"service-{uuid.uuid4().hex[:8]}"
    before = total([worker], "tail_sampling_traces_ingested_total")
    produce(parts, "--service", service, "--errors-every", "0")
    body = {
        "duration_secs": 60,
        "match": {"span": [{"key": "service.name", "op": "exists", "value": False}],
                  "resource": [{"key": "service.name", "op": "starts_with", "value": service}]},
        "action": "force_keep",
    }  # fmt: skip
    assert worker.request("POST", "/admin/force-rules", body)[0] == 201
    wait_for(
        lambda: total([worker], "tail_sampling_traces_ingested_total") >= before + 10,
        60,
        lambda: worker.log[-2000:],
    )
    assert len(kept(worker, service)) == 10


def test_queries_answer_in_the_promised_shape(parts: Parts, worker: Worker) -> None:
    """The plan's SQL gives columns, rows by name, the count, whether it was cut, and the time it took."""
    produce_and_settle(parts, worker)
    status, answer = worker.request(
        "POST", "/admin/query", {"sql": "SELECT trace_id, status_code, duration_ms FROM spans LIMIT 10"}
    )
    assert status == 200
    assert (answer["success"], answer["error"]) == (True, None)
    data = answer["data"]
    assert [c["name"] for c in data["columns"]] == ["trace_id", "status_code", "duration_ms"]
    assert data["row_count"] == len(data["rows"]) == 10
    assert data["truncated"] is False
    assert data["elapsed_ms"] > 0
    assert re.fullmatch("[0-9a-f]{32}", data["rows"][0]["trace_id"])
    (exact,) = worker.query("SELECT start_time_unix_nano AS ns FROM default.spans LIMIT 1")
    assert exact["ns"] > 1_700_000_000_000_000_000
    for name in ("slowest-traces", "error-traces", "service-stats"):
        status, answer = worker.request("GET", f"/admin/query/{name}")
        assert status == 200, answer
        assert answer["data"]["rows"], name


def test_health_tells_the_truth(parts: Parts, worker: Worker) -> None:
    """Live, ready and full health answer as promised."""
    assert worker.request("GET", "/health/live")[0] == 200
    assert worker.request("GET", "/health/ready")[0] == 200
    status, body = worker.request("GET", "/health")
    assert (status, body["status"], body["version"]) == (200, "healthy", __version__)
    assert {check["name"]: check["ok"] for check in body["checks"]} == {
        "kafka": True,
        "redis": True,
        "storage": True,
        "workers": True,
    }


def test_metrics_have_the_promised_names(parts: Parts, worker: Worker) -> None:
    """Every metric name of the plan is served."""
    produce_and_settle(parts, worker)
    names = {name.partition("{")[0] for name in worker.metrics()}
    assert {
        "tail_sampling_traces_ingested_total",
        "tail_sampling_traces_sampled_total",
        "tail_sampling_traces_dropped_total",
        "tail_sampling_spans_exported_total",
        "tail_sampling_traces_force_sampled_total",
        "tail_sampling_spans_ingested_total",
    } <= names


def test_spans_are_conserved(parts: Parts, worker: Worker) -> None:
    """Spans in = kept + dropped + pending + refused + duplicate, from the metrics alone."""
    wait_for(lambda: worker.metrics()["tail_sampling_buffer_spans_current"] == 0, 30, worker.metrics)
    metrics = worker.metrics()

    def of(name: str) -> float:
        return sum(v for k, v in metrics.items() if k.partition("{")[0] == f"tail_sampling_{name}")

    assert of("spans_ingested_total") > 0
    assert of("spans_ingested_total") == sum(
        of(name)
        for name in (
            "spans_exported_total",
            "spans_dropped_total",
            "spans_duplicate_total",
            "spans_rejected_total",
            "buffer_spans_current",
        )
    )


def test_the_table_is_where_its_users_look_for_it(
    parts: Parts, worker: Worker, request: pytest.FixtureRequest
) -> None:
    """The catalog shows the table, the store holds Parquet files, and Prometheus sees the target up."""
    if parts.name == "embedded":
        table = Path(parts.env["TSS__STORAGE__LOCAL__PATH"])
        assert (table / "catalog.db").exists()
        assert list((table / "warehouse" / "default" / "spans" / "data").rglob("*.parquet"))
        return
    stack: Stack = request.getfixturevalue("stack")
    stack.scrape(f"127.0.0.1:{worker.metrics_port}")
    catalog = urllib.request.Request(
        f"{stack.catalog.url}/v1/namespaces/default/tables/spans", headers={"x-project-id": PROJECT}
    )
    with urllib.request.urlopen(catalog, timeout=10) as answer:
        assert json.load(answer)["metadata"]["format-version"] == 2
    from pyarrow.fs import FileSelector

    files = s3_filesystem(stack.minio).get_file_info(FileSelector(BUCKET, recursive=True))
    assert any("/spans/data/" in f.path and f.path.endswith(".parquet") for f in files)
    wait_for(
        lambda: (
            prometheus_value(stack.prometheus, 'up{job="tss"}') == 1
            and (prometheus_value(stack.prometheus, "tail_sampling_traces_ingested_total") or 0) > 0
        ),
        START_SECS,
        lambda: stack.prometheus.log.read_text()[-1000:],
    )


def test_a_second_worker_may_not_take_the_same_port(parts: Parts, worker: Worker, tmp_path: Path) -> None:
    """A taken port ends the start with exit code 78 and the setting's name."""
    other = Worker(parts.env | {"TSS__OBSERVABILITY__HEALTH_PORT": str(worker.api_port)}, tmp_path / "log")
    assert other.process.wait(60) == 78
    assert "observability.health" in other.log
