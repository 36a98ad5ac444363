"""The values that travel between the halves: records in, facts and chunks, verdicts out.

A *chunk* is what one batch holds of one trace: a valid OTLP `TracesData` made of the original span bytes. Its
*facts* are a fixed-size summary, enough to judge by; its *records* say which Kafka records its spans came from,
in payload order, so that what already landed can be cut away exactly.

Facts and records together are the chunk's *field*: the field name of the Redis hash that holds the trace. Reading
field names tells all that a decision needs without moving a payload.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRACE_ID_BYTES = 16
SPAN_ID_BYTES = 8

FACTS = np.dtype(
    [
        ("log_time_ms", "<i8"),  # oldest record timestamp; first, so that a script can read it from any field
        ("spans", "<u4"),  # second, for the same reason
        ("bits", "<u4"),  # ERROR | ROOT
        ("log_span_ms", "<u4"),  # newest record timestamp minus the oldest
        ("start_ns", "<u8"),  # earliest start; 2^64-1 when no span states one
        ("end_ns", "<u8"),  # latest end
        ("randomness", "<u8"),  # 56 bits: tracestate `ot=rv:`, else the low 56 bits of the trace id
        ("rules", "<u8"),  # version of the rule set that `mask` was made with
        ("mask", "<u8"),  # bit i: a span here matches rule i of that set
    ]
)
ERROR = 1
ROOT = 2
NO_START = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Now:
    """One moment on both clocks: `wall_ms` for stamps, `mono_secs` for durations."""

    wall_ms: int
    mono_secs: float


def epoch_name(born_ms: int, fresh: str) -> str:
    """What a life of Redis is called; its age can be told from that."""
    return f"{born_ms}-{fresh}"


def epoch_born_ms(epoch: str) -> int | None:
    """Inverse of `epoch_name`; None for a name of another make."""
    born, dash, _ = epoch.partition("-")
    return int(born) if dash and born.isdecimal() else None


class Trigger(enum.IntEnum):
    """Why a trace is judged now."""

    INACTIVITY = 0
    ROOT_SEEN = 1
    MAX_DURATION = 2
    MAX_SIZE = 3
    MEMORY_PRESSURE = 4
    SHUTDOWN = 5
    LATE = 6

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record. `value` is None for a tombstone; `timestamp_ms` is the log's own time."""

    partition: int
    offset: int
    timestamp_ms: int
    value: bytes | None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What of a record could not be taken in: `value` holds exactly that, `reason` is one of a closed set."""

    record: Record
    reason: str
    detail: str
    value: bytes
    spans: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one batch, one per trace, in columns.

    `trace_ids` is (n, 16) uint8 and `facts` is (n,) FACTS. `buffer` holds, for chunk i, the field name in
    `field_at[i]:payload_at[i]` and the payload in `payload_at[i]:field_at[i + 1]`; both arrays are int64,
    `field_at` with n + 1 entries.
    """

    trace_ids: NDArray[np.uint8]
    facts: NDArray[Any]
    buffer: memoryview
    field_at: NDArray[np.int64]
    payload_at: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.facts)

    def trace_id(self, i: int) -> bytes:
        return bytes(self.trace_ids[i])

    def field(self, i: int) -> bytes:
        return bytes(self.buffer[self.field_at[i] : self.payload_at[i]])

    def payload(self, i: int) -> bytes:
        return bytes(self.buffer[self.payload_at[i] : self.field_at[i + 1]])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Keep or drop, and why. `policy` names the rule or policy that decided; `rules` is the rule-set version."""

    kept: bool
    reason: str
    policy: str
    probability: float
    trigger: Trigger
    rules: int

    def encode(self) -> bytes:
        """For its key in Redis; the first byte is 1 for kept, 0 for dropped."""
        parts = (
            f"{self.kept:d}",
            self.reason,
            self.policy.replace("\x1f", " "),
            repr(self.probability),
            f"{self.trigger:d}",
            f"{self.rules:x}",
        )
        return "\x1f".join(parts).encode()

    @classmethod
    def decode(cls, value: bytes) -> Verdict:
        kept, reason, policy, probability, trigger, rules = value.decode().split("\x1f")
        return cls(kept == "1", reason, policy, float(probability), Trigger(int(trigger)), int(rules, 16))


@dataclass(frozen=True, slots=True)
class Origin:
    """`spans` consecutive spans of a chunk came from this record."""

    partition: int
    offset: int
    spans: int


# --- a chunk's records -------------------------------------------------------------------------------------------
#
# Coded as groups of varints: partition, number of records, then per record the distance to the offset before it in
# the group (the first: the offset itself) and its number of spans. Offsets in a group ascend.


def encode_origins(origins: Iterable[Origin]) -> bytes:
    """`origins` in payload order; a group ends where the partition changes or an offset does not ascend."""
    groups: list[list[Origin]] = []
    for origin in origins:
        last = groups[-1][-1] if groups else None
        if last and last.partition == origin.partition and last.offset < origin.offset:
            groups[-1].append(origin)
        else:
            groups.append([origin])
    out = bytearray()
    for group in groups:
        _put_varint(out, group[0].partition)
        _put_varint(out, len(group))
        previous = 0
        for origin in group:
            _put_varint(out, origin.offset - previous)
            _put_varint(out, origin.spans)
            previous = origin.offset
    return bytes(out)


def decode_origins(data: bytes) -> Iterator[Origin]:
    """Inverse of `encode_origins`."""
    values = _varints(data)
    for partition in values:
        offset = 0
        for _ in range(next(values)):
            offset += next(values)
            yield Origin(partition, offset, next(values))


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        if byte < 0x80:
            yield value | byte << shift
            value = shift = 0
        else:
            value |= (byte & 0x7F) << shift
            shift += 7


def format_records(records: Iterable[tuple[int, int]]) -> str:
    """(partition, offset) pairs as text for the decisions table: `0:17-19,23;4:2`."""
    by_partition: dict[int, list[int]] = {}
    for partition, offset in sorted(set(records)):
        by_partition.setdefault(partition, []).append(offset)
    return ";".join(f"{p}:{','.join(_ranges(offsets))}" for p, offsets in by_partition.items())


def _ranges(offsets: list[int]) -> Iterator[str]:
    first = previous = offsets[0]
    for offset in [*offsets[1:], None]:
        if offset is not None and offset == previous + 1:
            previous = offset
            continue
        yield str(first) if first == previous else f"{first}-{previous}"
        if offset is not None:
            first = previous = offset


def parse_records(text: str) -> set[tuple[int, int]]:
    """Inverse of `format_records`."""
    records: set[tuple[int, int]] = set()
    for group in filter(None, text.split(";")):
        partition, _, ranges = group.partition(":")
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            records.update((int(partition), offset) for offset in range(int(first), int(last or first) + 1))
    return records


@dataclass(frozen=True, slots=True)
class Claimed:
    """One claimed trace as its fields tell it: nothing of a payload has been read."""

    trace_id: bytes
    trigger: Trigger
    fields: tuple[bytes, ...]

    @property
    def facts(self) -> NDArray[Any]:
        return np.frombuffer(b"".join(f[: FACTS.itemsize] for f in self.fields), FACTS)

    @property
    def coded_records(self) -> bytes:
        """Of all its chunks: coded records may stand one after another."""
        return b"".join([f[FACTS.itemsize :] for f in self.fields])

    def records(self) -> set[tuple[int, int]]:
        return {(o.partition, o.offset) for f in self.fields for o in decode_origins(f[FACTS.itemsize :])}


def list_records(traces: Iterable[Claimed]) -> tuple[list[str], list[bool]]:
    """For each trace its records as `format_records` writes them, and whether one is in it twice."""
    texts, repeated = [], []
    for trace in traces:
        records = [(o.partition, o.offset) for f in trace.fields for o in decode_origins(f[FACTS.itemsize :])]
        texts.append(format_records(records))
        repeated.append(len(set(records)) < len(records))
    return texts, repeated
