"""The same job done by the OpenTelemetry Collector's tail_sampling, on the same topic: the figure to compare with.

The binary is the caller's; tests/bench/otelcol-builder.yaml and README say how one is built. It reads with
kafkareceiver, decides with the same policies and the same five rules, and exports to nowhere, where tss also writes
the table. CPU is taken over a window at full speed, after heap and decisions have settled. One core (GOMAXPROCS=1), as the figure is spans a CPU second.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import CollectorRun
from tests.bench.stages import cpu_seconds, peak_rss_bytes, told_bytes
from tests.bench.topics import Filled
from tests.ports import LOOPBACK, free_port

SETTLE_SECS = 20
WINDOW_SECS = 30
START_SECS = 60
NEARLY_ALL = 0.99  # the last records trickle in
POLL_SECS = 0.2

ACCEPTED = "otelcol_receiver_accepted_spans"
DECIDED = "otelcol_processor_tail_sampling_global_count_traces_sampled"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Of Go's garbage collection. `best` is the fastest that was found, for 10 GB of memory."""

    name: str
    env: dict[str, str]
    wait_secs: int
    needs_bytes: int


TUNINGS = (
    Tuning("default", {}, 10, 6 << 30),
    Tuning("best", {"GOGC": "400", "GOMEMLIMIT": "11GiB"}, 5, 12 << 30),
)


CONFIG = """\
receivers:
  kafka:
    brokers: ["{brokers}"]
    group_id: "{group}"
    initial_offset: earliest
    traces: {{topics: ["{topic}"], encoding: otlp_proto}}
processors:
  tail_sampling:
    decision_wait: {wait_secs}s
    num_traces: 200000
    sample_on_first_match: true
    policies:
      - {{name: errors, type: status_code, status_code: {{status_codes: [ERROR]}}}}
      - {{name: slow, type: latency, latency: {{threshold_ms: 5000}}}}
      - {{name: base, type: probabilistic, probabilistic: {{sampling_percentage: {percentage}}}}}
{rules}
exporters:
  nop:
service:
  telemetry:
    logs: {{level: warn}}
    metrics: {{readers: [{{pull: {{exporter: {{prometheus: {{host: {host}, port: {port}}}}}}}}}]}}
  pipelines:
    traces: {{receivers: [kafka], processors: [tail_sampling], exporters: [nop]}}
"""
RULE = (
    "      - {{name: rule{n}, type: string_attribute, string_attribute: {{key: {key}, values: [{values}]}}}}"
)


def config_text(
    brokers: str, topic: str, port: int, wait_secs: int, base_rate: float, rules: dict[str, list[str]]
) -> str:
    """`rules`: attribute to values, any of which keeps a trace."""
    lines = (
        RULE.format(n=n, key=key, values=", ".join(f'"{value}"' for value in values))
        for n, (key, values) in enumerate(rules.items())
    )
    return CONFIG.format(
        brokers=brokers,
        group=f"collector-{uuid.uuid4().hex[:8]}",
        topic=topic,
        wait_secs=wait_secs,
        percentage=100 * base_rate,
        rules="\n".join(lines),
        host=LOOPBACK,
        port=port,
    )


def available_bytes() -> int:
    """Memory that a new process can have."""
    return told_bytes(Path("/proc/meminfo"), "MemAvailable")


def measure(
    binary: Path,
    brokers: str,
    filled: Filled,
    tuning: Tuning,
    base_rate: float,
    rules: dict[str, list[str]],
    folder: Path,
) -> CollectorRun:
    """Raises when the topic is read before the window has opened: fill more."""
    port = free_port()
    config = folder / f"collector-{port}.yaml"
    config.write_text(config_text(brokers, filled.topic, port, tuning.wait_secs, base_rate, rules))
    with _running(binary, config, tuning) as (pid, address):
        process = Path(f"/proc/{pid}")
        while (spans := _total(_metrics(address), ACCEPTED)) == 0:
            time.sleep(POLL_SECS)
        opens_secs = time.monotonic() + SETTLE_SECS
        while time.monotonic() < opens_secs:
            time.sleep(POLL_SECS)
        before, cpu_before = _total(_metrics(address), ACCEPTED), cpu_seconds(process, with_children=False)
        while spans < NEARLY_ALL * filled.spans and time.monotonic() < opens_secs + WINDOW_SECS:
            time.sleep(POLL_SECS)
            spans = _total(_metrics(address), ACCEPTED)
        cpu_secs = cpu_seconds(process, with_children=False) - cpu_before
        metrics = _metrics(address)
        spans = _total(metrics, ACCEPTED)
        if spans - before < 0.1 * filled.spans:
            raise SystemExit(
                f"{filled.spans} spans are too few for the Collector to settle; use --spans 4000000"
            )
        kept = _total(metrics, DECIDED, 'sampled="true"')
        return CollectorRun(
            filled.layout,
            tuning.name,
            (spans - before) / cpu_secs,
            peak_rss_bytes(process),
            kept / _total(metrics, DECIDED),
            int(spans - before),
            round(cpu_secs, 2),
        )


@contextmanager
def _running(binary: Path, config: Path, tuning: Tuning) -> Iterator[tuple[int, str]]:
    """Its pid and the address of its metrics, once they answer."""
    port = config.stem.rpartition("-")[2]
    env = {**os.environ, "GOMAXPROCS": "1", **tuning.env}
    log = config.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen([binary, "--config", config], env=env, stdout=out, stderr=out)
    try:
        address = f"http://{LOOPBACK}:{port}/metrics"
        deadline = time.monotonic() + START_SECS
        while not _metrics(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the Collector did not start:\n{log.read_text()[-2000:]}")
            time.sleep(POLL_SECS)
        yield process.pid, address
    finally:
        process.kill()
        process.wait()


def _metrics(address: str) -> dict[str, float]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def _total(metrics: dict[str, float], name: str, label: str = "") -> float:
    return sum(v for k, v in metrics.items() if re.match(rf"{name}(_total)?(\{{|$)", k) and label in k)
