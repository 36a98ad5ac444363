"""What is printed: a row for each run, and a row for each fault beside the Collector's figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.faults import Chaos
from tests.chaos.truth import Outcome


@dataclass(frozen=True)
class Run:
    """`settled_secs`: from the end of the stream until the tables were right; None when they never were."""

    seed: int
    outcome: Outcome
    settled_secs: float | None


@dataclass
class Series:
    fault: Chaos
    ground: str
    runs: list[Run]
    total: Outcome
    leftovers: list[str]

    @property
    def right(self) -> bool:
        return (
            self.total.right and not self.leftovers and all(run.settled_secs is not None for run in self.runs)
        )


NUMBERS = ("traces", "kept", "lost", "doubled", "split", "late_upgraded", "cut")
_WIDTHS = (24, 9, 6, 7, 6, 6, 8, 6, 14, 5)


def row(*cells: object) -> str:
    return "  ".join(str(cell).ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False)).rstrip()


def heading(*more: str) -> str:
    return row("fault", "ground", "runs", *(name.replace("_", "-") for name in NUMBERS), *more)


def run_row(fault: Chaos, ground: str, number: int, run: Run) -> str:
    settled = "NEVER" if run.settled_secs is None else f"{run.settled_secs:.1f} s"
    numbers = (getattr(run.outcome, name) for name in NUMBERS)
    cells = row(fault.name, ground, f"#{number}", *numbers)
    return "\n".join(
        [f"{cells}  settled after {settled}, seed {run.seed}", *(f"    {f}" for f in run.outcome.faults)]
    )


def summary(series: Sequence[Series]) -> str:
    lines = [heading() + "  settled (worst)  the Collector loses"]
    for each in series:
        times = [run.settled_secs for run in each.runs]
        worst = "NEVER" if None in times else f"{max(filter(None, times), default=0):.1f} s"
        numbers = (getattr(each.total, name) for name in NUMBERS)
        cells = row(each.fault.name, each.ground, len(each.runs), *numbers)
        lines.append(f"{cells}  {worst:15}  {each.fault.collector}".rstrip())
        lines += [f"    {fault}" for fault in each.total.faults]
        if each.leftovers:
            lines.append(f"    left in Redis: {', '.join(each.leftovers[:5])} ({len(each.leftovers)} keys)")
    return "\n".join(lines)
