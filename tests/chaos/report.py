"""What is printed: a row for each run, and a row for each fault beside the Collector's figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.faults import Chaos
from tests.chaos.truth import Outcome


@dataclass(frozen=True)
class Series:
    """The runs of one fault. `settled_secs`: from the end of the stream until nothing was missing; None = never."""

    fault: Chaos
    ground: str
    runs: list[Outcome]
    settled_secs: float | None
    leftovers: list[str]

    @property
    def total(self) -> Outcome:
        return sum(self.runs, Outcome())

    @property
    def right(self) -> bool:
        return self.total.right and not self.leftovers and self.settled_secs is not None


NUMBERS = ("traces", "kept", "lost", "doubled", "split", "late_upgraded", "cut")
_WIDTHS = (22, 8, 5, 7, 6, 5, 7, 5, 13, 6)


def _row(*cells: object) -> str:
    return "  ".join(str(cell).ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False))


def _numbers(outcome: Outcome) -> list[int]:
    return [getattr(outcome, name) for name in NUMBERS]


def heading() -> str:
    return _row("fault", "ground", "runs", *(name.replace("_", "-") for name in NUMBERS)) + "  settled"


def run_rows(series: Series) -> str:
    lines = []
    for number, outcome in enumerate(series.runs, 1):
        lines.append(_row(series.fault.name, series.ground, f"#{number}", *_numbers(outcome)).rstrip())
        lines += [f"    {fault}" for fault in outcome.faults]
    return "\n".join(lines)


def summary(all_series: Sequence[Series]) -> str:
    lines = [heading() + "  the Collector loses"]
    for series in all_series:
        settled = "NEVER" if series.settled_secs is None else f"{series.settled_secs:.1f} s"
        cells = _row(series.fault.name, series.ground, len(series.runs), *_numbers(series.total))
        lines.append(f"{cells}  {settled:7}  {series.fault.collector}".rstrip())
        lines += [f"    {fault}" for fault in series.total.faults]
        if series.leftovers:
            some = ", ".join(series.leftovers[:5])
            lines.append(f"    left in Redis: {some} ({len(series.leftovers)} keys)")
    return "\n".join(lines)
