"""A run: the stream flows, a fault happens, everything drains, the tables are compared with the truth."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.chaos.faults import Chaos
from tests.chaos.fleet import Fleet, Ground, embedded_ground, stack_ground
from tests.chaos.report import Series
from tests.chaos.truth import Stream, compare
from tests.e2e.conftest import PARTITIONS
from tests.e2e.traces import Trace
from tests.stack import Stack

TRACES_PER_SEC = 40.0
BEFORE_SECS = (1.0, 5.0)  # of stream before a fault: it finds traces pending, claimed, on their way, written
AFTER_SECS = 1.5
SETTLE_SECS = 120.0  # a fleet drains in ten; commits that hang and leases that expire add up
LOOK_SECS = 1.0
IDLE_SECS = 3.0  # a zombie that would still write does it within that


@contextmanager
def ground_for(fault: Chaos, stack: Stack | None, folder: Path) -> Iterator[Ground]:
    """The real parts where there is a stack and the fault can be done there, else the embedded ones."""
    with ExitStack() as ends:
        if stack is not None and fault.where not in ("disks", "embedded"):
            yield ends.enter_context(stack_ground(stack, folder))
        else:
            yield ends.enter_context(embedded_ground(folder, small_disks=fault.where == "disks"))


def series(fault: Chaos, fleet: Fleet, runs: int, seed: int) -> Series:
    """The same fault again and again while one stream flows, so that it also strikes fleets that still recover.

    A run is a fault with the traces that were begun from the one before it on. Everything is compared after the last.
    """
    ground, began, failures = fleet.ground, [], []
    fleet.scale(fault.workers)
    with Stream(ground.brokers, ground.topic, PARTITIONS, TRACES_PER_SEC, seed) as stream:
        for _ in range(runs):
            began.append(len(stream.traces))
            fleet.scale(fault.workers)
            time.sleep(fleet.rng.uniform(*BEFORE_SECS))
            failures.append(strike(fault, fleet))
        time.sleep(AFTER_SECS)
    settled_secs = settle(stream.traces, ground)
    time.sleep(IDLE_SECS)
    outcomes = []
    for first, end, failed in zip(began, [*began[1:], len(stream.traces)], failures, strict=True):
        outcome = compare(stream.traces[first:end], ground.tables)
        outcome.faults += failed
        outcomes.append(outcome)
    return Series(fault, ground.name, outcomes, settled_secs, fleet.leftovers())


def strike(fault: Chaos, fleet: Fleet) -> list[str]:
    """What the fault itself found wrong."""
    try:
        fault.do(fleet)
    except AssertionError as broken:
        return [str(broken)]
    return []


def settle(traces: Sequence[Trace], ground: Ground) -> float | None:
    """Waits until nothing is missing; how long it took, None when it did not come."""
    began = time.monotonic()
    while (passed_secs := time.monotonic() - began) < SETTLE_SECS:
        time.sleep(LOOK_SECS)
        if compare(traces, ground.tables).lost == 0:
            return passed_secs
    return None
