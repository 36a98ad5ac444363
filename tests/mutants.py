"""Records changed at random, for whoever wants to see that two readers of OTLP agree on all of them.

A mutant is a whole record with one change, now and then a second. Three sorts of change:

    sound     what any SDK might have sent as well: another value, key, number, id, order, part of another record
    odd       what protobuf allows, or just not: fields that are repeated, missing, unknown, of another type, groups,
              numbers longer than they need be, texts that are no UTF-8, lists in lists
    damaged   bytes cut, flipped, left out, put in, or taken from another record

Half of all are sound: a reader that refuses what is odd must be tried on what it takes in. Records are small, one to
three spans, as what is wrong with a large one can be wrong with a small one; now and then one is large.

Records that are read together must not hide each other's faults: an error that is missed in one would be found in
another of the same trace. So most mutants have traces of their own; the others share theirs.

A record is parsed once, along the official schema, into a tree that is never changed: a change copies the path to its
place, and all other parts keep the bytes they came with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span, TracesData

from tests.bench import generate
from tests.builders import (
    any_value,
    framed,
    nested,
    resource_spans,
    scope_spans,
    span,
    span_id,
    trace,
    trace_id,
    traces_data,
    varint,
)
from tss.model import TRACE_ID_BYTES

GENERATED_SPANS = 800
SMALL_BYTES_MAX = 1500
LARGE = 4  # whole traces of some 5 spans
LARGE_SHARE = 1 / 64
MARK = b"\xb7trace mark\xb7"  # how all trace ids of samples begin, so that a mutant can be given its own
OWN_SHARE = 0.8  # of the mutants that are
MORE_SHARE = 0.1  # of the mutants that are changed once more
DEEPER_SHARE = 0.85  # of the steps down from a message that has messages in it


# --- records as trees --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Field:
    """One field on the wire; `head` and `size` are what stands before its value, as bytes that may be odd."""

    head: bytes
    size: bytes | None  # None: taken from the value
    value: bytes | list[Field]
    kind: FieldDescriptor | None
    raw: bytes | None = None  # all of it as it came

    def encode(self) -> bytes:
        if self.raw is not None:
            return self.raw
        value = self.value if isinstance(self.value, bytes) else encode(self.value)
        if self.head and self.head[0] & 7 == 2:
            return self.head + (varint(len(value)) if self.size is None else self.size) + value
        return self.head + value


Fields: TypeAlias = list[Field]
Path: TypeAlias = tuple[int, ...]  # of positions, from the record down to a message in it


def encode(fields: Fields) -> bytes:
    return b"".join([field.encode() for field in fields])


def parse(value: bytes, message: Descriptor) -> Fields:
    """The fields of a sound message, those of the messages in it below."""
    fields: Fields = []
    by_number = {f.number: f for f in message.fields}
    at = 0
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
                raise ValueError(f"tag {tag} at {begin}")
        content: bytes | Fields = value[at:end]
        if kind is not None and kind.message_type is not None:
            content = parse(value[at:end], kind.message_type)
        fields.append(Field(head, None, content, kind, value[begin:end]))
        at = end
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


class Sample:
    """A whole record: its bytes, its tree, and where in it the messages of each type are."""

    def __init__(self, value: bytes, message: Descriptor) -> None:
        self.value = value
        self.type = message.name
        self.tree = parse(value, message)
        self.places: dict[str, list[Path]] = {}
        self._note(self.tree, message.name, ())

    def _note(self, fields: Fields, type_name: str, path: Path) -> None:
        self.places.setdefault(type_name, []).append(path)
        for i, field in enumerate(fields):
            if isinstance(field.value, list):
                self._note(field.value, _type_name(field), (*path, i))

    def message(self, path: Path) -> Fields:
        fields = self.tree
        for i in path:
            inner = fields[i].value
            assert isinstance(inner, list)
            fields = inner
        return fields


def _type_name(field: Field) -> str:
    assert field.kind is not None
    assert field.kind.message_type is not None
    return field.kind.message_type.name


def _opened(fields: Fields, i: int) -> Fields:
    """A copy of the message at `i`, put in place of the original."""
    old = fields[i]
    assert isinstance(old.value, list)
    inner = list(old.value)
    fields[i] = Field(old.head, old.size, inner, old.kind)
    return inner


# --- whole records -----------------------------------------------------------------------------------------------


def samples(seed: int = 1) -> list[Sample]:
    """Plain records, and ones with all that OTLP allows: small ones first, then the large."""
    rng = random.Random(seed)
    generated = [
        TracesData.FromString(r.value or b"") for r in generate.records("A", GENERATED_SPANS, seed=seed)
    ]
    whole = list(map(_marked, generated))
    made = [_marked(data) for data in [*map(_rich, range(len(RICH))), *_small(rng, generated)]]
    large = sorted(whole, key=len)[:LARGE]
    bare = traces_data(resource_spans(*trace(5, 2), service="cart", schema_url="https://r"))
    _marked(bare)
    return [
        Sample(bare.resource_spans[0].SerializeToString(), ResourceSpans.DESCRIPTOR),
        *(Sample(value, TracesData.DESCRIPTOR) for value in [_looks_like_json(), *made, *large]),
    ]


# Spans with something that others have not; `_rich` makes records of one or two of them.
RICH: tuple[Span, ...] = (
    span(1, 1, attrs={"k": 5, "http.route": "/slow", "b": b"\xff", "f": 2.5, "n": None}),
    span(1, 2, attrs={"k": "äöü €𝄞", "list": [1, True, {"deep": nested(4)}], "": "empty key"}),
    span(2, 3, trace_state="a=b,ot=rv:0000000000000f;th:8", attrs={"k": True, "http.method": "GET"}),
    span(1, 4, trace_state="ot=rv:ffffffffffffff", parent=1, error=True),
    span(2, 5, events=[Span.Event(name="e", time_unix_nano=7)], flags=257),
    span(3, 6, links=[Span.Link(trace_id=bytes(range(16)), span_id=bytes(range(8)))]),
    span(1, 7, dropped_events_count=2**32 - 1, end_time_unix_nano=2**64 - 1),
    span(4, 8, start_time_unix_nano=0, attrs={"k": [0.5, b"\0", None], "http.response.status_code": 504}),
)


def _rich(number: int) -> TracesData:
    one, other = RICH[number], RICH[(number + 1) % len(RICH)]
    match number % 4:
        case 0:
            return traces_data(one)
        case 1:
            return traces_data(resource_spans(one, other, resource={"list": [1, 2.5, {"k": b"\0"}]}))
        case 2:
            scopes = scope_spans(one, schema_url="https://s"), scope_spans(other, scope="")
            return traces_data(resource_spans(*scopes, service=None, schema_url="https://r"))
        case _:
            return traces_data(resource_spans(one, service="cart"), resource_spans(other, service=None))


def _small(rng: random.Random, generated: Iterable[TracesData]) -> Iterator[TracesData]:
    """The first spans of each, and some of their attributes."""
    for data in generated:
        resource = data.resource_spans[0]
        scope = resource.scope_spans[0]
        del data.resource_spans[1:], resource.scope_spans[1:], resource.resource.attributes[3:]
        del scope.spans[rng.choice((1, 1, 1, 2, 3)) :]
        for one in scope.spans:
            del one.attributes[rng.choice((1, 3, 6)) :]
        yield data


def _marked(data: TracesData) -> bytes:
    """Encoded, after all trace ids have got the mark."""
    for resource in data.resource_spans:
        for scope in resource.scope_spans:
            for one in scope.spans:
                one.trace_id = _mark(one.trace_id)
    return data.SerializeToString()


def _mark(trace_id: bytes) -> bytes:
    return MARK + trace_id[len(MARK) - TRACE_ID_BYTES :]


def _looks_like_json() -> bytes:
    """A `TracesData` that begins with a newline and a brace: the first tag, and a length of 123."""
    inner = framed(15, b"unknown") + resource_spans(span(trace_id=_mark(b"json"))).SerializeToString()
    return framed(1, inner + framed(4, b"x" * (ord("{") - len(inner) - 2)))


# --- sound changes -----------------------------------------------------------------------------------------------

KEYS = (
    *("k", "http.route", "http.response.status_code", "server.port", "never", "service.name"),
    *("http.status_code", "db.system", "exception.type", "list", "", "K", "kk", "é" * 9, "x" * 300),
)
VALUES = tuple(
    any_value(value).SerializeToString()
    for value in (
        *("", "5", "five", "äöü", "[x]", "/a/items", "/cart", "/slow", "cart", "shop", "y" * 200),
        *(0, 1, 3, 4, 5, 8, 9, 443, 500, 1024, -1, 2**63 - 1, -(2**63)),
        *(5.0, 0.1, -0.0, 1e22, 1e-7, 5e-324, float("nan"), float("inf"), -float("inf")),
        *(True, False, None, b"", b"5", b"\0\xff", [], {}, [5], ["five", 1, 2.5, None, True, b"b"]),
        *({"a": 1, "b": {"c": []}}, [[], [[]]], {"": ""}, nested(5), ["€", '"\\\n\x7f']),
    )
)
STATES = (
    *(b"", b"a=b", b"rv:", b"ot=rv:", b"ot=rv:00000000000001", b"ot=th:8;rv:8000000000000f", b"ot=th:0"),
    *(b"a=b,ot=th:c;rv:ABCDEFabcdef01", b"ot=rv:0000000000000g", b"ot=rv:1,ot=rv:00000000000002"),
    *(b"ot=th:ffffffffffffff", b"ot=th:", b"ot=x:1;th:4", b"otx=rv:00000000000001", " ot=th:8,ü".encode()),
)
NUMBERS = (  # with such as are an error or a kind only in their low 32 bits
    *(0, 1, 2, 3, 5, 6, 127, 128, 257, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
    *(2**32 + 2, 2**63 + 2, 2**40 + 3),
)
SOUND_TEXTS = (
    b"",
    b"x",
    b"\0",
    "äöü".encode(),
    "€".encode(),
    "𝄞".encode(),
    b"\xed\x9f\xbf",
    b"\xf4\x8f\xbf\xbf",
)
EVERYWHERE: tuple[str, ...] = ()


def _set(fields: Fields, number: int, value: bytes) -> None:
    """A delimited field in place of the first of that number, or behind all."""
    head = varint(number << 3 | 2)
    old = next((i for i, f in enumerate(fields) if f.head == head), len(fields))
    kind = fields[old].kind if old < len(fields) else None
    fields[old : old + 1] = [Field(head, None, value, kind)]


def value(rng: random.Random, fields: Fields, _: Fields) -> None:
    _set(fields, 2, rng.choice(VALUES))


def key(rng: random.Random, fields: Fields, _: Fields) -> None:
    _set(fields, 1, rng.choice(KEYS).encode())


def number(rng: random.Random, fields: Fields, _: Fields) -> None:
    """Of times, kinds, codes, counts, flags: those at hand."""
    numbers = [i for i, f in enumerate(fields) if f.kind is not None and f.head[0] & 7 != 2]
    if numbers:
        i = rng.choice(numbers)
        old, new = fields[i], rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(64)
        width = {0: 0, 1: 8, 5: 4}[old.head[0] & 7]
        encoded = (new & (1 << 8 * width) - 1).to_bytes(width, "little") if width else varint(new)
        fields[i] = Field(old.head, None, encoded, old.kind)


def ids(rng: random.Random, fields: Fields, _: Fields) -> None:
    which = rng.choice((1, 2, 4))
    if which == 1:
        _set(fields, 1, rng.choice((_mark(trace_id(1)), _mark(trace_id(2)), rng.randbytes(16), bytes(16))))
    elif which == 2:
        _set(fields, 2, rng.choice((span_id(1), span_id(2), rng.randbytes(8), bytes(8))))
    else:
        _set(fields, 4, rng.choice((b"", bytes(8), bytes(3), span_id(1), bytes(7) + b"\1", rng.randbytes(8))))


def state(rng: random.Random, fields: Fields, _: Fields) -> None:
    """Another, or a second one: the last counts."""
    if rng.random() < 0.7:
        _set(fields, 3, rng.choice(STATES))
    else:
        fields.append(Field(b"\x1a", None, rng.choice(STATES), None))


def text(rng: random.Random, fields: Fields, _: Fields) -> None:
    _change_text(rng, fields, rng.choice(SOUND_TEXTS))


def _change_text(rng: random.Random, fields: Fields, middle: bytes) -> None:
    texts = [
        i for i, f in enumerate(fields) if f.kind is not None and f.kind.type == FieldDescriptor.TYPE_STRING
    ]
    if texts:
        i = rng.choice(texts)
        new = b"x" * rng.randint(0, 17) + middle + b"y" * rng.randint(0, 17)
        fields[i] = Field(fields[i].head, None, new, fields[i].kind)


def attribute(rng: random.Random, fields: Fields, _: Fields) -> None:
    """One more, in its place or out of it."""
    pair = framed(1, rng.choice(KEYS).encode()) + framed(2, rng.choice(VALUES))
    at = rng.choice((len(fields), rng.randint(0, len(fields))))
    fields.insert(at, Field(b"\x4a", None, pair, None))


def graft(_: random.Random, fields: Fields, other: Fields) -> None:
    """Becomes the same message of another record."""
    fields[:] = other


def join(_: random.Random, fields: Fields, other: Fields) -> None:
    """Gets all spans of another record, too."""
    fields += other


def repeat(rng: random.Random, fields: Fields, _: Fields) -> None:
    if fields:
        fields.insert(rng.randint(0, len(fields)), rng.choice(fields))


def shuffle(rng: random.Random, fields: Fields, _: Fields) -> None:
    rng.shuffle(fields)


# --- odd changes -------------------------------------------------------------------------------------------------


def merge(rng: random.Random, fields: Fields, other: Fields) -> None:
    """Some fields of another such message come in between: of most, the last counts."""
    for _field in range(rng.choice((1, 1, 3))):
        if other:
            fields.insert(rng.randint(0, len(fields)), rng.choice(other))


def leave_out(rng: random.Random, fields: Fields, _: Fields) -> None:
    if fields:
        del fields[rng.randrange(len(fields))]


def empty(rng: random.Random, fields: Fields, _: Fields) -> None:
    """An empty value, or a part of it: a short id, a split message."""
    if fields:
        i = rng.randrange(len(fields))
        old = fields[i]
        content = old.value if isinstance(old.value, bytes) else b""
        fields[i] = Field(old.head, None, content[: rng.choice((0, 0, 1, 7))], old.kind)


def unknown(rng: random.Random, fields: Fields, _: Fields) -> None:
    number = rng.choice((4, 15, 16, 17, 19, 100, 1000, 2047, 2048, 50_000, 2**29 - 1))
    wire_type, content = rng.choice(
        ((0, b"\1"), (0, b"\xff" * 9 + b"\1"), (1, b"\xff" * 8), (2, rng.randbytes(9)), (5, b"\xff" * 4))
    )
    fields.insert(rng.randint(0, len(fields)), Field(varint(number << 3 | wire_type), None, content, None))


def group(rng: random.Random, fields: Fields, _: Fields) -> None:
    number = rng.randint(1, 20)
    end = number if rng.random() < 0.7 else number + 1
    content = varint(number << 3 | 3) + rng.choice((b"", b"\x08\1")) + varint(end << 3 | 4)
    fields.insert(rng.randint(0, len(fields)), Field(b"", None, content, None))


def other_type(rng: random.Random, fields: Fields, _: Fields) -> None:
    """A known field with another wire type, or number 0."""
    number = rng.randint(0, 16)
    wire_type, content = rng.choice(
        ((0, b"\1"), (1, bytes(8)), (2, b"\1\1"), (5, bytes(4)), (6, b""), (7, b""))
    )
    fields.insert(rng.randint(0, len(fields)), Field(varint(number << 3 | wire_type), None, content, None))


def long_number(rng: random.Random, fields: Fields, _: Fields) -> None:
    """A tag, a size or a value longer than it need be, or huge."""
    if not fields:
        return
    i = rng.randrange(len(fields))
    old = fields[i]
    number, _at = _read_varint(old.head, 0) if old.head else (8, 0)
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
    fields[i] = odd


def _padded(number: int, more: int) -> bytes:
    out = bytearray(varint(number))
    out[-1] |= 0x80
    return bytes(out) + b"\x80" * (more - 1) + b"\0"


BAD_TEXTS = (
    *(b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xe0\x9f\xbf"),
    *(b"\xff", b"\xc3", b"\xe2\x82"),
)


def bad_text(rng: random.Random, fields: Fields, _: Fields) -> None:
    _change_text(rng, fields, rng.choice(BAD_TEXTS))


def deep(rng: random.Random, fields: Fields, _: Fields) -> None:
    """Lists in lists, around the depth at which the official class gives up."""
    content = b""
    for _level in range(rng.choice((1, 20, 29, 30, 31, 45, 46, 47, 48, 60))):
        inner = b"\x0a" + varint(len(content)) + content
        content = b"\x2a" + varint(len(inner)) + inner
    _set(fields, 2, content)


# --- damage ------------------------------------------------------------------------------------------------------


def cut(rng: random.Random, value: bytes, _: bytes) -> bytes:
    return value[: rng.randint(0, len(value))]


def flip(rng: random.Random, value: bytes, _: bytes) -> bytes:
    out = bytearray(value)
    for _bit in range(rng.choice((1, 1, 2, 5))):
        if out:
            out[rng.randrange(len(out))] ^= rng.choice((1 << rng.randrange(8), rng.randint(1, 255)))
    return bytes(out)


def delete(rng: random.Random, value: bytes, _: bytes) -> bytes:
    at = rng.randint(0, len(value))
    return value[:at] + value[at + rng.randint(1, 8) :]


def insert(rng: random.Random, value: bytes, _: bytes) -> bytes:
    at = rng.randint(0, len(value))
    return value[:at] + rng.randbytes(rng.randint(1, 8)) + value[at:]


def splice(rng: random.Random, value: bytes, other: bytes) -> bytes:
    return value[: rng.randint(0, len(value))] + other[rng.randint(0, len(other)) :]


def append(_: random.Random, value: bytes, other: bytes) -> bytes:
    return value + other


def json_brace(rng: random.Random, value: bytes, _: bytes) -> bytes:
    """What begins as JSON does, or nearly."""
    blanks = bytes(rng.choices(b" \n\t\r", k=rng.randint(0, 3)))
    return blanks + b"{" + rng.choice((b"", b" ", b"}", b'"', b'"\x01', b'"resourceSpans":[]}')) + value


# --- mutants -----------------------------------------------------------------------------------------------------

Change: TypeAlias = Callable[[random.Random, Fields, Fields], None]
Damage: TypeAlias = Callable[[random.Random, bytes, bytes], bytes]

# Each with the types of message in which it makes sense; none given: in any.
SOUND: tuple[tuple[Change, tuple[str, ...]], ...] = (
    (value, ("KeyValue",)),
    (key, ("KeyValue",)),
    (number, ("Span", "Status", "Event", "Link")),
    (ids, ("Span",)),
    (state, ("Span",)),
    (text, ("Span", "KeyValue", "AnyValue", "InstrumentationScope", "ScopeSpans", "Event", "Status")),
    (attribute, ("Span",)),
    (graft, ("Span", "KeyValue", "AnyValue", "Resource", "InstrumentationScope", "ScopeSpans")),
    (join, ("TracesData", "ScopeSpans")),
    (shuffle, ("Span", "ScopeSpans", "ResourceSpans", "KeyValue")),
)
ODD: tuple[tuple[Change, tuple[str, ...]], ...] = (
    *((change, EVERYWHERE) for change in (repeat, merge, leave_out, empty, unknown)),
    *((change, EVERYWHERE) for change in (group, other_type, long_number)),
    (bad_text, ("Span", "KeyValue", "AnyValue", "InstrumentationScope", "ScopeSpans", "Event", "Status")),
    (deep, ("KeyValue",)),
)
DAMAGE: tuple[Damage, ...] = (cut, flip, delete, insert, splice, append, json_brace)

SORTS = (("sound", 50), ("odd", 30), ("damaged", 20))
KINDS = {
    "sound": [change.__name__ for change, _ in SOUND],
    "odd": [change.__name__ for change, _ in ODD],
    "damaged": [damage.__name__ for damage in DAMAGE],
}


class Mutants:
    """An endless source, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.samples = samples(seed)
        self._small = [s for s in self.samples if len(s.value) <= SMALL_BYTES_MAX]
        self._large = [s for s in self.samples if len(s.value) > SMALL_BYTES_MAX]
        self._changes = {change.__name__: (change, types) for change, types in (*SOUND, *ODD)}
        self._damage = {damage.__name__: damage for damage in DAMAGE}
        self._messages: dict[str, list[Fields]] = {}
        self._having: dict[str, list[Sample]] = {}
        for sample in self._small:
            for type_name, paths in sample.places.items():
                self._messages.setdefault(type_name, []).extend(map(sample.message, paths))
                self._having.setdefault(type_name, []).append(sample)

    def kind(self) -> str:
        """One at random, as often as its sort deserves."""
        (sort,) = self._rng.choices([name for name, _ in SORTS], [share for _, share in SORTS])
        return self._rng.choice(KINDS[sort])

    def make(self, kind: str) -> bytes:
        rng = self._rng
        damage = self._damage.get(kind)
        if damage is None:
            change, types = self._changes[kind]
            made = encode(self._changed(change, types))
        else:
            made = damage(rng, self._sample().value, rng.choice(self._small).value)
        if rng.random() < MORE_SHARE:
            made = rng.choice(DAMAGE)(rng, made, rng.choice(self._small).value)
        return made.replace(MARK, rng.randbytes(len(MARK))) if rng.random() < OWN_SHARE else made

    def _sample(self) -> Sample:
        return self._rng.choice(self._large if self._rng.random() < LARGE_SHARE else self._small)

    def _changed(self, change: Change, types: Sequence[str]) -> Fields:
        rng = self._rng
        if not types:
            sample = self._sample()
            tree = list(sample.tree)
            type_name, fields = self._somewhere(tree, sample.type)
        else:
            type_name = rng.choice(types)
            sample = self._sample()
            if type_name not in sample.places:
                sample = rng.choice(self._having[type_name])
            tree = fields = list(sample.tree)
            for i in rng.choice(sample.places[type_name]):
                fields = _opened(fields, i)
        change(rng, fields, rng.choice(self._messages[type_name]))
        if rng.random() < MORE_SHARE:
            type_name, fields = self._somewhere(tree, sample.type)
            more, _ = rng.choice(ODD)
            more(rng, fields, [])
        return tree

    def _somewhere(self, fields: Fields, type_name: str) -> tuple[str, Fields]:
        """A message in this one, or itself: its type and a copy of its fields, put in place."""
        rng = self._rng
        while True:
            below = [i for i, f in enumerate(fields) if isinstance(f.value, list)]
            if not below or rng.random() > DEEPER_SHARE:
                return type_name, fields
            i = rng.choice(below)
            type_name = _type_name(fields[i])
            fields = _opened(fields, i)
