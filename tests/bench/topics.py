"""A topic full of one layout: some generated records, again and again with other trace ids, dated evenly in the past.

A worker's timers run on the log's own time, so dates decide how much is pending while a backlog is read at full
speed: `LOG_SPANS_PER_SEC` of them fall into each second.
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from confluent_kafka import Producer
from numpy.typing import NDArray
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from tests.bench.generate import PARTITIONS, records

BASE_SPANS = 200_000  # generated, at 50 µs each; the rest are repetitions
LOG_SPANS_PER_SEC = 20_000
INACTIVITY_SECS = 10  # so some 200,000 spans wait, in layout C for less than four times what a trace takes
AGE_SECS = 3600  # of the newest record: at the log's end all becomes due at once
SPAN_BEGIN = re.compile(rb"\x0a\x10(.{16})\x12\x08", re.DOTALL)  # trace id, then the head of the span id
PRODUCER = {
    "linger.ms": 20,
    "batch.size": 900_000,
    "message.max.bytes": 4_000_000,
    "queue.buffering.max.kbytes": 262_144,
    "acks": "1",
    "log_level": 2,
}


@dataclass(frozen=True, slots=True)
class Filled:
    """What a topic holds."""

    topic: str
    layout: str
    records: int
    spans: int
    traces: int
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class Base:
    """A record to repeat: `at` are the places of its spans' trace ids."""

    value: bytes
    at: NDArray[np.int64]


def fill(brokers: str, topic: str, layout: str, spans: int, *, seed: int = 1) -> Filled:
    """Whole repetitions of a base, at least `spans` spans; returns when the broker has all. A seed has its own trace ids."""
    base, traces = _base(layout, min(spans, BASE_SPANS))
    base_spans = sum(len(record.at) for record in base)
    rounds = -(-spans // base_spans)
    begin_ms = int(time.time() * 1000) - 1000 * (AGE_SECS + rounds * base_spans // LOG_SPANS_PER_SEC)
    producer = Producer({"bootstrap.servers": brokers, **PRODUCER})
    failed: list[Any] = []
    sent_spans = sent_bytes = 0
    for number, (value, count) in enumerate(_repeated(base, rounds, seed)):
        at_ms = begin_ms + 1000 * sent_spans // LOG_SPANS_PER_SEC
        _send(producer, failed, topic, value, partition=number % PARTITIONS, timestamp=at_ms)
        sent_spans += count
        sent_bytes += len(value)
    assert producer.flush(120) == 0
    assert not failed, failed[0]
    return Filled(topic, layout, rounds * len(base), sent_spans, rounds * traces, sent_bytes)


@functools.lru_cache(1)
def _base(layout: str, spans: int) -> tuple[list[Base], int]:
    out = []
    ids: set[bytes] = set()
    for record in records(layout, spans):
        assert record.value is not None
        mine = [
            span.trace_id
            for resource in TracesData.FromString(record.value).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        known = set(mine)
        at = [found.start(1) for found in SPAN_BEGIN.finditer(record.value) if found[1] in known]
        assert len(at) == len(mine), "a trace id stands somewhere else than at the head of a span"
        ids |= known
        out.append(Base(record.value, np.array(at, np.int64)))
    return out, len(ids)


def _repeated(base: list[Base], rounds: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """Values and their numbers of spans; each round has trace ids of its own."""
    rng = random.Random(seed)
    columns = np.arange(16)
    for _ in range(rounds):
        key = np.frombuffer(rng.randbytes(16), np.uint8)
        for record in base:
            value = np.frombuffer(bytearray(record.value), np.uint8)
            value[record.at[:, None] + columns] ^= key
            yield value.tobytes(), len(record.at)


def _send(producer: Any, failed: list[Any], topic: str, value: bytes, **where: int) -> None:
    def delivered(error: Any, _: Any) -> None:
        if error:
            failed.append(error)

    while True:
        try:
            producer.produce(topic, value, on_delivery=delivered, **where)
            producer.poll(0)
            return
        except BufferError:
            producer.poll(0.2)
