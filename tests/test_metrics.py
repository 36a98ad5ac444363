"""The metrics are what they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tss.metrics import PREFIX, Metrics, observe_all

PACKAGE = Path(__file__).parent.parent / "tss"


def test_every_metric_is_set_somewhere() -> None:
    """A declared metric that nothing updates would be a lie on a dashboard."""
    code = "\n".join(path.read_text() for path in PACKAGE.glob("*.py") if path.name != "metrics.py")
    unused = [
        name for name in vars(Metrics()) if name != "registry" and not re.search(rf"metrics\.{name}\b", code)
    ]
    assert unused == []


def test_every_metric_has_a_help_text_and_the_prefix() -> None:
    """What `curl | grep ^tail_sampling` shows is all of ours, and each explains itself."""
    families = list(text_string_to_metric_families(generate_latest(Metrics().registry).decode()))
    ours = [family for family in families if family.name.startswith(PREFIX)]
    assert len(ours) == len(vars(Metrics())) - 1
    assert [family.name for family in ours if not family.documentation.endswith(".")] == []


def test_many_observations_at_once_are_as_one_by_one() -> None:
    """On a bound, between bounds, beyond the last: the same buckets, count and sum."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 7.0, 7.0]
    pages = []
    for at_once in (True, False):
        registry = CollectorRegistry()
        histogram = Histogram("secs", "Some.", buckets=(0.5, 1, 2), registry=registry)
        if at_once:
            observe_all(histogram, np.array(values))
            observe_all(histogram, np.array([]))
        else:
            for value in values:
                histogram.observe(value)
        pages.append(generate_latest(registry))
    assert pages[0] == pages[1]
