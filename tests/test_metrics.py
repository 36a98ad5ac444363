"""The metrics are what they say."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tss.metrics import PREFIX, Metrics

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
