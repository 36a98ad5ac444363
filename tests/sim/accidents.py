"""The rules of docs/protocol.md taken out, one at a time: each is a way in which the code could be wrong.

`tests/test_simulation.py` plays a history without each rule, where a law must see the breach, and the same history
with it, where none may. The histories are `tests.sim.kept.ACCIDENTS`; `find` looks for new ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from tests.sim import history, resp
from tests.sim.history import Plan
from tests.sim.iceberg import SimTables
from tests.sim.links import Nodes
from tests.sim.shorten import broken_laws, shorten
from tss import buffer, decide, ingest, rows
from tss.buffer import Buffer, Link, Recorded, Script
from tss.decide import Writer
from tss.errors import LinkLost
from tss.model import FACTS, decode_origins
from tss.resp import Placed, Request, pack
from tss.sink import Upload
from tss.source import Source

Removal = Callable[[], AbstractContextManager[object]]


@contextmanager
def changed_script(name: str, *changes: tuple[str, str]) -> Iterator[None]:
    """A script of the buffer with parts of its text replaced."""
    before: Script = getattr(buffer, name)
    text = before.text
    for old, new in changes:
        assert old in text, f"{name} has no {old!r} any more: say anew how this rule is taken out"
        text = text.replace(old, new)
    after = Script(text)
    scripts = tuple(after if script is before else script for script in buffer.SCRIPTS)
    with patch.object(buffer, name, after), patch.object(buffer, "SCRIPTS", scripts):
        yield


# --- R1 to R4: claims and verdicts -------------------------------------------------------------------------------


def second_claim() -> AbstractContextManager[object]:
    """1: a trace may be claimed again while its first claim is open."""
    return changed_script(
        "CLAIM",
        ("redis.pcall('RENAMENX'", "redis.pcall('RENAME'"),
        ("if renamed == 0 then", "if renamed.ok then renamed = 1 end\n  if renamed == 0 then"),
    )


def covered_when_recorded() -> AbstractContextManager[object]:
    """2: the verdict is written with the coverage, before anything landed."""
    begin = "local keys, fresh = named('d:', ids), {}"
    cover = f"""
    local function cover(id)
      local all = ''
      for _, field in ipairs(redis.call('HKEYS', tag .. 'x:' .. id)) do
        all = all .. string.sub(field, {FACTS.itemsize + 1})
      end
      return struct.pack('<i8I4', 0, #all) .. all
    end"""
    late = "out[i] = known[i]"
    return changed_script(
        "RECORD",
        (begin, begin + cover),
        (late, f"{late}; redis.call('SET', keys[i], known[i] .. cover(ids[i]))"),
        ("= keys[i], chosen[i]", "= keys[i], chosen[i] .. cover(ids[i])"),
    )


def covered_by_chunk() -> AbstractContextManager[object]:
    """3: a chunk counts as landed when one of its records did."""

    def cut(chunks: Mapping[bytes, bytes], coverage: frozenset[tuple[int, int]]) -> rows.Cut:
        fresh = {
            name: payload
            for name, payload in chunks.items()
            if not any((o.partition, o.offset) in coverage for o in decode_origins(name[FACTS.itemsize :]))
        }
        return rows.cut(fresh, frozenset())

    return patch.object(decide, "cut", cut)


def last_verdict_wins() -> AbstractContextManager[object]:
    """4: whoever records last changes the verdict."""
    last_wins = """
    local size = struct.unpack('<I4', known[i])
    out[i] = chosen[i] .. string.sub(known[i], 5 + size)
    redis.call('SET', keys[i], out[i])"""
    return changed_script("RECORD", ("out[i] = known[i]", last_wins))


def verdict_expires() -> AbstractContextManager[object]:
    """5: a verdict that was released once keeps its expiry under an open claim."""
    return changed_script("RECORD", ("redis.call('PERSIST', keys[i])", ""))


def upgraded_by_its_own() -> AbstractContextManager[object]:
    """6: a drop turns to kept although nothing of the trace has landed, and for each who looks."""
    turn, nowhere = Writer._turn, frozenset({(-1, -1)})

    def own_too(
        self: Writer,
        outside: Buffer,
        sequence: Any,
        traces: Any,
        candidates: Any,
        recorded: Any,
        summary: Any,
    ) -> None:
        marked = [r and Recorded(r.verdict, r.coverage | nowhere) for r in recorded]
        turn(self, outside, sequence, traces, candidates, marked, summary)
        recorded[:] = [r and Recorded(r.verdict, r.coverage - nowhere) for r in marked]

    stack = ExitStack()
    stack.enter_context(turned_by_each())
    stack.enter_context(patch.object(Writer, "_turn", own_too))
    return stack


def one_author_for_all_lives() -> AbstractContextManager[object]:
    """What is left of a claim lands under the name of before, and makes rows count whose spans never landed."""
    return patch.object(decide, "author_of", lambda owner, _: owner)


def turned_by_each() -> AbstractContextManager[object]:
    """An adopter that knows other rules than the owner turns a drop that the owner has landed as such."""
    return changed_script("TURN", ("#note == 1", "true"))


def turned_again() -> AbstractContextManager[object]:
    """An error that landed turns the drop it was part of when it is delivered again, after the rules changed."""
    return patch.object(decide, "new_error", lambda *_: True)


def wait_before_recording() -> AbstractContextManager[object]:
    """7: the durable wait covers the claim, but not the verdict."""
    record, wait = Buffer.record, Buffer.wait_durable

    def late_record(self: Buffer, *arguments: Any) -> Any:
        wait(self)
        return record(self, *arguments)

    stack = ExitStack()
    stack.enter_context(patch.object(Buffer, "record", late_record))
    stack.enter_context(patch.object(Buffer, "wait_durable", lambda _: None))
    return stack


# --- R5 to R8: connections, offsets, transactions ----------------------------------------------------------------


def commit_from_memory() -> AbstractContextManager[object]:
    """8: nobody waits for the disk before the table commits."""
    return patch.object(Buffer, "wait_durable", lambda _: None)


class _Reconnecting(Link):
    """What redis-py would do."""

    def __init__(self, connection: Any, answer_secs: float) -> None:
        self._given = connection, answer_secs
        self._opening = True
        super().__init__(connection, answer_secs)
        self._opening = False

    def exchange(self, request: bytes, commands: int, *, wait_secs: float = 0) -> list[Any]:
        try:
            return super().exchange(request, commands, wait_secs=wait_secs)
        except LinkLost:
            if self._opening:
                raise
        self._opening = True
        connection, answer_secs = self._given
        super().__init__(connection.another(), answer_secs)
        self._opening = False
        return super().exchange(request, commands, wait_secs=wait_secs)


def reconnecting() -> AbstractContextManager[object]:
    """9: the client connects again by itself and sends its command again."""
    return patch.object(Nodes, "link", _Reconnecting)


def same_name_again() -> AbstractContextManager[object]:
    """10: a writer that lost an answer goes on under its old id."""
    fresh: dict[int, str] = {}
    born = Writer._living

    def living(self: Writer) -> Buffer:
        name = fresh.setdefault(id(self), self._fresh_id())
        number = self._number
        with patch.object(self, "_fresh_id", lambda: name):
            reborn = self.id is None
            out = born(self)
        if reborn:
            self._number = number
        return out

    return patch.object(Writer, "_living", living)


def offsets_by_timer() -> AbstractContextManager[object]:
    """11: offsets are committed as soon as Redis has acknowledged, without another look at it."""
    commit = ingest.Ingest._commit

    def by_timer(self: ingest.Ingest, *arguments: Any, **named: Any) -> None:
        with patch.object(Buffer, "confirm", lambda _: None), patch.object(ingest, "LAG_SECS", 0.0):
            commit(self, *arguments, **named)

    return patch.object(ingest.Ingest, "_commit", by_timer)


def index_apart() -> AbstractContextManager[object]:
    """12: payloads and indexes are written one after the other."""
    together = Buffer._transaction

    def apart(self: Buffer, *arguments: Any, **named: Any) -> Request:
        _, *commands, _ = resp.parsed(together(self, *arguments, **named).packed)
        parts = [part for command in commands for part in (("MULTI",), tuple(command), ("EXEC",))]
        return Request(pack(parts), len(parts))

    return patch.object(Buffer, "_transaction", apart)


def clock_of_one_node() -> AbstractContextManager[object]:
    """13: the clock is kept on one shard, and the claims of all go by it."""
    append, claim = Buffer._transaction, Buffer.claim

    def without_clock(
        self: Buffer, shard: int, placed: Placed, writes: Request, entries: Sequence[str], **named: Any
    ) -> Request:
        return append(self, shard, placed, writes, entries if shard == 0 else (), **named)

    def by_one_clock(self: Buffer, *arguments: Any, **named: Any) -> Any:
        ((pairs,),) = self._all({0: [("HGETALL", b"{tss:0}:clock")]}).values()
        if pairs:
            others = range(1, self._shards)
            self._all({s: [("HSET", b"{tss:%d}:clock" % s, *pairs)] for s in others})
        return claim(self, *arguments, **named)

    stack = ExitStack()
    stack.enter_context(patch.object(Buffer, "_transaction", without_clock))
    stack.enter_context(patch.object(Buffer, "claim", by_one_clock))
    return stack


def unheard_partitions_ignored() -> AbstractContextManager[object]:
    """14: a partition without a clock does not hold the others'."""
    return changed_script("CLAIM", ("or #waiting > 0", ""))


# --- R9 to R11: tables, epochs, offsets --------------------------------------------------------------------------


class _SpansFirst(SimTables):
    """Commits of a sequence in the wrong order."""

    _spans: Upload | None = None

    def upload(self, kind: Any, parts: Any) -> Any:
        made = super().upload(kind, parts)
        self._spans = made if kind == "spans" else None
        return made

    def commit(self, upload: Upload, writer: str, sequence: int, epoch: str) -> bool:
        spans, self._spans = self._spans, None
        if upload.kind == "decisions" and spans is not None:
            super().commit(spans, writer, sequence, epoch)
        return super().commit(upload, writer, sequence, epoch)


def spans_first() -> AbstractContextManager[object]:
    """15: spans land before the decision that remembers them."""
    return patch("tests.sim.fleet.SimTables", _SpansFirst)


def tables_without_epoch() -> AbstractContextManager[object]:
    """15: a commit does not look at the table's epoch."""
    commit = SimTables.commit

    def unfenced(self: SimTables, upload: Upload, writer: str, sequence: int, epoch: str) -> bool:
        current = self._catalog.tables[upload.kind].epochs[-1:]
        return commit(self, upload, writer, sequence, current[0] if current else epoch)

    return patch.object(SimTables, "commit", unfenced)


def low_without_claims() -> AbstractContextManager[object]:
    """16: what is claimed does not count for how far a new life reads back."""
    return changed_script(
        "CLAIM",
        (
            "list[#list + 1] = trigger",
            "list[#list + 1] = trigger redis.call('ZREM', tag .. 'born', id)",
        ),
    )


def starts_at_the_offset() -> AbstractContextManager[object]:
    """16: a partition begins at its offset whatever epoch it was committed in."""
    return patch.object(Source, "_rewound", lambda _self, _partition, committed, _low: committed)


# --- found by the simulation -------------------------------------------------------------------------------------


def deaf_when_idle() -> AbstractContextManager[object]:
    """A reader that has nothing to commit does not look at Redis' epoch, and holds the clock with an old one."""
    commit = ingest.Ingest._commit

    def when_busy(self: ingest.Ingest, *arguments: Any, **named: Any) -> None:
        if self._waiting or not self._safe.items() <= self._committed.items():
            commit(self, *arguments, **named)

    return patch.object(ingest.Ingest, "_commit", when_busy)


def low_of_what_waits() -> AbstractContextManager[object]:
    """The oldest log time in a commit leaves out records that landed, but whose offsets are not committed yet."""
    whole = ingest.Acknowledged
    never_ms = 1 << 60
    return patch.object(
        ingest, "Acknowledged", lambda mono_secs, positions, _: whole(mono_secs, positions, never_ms)
    )


def stamps_by_log_time() -> AbstractContextManager[object]:
    """A commit tells the oldest log time; a record whose time stamp is behind it is not found again after a wipe."""
    return patch.object(ingest.Ingest, "_oldest_stamp", lambda _, low_ms: low_ms)


def low_not_handed_on() -> AbstractContextManager[object]:
    """The same, of records that another had read before the partition moved."""
    return patch.object(Source, "_inherit", lambda *_: None)


def verdicts_outlived() -> AbstractContextManager[object]:
    """A fleet that was away for longer than verdicts are remembered reads on as if nothing were forgotten."""
    return patch.object(Source, "_check_age", lambda *_: None)


def copies_trusted() -> AbstractContextManager[object]:
    """A reader that has put its dictionary on a shard once does not look again whether it is still there."""
    told: weakref.WeakSet[Buffer] = weakref.WeakSet()

    def trusting(self: Buffer, requests: dict[int, Request], _: Placed) -> dict[int, list[Any]]:
        dictionary = self._packing.dictionary
        if dictionary is not None and self not in told:
            key = b"{tss:%d}:z:%d"
            shards = range(self._shards)
            self._all({s: [("SET", key % (s, dictionary.id), dictionary.content)] for s in shards})
            told.add(self)
        return self._exchanged(requests)

    return patch.object(Buffer, "_written", trusting)


@dataclass(frozen=True, slots=True)
class Accident:
    """How the rule is taken out, and the law that sees what comes of it."""

    removal: Removal
    law: str


ACCIDENTS: dict[str, Accident] = {
    "1 second claim": Accident(second_claim, "conservation"),
    "2 covered when recorded": Accident(covered_when_recorded, "conservation"),
    "3 covered by chunk": Accident(covered_by_chunk, "conservation"),
    "4 last verdict wins": Accident(last_verdict_wins, "one_verdict"),
    "5 verdict expires": Accident(verdict_expires, "one_verdict"),
    "6 upgraded by its own": Accident(upgraded_by_its_own, "nothing_doubled"),
    "7 wait before recording": Accident(wait_before_recording, "nothing_doubled"),
    "8 commit from memory": Accident(commit_from_memory, "conservation"),
    "9 reconnecting": Accident(reconnecting, "conservation"),
    "10 same name again": Accident(same_name_again, "conservation"),
    "11 offsets by timer": Accident(offsets_by_timer, "conservation"),
    "12 index apart": Accident(index_apart, "keys_are_owned"),
    "13 clock of one node": Accident(clock_of_one_node, "not_early"),
    "14 unheard partitions ignored": Accident(unheard_partitions_ignored, "not_early"),
    "15 spans first": Accident(spans_first, "nothing_doubled"),
    "15 tables without epoch": Accident(tables_without_epoch, "nothing_doubled"),
    "16 low without claims": Accident(low_without_claims, "conservation"),
    "16 starts at the offset": Accident(starts_at_the_offset, "conservation"),
    "deaf when idle": Accident(deaf_when_idle, "progress"),
    "low of what waits": Accident(low_of_what_waits, "nothing_doubled"),
    "time stamps behind": Accident(stamps_by_log_time, "conservation"),
    "low not handed on": Accident(low_not_handed_on, "conservation"),
    "verdicts outlived": Accident(verdicts_outlived, "conservation"),
    "one author for all lives": Accident(one_author_for_all_lives, "conservation"),
    "copies trusted": Accident(copies_trusted, "keys_are_owned"),
    "turned by each": Accident(turned_by_each, "nothing_doubled"),
    "turned again": Accident(turned_again, "one_verdict"),
}


def seen_by(removal: Removal, plan: Plan) -> set[str]:
    """The laws that a history breaks when a rule is out."""
    with removal():
        return broken_laws(plan)


def find(accident: Accident, seeds: Iterable[int], draw: Callable[[int], Plan] = history.draw) -> Plan | None:
    """The shortest plan found that only fails without the rule."""

    def shows(plan: Plan) -> bool:
        return accident.law in seen_by(accident.removal, plan) and not broken_laws(plan)

    for plan in map(draw, seeds):
        if shows(plan):
            return shorten(plan, shows)
    return None


def file_of(name: str) -> str:
    """Where the history of an accident is kept."""
    return f"accident-{name.replace(' ', '-')}"
