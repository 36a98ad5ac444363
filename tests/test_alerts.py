"""The alert rules speak of metrics that exist, and fire when they should."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tss.metrics import Metrics

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_rules_use_metrics_that_exist(rule: dict[str, Any]) -> None:
    """Names and labels are those that a worker serves, and each alert says what it means and what to do."""
    known = {
        f"{family.name}_total" if family.type == "counter" else family.name: metric
        for metric in vars(Metrics()).values()
        if hasattr(metric, "describe")
        for family in metric.describe()
    }
    used = re.findall(r"(tail_sampling_\w+)(?:\{(\w+)=)?", rule["expr"])
    assert used or "up{" in rule["expr"]
    for name, label in used:
        assert name in known
        assert not label or label in known[name]._labelnames
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["action"]
    assert rule["labels"]["severity"] in {"page", "ticket"}


def test_every_rule_is_shown_to_fire() -> None:
    """The test of the rules expects each of them once at least."""
    expected = (DEPLOY / "alerts_test.yml").read_text()
    assert [r["alert"] for r in RULES if f'alertname="{r["alert"]}"' not in expected] == []


def test_compose_loads_the_rules() -> None:
    """The Prometheus of docker-compose.yml reads them, and scrapes the job that they name."""
    root = DEPLOY.parent
    prometheus = yaml.safe_load((root / "prometheus.yml").read_text())
    volumes = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]
    assert prometheus["rule_files"] == ["alerts.yml"]
    assert "./deploy/alerts.yml:/etc/prometheus/alerts.yml:ro" in volumes
    assert "tss" in [job["job_name"] for job in prometheus["scrape_configs"]]


@pytest.mark.stack
def test_rules_fire_when_they_should() -> None:
    """promtool's own test: every alert fires on its fault, a healthy fleet is left alone."""
    done = subprocess.run(
        ["promtool", "test", "rules", DEPLOY / "alerts_test.yml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
