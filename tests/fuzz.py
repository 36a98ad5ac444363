"""Damaged and odd records by the million, to see the kernels say what their slow twin says.

`bin/fuzz --mutants N` runs for as long as that takes; the tests run a few thousand. Damage is of two sorts: bytes are
cut, flipped, left out, put in, or taken from another record; or the record is taken apart along the official schema
and one field of it changed in a way that protobuf allows, or just not. Mutants go in batches with whole records
between them, so that the joining of both paths is tried as well.

The table of spans is tried on the same mutants, as payloads.

`bin/fuzz` has numba check every index. Loads and copies, which it cannot see, are checked always.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from tests.bench import generate
from tests.builders import (
    LOG_MS,
    nested,
    record,
    resource_spans,
    scope_spans,
    span,
    trace,
    trace_id,
    traces_data,
    varint,
)
from tss import rows, wire
from tss.gather import Gatherer
from tss.kernels import Decoder
from tss.model import Record, Trigger, Verdict
from tss.rows import Cut, KeptTrace
from tss.rules import ForceRule, RuleSet
from tss.wire import Decoded

BARE = 4  # the number of the sample that is a ResourceSpans
BATCH = 16  # mutants decoded together
PROGRESS_SECS = 30


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
    if type(one.chunks.buffer) is not bytes or one.chunks.buffer != other.chunks.buffer:
        return "buffer"
    return None


def fault_of(decoder: Decoder, records: Sequence[Record], rules: RuleSet) -> str | None:
    """How kernels and twin disagree on this batch."""
    return difference(decoder.decode(records, rules), wire.decode(records, rules))


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
        expected, repeated = rows.span_table(traces, DECIDED_AT)
    except (DecodeError, IndexError) as fault:
        try:
            gatherer.span_table(traces, DECIDED_AT)
        except type(fault):
            return None
        return f"the twin raises {fault!r}"
    table, found = gatherer.span_table(traces, DECIDED_AT)
    table.validate(full=True)
    if table.equals(expected) and found == repeated:
        return None
    columns = [name for name in expected.schema.names if not table[name].equals(expected[name])]
    told = [f"{name}: {table[name].to_pylist()} and {expected[name].to_pylist()}" for name in columns[:1]]
    return "; ".join(
        [*told, f"repeated: {found} and {repeated}", f"rows: {table.num_rows} and {expected.num_rows}"]
    )


# --- mutants -----------------------------------------------------------------------------------------------------


def samples(seed: int = 1) -> list[bytes]:
    """Whole records to damage: plain ones, and ones with all that OTLP allows."""
    generated = [r.value or b"" for r in generate.records("A", 200, seed=seed)]
    rich = traces_data(
        resource_spans(
            scope_spans(
                span(1, 1, attrs={"k": 5, "http.route": "/slow", "b": b"\xff", "f": 2.5, "n": None}),
                span(1, 2, attrs={"k": "äöü €𝄞", "list": [1, True, {"deep": nested(4)}], "": "empty key"}),
                span(2, 3, trace_state="a=b,ot=rv:0000000000000f;th:8", attrs={"k": True}),
                span(1, 4, trace_state="ot=rv:ffffffffffffff", parent=1, error=True),
                schema_url="https://s",
            ),
            scope_spans(
                span(2, 5, events=[Span.Event(name="e", time_unix_nano=7)], flags=257),
                span(3, 6, links=[Span.Link(trace_id=bytes(range(16)), span_id=bytes(range(8)))]),
            ),
            resource={"list": [1, 2.5, {"k": b"\0"}], "host": "a"},
            schema_url="https://r",
        ),
        resource_spans(
            span(1, 7, dropped_events_count=2**32 - 1, end_time_unix_nano=2**64 - 1), service="cart"
        ),
        resource_spans(span(4, 8, start_time_unix_nano=0, span_id=b""), service=None),
    )
    bare = resource_spans(*trace(5), service="cart", schema_url="https://r")
    made = [traces_data(*trace(1)), traces_data(*trace(2, 1)), rich, rich, bare]
    small = [value for value in generated if len(value) < 5000]
    return [message.SerializeToString() for message in made] + small


def mutants(rng: random.Random, whole: Sequence[bytes]) -> Iterator[bytes]:
    """Endless. Most are damaged once, so that much of them stays what it was."""
    while True:
        number = rng.randrange(len(whole))
        value = whole[number]
        if number != BARE and rng.random() < 0.6:
            value = _with_oddities(rng, value)
        else:
            value = rng.choice(DAMAGE)(rng, value, rng.choice(whole))
        while rng.random() < 0.2:
            value = rng.choice(DAMAGE)(rng, value, rng.choice(whole))
        yield value


def _cut(rng: random.Random, value: bytes, _: bytes) -> bytes:
    return value[: rng.randint(0, len(value))]


def _flip(rng: random.Random, value: bytes, _: bytes) -> bytes:
    out = bytearray(value)
    for _bit in range(rng.choice((1, 1, 2, 5))):
        if out:
            out[rng.randrange(len(out))] ^= rng.choice((1 << rng.randrange(8), rng.randint(1, 255)))
    return bytes(out)


def _delete(rng: random.Random, value: bytes, _: bytes) -> bytes:
    at = rng.randint(0, len(value))
    return value[:at] + value[at + rng.randint(1, 8) :]


def _insert(rng: random.Random, value: bytes, _: bytes) -> bytes:
    at = rng.randint(0, len(value))
    return value[:at] + rng.randbytes(rng.randint(1, 8)) + value[at:]


def _splice(rng: random.Random, value: bytes, other: bytes) -> bytes:
    return value[: rng.randint(0, len(value))] + other[rng.randint(0, len(other)) :]


def _append(_: random.Random, value: bytes, other: bytes) -> bytes:
    return value + other


Damage = Callable[[random.Random, bytes, bytes], bytes]
DAMAGE: tuple[Damage, ...] = (_cut, _flip, _flip, _flip, _delete, _insert, _splice, _append)


# --- mutants along the schema ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Field:
    """One field on the wire; `head` and `size` are what stands before its value, as bytes that may be odd."""

    head: bytes
    size: bytes | None  # None: taken from the value
    value: bytes | list[Field]
    kind: FieldDescriptor | None

    def encode(self) -> bytes:
        value = self.value if isinstance(self.value, bytes) else b"".join(f.encode() for f in self.value)
        if self.head and self.head[0] & 7 == 2:
            return self.head + (varint(len(value)) if self.size is None else self.size) + value
        return self.head + value


def _parse(value: bytes, message: Descriptor) -> list[Field] | None:
    """The fields of a message, those of the messages in it below; None when it is not plain."""
    fields: list[Field] = []
    by_number = {f.number: f for f in message.fields}
    at = 0
    try:
        while at < len(value):
            begin = at
            tag, at = _read_varint(value, at)
            head, kind = value[begin:at], by_number.get(tag >> 3)
            match tag & 7:
                case 0:
                    _, end = _read_varint(value, at)
                case 1 | 5:
                    end = at + (8 if tag & 7 == 1 else 4)
                case 2:
                    size, at = _read_varint(value, at)
                    end = at + size
                case _:
                    return None
            content: bytes | list[Field] = value[at:end]
            if kind is not None and kind.message_type is not None and tag & 7 == 2:
                content = _parse(value[at:end], kind.message_type) or b""
            fields.append(Field(head, None, content, kind))
            at = end
    except IndexError:
        return None
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _with_oddities(rng: random.Random, value: bytes) -> bytes:
    tree = _parse(value, TracesData.DESCRIPTOR)
    assert tree is not None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        fields = tree
        below = [f for f in fields if isinstance(f.value, list)]
        while below and rng.random() < 0.85:
            chosen = rng.choice(below).value
            assert isinstance(chosen, list)
            fields = chosen
            below = [f for f in fields if isinstance(f.value, list)]
        rng.choice(ODDITIES)(rng, fields)
    return b"".join(field.encode() for field in tree)


def _repeat(rng: random.Random, fields: list[Field]) -> None:
    if fields:
        fields.insert(rng.randint(0, len(fields)), rng.choice(fields))


def _leave_out(rng: random.Random, fields: list[Field]) -> None:
    if fields:
        del fields[rng.randrange(len(fields))]


def _shuffle(rng: random.Random, fields: list[Field]) -> None:
    rng.shuffle(fields)


def _empty(rng: random.Random, fields: list[Field]) -> None:
    """An empty value, or a part of it: a short id, a split message."""
    if fields:
        old = rng.choice(fields)
        value = old.value if isinstance(old.value, bytes) else b""
        fields[fields.index(old)] = Field(old.head, None, value[: rng.choice((0, 0, 1, 7))], old.kind)


def _unknown(rng: random.Random, fields: list[Field]) -> None:
    number = rng.choice((4, 15, 16, 17, 19, 100, 1000, 2047, 2048, 50_000, 2**29 - 1))
    wire_type, value = rng.choice(
        ((0, b"\1"), (0, b"\xff" * 9 + b"\1"), (1, b"\xff" * 8), (2, rng.randbytes(9)), (5, b"\xff" * 4))
    )
    fields.insert(rng.randint(0, len(fields)), Field(varint(number << 3 | wire_type), None, value, None))


def _group(rng: random.Random, fields: list[Field]) -> None:
    number = rng.randint(1, 20)
    end = number if rng.random() < 0.7 else number + 1
    group = varint(number << 3 | 3) + rng.choice((b"", b"\x08\1")) + varint(end << 3 | 4)
    fields.insert(rng.randint(0, len(fields)), Field(b"", None, group, None))


def _other_type(rng: random.Random, fields: list[Field]) -> None:
    """A known field with another wire type, or number 0."""
    number = rng.randint(0, 16)
    wire_type, value = rng.choice(
        ((0, b"\1"), (1, bytes(8)), (2, b"\1\1"), (5, bytes(4)), (6, b""), (7, b""))
    )
    fields.insert(rng.randint(0, len(fields)), Field(varint(number << 3 | wire_type), None, value, None))


def _long_number(rng: random.Random, fields: list[Field]) -> None:
    """A tag, a size or a value longer than it need be, or huge."""
    if not fields:
        return
    old = rng.choice(fields)
    number, _ = _read_varint(old.head, 0) if old.head else (8, 0)
    size = len(old.encode()) - len(old.head)
    odd = Field(old.head, old.size, old.value, old.kind)
    match rng.randrange(4):
        case 0:
            odd.head = _padded(number, rng.randint(1, 6))
        case 1 if number & 7 == 2:
            odd.size = _padded(size - 1, rng.randint(1, 6))
        case 2 if number & 7 == 2:
            odd.size = rng.choice((b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\1"))
        case _ if number & 7 == 0:
            odd.value = rng.choice(
                (b"\xff" * 9 + b"\1", b"\xff" * 9 + b"\2", b"\xff" * 10 + b"\1", b"\x82\x80\0")
            )
        case _:
            return
    fields[fields.index(old)] = odd


def _padded(number: int, more: int) -> bytes:
    out = bytearray(varint(number))
    out[-1] |= 0x80
    return bytes(out) + b"\x80" * (more - 1) + b"\0"


TEXTS = (
    *(
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf0\x8f\xbf\xbf",
        b"\xe0\x9f\xbf",
        b"\xff",
        b"\xc3",
    ),
    *(
        "äöü".encode(),
        "€".encode(),
        "𝄞".encode(),
        b"\xed\x9f\xbf",
        b"\xf4\x8f\xbf\xbf",
        b"\0",
        b"",
        b"\xe2\x82",
    ),
)


def _text(rng: random.Random, fields: list[Field]) -> None:
    texts = [f for f in fields if f.kind is not None and f.kind.type == FieldDescriptor.TYPE_STRING]
    if texts:
        old = rng.choice(texts)
        value = b"x" * rng.randint(0, 17) + rng.choice(TEXTS) + b"y" * rng.randint(0, 17)
        fields[fields.index(old)] = Field(old.head, None, value, old.kind)


def _deep(rng: random.Random, fields: list[Field]) -> None:
    """Lists in lists, around the depth at which the official class gives up."""
    values = [
        f for f in fields if f.kind is not None and f.kind.name == "value" and f.kind.message_type is not None
    ]
    if values:
        old = rng.choice(values)
        value = b""
        for _ in range(rng.choice((1, 20, 29, 30, 31, 45, 46, 47, 48, 60))):
            inner = b"\x0a" + varint(len(value)) + value
            value = b"\x2a" + varint(len(inner)) + inner
        fields[fields.index(old)] = Field(old.head, None, value, old.kind)


Oddity = Callable[[random.Random, list[Field]], None]
ODDITIES: tuple[Oddity, ...] = (
    *(_repeat, _leave_out, _shuffle, _empty, _unknown, _group, _other_type, _long_number, _text, _deep),
)


# --- running -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    mutants: int = 0
    odd: int = 0  # those that the kernels left to the twin
    valid: int = 0  # those that the official class can read


def run(mutants_wanted: int, seed: int, *, tell: Callable[[Tally], None] = lambda _: None) -> Tally:
    """Compares that many mutants. Raises AssertionError with what repeats the first that is not the same."""
    rng = random.Random(seed)
    decoder = Decoder()
    tally = Tally()
    whole = samples(seed)
    stream = mutants(rng, whole)
    while tally.mutants < mutants_wanted:
        size = min(BATCH, mutants_wanted - tally.mutants)
        values = [next(stream) for _ in range(size)]
        rules = RULES if rng.random() < 0.8 else RuleSet()
        batch = [
            record(value=v, partition=rng.randrange(2), offset=i, timestamp_ms=LOG_MS + rng.randrange(100))
            for i, v in enumerate(values)
        ]
        for _ in range(rng.randrange(4)):
            plain = record(value=whole[0], partition=rng.randrange(2), offset=rng.randrange(99))
            batch.insert(rng.randint(0, len(batch)), plain)
        _compare(decoder, batch, rules)
        tally.mutants += size
        tally.odd = decoder.odd
        tally.valid += sum(map(_is_valid, values))
        tell(tally)
    return tally


def _compare(decoder: Decoder, batch: Sequence[Record], rules: RuleSet) -> None:
    fault = fault_of(decoder, batch, rules)
    if fault is None:
        return
    for one in batch:
        alone = fault_of(Decoder(), [one], rules)
        if alone is not None:
            raise AssertionError(f"{alone}\nvalue = bytes.fromhex('{(one.value or b'').hex()}')")
    raise AssertionError(f"only as a batch: {fault}\nbatch = {batch!r}")


def run_gather(mutants_wanted: int, seed: int, *, tell: Callable[[Tally], None] = lambda _: None) -> Tally:
    """The same for the table of spans: mutants are payloads, in groups of which one may be cut off."""
    rng = random.Random(seed)
    gatherer = Gatherer()
    tally = Tally()
    whole = samples(seed)
    stream = mutants(rng, whole)
    while tally.mutants < mutants_wanted:
        values = [next(stream) for _ in range(min(BATCH, mutants_wanted - tally.mutants))]
        readable = []
        for value in values:
            if _has_rows(value):
                readable.append(value)
            elif (fault := gather_fault(gatherer, [kept(1, value)])) is not None:
                raise AssertionError(f"{fault}\nvalue = bytes.fromhex('{value.hex()}')")
        group = [kept(rng.randrange(9), value, rng.choice((value, whole[0]))) for value in readable]
        group.append(kept(4, whole[0], whole[2]))
        odd = gatherer.odd
        if (fault := gather_fault(gatherer, group)) is not None:
            raise AssertionError(f"{fault}\ngroup = {group!r}")
        tally.mutants += len(values)
        tally.odd += gatherer.odd - odd
        tally.valid += len(readable)
        tell(tally)
    return tally


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bin/fuzz", description="Compares the compiled kernels with their twin."
    )
    parser.add_argument(
        "--mutants", type=int, default=100_000, help="damaged records to try on each part (default: 100000)"
    )
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(2**32), help="repeats a run"
    )
    parser.add_argument("--part", choices=PARTS, help="one part alone (default: both)")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    wanted = [options.part] if options.part else list(PARTS)
    return 0 if all(_holds(part, options.mutants, options.seed) for part in wanted) else 1


def _holds(part: str, mutants_wanted: int, seed: int) -> bool:
    started = told = time.monotonic()

    def tell(tally: Tally) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_SECS:
            told = time.monotonic()
            print(_describe(part, tally, told - started), flush=True)

    try:
        tally = PARTS[part](mutants_wanted, seed, tell=tell)
    except (AssertionError, IndexError) as fault:
        print(f"{part}: kernels and twin differ (seed {seed}): {fault}", file=sys.stderr)
        return False
    print(_describe(part, tally, time.monotonic() - started) + ": all the same")
    return True


PARTS: dict[str, Callable[..., Tally]] = {"decode": run, "gather": run_gather}


def _describe(part: str, tally: Tally, secs: float) -> str:
    return (
        f"{part}: {tally.mutants} mutants in {secs:.0f} s, {tally.valid} readable by the official class, "
        f"{tally.odd} left to the twin"
    )


if __name__ == "__main__":
    sys.exit(main())
