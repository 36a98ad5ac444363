"""Plans as JSON: histories that failed once, and those in which each accident shows.

`tests/sim/histories/<name>.json` holds one plan each; `accident-<number>-….json` those of the accidents.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.sim.history import Fault, Plan, RecordPlan, SpanPlan

FOLDER = Path(__file__).parent / "histories"


def to_json(plan: Plan) -> str:
    """What differs from a plan's defaults, one record or fault a line."""
    plain = Plan(plan.seed, ())
    values: dict[str, Any] = {
        name: value
        for name, value in asdict(plan).items()
        if name == "seed" or (name not in ("records", "faults") and value != getattr(plain, name))
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    records = [
        [r.at_secs, r.partition, [[s.trace, s.number, int(s.error)] for s in r.spans]]
        + ([r.behind_secs] if r.behind_secs else [])
        for r in plan.records
    ]
    lines.append(f'  "records": {_rows(records)}')
    lines.append(f'  "faults": {_rows([[f.at_secs, f.kind, f.which, f.share, f.secs] for f in plan.faults])}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rows(rows: list[list[Any]]) -> str:
    return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]" if rows else "[]"


def from_json(text: str) -> Plan:
    values: dict[str, Any] = json.loads(text)
    records = tuple(
        RecordPlan(
            at,
            partition,
            tuple(SpanPlan(trace, number, bool(error)) for trace, number, error in spans),
            *behind,
        )
        for at, partition, spans, *behind in values.pop("records")
    )
    faults = tuple(Fault(*fault) for fault in values.pop("faults"))
    return replace(Plan(values.pop("seed"), records, faults), **values)


def load(name: str) -> Plan:
    return from_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def save(name: str, plan: Plan) -> Path:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(to_json(plan), encoding="utf-8")
    return path


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))
