"""Figures of a bench run: kept as JSON run by run, shown as medians with their spread, compared as ratios."""

from __future__ import annotations

import importlib.metadata
import json
import operator
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.worker import CLIENT_STAGES, REDIS, STAGES, Outcome
from tss import __version__

ROOT = Path(__file__).parent.parent.parent
BASELINE = Path(__file__).with_name("baseline.json")
README = ROOT / "README.md"
README_MARKS = ("<!-- bench: begin -->", "<!-- bench: end -->")
PACKAGES = ("numba", "numpy", "pyarrow", "confluent-kafka", "hiredis", "pyiceberg")
MEGA = 1_000_000


@dataclass(frozen=True, slots=True)
class PathRun:
    """One run of one case."""

    layout: str
    kept_percent: int
    rules: int
    outcome: Outcome

    def micros(self, stage: str) -> float:
        """CPU seconds a million spans, which is microseconds a span."""
        return self.outcome.seconds.get(stage, 0.0) / self.outcome.spans * MEGA

    @property
    def client_micros(self) -> float:
        return sum(map(self.micros, CLIENT_STAGES))

    @property
    def total_micros(self) -> float:
        return self.client_micros + self.micros(REDIS)

    def __str__(self) -> str:
        return (
            f"  {self.layout}, {self.kept_percent} % kept, {self.rules} rules: {self.total_micros:.2f} CPU s a "
            f"million spans, {self.outcome.wall_secs:.1f} s, kept {100 * self.outcome.kept_spans / self.outcome.spans:.1f} %"
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """With `spans` waiting in Redis and none decided."""

    layout: str
    spans: int
    redis_bytes_per_span: float
    wire_bytes_per_span: float
    worker_peak_rss_bytes: int

    @property
    def ratio(self) -> float:
        return self.redis_bytes_per_span / self.wire_bytes_per_span


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start of a process until it is ready; the cold one goes on until its kernels are compiled."""

    cold_secs: float
    warm_secs: list[float]
    compiled_secs: float | None = None  # not measured by earlier versions


@dataclass(frozen=True, slots=True)
class CollectorRun:
    """One window of the Collector at full speed; `kept_share` of the traces it decided."""

    layout: str
    tuning: str
    spans_per_cpu_sec: float
    peak_rss_bytes: int
    kept_share: float
    window_spans: int
    window_cpu_secs: float

    def __str__(self) -> str:
        return (
            f"  {self.layout}, Collector, {self.tuning} tuning: {self.spans_per_cpu_sec / 1000:.0f} k spans a CPU s "
            f"over {self.window_cpu_secs} CPU s, {self.peak_rss_bytes / 1e9:.1f} GB, kept {100 * self.kept_share:.1f} %"
        )


@dataclass(slots=True)
class Report:
    """All that one call of the bench measured, and where."""

    machine: str
    versions: dict[str, str]
    began: str
    spans: int
    load_before: float
    runs: list[PathRun] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    start: Start | None = None
    collector: list[CollectorRun] = field(default_factory=list)

    @classmethod
    def of_this_machine(cls, versions: dict[str, str], began: str, spans: int) -> Report:
        own = {"tss": _tss_version(), "Python": platform.python_version()}
        own |= {name: importlib.metadata.version(name) for name in PACKAGES}
        return cls(machine(), own | versions, began, spans, os.getloadavg()[0])

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Report:
        raw: dict[str, Any] = json.loads(file.read_text())
        runs = [PathRun(**(r | {"outcome": Outcome(**r["outcome"])})) for r in raw.pop("runs")]
        pending = [Pending(**p) for p in raw.pop("pending")]
        collected = [CollectorRun(**c) for c in raw.pop("collector")]
        started = raw.pop("start")
        start = Start(**started) if started else None
        return cls(**raw, runs=runs, pending=pending, start=start, collector=collected)

    # --- medians ---

    def groups(self) -> list[tuple[int, int]]:
        """(percent kept, rules), each a table."""
        return sorted({(r.kept_percent, r.rules) for r in self.runs})

    def layouts(self) -> list[str]:
        return sorted({r.layout for r in self.runs})

    def of(self, layout: str, group: tuple[int, int]) -> list[PathRun]:
        return [r for r in self.runs if (r.layout, r.kept_percent, r.rules) == (layout, *group)]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: how to get its figure of a run."""

    title: str
    value: Callable[[PathRun], float]
    digits: int = 2


ROWS = (
    *(Row(stage, operator.methodcaller("micros", stage)) for stage in STAGES),
    Row("sum", lambda run: run.total_micros),
    Row("k spans a CPU second", lambda run: 1000 / run.total_micros, 0),
    Row("the same without Redis", lambda run: 1000 / run.client_micros, 0),
    Row("peak RSS of the worker, MB", lambda run: run.outcome.peak_rss_bytes / 1e6, 0),
)


def median(row: Row, runs: Sequence[PathRun]) -> float:
    return statistics.median(map(row.value, runs))


def text(report: Report) -> str:
    """The tables for a terminal."""
    lines = [heading(report), ""]
    layouts = report.layouts()
    for group in report.groups():
        kept_percent, rules = group
        lines.append(
            f"{kept_percent} % kept, {rules} rules: CPU seconds a million spans, median (least-most)"
        )
        lines.append(f"{'layout':34}" + "".join(f"{layout:>22}" for layout in layouts))
        for row in ROWS:
            cells = (spread(row, report.of(layout, group)) for layout in layouts)
            lines.append(f"{row.title:34}" + "".join(f"{cell:>22}" for cell in cells))
        lines.append("")
    return "\n".join([*lines, *_others(report)])


def heading(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"{report.began}, {report.machine}, load {report.load_before:.1f}\n{versions}"


def spread(row: Row, runs: Sequence[PathRun]) -> str:
    if not runs:
        return "-"
    values = sorted(map(row.value, runs))
    digits = row.digits
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"


def _others(report: Report) -> Iterator[str]:
    for p in report.pending:
        yield (
            f"{p.layout}: {p.redis_bytes_per_span:.0f} B in Redis a pending span, {p.ratio:.2f} x its "
            f"{p.wire_bytes_per_span:.0f} B on the wire; worker's peak RSS {p.worker_peak_rss_bytes / 1e6:.0f} MB"
        )
    if report.start:
        warm = sorted(report.start.warm_secs)
        yield (
            f"start to ready: cold {report.start.cold_secs:.1f} s (compiled after {report.start.compiled_secs} s), "
            f"warm {statistics.median(warm):.2f} s ({warm[0]:.2f}-{warm[-1]:.2f})"
        )
    for c in report.collector:
        ratio = _over_collector(report, c)
        yield f"{c}{f'; tss does {ratio:.1f} x as many' if ratio else ''}"


def _over_collector(report: Report, collected: CollectorRun) -> float | None:
    """tss with Redis counted, on the same job: 10 % kept and five rules."""
    runs = report.of(collected.layout, (10, 5))
    if not runs:
        return None
    return 1e6 / statistics.median(r.total_micros for r in runs) / collected.spans_per_cpu_sec


def comparison(now: Report, before: Report) -> str:
    """Each figure now over the same before; below 1 is less."""
    lines = [f"ratio to {before.began} ({before.versions.get('tss')}, {before.machine})"]
    for group in now.groups():
        layouts = [layout for layout in now.layouts() if now.of(layout, group) and before.of(layout, group)]
        if not layouts:
            continue
        lines += ["", f"{group[0]} % kept, {group[1]} rules" + "".join(f"{layout:>10}" for layout in layouts)]
        for row in ROWS:
            cells = (_ratio(row, now.of(layout, group), before.of(layout, group)) for layout in layouts)
            lines.append(f"{row.title:32}" + "".join(f"{cell:>10}" for cell in cells))
    earlier = {p.layout: p for p in before.pending}
    lines += [
        f"{p.layout}: Redis bytes a pending span {p.redis_bytes_per_span / earlier[p.layout].redis_bytes_per_span:.2f}"
        for p in now.pending
        if p.layout in earlier
    ]
    return "\n".join(lines)


def _ratio(row: Row, now: Sequence[PathRun], before: Sequence[PathRun]) -> str:
    earlier = median(row, before)
    return f"{median(row, now) / earlier:.2f}" if earlier else "-"


# --- README ---


def markdown(report: Report) -> str:
    """What README shows: 10 % kept, five rules."""
    layouts, group = report.layouts(), (10, 5)
    lines = [
        "| CPU seconds a million spans | " + " | ".join(layouts) + " |",
        "|---|" + "---|" * len(layouts),
    ]
    for row in ROWS:
        cells = (spread(row, report.of(layout, group)) for layout in layouts)
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    pending = {p.layout: f"{p.ratio:.2f}" for p in report.pending}
    lines.append("| Redis bytes ÷ wire bytes | " + " | ".join(pending.get(x, "-") for x in layouts) + " |")
    tunings = list(dict.fromkeys(c.tuning for c in report.collector))
    for tuning in tunings:
        found = {c.layout: c for c in report.collector if c.tuning == tuning}
        cells = (_collector_cell(report, found.get(layout)) for layout in layouts)
        lines.append(f"| Collector, {tuning} tuning: k spans a CPU second | " + " | ".join(cells) + " |")
    if report.start:
        warm_secs = statistics.median(report.start.warm_secs)
        line = f"Start to ready: {warm_secs:.1f} s, on a new machine {report.start.cold_secs:.0f} s"
        if report.start.compiled_secs:
            line += f", where the kernels are compiled after {report.start.compiled_secs:.0f} s"
        lines += ["", f"{line}."]
    where = (
        f"{report.machine}; {', '.join(f'{k} {v}' for k, v in report.versions.items())}; {report.began[:10]}"
    )
    return "\n".join(
        [*lines, "", f"Median (least-most) of {_runs(report)} runs of {report.spans:,} spans. {where}."]
    )


def _collector_cell(report: Report, collected: CollectorRun | None) -> str:
    if collected is None:
        return "-"
    ratio = _over_collector(report, collected)
    return f"{collected.spans_per_cpu_sec / 1000:.0f}{f' (tss {ratio:.1f} x)' if ratio else ''}"


def _runs(report: Report) -> int:
    return min(len(report.of(layout, (10, 5))) for layout in report.layouts())


def readme_with(table: str, readme: str) -> str:
    """README with this table between its marks."""
    begin, end = README_MARKS
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    assert pattern.search(readme), f"README has no {begin}"
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", readme)


# --- where ---


def machine() -> str:
    """Processor, its number, system."""
    return f"{os.cpu_count()} x {_processor()}, {platform.system()} {platform.release()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _tss_version() -> str:
    """With the commit, where there is one to tell."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return f"{__version__} ({told.stdout.strip()})" if told.returncode == 0 else __version__


def progress(line: str) -> None:
    """To stderr: stdout has the tables."""
    print(line, file=sys.stderr, flush=True)
