"""The bench itself: that it still runs on the code as it is, and adds up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from tests.bench import collector, path, report, scale, steady
from tests.bench.generate import LAYOUTS
from tests.bench.outside import embedded
from tests.bench.path import RULE_VALUES, Case, Plan
from tests.bench.report import BASELINE, README, Report
from tests.bench.scale import Size
from tests.bench.stages import Stages
from tests.bench.worker import ARROW, COMMIT, DECODE, STAGES

SPANS = 3000
BURN_NS = 20_000_000


def burn() -> None:
    end_ns = time.thread_time_ns() + BURN_NS
    while time.thread_time_ns() < end_ns:
        pass


def test_a_stage_counts_what_is_in_no_stage_within_it() -> None:
    """Nested stages add up to the time of the outermost, also when one of them raises."""
    stages = Stages()
    inner = stages.timed("inner", burn)

    def story() -> None:
        burn()
        inner()
        raise ValueError("after both")

    before_ns = time.thread_time_ns()
    with pytest.raises(ValueError, match="after both"):
        stages.timed("outer", story)()
    took_secs = (time.thread_time_ns() - before_ns) / 1e9
    found = stages.moment().stages
    assert found["outer"] >= BURN_NS / 1e9
    assert found["inner"] >= BURN_NS / 1e9
    assert sum(found.values()) <= took_secs


def test_a_seam_that_is_gone_is_an_error() -> None:
    """A function that tss no longer has must not silently count as nothing."""
    with pytest.raises(AttributeError):
        Stages().wrap(path, "no_such_function", "stage")


def test_the_collector_is_given_the_same_job() -> None:
    """Its config is valid YAML with errors, latency, base rate and all five rules, and no output that costs."""
    text = collector.config_text("127.0.0.1:1", "bench-A", 8888, 10, path.base_rate_of(0.1), RULE_VALUES)
    config = yaml.safe_load(text)
    policies = config["processors"]["tail_sampling"]["policies"]
    rules = [p["string_attribute"] for p in policies if p["type"] == "string_attribute"]
    assert {rule["key"]: rule["values"] for rule in rules} == RULE_VALUES
    assert [p["type"] for p in policies[:3]] == ["status_code", "latency", "probabilistic"]
    assert 0.03 + 0.97 * policies[2]["probabilistic"]["sampling_percentage"] / 100 == pytest.approx(0.1)
    assert config["service"]["pipelines"]["traces"]["exporters"] == ["nop"]


def test_readme_shows_the_committed_baseline() -> None:
    """The table in README is that of baseline.json: `python -m tests.bench --baseline` writes both."""
    readme = README.read_text("utf-8")
    baseline = Report.read(BASELINE)
    assert baseline.layouts() == list(LAYOUTS)
    assert readme == report.readme_with(report.markdown(baseline), readme)


@pytest.mark.embedded
def test_the_whole_path_is_measured(tmp_path: Path) -> None:
    """Every stage of a small run has its cost, the share kept is the one asked for, and figures outlive the file."""
    with embedded(tmp_path) as outside:
        plan = Plan([Case("B", 10, 5), Case("B", 100, 0)], SPANS, runs=1, starts=False)
        found = path.measure(outside, plan)
    some, everything = found.runs
    assert some.outcome.spans == everything.outcome.spans >= SPANS
    assert 0.03 < some.outcome.kept_spans / some.outcome.spans < 0.2  # of 130 traces
    assert everything.outcome.kept_spans == everything.outcome.spans
    assert list(some.outcome.seconds) == list(STAGES)
    assert all(some.outcome.seconds[stage] > 0 for stage in (DECODE, ARROW, COMMIT))
    assert everything.micros(ARROW) > some.micros(ARROW)
    (pending,) = found.pending
    assert pending.spans == some.outcome.spans
    assert 0.05 < pending.ratio < 10

    file = tmp_path / "found.json"
    found.write(file)
    again = Report.read(file)
    assert again == found
    assert "1.00" in report.comparison(again, found)
    assert "B" in report.text(found)


@pytest.mark.embedded
def test_a_run_of_two_workers_beside_what_is_pending(tmp_path: Path) -> None:
    """Both together read and decide all of the topic; what waits takes room, and none of it is decided."""
    with embedded(tmp_path) as outside:
        (found,) = scale.measure(outside, "B", SPANS, [Size(5000, 2, 1)], runs=1)
    assert found.run.outcome.spans >= SPANS
    assert 300 < found.bytes_per_trace < 2000
    assert "| 5,000 | 2 | 1 |" in scale.markdown([found], {"Kafka": "mock"})


@pytest.mark.embedded
def test_a_steady_stream_is_watched(tmp_path: Path) -> None:
    """All that was sent within the time is decided, and memory and lag were looked at meanwhile."""
    with embedded(tmp_path) as outside:
        found = steady.measure(outside, "B", spans_per_sec=1000, secs=6, inactivity_secs=2)
    assert 5_000 <= found.spans <= 8_000
    assert found.samples
    assert all(sample.worker_bytes > 50_000_000 for sample in found.samples)
    assert found.peak_rss_bytes >= max(sample.worker_bytes for sample in found.samples)
    assert "| 3 |" in steady.markdown(found)
