"""What decoding costs: CPU time of the kernels and of their slow twin, by layout, without and with rules."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.generate import LAYOUTS, SPREAD, records
from tests.fuzz import difference, on_resource, on_span, rule_set
from tss import wire
from tss.kernels import Decoder
from tss.model import Record
from tss.rules import RuleSet
from tss.wire import Decoded

BATCH_SPANS = 20_000
BATCHES = 3  # of each layout, so that values of a rule's keys are seen first and again
TWIN_RUNS = 3  # it is slow, and steadier for it

FIVE_RULES = rule_set(
    on_span("http.response.status_code", "gte", 500),
    on_span("http.route", "in", ["/checkout", "/orders/{id}/items"]),
    on_span("exception.type", "exists"),
    on_span("url.path", "regex", "^/products/[0-9]*7$"),
    {**on_resource("service.name", "eq", "payment"), **on_span("server.port", "eq", 5432)},
)

Decode = Callable[[Sequence[Record], RuleSet], Decoded]


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU nanoseconds a span: the median of several runs, the least and the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:8.0f} ({self.least:.0f}-{self.most:.0f})"


def batches(layout: str) -> list[list[Record]]:
    """Batches of about 20,000 spans from the middle of a stream, where traces lie as in a long one."""
    margin = SPREAD.get(layout, 0)
    whole = records(layout, 2 * margin + BATCHES * BATCH_SPANS)
    spans_a_record = (2 * margin + BATCHES * BATCH_SPANS) / len(whole)
    size = round(BATCH_SPANS / spans_a_record)
    begin = (len(whole) - BATCHES * size) // 2
    return [whole[begin + i * size : begin + (i + 1) * size] for i in range(BATCHES)]


def cost(decode: Decode, given: Sequence[Sequence[Record]], rules: RuleSet, runs: int) -> Cost:
    found = []
    for batch in given:
        decode(batch, rules)
    for _ in range(runs):
        spans = 0
        started = time.thread_time_ns()
        for batch in given:
            spans += decode(batch, rules).spans
        found.append((time.thread_time_ns() - started) / spans)
    return Cost(statistics.median(found), min(found), max(found))


def main(runs: int) -> None:
    print(f"{'':10} {'rules':>5}  {'kernels, ns a span':>24}  {'twin, ns a span':>28}  {'twin/kernels':>12}")
    for layout in LAYOUTS:
        given = batches(layout)
        for rules in (RuleSet(), FIVE_RULES):
            decoder = Decoder()
            for batch in given:
                fault = difference(decoder.decode(batch, rules), wire.decode(batch, rules))
                assert fault is None, fault
            fast = cost(decoder.decode, given, rules, runs)
            slow = cost(wire.decode, given[:1], rules, TWIN_RUNS)
            ratio = slow.median / fast.median
            print(f"layout {layout:3} {len(rules):5}  {fast!s:>24}  {slow!s:>28}  {ratio:12.1f}")
    print(
        "CPU seconds per million spans = ns a span / 1000; batches of about 20,000 spans; median (least-most)"
    )
