"""A topic full of one layout: some generated records, again and again with other trace ids, dated evenly in the past.

A worker's timers run on the log's own time, so dates decide how much is pending while a backlog is read at full
speed: `LOG_SPANS_PER_SEC` of them fall into each second.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
PACE_SECS = 0.005  # a pause shorter than that is not worth it
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
    sent_spans = sent_bytes = 0
    with _sending(brokers, topic) as send:
        for value, count in _repeated(base, rounds, seed):
            send(value, begin_ms + 1000 * sent_spans // LOG_SPANS_PER_SEC)
            sent_spans += count
            sent_bytes += len(value)
    return Filled(topic, layout, rounds * len(base), sent_spans, rounds * traces, sent_bytes)


def send_paced(brokers: str, topic: str, layout: str, spans_per_sec: float, secs: float) -> int:
    """So many spans a second for so long, dated when they are sent; returns their number once the broker has all."""
    base, _ = _base(layout, min(BASE_SPANS, int(spans_per_sec * secs)))
    sent_spans = 0
    begun_secs = time.monotonic()
    with _sending(brokers, topic) as send:
        for value, count in _repeated(base, sys.maxsize, seed=time.time_ns()):
            passed_secs = time.monotonic() - begun_secs
            if passed_secs >= secs:
                break
            ahead_secs = sent_spans / spans_per_sec - passed_secs
            if ahead_secs > PACE_SECS:
                time.sleep(ahead_secs)  # waits for nothing: this is the rate
            send(value, int(time.time() * 1000))
            sent_spans += count
    return sent_spans


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


@contextmanager
def _sending(brokers: str, topic: str) -> Iterator[Callable[[bytes, int], None]]:
    """Sends a value of a time, to partitions in turn; in the end the broker has them all."""
    producer = Producer({"bootstrap.servers": brokers, **PRODUCER})
    failed: list[Any] = []
    partitions = itertools.cycle(range(PARTITIONS))

    def delivered(error: Any, _: Any) -> None:
        if error:
            failed.append(error)

    def send(value: bytes, at_ms: int) -> None:
        partition = next(partitions)
        while True:
            try:
                producer.produce(topic, value, partition=partition, timestamp=at_ms, on_delivery=delivered)
                producer.poll(0)
                return
            except BufferError:
                producer.poll(0.2)

    yield send
    assert producer.flush(120) == 0
    assert not failed, failed[0]
