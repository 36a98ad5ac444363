"""A failing history, with everything left out that it does not need to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.sim import laws
from tests.sim.history import Plan, play

ATTEMPTS_MAX = 300  # a minute; what is left by then is short enough to be read


def broken_laws(plan: Plan) -> set[str]:
    """Their names."""
    return {breach.partition(":")[0] for breach in laws.breaches(play(plan))}


def shorten_failing(plan: Plan) -> Plan:
    """The shortest plan found that breaks a law that this one breaks."""
    wanted = broken_laws(plan)
    return shorten(plan, lambda smaller: bool(broken_laws(smaller) & wanted)) if wanted else plan


def shorten(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """The shortest plan found that still fails, by leaving out faults, then records, then variety."""
    attempts = 0
    while True:
        for smaller in _smaller(plan):
            attempts += 1
            if attempts > ATTEMPTS_MAX:
                return plan
            if fails(smaller):
                plan = smaller
                break
        else:
            return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    for what in ("faults", "records"):
        parts: Any = getattr(plan, what)
        size = len(parts)
        while size >= 1:
            for at in range(0, len(parts), size):
                left = parts[:at] + parts[at + size :]
                if left or what == "faults":
                    changed: dict[str, Any] = {what: left}
                    yield replace(plan, **changed)
            size //= 2
    simpler: dict[str, Any] = {
        "processes": 1,
        "writers": 1,
        "nodes": 1,
        "skewed": False,
        "backlog": False,
        "waits": True,
        "root_wait_secs": None,
        "claim_max": 2000,
        "batch_max": 10,
    }
    for name, value in simpler.items():
        if getattr(plan, name) != value:
            yield replace(plan, **{name: value})
