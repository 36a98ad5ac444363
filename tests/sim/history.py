"""One history: a plan drawn from a seed, played in a world, and what came of it.

A plan is plain data (records with their times, and faults with theirs), so that a failing one can be made shorter by
leaving things out. Faults end after `Plan.active_secs`; from then on everything must drain.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData

from tests.sim import iceberg, links, redis
from tests.sim.bounds import Bounds
from tests.sim.fleet import Fleet, Worker
from tests.sim.iceberg import Catalog
from tests.sim.kafka import Broker
from tests.sim.links import Nodes
from tests.sim.world import T0_SECS, World
from tss import config
from tss.model import parse_records
from tss.rules import ForceRule, RuleSet, new_rule

DRAIN_SECS = 120.0  # longest wait for everything to drain after the last fault
LOOK_SECS = 0.5
BACKLOG_SECS = 3600.0
SKEW_SECS = 0.3
INACTIVITY_SECS = 2.0
LEASE_SECS = 4.0
SLEEP_TTL_SECS = 100.0  # of verdicts, where all processes may be away for as long; else nothing expires
SESSION_SECS = 3.0
GARBAGE = b"\xff\xff\xff"


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """`number` is unique in its trace."""

    trace: int
    number: int
    error: bool


@dataclass(frozen=True, slots=True)
class RecordPlan:
    """A record, written `at_secs` after the beginning with a time stamp from before. No spans: it cannot be read."""

    at_secs: float
    partition: int
    spans: tuple[SpanPlan, ...]
    behind_secs: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something bad at a time. What `which`, `share` and `secs` mean is up to its kind (`Player`)."""

    at_secs: float
    kind: str
    which: int = 0
    share: float = 1.0
    secs: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a history. `claim_max` and `batch_max` are small, so that things come in pieces."""

    seed: int
    records: tuple[RecordPlan, ...]
    faults: tuple[Fault, ...] = ()
    active_secs: float = 30.0
    partitions: int = 1
    nodes: int = 1
    waits: bool = False
    processes: int = 1
    writers: int = 1
    claim_max: int = 2000
    batch_max: int = 10
    flush_secs: float = 1.0
    flush_spans: int = 50_000
    root_wait_secs: float | None = None
    buffer_traces: int = 5_000_000
    stall_secs: float = 300.0
    ttl_secs: float = 3600.0
    skewed: bool = False
    backlog: bool = False
    static: bool = False

    @property
    def decides_early(self) -> bool:
        return self.buffer_traces < 1000 or self.stall_secs < 100

    @property
    def drops_by_rule(self) -> bool:
        return any(fault.kind == "rules" and fault.share == 0 for fault in self.faults)


@dataclass(frozen=True, slots=True)
class Written:
    """A record of the log, as it stands there.

    No reader's clock passes `reached_ms` before it has read this record: the newest time stamp up to it, or when it
    came, if anybody could ask for the end of the log before.
    """

    timestamp_ms: int
    reached_ms: int
    spans: tuple[SpanPlan, ...]


@dataclass
class Outcome:
    """What a history came to; `laws` reads it."""

    plan: Plan
    fleet: Fleet
    log: dict[tuple[int, int], Written]
    drained: bool
    drained_after_secs: float
    injected: Counter[str]
    story: list[str]
    breaches: list[str]
    """Of the law of Redis' keys, seen on the way."""
    excesses: list[str]
    """Of the law of memory."""


# --- drawing -----------------------------------------------------------------------------------------------------

FAULTS = (
    *("crash", "crash", "stop", "stop", "terminate", "join", "redis_restart", "redis_restart", "redis_wipe"),
    *("redis_cut", "redis_deaf", "redis_late", "redis_slow", "redis_full", "kafka_evict", "kafka_lost"),
    *(
        "kafka_unheard",
        "kafka_down",
        "kafka_ends_late",
        "catalog_conflict",
        "catalog_unheard",
        "catalog_lost",
    ),
    *("catalog_late", "catalog_down", "catalog_slow", "rules", "blackout"),
)
LONGEST_BEHIND_SECS = 3.0  # more than the inactivity timeout


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    chance = random.Random(f"plan {seed}")
    partitions = chance.choice((1, 2, 2, 3))
    active_secs = chance.choice((15.0, 25.0))
    plan = Plan(
        seed,
        records=_records(chance, partitions, active_secs),
        active_secs=active_secs,
        partitions=partitions,
        nodes=chance.choice((1, 1, 2)),
        waits=chance.random() < 0.5,
        processes=chance.choice((1, 2, 2, 3)),
        writers=chance.choice((1, 1, 2)),
        claim_max=chance.choice((2, 5, 2000)),
        batch_max=chance.choice((1, 3, 10)),
        flush_secs=chance.choice((0.5, 2.0)),
        root_wait_secs=chance.choice((None, None, 1.0)),
        buffer_traces=chance.choice((5_000_000,) * 7 + (4,)),
        stall_secs=chance.choice((300.0,) * 7 + (5.0,)),
        skewed=chance.random() < 0.3,
        backlog=chance.random() < 0.15,
    )
    faults = [
        _fault(chance, kind, active_secs)
        for kind in chance.choices(FAULTS, k=chance.choice((0, 1, 3, 6, 10)))
    ]
    return _varied(replace(plan, faults=_in_time(faults)))


def _in_time(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    return tuple(sorted(faults, key=lambda fault: fault.at_secs))


def _varied(plan: Plan) -> Plan:
    """What only some histories have; from a stream of its own."""
    chance = random.Random(f"variety {plan.seed}")
    records = list(plan.records)
    if chance.random() < 0.3:
        late = (chance.choice((0.0, 0.0, chance.uniform(0, LONGEST_BEHIND_SECS))) for _ in itertools.count())
        records = [replace(r, behind_secs=round(secs, 3)) for r, secs in zip(records, late, strict=False)]
    if chance.random() < 0.25:
        for record in [r for r in records if chance.random() < 0.2]:
            at_secs = min(plan.active_secs, record.at_secs + chance.uniform(0, 3 * INACTIVITY_SECS))
            again = replace(record, at_secs=round(at_secs, 3), partition=chance.randrange(plan.partitions))
            records.append(replace(again, spans=again.spans[: chance.randint(1, 2)]))
    if chance.random() < 0.25:
        for _ in range(chance.randint(1, 4)):
            at_secs = round(chance.uniform(0, plan.active_secs), 3)
            records.append(RecordPlan(at_secs, chance.randrange(plan.partitions), ()))
    plan = replace(plan, records=tuple(sorted(records, key=lambda record: record.at_secs)))
    plan = replace(plan, static=chance.random() < 0.2, flush_spans=chance.choice((50_000,) * 4 + (3,)))
    if chance.random() < 0.1:
        sleep = Fault(round(chance.uniform(2, plan.active_secs), 3), "sleep", 0, 1.0, chance.uniform(30, 160))
        plan = replace(plan, ttl_secs=SLEEP_TTL_SECS, faults=_in_time((*plan.faults, sleep)))
        # A backlog older than the verdicts' time, asleep and wiped: late spans then come after the stated limit.
        plan = replace(plan, backlog=False)
    return plan


def _fault(chance: random.Random, kind: str, active_secs: float) -> Fault:
    secs = chance.choice((chance.uniform(0.05, 1.0), chance.uniform(1.0, 8.0)))
    share = chance.choice((0.0, 1.0, chance.random()))
    at = chance.uniform(0, active_secs)
    return Fault(round(at, 3), kind, chance.randrange(12), round(share, 2), round(secs, 2))


def _records(chance: random.Random, partitions: int, active_secs: float) -> tuple[RecordPlan, ...]:
    """Traces of a few spans, most of them quiet for good after that, some with late spans."""
    keyed = chance.random() < 0.3
    spans: list[tuple[float, int, SpanPlan]] = []
    for trace in range(chance.choice((1, 4, 12, 20))):
        at = chance.uniform(0, active_secs * 0.8)
        home = chance.randrange(partitions)
        failing = chance.random() < 0.4
        for number in range(1, chance.randint(1, 5) + 1):
            partition = home if keyed else chance.randrange(partitions)
            spans.append((at, partition, SpanPlan(trace, number, failing and chance.random() < 0.5)))
            late = chance.random() < 0.1
            at += chance.uniform(INACTIVITY_SECS * 2, active_secs / 2) if late else chance.uniform(0, 1.2)
    spans.sort(key=lambda span: span[0])
    records: list[RecordPlan] = []
    for at, partition, span in spans:
        last = records[-1] if records else None
        if last and last.partition == partition and chance.random() < 0.3:
            records[-1] = replace(last, spans=(*last.spans, span))
        else:
            records.append(RecordPlan(round(at, 3), partition, (span,)))
    return tuple(records)


# --- playing -----------------------------------------------------------------------------------------------------


def settings_of(plan: Plan) -> config.Config:
    return config.Config(
        app=config.App(
            evaluation_workers=plan.writers,
            evaluation_interval_secs=0.5,
            inactivity_timeout_secs=INACTIVITY_SECS,
            root_wait_secs=plan.root_wait_secs,
            lease_secs=LEASE_SECS,
            claim_max_traces=plan.claim_max,
            max_buffer_traces=plan.buffer_traces,
            instance_id="simulated",
        ),
        kafka=config.Kafka(
            auto_offset_reset="earliest",
            batch_max_records=plan.batch_max,
            partition_stall_secs=plan.stall_secs,
        ),
        redis=config.Redis(shards=links.SHARDS, cluster_enabled=plan.nodes > 1, trace_ttl_secs=plan.ttl_secs),
        storage=config.Storage(flush_interval_secs=plan.flush_secs, flush_max_spans=plan.flush_spans),
    )


def trace_bytes(trace: int) -> bytes:
    return random.Random(trace).randbytes(16)


def span_bytes(trace: int, number: int) -> bytes:
    return (trace << 16 | number).to_bytes(8, "big")


def encoded(spans: Sequence[SpanPlan]) -> bytes:
    """As a Collector would send them, or as nobody should; the first span of a trace is its root."""
    if not spans:
        return GARBAGE
    made = [
        Span(
            trace_id=trace_bytes(span.trace),
            span_id=span_bytes(span.trace, span.number),
            parent_span_id=b"" if span.number == 1 else span_bytes(span.trace, 1),
            name="x",
            status=Status(code=Status.STATUS_CODE_ERROR) if span.error else None,
        )
        for span in spans
    ]
    data = TracesData()
    data.resource_spans.add().scope_spans.add().spans.extend(made)
    return data.SerializeToString()


def _rule(action: str) -> ForceRule:
    everything = {"span": [{"key": "absent", "op": "exists", "value": False}]}
    began = datetime.fromtimestamp(T0_SECS, UTC) - timedelta(seconds=1)
    return new_rule(
        {"action": action, "match": everything, "duration_secs": 86_000}, rule_id=action, now=began
    )


KEEP_ALL = _rule("force_keep")
DROP_ALL = _rule("force_drop")


class Player:
    """Plays one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = world = World(plan.seed)
        self.fleet = Fleet(
            world,
            settings_of(plan),
            Nodes.new(world, plan.nodes, waits=plan.waits),
            Broker(world, plan.partitions, SESSION_SECS),
            Catalog(world),
        )
        self.log: dict[tuple[int, int], Written] = {}
        self._chance = world.chance("player")
        self._born = 0
        self._asleep_until = 0.0
        self._reached_ms: dict[int, int] = {}
        self._breaches: list[str] = []
        self._excesses: list[str] = []
        self._bounds = Bounds(self.fleet, plan.flush_spans, plan.buffer_traces)
        self.fleet.broker.on_read = lambda process: self._bounds.read(process.name)

    def play(self) -> Outcome:
        world, plan = self.world, self.plan
        for record in plan.records:
            self._schedule(record)
        for _ in range(plan.processes):
            self._start()
        for fault in plan.faults:
            world.at(T0_SECS + fault.at_secs, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        self._look()
        world.run(T0_SECS + plan.active_secs)
        world.run(self._asleep_until)
        healed = world.now_secs
        self._heal()
        drained = False
        while not drained and world.now_secs < healed + DRAIN_SECS:
            world.run(world.now_secs + 1.0)
            drained = self._drained()
        outcome = Outcome(
            plan,
            self.fleet,
            self.log,
            drained,
            world.now_secs - healed,
            world.injected,
            world.story,
            self._breaches,
            self._excesses,
        )
        self._end()
        return outcome

    def _look(self) -> None:
        """Now and then at what no outside call may ever see otherwise."""
        shards = self.fleet.settings.redis.shards
        at = f"after {self.world.now_secs - T0_SECS:.1f} s, "
        self._breaches += [at + fault for fault in redis.faults(self.fleet.nodes.servers, shards)]
        self._excesses += [at + excess for excess in self._bounds.look()]
        self.world.after(LOOK_SECS, self._look)

    def _schedule(self, record: RecordPlan) -> None:
        at = T0_SECS + record.at_secs
        if self.plan.backlog and record.at_secs < self.plan.active_secs / 2:
            self._write(record, at - BACKLOG_SECS, came_ms=0)
        else:
            self.world.at(at, lambda: self._write(record, at, came_ms=int(at * 1000)))

    def _write(self, record: RecordPlan, at_secs: float, came_ms: int) -> None:
        timestamp_ms, partition = int((at_secs - record.behind_secs) * 1000), record.partition
        offset = self.fleet.broker.append(partition, timestamp_ms, encoded(record.spans))
        self._reached_ms[partition] = max(self._reached_ms.get(partition, 0), timestamp_ms, came_ms)
        self.log[partition, offset] = Written(timestamp_ms, self._reached_ms[partition], record.spans)

    def _start(self, seat: str = "") -> None:
        """A process that takes another's seat is the same member of the group to Kafka, where membership is static."""
        self._born += 1
        skew = self._chance.uniform(-SKEW_SECS, SKEW_SECS) if self.plan.skewed else 0.0
        self.fleet.start(f"p{self._born}", skew, (seat or f"s{self._born}") if self.plan.static else "")

    def _heal(self) -> None:
        """Faults stop: everything is up again, and somebody works."""
        fleet, now = self.fleet, self.world.now_secs
        fleet.nodes.troubles.clear()
        fleet.nodes.slow_until = 0.0
        fleet.nodes.down_until.clear()
        for server in fleet.nodes.servers:
            server.full = False
        fleet.broker.troubles.clear()
        fleet.broker.down_until = fleet.broker.ends_late_secs = 0.0
        fleet.catalog.troubles.clear()
        fleet.catalog.down_until = fleet.catalog.slow_secs = 0.0
        for worker in fleet.workers:
            worker.process.stopped_until = min(worker.process.stopped_until, now)
        if not fleet.running():
            self._start()

    def _drained(self) -> bool:
        """Everything is decided, no payload waits, and every offset is committed."""
        fleet = self.fleet
        for p, log in enumerate(fleet.broker.logs):
            if log and fleet.broker.committed.get(p, (0, ""))[0] < len(log):
                return False
        waiting = (key.partition(b"}:")[2][:2] for server in fleet.nodes.servers for key in server.store.keys)
        if any(kind in (b"t:", b"x:", b"c:") for kind in waiting):
            return False
        decisions, landed = fleet.catalog.tables["decisions"], fleet.catalog.tables["spans"].committed
        names = ("records", "kept", "writer", "sequence")
        rows = zip(*(decisions.column(name) for name in names), strict=True)
        told = {
            record
            for records, kept, writer, sequence in rows
            if not kept or landed.get(writer, 0) >= sequence  # else a restore has it decided again
            for record in parse_records(records)
        }
        return {record for record, written in self.log.items() if written.spans} <= told

    def _end(self) -> None:
        for worker in self.fleet.workers:
            self.world.kill(worker.process)

    # --- faults ---

    def _victim(self, fault: Fault) -> Worker | None:
        running = self.fleet.running()
        return running[fault.which % len(running)] if running else None

    def _strike(self, fault: Fault) -> None:
        kind = fault.kind
        if kind in ("crash", "stop", "terminate", "kafka_evict"):
            victim = self._victim(fault)
            if victim is not None:
                self._strike_process(fault, victim)
        elif kind == "join":
            self.world.inject(kind, "one more process")
            self._start()
        elif kind in ("blackout", "sleep"):
            self._darken(fault)
        elif kind == "rules":
            self._change_rules(DROP_ALL if fault.share == 0 else KEEP_ALL)
        elif kind.startswith("redis"):
            self._strike_redis(fault)
        elif kind.startswith("kafka"):
            self._strike_kafka(fault)
        else:
            self._strike_catalog(fault)

    def _strike_process(self, fault: Fault, victim: Worker) -> None:
        fleet, world = self.fleet, self.world
        if fault.kind == "kafka_evict":
            if fleet.broker.evict(victim.process):
                world.inject(fault.kind, victim.process.name)
            return
        world.inject(fault.kind, f"{victim.process.name}, {fault.secs:.1f} s")
        if fault.kind == "stop":
            fleet.stop(victim, fault.secs)
            return
        if fault.kind == "crash":
            fleet.crash(victim)
        else:
            victim.terminate()
        world.after(fault.secs, lambda: self._start(victim.seat))

    def _darken(self, fault: Fault) -> None:
        """All processes die at once; new ones come after a while. What outlives verdicts is waited for by the end."""
        fleet, world = self.fleet, self.world
        fallen = fleet.running()
        world.inject(fault.kind, f"{len(fallen)} processes, {fault.secs:.1f} s")
        for worker in fallen:
            fleet.crash(worker)
            world.after(fault.secs, lambda worker=worker: self._start(worker.seat))  # type: ignore[misc]
        if fault.kind == "sleep":
            self._asleep_until = max(self._asleep_until, world.now_secs + fault.secs)

    def _change_rules(self, rule: ForceRule) -> None:
        """Processes hear of it at different times."""
        fleet = self.fleet
        fleet.rules = rules = RuleSet(() if len(fleet.rules) else (rule,))
        self.world.inject("rules", ", ".join(rule.action for rule in rules.rules) or "none")
        for worker in fleet.running():
            delay = self._chance.uniform(0, 3)
            self.world.after(delay, lambda worker=worker: setattr(worker, "rules", rules))  # type: ignore[misc]

    def _strike_redis(self, fault: Fault) -> None:
        nodes, world = self.fleet.nodes, self.world
        number = fault.which % len(nodes.servers)
        match fault.kind:
            case "redis_restart":
                lost = nodes.restart(number, fault.share, min(fault.secs, 3.0))
                world.inject(fault.kind, f"node {number}, {lost} writes lost")
            case "redis_wipe":
                hit = nodes.servers if fault.share == 1.0 else [nodes.servers[number]]
                world.inject(fault.kind, f"{len(hit)} of {len(nodes.servers)} nodes")
                for server in hit:
                    server.wipe()
                    if fault.which % 2:
                        nodes.restart(server.number, 0.0, min(fault.secs, 3.0))
            case "redis_slow":
                world.inject(fault.kind, f"{fault.secs:.1f} s")
                nodes.slow_until = world.now_secs + fault.secs
            case "redis_full":
                world.inject(fault.kind, f"{fault.secs:.1f} s")
                server = nodes.servers[number]
                server.full = True
                world.after(fault.secs, lambda: setattr(server, "full", False))
            case _:
                nodes.troubles.append(
                    links.Trouble(fault.kind.removeprefix("redis_"), fault.share, fault.secs)
                )

    def _strike_kafka(self, fault: Fault) -> None:
        broker, world = self.fleet.broker, self.world
        match fault.kind:
            case "kafka_down":
                world.inject(fault.kind, f"{fault.secs:.1f} s")
                broker.down_until = world.now_secs + fault.secs
            case "kafka_ends_late":
                world.inject(fault.kind, f"{fault.secs:.1f} s")
                broker.ends_late_secs = fault.secs
            case _:
                broker.troubles.append(fault.kind.removeprefix("kafka_"))

    def _strike_catalog(self, fault: Fault) -> None:
        catalog, world = self.fleet.catalog, self.world
        match fault.kind:
            case "catalog_down":
                world.inject(fault.kind, f"{fault.secs:.1f} s")
                catalog.down_until = world.now_secs + fault.secs
            case "catalog_slow":
                world.inject(fault.kind, f"{fault.secs:.1f} s")
                catalog.slow_secs = fault.secs
                world.after(fault.secs * 2, lambda: setattr(catalog, "slow_secs", 0.0))
            case _:
                catalog.troubles.append(iceberg.Trouble(fault.kind.removeprefix("catalog_"), fault.secs))


def play(plan: Plan) -> Outcome:
    return Player(plan).play()
