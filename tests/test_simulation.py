"""The whole protocol in a simulated world: many histories, the accidents that its rules prevent, and the doubles.

`bin/simulate` plays more histories than fit here, and keeps those that fail in tests/sim/histories.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.sim import accidents, kept, laws, mutants, resp
from tests.sim.history import draw, play
from tests.sim.iceberg import Catalog, SimTables, Trouble
from tests.sim.redis import FSYNC_SECS, Server, Session
from tests.sim.world import Process, World
from tests.test_sink import EPOCH, T0_MS, decisions, local, spans
from tss.decide import Tables
from tss.errors import Fenced, Unavailable
from tss.sink import Kind

pytestmark = pytest.mark.embedded  # a minute and more: not for the gate before every commit

FIXED_SEEDS = 200
FRESH_SEEDS = 20
SEEDS_A_TEST = 20


def broken(seed: int) -> list[str]:
    try:
        return laws.breaches(play(draw(seed)))
    except Exception as fault:
        fault.add_note(f"bin/simulate --seeds 1 --seed {seed}")
        raise


def play_all(seeds: range) -> None:
    """Says how each failing history is played again, however long what it broke is."""
    found = {seed: breaches for seed in seeds if (breaches := broken(seed))}
    told = [f"bin/simulate --seeds 1 --seed {seed} --story: {lines[0]}" for seed, lines in found.items()]
    if told:
        pytest.fail("\n".join(told), pytrace=False)


# --- histories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, FIXED_SEEDS, SEEDS_A_TEST))
def test_every_law_holds(first: int) -> None:
    """Nothing is lost, doubled, split or early, and everything drains, in the same histories every time."""
    play_all(range(first, first + SEEDS_A_TEST))


def test_every_law_holds_in_new_histories() -> None:
    """The same of histories that nobody has seen."""
    first = secrets.randbelow(1 << 40)
    play_all(range(first, first + FRESH_SEEDS))


@pytest.mark.parametrize("name", kept.names())
def test_every_law_holds_where_it_once_did_not(name: str) -> None:
    """Histories that failed once, and those of the accidents, break no law."""
    assert not laws.breaches(play(kept.load(name)))


def test_a_seed_is_a_history() -> None:
    """The same seed gives the same story, event for event, and another seed gives another."""
    first, again, other = (play(draw(seed)) for seed in (2, 2, 5))
    assert first.story == again.story
    assert laws.decided(first) == laws.decided(again)
    assert first.fleet.world.now_secs == again.fleet.world.now_secs
    assert first.story != other.story


def test_a_plan_survives_its_file() -> None:
    """A kept history is the one that was played."""
    for seed in range(20):
        assert kept.from_json(kept.to_json(draw(seed))) == draw(seed)


# --- the rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", accidents.ACCIDENTS)
def test_without_its_rule_an_accident_happens(name: str) -> None:
    """Each rule is needed: without it, the law it serves is broken in a history that is fine with it."""
    accident = accidents.ACCIDENTS[name]
    assert accident.law in accidents.seen_by(accident.removal, kept.load(accidents.file_of(name)))


@pytest.mark.parametrize("law", [law.__name__ for law in laws.LAWS])
def test_every_law_can_fail(law: str) -> None:
    """A program that breaks what a law is about is caught by that law, and the plainest one by no other."""
    for number, mutant in enumerate(mutants.MUTANTS[law]):
        seen = accidents.seen_by(mutant, kept.load(mutants.file_of(mutant)))
        assert law in seen
        assert number > 0 or seen == {law}


# --- doubles: Redis ----------------------------------------------------------------------------------------------


def served(server: Server, *commands: tuple[bytes, ...]) -> list[Any]:
    session = Session()
    return [server.execute(session, command) for command in commands]


@dataclass
class Hand:
    """A clock that is set by hand."""

    secs: float = 100.0

    def __call__(self) -> float:
        return self.secs


def test_a_restart_loses_a_tail_of_whole_transactions() -> None:
    """What is older than the fsync survives; of what is younger, a prefix, and no transaction in part."""
    pair = ((b"MULTI",), (b"SET", b"a", b"1"), (b"SET", b"b", b"1"), (b"EXEC",))
    for share, left in ((0.0, {b"old", b"a", b"b", b"c"}), (0.5, {b"old", b"a", b"b"}), (1.0, {b"old"})):
        clock = Hand()
        server = Server(clock)
        served(server, (b"SET", b"old", b"1"))
        clock.secs += FSYNC_SECS
        clock.secs += 0.1
        served(server, *pair, (b"SET", b"c", b"1"))
        before = server.run_id
        server.restart(share)
        assert set(server.store.keys) == left
        assert server.run_id != before


def test_what_the_disk_vouched_for_survives() -> None:
    """After WAITAOF nothing before it can be lost."""
    server = Server(Hand(), waits=True)
    served(server, (b"SET", b"a", b"1"), (b"WAITAOF", b"1", b"0", b"100"), (b"SET", b"b", b"1"))
    server.restart(1.0)
    assert set(server.store.keys) == {b"a"}


def test_replies_are_those_of_the_wire() -> None:
    """Each kind of reply comes out as the protocol writes it, and commands are read as clients write them."""
    data = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1\r\n$4\r\nPING\r\n"
    assert resp.parsed(data) == [[b"GET", b"k"], [b"PING"]]
    replies = served(Server(Hand()), *(tuple(command) for command in resp.parsed(data)))
    assert b"".join(map(resp.encoded, [*replies, [1, b"x"]])) == b"$-1\r\n+PONG\r\n*2\r\n:1\r\n$1\r\nx\r\n"


# --- doubles: the tables, one suite with the real sink -----------------------------------------------------------

Body = Callable[[Tables], None]


@dataclass
class Place:
    """Where a test's body meets tables in their first epoch, and what is in them afterwards."""

    run: Callable[[Body], None]
    count: Callable[[Kind], int]


@pytest.fixture(params=["sink", "simulated"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sink":
        real = local(tmp_path / "data")
        sink = real.begin()
        return Place(lambda body: body(sink), lambda kind: real.rows(kind).num_rows)
    world = World(0)
    catalog = Catalog(world)
    for table in catalog.tables.values():
        table.epochs.append(EPOCH)
    process = Process("p")
    return Place(
        lambda body: in_world(world, process, lambda: body(SimTables(catalog, process))),
        lambda kind: len(catalog.tables[kind].column("trace_id")),
    )


def in_world(world: World, process: Process, main: Callable[[], None]) -> None:
    actor = world.spawn(process, "test", main)
    assert world.run(world.now_secs + 1000, lambda: actor.ended)


def land(
    tables: Tables, kind: Kind, rows: pa.Table, sequence: int = 1, *, writer: str = "w", epoch: str = EPOCH
) -> bool:
    return tables.commit(tables.upload(kind, [rows]), writer, sequence, epoch)


def test_a_sequence_lands_once(place: Place) -> None:
    """Whoever commits it again, and an older one after it, changes nothing; each table counts for itself."""

    def body(tables: Tables) -> None:
        assert land(tables, "spans", spans("s1"))
        assert not land(tables, "spans", spans("s1"))
        assert land(tables, "spans", spans("s2"), 3)
        assert not land(tables, "spans", spans("s3"), 2)
        assert land(tables, "spans", spans("s4"), writer="v")
        assert land(tables, "decisions", decisions(1))
        assert tables.landed("spans") == {"w": 3, "v": 1}
        assert tables.landed("decisions") == {"w": 1}

    place.run(body)
    assert (place.count("spans"), place.count("decisions")) == (3, 1)


def test_a_lost_epoch_lands_nothing(place: Place) -> None:
    """After a new epoch has entered, a writer of the old one is fenced in both tables, also under a new sequence."""

    def body(tables: Tables) -> None:
        assert land(tables, "spans", spans("s1"))
        uploaded = tables.upload("spans", [spans("s2")])
        tables.enter_epoch("life-2")
        tables.enter_epoch("life-2")
        assert tables.epochs() == ("life-2", "life-2")
        with pytest.raises(Fenced):
            tables.commit(uploaded, "w", 2, EPOCH)
        with pytest.raises(Fenced):
            land(tables, "decisions", decisions(1))
        assert land(tables, "spans", spans("s3"), 2, epoch="life-2")

    place.run(body)
    assert (place.count("spans"), place.count("decisions")) == (2, 0)


def test_decisions_are_read_back_by_either_time(place: Place) -> None:
    """Rows whose newest record is of that time or later, or that were decided since, with all that a restore needs."""

    def body(tables: Tables) -> None:
        for sequence, ago_ms in enumerate((5000, 1000, 0), start=1):
            land(
                tables,
                "decisions",
                decisions(sequence, last_log_ms=T0_MS - ago_ms, sequence=sequence),
                sequence,
            )
        rows = [row for batch in tables.decisions_since(T0_MS - 1000, T0_MS + 1) for row in batch.to_pylist()]
        assert sorted(row["sequence"] for row in rows) == [2, 3]
        assert {row["records"] for row in rows} == {"0:2", "0:3"}
        assert sum(batch.num_rows for batch in tables.decisions_since(T0_MS + 1, T0_MS)) == 3

    place.run(body)


@pytest.mark.parametrize(("kind", "landed"), [("unheard", True), ("lost", False), ("late", True)])
def test_an_unknown_outcome_is_settled_by_a_look(kind: str, landed: bool) -> None:
    """The double's commits whose answer is missing: a second try lands what did not land, and nothing twice."""
    world, process = World(0), Process("p")
    catalog = Catalog(world)
    catalog.tables["spans"].epochs.append(EPOCH)
    catalog.troubles.append(Trouble(kind, secs=0.001))

    def body() -> None:
        tables = SimTables(catalog, process)
        with pytest.raises(Unavailable):
            land(tables, "spans", spans("s1"))
        world.pause(1.0)
        assert land(tables, "spans", spans("s1")) != landed

    in_world(world, process, body)
    assert catalog.tables["spans"].column("span_id") == ["s1"]


def test_one_of_two_commits_on_one_base_wins() -> None:
    """The double compares: of commits that began on the same version one goes first, and both land in the end."""
    world = World(0)
    catalog = Catalog(world)
    catalog.tables["spans"].epochs.append(EPOCH)
    actors = []
    for name in ("p", "q"):
        process = Process(name)
        tables = SimTables(catalog, process)

        def body(tables: SimTables = tables, name: str = name) -> None:
            assert land(tables, "spans", spans(name), writer=name)

        actors.append(world.spawn(process, name, body))
    assert world.run(world.now_secs + 100, lambda: all(actor.ended for actor in actors))
    assert sorted(catalog.tables["spans"].column("span_id")) == ["p", "q"]


# --- doubles: Kafka ----------------------------------------------------------------------------------------------


def test_a_group_goes_on_without_the_silent() -> None:
    """With one of two processes stopped for ever, the other reads all partitions and nothing is lost."""
    plan = draw(3)
    silent = replace(plan.faults[0], kind="stop", secs=1000.0, which=0, at_secs=5.0) if plan.faults else None
    assert silent is not None
    plan = replace(plan, processes=2, faults=(silent,))
    assert not laws.breaches(play(plan))
