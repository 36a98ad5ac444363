"""A steady stream for minutes or hours, one fault after another, memory watched; at the end the truth, as always."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.bench.stages import rss_bytes
from tests.chaos.faults import FAULTS, Chaos
from tests.chaos.fleet import Fleet
from tests.chaos.report import Series
from tests.chaos.runs import IDLE_SECS, TRACES_PER_SEC, settle, strike
from tests.chaos.truth import Stream, compare
from tests.e2e.conftest import PARTITIONS
from tests.stack.install import say

WORKERS = 2
PAUSE_SECS = (2.0, 8.0)  # between two faults: some find a calm fleet, some one that still recovers
SAMPLE_SECS = 2.0
GROWN = 1.5  # how much more the last third may need than the first, at its peak


@dataclass(frozen=True)
class Sample:
    at_secs: float
    worker_bytes: int
    """Resident memory of the largest worker."""
    redis_bytes: int
    """What Redis counts as used, for all it holds."""


class Sampler:
    """Looks at memory now and then while the block lasts."""

    def __init__(self, fleet: Fleet) -> None:
        self.samples: list[Sample] = []
        self._fleet = fleet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(SAMPLE_SECS):
            workers = [rss_bytes(Path(f"/proc/{w.process.pid}")) for w in list(self._fleet.workers)]
            try:
                with redis.Redis.from_url(self._fleet.ground.redis_url, socket_timeout=1) as client:
                    used = int(client.info("memory")["used_memory"])
            except redis.RedisError:
                continue  # it is down just now
            self.samples.append(Sample(time.monotonic() - began, max(workers, default=0), used))


def soak(fleet: Fleet, minutes: float, seed: int) -> tuple[Series, list[Sample], list[str]]:
    """All faults that the fleet's ground allows, in random order, again and again."""
    ground = fleet.ground
    possible = [f for f in FAULTS if f.where in ("anywhere", ground.name)]
    done: list[str] = []
    broken: list[str] = []
    fleet.scale(WORKERS)
    end = time.monotonic() + minutes * 60
    with (
        Sampler(fleet) as sampler,
        Stream(ground.brokers, ground.topic, PARTITIONS, TRACES_PER_SEC, seed) as stream,
    ):
        while time.monotonic() < end:
            fault = fleet.rng.choice(possible)
            done.append(fault.name)
            say(
                f"  {(end - time.monotonic()) / 60:.1f} min to go, {len(stream.traces)} traces sent: {fault.name}"
            )
            broken += [f"{fault.name}: {what}" for what in strike(fault, fleet)]
            fleet.scale(WORKERS)
            time.sleep(fleet.rng.uniform(*PAUSE_SECS))
        stream.stop()
        settled_secs = settle(stream.traces, ground)
    time.sleep(IDLE_SECS)
    outcome = compare(stream.traces, ground.tables)
    outcome.faults += broken
    result = Series(Chaos("soak", lambda _: None), ground.name, [outcome], settled_secs, fleet.leftovers())
    return result, sampler.samples, done


def memory_report(samples: Sequence[Sample]) -> tuple[str, bool]:
    """Peaks by third, and whether the last is still near the first."""
    third = max(1, len(samples) // 3)
    parts = [samples[:third], samples[third : 2 * third], samples[2 * third :]]
    workers = [max((s.worker_bytes for s in part), default=0) for part in parts]
    servers = [max((s.redis_bytes for s in part), default=0) for part in parts]
    lines = [
        f"peak memory of {name}, by third: " + ", ".join(f"{peak / (1 << 20):.0f} MiB" for peak in peaks)
        for name, peaks in (("the largest worker", workers), ("Redis", servers))
    ]
    flat = all(0 < peaks[-1] <= GROWN * peaks[0] for peaks in (workers, servers))
    return "\n".join(lines), flat
