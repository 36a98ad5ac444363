"""What is done to a fleet while a stream flows. Each function returns when the fault is over.

`COLLECTOR` is what the OpenTelemetry Collector's tail_sampling lost under the same fault: share of the error traces,
measured with Collector 0.161, 400 traces a second, decision wait 10 s, offsets and exporters set up as well as it
allows; where it says nothing, that fault has no counterpart there (it has no store, no catalog, no shared state).
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.chaos.fleet import LEASE_SECS, SHUTDOWN_SECS, STORAGE_TIMEOUT_SECS, Fleet, cut_power, full, wipe
from tests.e2e.parts import wait_for
from tests.stack import Fault as Answer
from tests.stack import Part
from tss.crashpoints import POINTS

CRASH_SECS = 180  # until an armed worker comes by its crash point

Place = Literal["anywhere", "stack", "embedded", "disks"]


@dataclass(frozen=True)
class Chaos:
    """One kind of fault. `where` it can be done: `disks` = embedded parts on small disks of their own."""

    name: str
    do: Callable[[Fleet], None]
    where: Place = "anywhere"
    collector: str = ""
    workers: int = 2


def nothing(fleet: Fleet) -> None:
    """The control."""


def kill_one(fleet: Fleet) -> None:
    """kill -9, and a new one a moment later."""
    fleet.kill(fleet.any())
    time.sleep(fleet.rng.uniform(0, 2))
    fleet.start()


def kill_all(fleet: Fleet) -> None:
    """kill -9 of the whole fleet at once."""
    for worker in list(fleet.workers):
        fleet.kill(worker)
    time.sleep(fleet.rng.uniform(0, LEASE_SECS + 1))
    fleet.start()
    fleet.start()


def crash(point: str, fleet: Fleet) -> None:
    """One worker more, which dies at a passage of the point; the others go on."""
    passage = fleet.rng.randint(2, 8) if point == "within-release" else fleet.rng.randint(1, 3)
    doomed = fleet.start(crash_point=f"{point}:{passage}")
    try:
        wait_for(lambda: doomed.process.poll() is not None, CRASH_SECS, lambda: doomed.log[-2000:])
        assert doomed.process.returncode == -signal.SIGKILL, doomed.log[-2000:]
    finally:
        doomed.kill()


def roll(fleet: Fleet) -> None:
    """SIGTERM to one after the other, each replaced before the next."""
    for worker in list(fleet.workers):
        fleet.stop(worker)
        fleet.await_ready(fleet.start())


def stop_one(fleet: Fleet) -> None:
    """SIGTERM under load: exit code 0 within the deadline, then a new one."""
    fleet.stop(fleet.any())
    fleet.start()


def second_signal(fleet: Fleet) -> None:
    """A second SIGTERM while the first is being obeyed ends the process at once."""
    worker = fleet.any()
    fleet.workers.remove(worker)
    worker.process.send_signal(signal.SIGTERM)
    time.sleep(fleet.rng.uniform(0.02, 0.5))
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(SHUTDOWN_SECS)
    assert time.monotonic() - began < 2, "the second signal was not obeyed at once"
    fleet.start()


def scale_up_and_down(fleet: Fleet) -> None:
    """1 → 4 → 2."""
    fleet.scale(4)
    time.sleep(fleet.rng.uniform(1, 4))
    fleet.scale(2)


def freeze(fleet: Fleet) -> None:
    """SIGSTOP for longer than the lease, and sometimes than the session, then SIGCONT: a zombie wakes up."""
    process = fleet.any().process
    process.send_signal(signal.SIGSTOP)
    time.sleep(fleet.rng.uniform(1.3 * LEASE_SECS, 4 * LEASE_SECS))
    process.send_signal(signal.SIGCONT)


# --- parts that fail ---------------------------------------------------------------------------------------------


def restart(part: Callable[[Fleet], Part | None], number: signal.Signals, fleet: Fleet) -> None:
    """SIGTERM or kill -9, some time of silence, and the same data again."""
    server = part(fleet)
    assert server is not None
    server.kill() if number is signal.SIGKILL else server.stop()
    time.sleep(fleet.rng.uniform(0, 3))
    server.start()


def redis_power_cut(fleet: Fleet) -> None:
    """Redis comes back without its last second."""
    cut_power(fleet.ground.redis, fleet.rng.uniform(0.3, 1.2))


def redis_wipe(fleet: Fleet) -> None:
    """Redis comes back empty."""
    wipe(fleet.ground.redis)


def commits_lost(fleet: Fleet) -> None:
    """The next commits are answered with an error or not at all; most of them have landed."""
    proxy = fleet.ground.proxy
    assert proxy is not None
    proxy.requests.clear()
    for _ in range(6):
        answer = fleet.rng.choice([500, 502, 503, 504, None])
        proxy.fail_next(Answer(answer, lands=fleet.rng.choice(["before", "before", "never"])))
    time.sleep(4)


def commits_hang(fleet: Fleet) -> None:
    """The next commits are not answered until the client has given up; they land before or long after that."""
    proxy = fleet.ground.proxy
    assert proxy is not None
    proxy.requests.clear()
    for _ in range(3):
        hold_secs = STORAGE_TIMEOUT_SECS + fleet.rng.uniform(1, 5)
        proxy.fail_next(Answer(None, hold_secs=hold_secs, lands=fleet.rng.choice(["before", "after"])))
    time.sleep(STORAGE_TIMEOUT_SECS + 4)


def commits_refused(fleet: Fleet) -> None:
    """Every request to the catalog is answered with 500, without effect, for some seconds."""
    proxy = fleet.ground.proxy
    assert proxy is not None
    refused = [Answer(500, lands="never") for _ in range(40)]
    proxy.fail_next(*refused, when=lambda _: True)
    wait_for(lambda: not proxy.failing, CRASH_SECS, lambda: "requests left to fail")


def down(part: Callable[[Fleet], Part | None], fleet: Fleet) -> None:
    """kill -9, away for longer than a lease."""
    server = part(fleet)
    assert server is not None
    with server.down():
        time.sleep(fleet.rng.uniform(LEASE_SECS, 3 * LEASE_SECS))


def s3(mode: Literal["cut", "overloaded", "slow"], fleet: Fleet) -> None:
    """The line to the object store, for longer than a lease."""
    gate = fleet.ground.gate
    assert gate is not None
    with gate.set(mode):
        time.sleep(fleet.rng.uniform(LEASE_SECS, 3 * LEASE_SECS))


def disk_full(disk: str, fleet: Fleet) -> None:
    """ENOSPC for some seconds."""
    with full(fleet.ground.disks[disk]):
        time.sleep(fleet.rng.uniform(LEASE_SECS, 2 * LEASE_SECS))


def _kafka(fleet: Fleet) -> Part | None:
    return fleet.ground.kafka


def _redis(fleet: Fleet) -> Part | None:
    return fleet.ground.redis


def _catalog(fleet: Fleet) -> Part | None:
    return fleet.ground.catalog


def _minio(fleet: Fleet) -> Part | None:
    return fleet.ground.minio


_with = functools.partial
TERM, KILL = signal.SIGTERM, signal.SIGKILL

KILL_COLLECTOR = "34.4 % (84.5 % at its default wait)"

FAULTS = (
    Chaos("none", nothing, collector="0 % keyed, 15.9 % unkeyed"),
    Chaos("kill-one", kill_one, collector="17.1 % (one of two)"),
    Chaos("kill-all", kill_all, collector=KILL_COLLECTOR),
    *(Chaos(f"crash-{point}", _with(crash, point), collector=KILL_COLLECTOR) for point in POINTS),
    Chaos("sigterm", stop_one, collector="2.3 %"),
    Chaos("second-signal", second_signal),
    Chaos("roll", roll, collector="2.3 % per worker"),
    Chaos("scale-1-4-2", scale_up_and_down, collector="1.9 %", workers=1),
    Chaos("freeze", freeze),
    Chaos("redis-restart", _with(restart, _redis, TERM)),
    Chaos("redis-kill", _with(restart, _redis, KILL)),
    Chaos(
        "redis-power-cut", redis_power_cut, where="stack"
    ),  # the embedded server says itself what it has on disk
    Chaos("redis-wipe", redis_wipe, where="stack"),  # the mock broker cannot look up an offset by time
    Chaos("redis-disk-full", _with(disk_full, "redis"), where="disks"),
    Chaos("kafka-restart", _with(restart, _kafka, TERM), where="stack"),
    Chaos("kafka-kill", _with(restart, _kafka, KILL), where="stack"),
    Chaos("catalog-commits-lost", commits_lost, where="stack"),
    Chaos("catalog-commits-hang", commits_hang, where="stack"),
    Chaos("catalog-500", commits_refused, where="stack"),
    Chaos("catalog-down", _with(down, _catalog), where="stack"),
    Chaos("s3-down", _with(down, _minio), where="stack"),
    Chaos("s3-cut", _with(s3, "cut"), where="stack"),
    Chaos("s3-overloaded", _with(s3, "overloaded"), where="stack"),
    Chaos("s3-slow", _with(s3, "slow"), where="stack"),
    Chaos("tables-disk-full", _with(disk_full, "tables"), where="disks"),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
