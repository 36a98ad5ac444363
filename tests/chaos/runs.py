"""A run: the stream flows, a fault happens, everything drains, the tables are compared with the truth."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.chaos.faults import Chaos
from tests.chaos.fleet import Fleet, Ground, embedded_ground, stack_ground
from tests.chaos.report import Run, Series
from tests.chaos.truth import Outcome, Stream, compare
from tests.e2e.conftest import PARTITIONS
from tests.e2e.traces import Trace
from tests.stack import Stack

TRACES_PER_SEC = 40.0
BEFORE_SECS = (1.0, 4.0)  # of stream before the fault: pending, claimed and committed traces are all there
AFTER_SECS = 1.5
SETTLE_SECS = 90.0  # a fleet drains in ten; commits that hang and leases that expire add up
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


def series(fault: Chaos, ground: Ground, runs: int, seed: int, tell: Callable[[int, Run], None]) -> Series:
    """The same fault again and again on one fleet; at last everything that was ever sent is compared again."""
    fleet = Fleet(ground, random.Random(seed))
    done: list[Run] = []
    sent: list[Trace] = []
    try:
        for number in range(1, runs + 1):
            fleet.scale(fault.workers)
            result, traces = one_run(fault, fleet, seed * 1000 + number)
            done.append(result)
            sent += traces
            tell(number, result)
        time.sleep(IDLE_SECS)
        total = compare(sent, ground.tables)
        total.faults += [f for run in done for f in run.outcome.faults if f not in total.faults]
        return Series(fault, ground.name, done, total, fleet.leftovers())
    finally:
        fleet.close()


def one_run(fault: Chaos, fleet: Fleet, seed: int) -> tuple[Run, list[Trace]]:
    ground = fleet.ground
    failed: list[str] = []
    with Stream(ground.brokers, ground.topic, PARTITIONS, TRACES_PER_SEC, seed) as stream:
        time.sleep(fleet.rng.uniform(*BEFORE_SECS))
        try:
            fault.do(fleet)
        except AssertionError as broken:
            failed.append(str(broken))
        time.sleep(AFTER_SECS)
    outcome, settled_secs = settle(stream.traces, ground)
    outcome.faults += failed
    return Run(seed, outcome, settled_secs), stream.traces


def settle(traces: Sequence[Trace], ground: Ground) -> tuple[Outcome, float | None]:
    """Waits until nothing is missing; what the tables say then, and how long it took (None: it never came)."""
    began = time.monotonic()
    while True:
        time.sleep(LOOK_SECS)
        outcome = compare(traces, ground.tables)
        passed_secs = time.monotonic() - began
        if outcome.lost == 0:
            return outcome, passed_secs
        if passed_secs > SETTLE_SECS:
            return outcome, None
