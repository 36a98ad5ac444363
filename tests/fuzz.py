"""Mutants by the million, to see the kernels say what their slow twin says.

`bin/fuzz --mutants N` runs for as long as that takes; the tests run a few thousand. A run is cut into shards, each
with a seed of its own, counting up: shard 57 of a run that began with seed 1 is repeated, or the run continued, with
`--seed 57`. Mutants go in batches with whole records between them, so that the joining of both paths is tried as
well. A batch is of one kind, so that how many of each are taken in can be told. What `mutants` makes is compared

    decode    as records: facts, chunks and dead letters, the same to the byte
    gather    as payloads: the table of spans

`bin/fuzz` has numba check every index. Loads and copies, which it cannot see, are checked always.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import numba
import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from tests.builders import LOG_MS, trace_id
from tests.mutants import Mutants
from tss import rows, wire
from tss.gather import Gatherer
from tss.kernels import Decoder
from tss.model import Record, Trigger, Verdict
from tss.rows import Cut, KeptTrace
from tss.rules import ForceRule, RuleSet
from tss.wire import Decoded

BATCH = 48  # mutants compared together
SHARD = 100_000  # mutants of one seed
PROGRESS_SECS = 30
FAULTS_MAX = 20  # shards that differ before a run gives up


def from_python(inner: Callable[..., Any]) -> Callable[..., Any]:
    """What kernels call, to be called from here: most have no way in of their own."""
    outer: Callable[..., Any] = numba.njit(lambda *arguments: inner(*arguments))
    return outer


def rule_set(*matches: dict[str, Any]) -> RuleSet:
    """A rule for each match."""
    now = datetime.now(UTC)
    rules = [
        {"id": f"rule-{i}", "match": match, "created_at": now, "expires_at": now}
        for i, match in enumerate(matches)
    ]
    return RuleSet(map(ForceRule.model_validate, rules))


def on_span(key: str, op: str, value: object = None) -> dict[str, Any]:
    return {"span": [{"key": key, "op": op, "value": value}]}


def on_resource(key: str, op: str, value: object = None) -> dict[str, Any]:
    return {"resource": [{"key": key, "op": op, "value": value}]}


# All operators, keys that are often there, seldom and never, conditions on both sides, several on one key.
RULES = rule_set(
    on_span("k", "eq", 5),
    on_span("k", "neq", "five"),
    on_span("k", "in", [True, 5, "äöü"]),
    on_span("k", "contains", "5"),
    on_span("k", "starts_with", "["),
    on_span("http.route", "ends_with", "/items"),
    on_span("http.route", "regex", "^/(cart|slow)$"),
    on_span("http.response.status_code", "gte", 500),
    on_span("server.port", "lt", 1024),
    on_span("never", "exists"),
    on_span("k", "exists", value=False),
    on_resource("service.name", "eq", "cart"),
    on_resource("service.name", "exists", value=False),
    {"resource": on_resource("service.name", "in", ["shop", "cart"])["resource"], **on_span("k", "exists")},
    {"span": [*on_span("k", "gt", 3)["span"], *on_span("k", "lt", 9)["span"]]},
    {"span": [*on_span("server.port", "eq", 443)["span"], *on_span("k", "neq", 1)["span"]]},
)

# The twin asks every rule of every span, so most mutants meet some of them, in turn.
RULE_SETS = (
    RuleSet(),
    *(RuleSet(RULES.rules[first::5]) for first in range(5)),
    *(RuleSet(RULES.rules[first::4]) for first in range(4)),
    RULES,
)


# --- comparing ---------------------------------------------------------------------------------------------------


def difference(one: Decoded, other: Decoded) -> str | None:
    """The first part in which two results differ, None when they are the same to the byte."""
    for name in ("spans", "empty", "dead"):
        if getattr(one, name) != getattr(other, name):
            return f"{name}: {getattr(one, name)} and {getattr(other, name)}"
    for name in ("trace_ids", "facts", "field_at", "payload_at"):
        a, b = getattr(one.chunks, name), getattr(other.chunks, name)
        if a.dtype != b.dtype or not np.array_equal(a, b):
            return f"{name}: {a} and {b}"
    if type(one.chunks.buffer) is not memoryview or one.chunks.buffer != other.chunks.buffer:
        return "buffer"
    return None


def fault_of(
    decoder: Decoder, records: Sequence[Record], rules: RuleSet, expected: Decoded | None = None
) -> str | None:
    """How kernels and twin, of whom this is expected, disagree on this batch."""
    try:
        decoded = decoder.decode(records, rules)
    except Exception as fault:  # noqa: BLE001, the twin raises nothing, so no error is expected
        return f"the kernels raise {fault!r}"
    return difference(decoded, expected or wire.decode(records, rules))


_DECODER = Decoder()


def decode_both_ways(records: Sequence[Record], rules: RuleSet) -> Decoded:
    """What `wire.decode` gives, after the kernels have given the same."""
    decoded = wire.decode(records, rules)
    assert (fault := difference(_DECODER.decode(records, rules), decoded)) is None, fault
    return decoded


DECIDED_AT = datetime(2027, 1, 15, 8, 0, 1, 500_000, UTC)
KEPT = Verdict(True, "error", "error", 1.0, Trigger.INACTIVITY, 0xAB)


def kept(trace: int, *payloads: bytes) -> KeptTrace:
    """A trace of which all is written."""
    pieces = Cut([(payload, None) for payload in payloads], "", sum(map(len, payloads)), 0)
    return trace_id(trace), KEPT, False, pieces


def gather_fault(gatherer: Gatherer, traces: Sequence[KeptTrace]) -> str | None:
    """How kernels and twin disagree on the table of these traces; what one refuses, both must."""
    try:
        expected = rows.span_table(traces, DECIDED_AT)
    except (DecodeError, IndexError) as fault:
        try:
            gatherer.span_table(traces, DECIDED_AT)
        except (DecodeError, IndexError) as found:
            return None if type(found) is type(fault) else f"{found!r} and {fault!r}"
        return f"the twin raises {fault!r}"
    return _table_fault(gatherer, traces, expected)


def _table_fault(gatherer: Gatherer, traces: Sequence[KeptTrace], twins: tuple[pa.Table, int]) -> str | None:
    expected, repeated = twins
    try:
        table, found = gatherer.span_table(traces, DECIDED_AT)
        table.validate(full=True)
    except Exception as fault:  # noqa: BLE001, the twin raised nothing, so no error is expected
        return f"the kernels raise {fault!r}"
    if table.equals(expected) and found == repeated:
        return None
    columns = [name for name in expected.schema.names if not table[name].equals(expected[name])]
    told = [f"{name}: {table[name].to_pylist()} and {expected[name].to_pylist()}" for name in columns[:1]]
    return "; ".join(
        [*told, f"repeated: {found} and {repeated}", f"rows: {table.num_rows} and {expected.num_rows}"]
    )


# --- running -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Count:
    """Of one kind of mutants."""

    mutants: int = 0
    valid: int = 0  # the official class can read them
    taken: int = 0  # the kernels took them in; the others were left to the twin
    refused: int = 0  # by both, in part or as a whole


@dataclass(slots=True)
class Tally:
    """Counts by kind, and the mutants that kernels and twin do not agree on."""

    kinds: dict[str, Count] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def of(self, kind: str) -> Count:
        return self.kinds.setdefault(kind, Count())

    def sum(self) -> Count:
        counts = self.kinds.values()
        return Count(*(sum(getattr(c, name) for c in counts) for name in Count.__slots__))

    def add(self, other: Tally) -> None:
        for kind, count in other.kinds.items():
            mine = self.of(kind)
            for name in Count.__slots__:
                setattr(mine, name, getattr(mine, name) + getattr(count, name))
        self.faults += other.faults


class Part(Protocol):
    """Compares so many mutants of a seed. Ends at the first that is not the same."""

    def __call__(self, wanted: int, seed: int, *, tell: Callable[[Tally], None] = ...) -> Tally: ...


def _batches(source: Mutants, wanted: int) -> Iterator[tuple[str, list[bytes]]]:
    while wanted > 0:
        kind = source.kind()
        size = min(BATCH, wanted)
        yield kind, [source.make(kind) for _ in range(size)]
        wanted -= size


def run(wanted: int, seed: int, *, tell: Callable[[Tally], None] = lambda _: None) -> Tally:
    """As records."""
    rng, source, tally = random.Random(seed), Mutants(seed), Tally()
    # Each remembers the values that its rules have judged, as the one of a worker does.
    decoders = [(Decoder(), rules) for rules in RULE_SETS]
    for kind, values in _batches(source, wanted):
        decoder, rules = rng.choice(decoders)
        batch = [
            Record(rng.randrange(2), offset, LOG_MS + rng.randrange(100), value)
            for offset, value in enumerate(values)
        ]
        for _ in range(rng.randrange(4)):  # their places may be the same: then the last counts
            plain = rng.choice(source.samples).value
            where = rng.randrange(2), rng.randrange(BATCH, 2 * BATCH)
            batch.insert(rng.randint(0, len(batch)), Record(*where, LOG_MS, plain))
        odd = decoder.odd
        expected = wire.decode(batch, rules)
        if (fault := fault_of(decoder, batch, rules, expected)) is not None:
            tally.faults.append(_narrowed(batch, rules, fault))
            return tally
        count = tally.of(kind)
        count.mutants += len(values)
        count.taken += len(values) - (decoder.odd - odd)
        count.refused += len({(letter.record.partition, letter.record.offset) for letter in expected.dead})
        count.valid += sum(map(_is_valid, values))
        tell(tally)
    return tally


def _narrowed(batch: Sequence[Record], rules: RuleSet, fault: str) -> str:
    """What repeats the fault: one record where one is enough."""
    for one in batch:
        alone = fault_of(Decoder(), [one], rules)
        if alone is not None:
            return f"{alone}\nvalue = bytes.fromhex('{(one.value or b'').hex()}')"
    return f"only as a batch: {fault}\nbatch = {batch!r}"


def run_gather(wanted: int, seed: int, *, tell: Callable[[Tally], None] = lambda _: None) -> Tally:
    """As payloads: those that the twin reads in one group, each of the others alone."""
    rng, source, gatherer, tally = random.Random(seed), Mutants(seed), Gatherer(), Tally()
    whole = [sample.value for sample in source.samples if _is_plain(sample.value)]
    for kind, values in _batches(source, wanted):
        valid = list(map(_is_valid, values))
        readable, group, expected = _by_twin(
            rng, [v for v, sound in zip(values, valid, strict=True) if sound], whole
        )
        odd = gatherer.odd
        if (fault := _table_fault(gatherer, group, expected)) is not None:
            tally.faults.append(_narrowed_group(group, fault))
            return tally
        odd = gatherer.odd - odd
        taken = set(readable)
        for value in values:
            if value not in taken and (fault := gather_fault(gatherer, [kept(1, value)])) is not None:
                tally.faults.append(f"{fault}\nvalue = bytes.fromhex('{value.hex()}')")
                return tally
        count = tally.of(kind)
        count.mutants += len(values)
        count.taken += len(readable) - odd
        count.refused += len(values) - len(readable)
        count.valid += sum(valid)
        tell(tally)
    return tally


def _by_twin(
    rng: random.Random, values: Sequence[bytes], whole: Sequence[bytes]
) -> tuple[Sequence[bytes], list[KeptTrace], tuple[pa.Table, int]]:
    """Those of the values that the twin reads, traces of them, some in two parts, and its table."""
    group = [kept(rng.randrange(99), *rng.choice(((v,), (v, v), (v, rng.choice(whole))))) for v in values]
    group.append(kept(4, *rng.choices(whole, k=2)))
    try:
        return values, group, rows.span_table(group, DECIDED_AT)
    except (DecodeError, IndexError):
        readable = list(filter(_has_rows, values))
        return _by_twin(rng, readable, whole)


def _narrowed_group(group: Sequence[KeptTrace], fault: str) -> str:
    for one in group:
        if (alone := gather_fault(Gatherer(), [one])) is not None:
            return f"{alone}\ntrace = {one!r}"
    return f"only as a group: {fault}\ngroup = {group!r}"


def _is_plain(value: bytes) -> bool:
    gatherer = Gatherer()
    gatherer.span_table([kept(1, value)], DECIDED_AT)
    return gatherer.odd == 0


def _has_rows(value: bytes) -> bool:
    try:
        rows.span_table([kept(1, value)], DECIDED_AT)
    except (DecodeError, IndexError):
        return False
    return True


def _is_valid(value: bytes) -> bool:
    try:
        TracesData.FromString(value)
    except DecodeError:
        return False
    return True


PARTS: dict[str, Part] = {"decode": run, "gather": run_gather}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bin/fuzz", description="Compares the compiled kernels with their twin."
    )
    parser.add_argument(
        "--mutants", type=int, default=100_000, help="changed records to try on each part (default: 100000)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.SystemRandom().randrange(2**32),
        help=f"of the first {SHARD}, the next have the next; repeats or continues a run",
    )
    parser.add_argument("--part", choices=PARTS, help="one part alone (default: both)")
    options = parser.parse_args()
    wanted = [options.part] if options.part else list(PARTS)
    held = [_holds(part, options.mutants, options.seed) for part in wanted]
    return 0 if all(held) else 1


def _holds(part: str, wanted: int, first_seed: int) -> bool:
    """Shard after shard; also after one that differed, as the next may differ elsewhere."""
    began = told = time.monotonic()
    whole, seed = Tally(), first_seed

    def tell(shard: Tally) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_SECS:
            told = time.monotonic()
            rate = _rate(whole.sum().mutants + shard.sum().mutants, told - began)
            print(f"{part}: seed {seed}, {rate}", flush=True)

    for done in range(0, wanted, SHARD):
        seed = first_seed + done // SHARD
        shard = PARTS[part](min(SHARD, wanted - done), seed, tell=tell)
        for fault in shard.faults:
            print(f"{part}: kernels and twin differ (seed {seed}): {fault}", file=sys.stderr, flush=True)
        whole.add(shard)
        if len(whole.faults) == FAULTS_MAX:
            break
    print(_table(whole))
    verdict = f"{len(whole.faults)} shards DIFFER" if whole.faults else "all the same"
    rate = _rate(whole.sum().mutants, time.monotonic() - began)
    print(f"{part}: seeds {first_seed} to {seed}, {rate}: {verdict}", flush=True)
    return not whole.faults


def _rate(mutants: int, secs: float) -> str:
    return f"{mutants} mutants in {secs:.0f} s, {mutants / max(secs, 1e-3):.0f} a second"


def _table(tally: Tally) -> str:
    """A line for each kind of mutants."""
    lines = [f"{'kind':14}{'mutants':>10}{'taken in':>10}{'refused':>10}{'valid':>10}"]
    for kind, c in [*sorted(tally.kinds.items()), ("all", tally.sum())]:
        shares = "".join(f"{100 * n / max(c.mutants, 1):>9.0f}%" for n in (c.taken, c.refused, c.valid))
        lines.append(f"{kind:14}{c.mutants:>10}{shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
