"""What runs in a history: processes made of the production `Ingest` and `Writer`s, and the parts they share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.builders import QUICK
from tests.sim.iceberg import Catalog, SimTables
from tests.sim.kafka import Broker
from tests.sim.links import Nodes
from tests.sim.world import Process, SimClock, World
from tss import config
from tss.buffer import Buffer
from tss.decide import Writer
from tss.errors import Fenced, Unavailable
from tss.ingest import Ingest
from tss.metrics import Metrics
from tss.model import Now
from tss.rules import RuleSet
from tss.service import BACKOFF_SECS
from tss.source import Source, lowest_commit

PART_BYTES = 1000  # of payloads: so that what is kept is written in parts
METRICS = Metrics()  # of all histories: nobody reads them


@dataclass
class Fleet:
    """The outside, and the processes that work on it."""

    world: World
    settings: config.Config
    nodes: Nodes
    broker: Broker
    catalog: Catalog
    workers: list[Worker] = field(default_factory=list)
    rules: RuleSet = field(default_factory=RuleSet)

    def start(self, name: str, skew_secs: float, seat: str = "") -> Worker:
        """`seat` is `kafka.group_instance_id`; empty without static membership."""
        worker = Worker(self, Process(name, skew_secs), seat)
        self.workers.append(worker)
        return worker

    def crash(self, worker: Worker) -> None:
        self.broker.watch(worker.process)
        self.world.kill(worker.process)

    def stop(self, worker: Worker, secs: float) -> None:
        """SIGSTOP, and SIGCONT after `secs`."""
        worker.process.stopped_until = max(worker.process.stopped_until, self.world.now_secs + secs)
        self.broker.watch(worker.process)

    def running(self) -> list[Worker]:
        return [w for w in self.workers if w.process.alive and not w.stopping]


class Worker:
    """One process: an ingest loop, decide loops, and the heartbeat, as `tss.service` runs them."""

    def __init__(self, fleet: Fleet, process: Process, seat: str) -> None:
        self.process = process
        self.seat = seat
        self.rules = fleet.rules
        self._fleet = fleet
        self._world = world = fleet.world
        kafka = fleet.settings.kafka.model_copy(update={"group_instance_id": seat or None})
        self._settings = settings = fleet.settings.model_copy(update={"kafka": kafka})
        self._clock = SimClock(world, process)
        self._stop = threading.Event()
        self._ids = world.chance(f"ids {process.name}")
        clients = fleet.broker.clients(process)
        sink = SimTables(fleet.catalog, process)
        restoring = Turn(world)
        self.ingest = Ingest(
            settings,
            source=lambda revoked: Source(
                settings.kafka,
                embedded=False,
                revoked=revoked,
                verdict_secs=settings.redis.trace_ttl_secs,
                clients=clients,
                clock=self._clock,
            ),
            connect=self._connect,
            rules=lambda: self.rules,
            metrics=METRICS,
            clock=self._clock,
        )
        self.writers = [
            Writer(
                str(number),
                settings,
                connect=self._connect,
                sink=sink,
                rules=lambda: self.rules,
                partitions=lambda: self.ingest.source.partition_count,
                relief=lambda: self.ingest.relief,
                low=lambda: lowest_commit(settings.kafka, clients),
                metrics=METRICS,
                clock=self._clock,
                stop=self._stop,
                restoring=restoring,
                adopts=number == 0,
                fresh_id=lambda: f"{self._ids.getrandbits(128):032x}",
                part_bytes=PART_BYTES,
            )
            for number in range(settings.app.evaluation_workers)
        ]
        world.spawn(process, "ingest", self._take_in)
        world.spawn(process, "heartbeat", self._beat)
        for writer in self.writers:
            world.spawn(process, f"writer {writer.name}", lambda w=writer: self._decide(w))  # type: ignore[misc]

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def ended(self) -> bool:
        return all(actor.ended for actor in self.process.actors)

    def terminate(self) -> None:
        """SIGTERM."""
        self._stop.set()

    def _connect(self) -> Buffer:
        opener = self._fleet.nodes.opener(self.process)
        return Buffer(self._settings.redis, self._clock, opener, QUICK)

    def _loop(self, step: Callable[[Now], bool], forget: Callable[[Any], None], pause_secs: float) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                more = step(self._clock.now())
            except (Unavailable, Fenced) as fault:
                forget(fault)
                self._clock.wait(self._stop, BACKOFF_SECS[min(failures, len(BACKOFF_SECS) - 1)])
                failures += 1
            else:
                failures = 0
                if not more:
                    self._clock.wait(self._stop, pause_secs)

    def _take_in(self) -> None:
        self._loop(lambda now: self.ingest.step(now) >= 0, self.ingest.recover, 0)
        self.ingest.close()

    def _decide(self, writer: Writer) -> None:
        self._loop(writer.step, writer.die, self._settings.app.evaluation_interval_secs)
        try:
            writer.flush()
            writer.resign()
        except (Unavailable, Fenced) as fault:
            self._world.tell(f"{self.process.name} leaves its open sequence to others: {fault}")

    def _beat(self) -> None:
        lease_secs = self._settings.app.lease_secs
        buffer: Buffer | None = None
        while not (
            self._stop.is_set() and all(a.ended for a in self.process.actors if a.name != "heartbeat")
        ):
            try:
                buffer = buffer or self._connect()
                buffer.renew([w.id for w in self.writers if w.id], lease_secs)
            except Unavailable:
                if buffer is not None:
                    buffer.close()
                buffer = None
            self._clock.sleep(lease_secs / 4)


class Turn:
    """A lock between the actors of one process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False

    def __enter__(self) -> None:
        while self._held:
            self._world.pause(0.01)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False
