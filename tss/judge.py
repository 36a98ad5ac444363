"""Facts to verdicts: pure, vectorised over the traces of one claim, the same on every worker and every retry.

Order: force rules by priority, then errors, latency and the base rate. The probabilistic policies share the trace's
one random value, so a trace that matches several is kept with the largest of their probabilities, and that is what
its verdict states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tss import model
from tss.consistent import threshold
from tss.model import ERROR, FACTS, NO_START, Claimed, Trigger, Verdict, decode_origins
from tss.rules import RuleSet

FORCE = "force"
FORCE_DROP = "force_drop"
ERROR_REASON = "error"
LATENCY = "latency"
PROBABILISTIC = "probabilistic"
NOT_SAMPLED = "not_sampled"
LATE_ERROR = "late_error"
REASONS_KEPT = (FORCE, ERROR_REASON, LATENCY, PROBABILISTIC, LATE_ERROR)

NS_PER_MS = 1_000_000

ListRecords = Callable[
    [Sequence[Claimed]], tuple[list[str], list[bool]]
]  # `model.list_records`, or its kernel


@dataclass(frozen=True, slots=True)
class Policies:
    """The standing policies; a rate of 0 switches one off."""

    error_rate: float
    latency_rate: float
    latency_threshold_ms: float
    base_rate: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One row a trace, over all its chunks. `stale` marks traces with a chunk whose mask is of another rule set,
    `repeated` those that have a record in two chunks, after a redelivery."""

    spans: NDArray[np.int64]
    bits: NDArray[np.uint32]
    start_ns: NDArray[np.uint64]
    end_ns: NDArray[np.uint64]
    randomness: NDArray[np.uint64]
    mask: NDArray[np.uint64]
    stale: NDArray[np.bool_]
    first_log_ms: NDArray[np.int64]
    last_log_ms: NDArray[np.int64]
    duration_ms: NDArray[np.float64]
    records: list[str]
    repeated: list[bool]

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def errors(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self.bits & ERROR) != 0
        return found


def _duration_ms(start_ns: NDArray[np.uint64], end_ns: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Earliest start to latest end; 0 where no span states both or clocks disagree."""
    known = (start_ns != NO_START) & (end_ns > start_ns)
    return np.where(known, (end_ns - start_ns).astype(np.float64) / NS_PER_MS, 0.0)


def summarise(
    traces: Sequence[Claimed], rules: RuleSet, list_records: ListRecords = model.list_records
) -> Summary:
    """Every trace needs at least one field. Spans of a record that is in two chunks are counted once."""
    records, repeated = list_records(traces)
    table = np.frombuffer(b"".join(f[: FACTS.itemsize] for t in traces for f in t.fields), FACTS)
    counts = np.array([len(t.fields) for t in traces], np.int64)
    at = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(traces) else np.zeros(0, np.int64)
    spans = _reduce(np.add, table["spans"].astype(np.int64), at)
    for row in np.flatnonzero(repeated).tolist():
        spans[row] = _distinct_spans(traces[row])
    start_ns = _reduce(np.minimum, table["start_ns"], at)
    end_ns = _reduce(np.maximum, table["end_ns"], at)
    return Summary(
        spans=spans,
        bits=_reduce(np.bitwise_or, table["bits"], at),
        start_ns=start_ns,
        end_ns=end_ns,
        randomness=_stated_randomness(traces, table["randomness"], at),
        mask=_reduce(np.bitwise_or, table["mask"], at),
        stale=_reduce(np.logical_or, table["rules"] != rules.version, at),
        first_log_ms=_reduce(np.minimum, table["log_time_ms"], at),
        last_log_ms=_reduce(np.maximum, table["log_time_ms"] + table["log_span_ms"], at),
        duration_ms=_duration_ms(start_ns, end_ns),
        records=records,
        repeated=repeated,
    )


def _reduce(ufunc: np.ufunc, column: NDArray[Any], at: NDArray[np.int64]) -> Any:
    return ufunc.reduceat(column, at) if len(at) else column[:0]


def _distinct_spans(trace: Claimed) -> int:
    seen: dict[tuple[int, int], int] = {}
    for name in trace.fields:
        for origin in decode_origins(name[FACTS.itemsize :]):
            seen[origin.partition, origin.offset] = origin.spans
    return sum(seen.values())


def _stated_randomness(
    traces: Sequence[Claimed], own: NDArray[np.uint64], at: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """A chunk that saw an explicit `rv` wins over chunks that fell back to the trace id."""
    ids = np.frombuffer(b"".join(t.trace_id for t in traces), np.uint8).reshape(-1, 16)
    fallback = np.zeros(len(traces), np.uint64)
    for column in range(9, 16):
        fallback = fallback << np.uint64(8) | ids[:, column].astype(np.uint64)
    low, high = _reduce(np.minimum, own, at), _reduce(np.maximum, own, at)
    stated: NDArray[np.uint64] = np.where(low != fallback, low, high)
    return stated


def judge(
    traces: Sequence[Claimed],
    summary: Summary,
    policies: Policies,
    rules: RuleSet,
    active: int,
    masks: Mapping[int, int],
) -> list[Verdict]:
    """One candidate verdict a trace. `active` masks rules that are not expired; `masks` replaces stale rows' masks."""
    forced = summary.mask.copy()
    for row, mask in masks.items():
        forced[row] = mask
    forced &= np.uint64(active)

    slow = summary.duration_ms > policies.latency_threshold_ms
    choices = (
        (ERROR_REASON, ERROR_REASON, summary.errors, policies.error_rate),
        (LATENCY, LATENCY, slow, policies.latency_rate),
        (PROBABILISTIC, "base_rate", np.ones(len(summary), np.bool_), policies.base_rate),
    )
    probability = np.zeros(len(summary))
    choice = np.full(len(summary), -1, np.int8)
    for index, (_, _, matches, rate) in enumerate(choices):
        passes = matches & (summary.randomness >= np.uint64(threshold(rate))) & (rate > 0)
        choice = np.where((choice < 0) & passes, index, choice)
        probability = np.where(matches, np.maximum(probability, rate), probability)

    # Few are different: traces share the objects, and whoever encodes or counts them needs to do so only once each.
    known: dict[tuple[int, int, float, Trigger], Verdict] = {}
    verdicts = []
    columns = (forced.tolist(), choice.tolist(), probability.tolist())
    for trace, mask, picked, chance in zip(traces, *columns, strict=True):
        key = (mask & -mask, picked, chance, trace.trigger)
        verdict = known.get(key)
        if verdict is None:
            if mask:
                rule = rules.rules[(mask & -mask).bit_length() - 1]
                kept = rule.action == "force_keep"
                reason, policy, chance = FORCE if kept else FORCE_DROP, rule.id, float(kept)
            else:
                kept = picked >= 0
                reason, policy = choices[picked][:2] if kept else (NOT_SAMPLED, NOT_SAMPLED)
            known[key] = verdict = Verdict(kept, reason, policy, chance, trace.trigger, rules.version)
        verdicts.append(verdict)
    return verdicts


def late_upgrade(candidate: Verdict, error: bool) -> Verdict | None:
    """What a dropped trace becomes when its late spans, judged alone, hold an error worth keeping.

    A force rule that keeps them gives the error another reason, but does not make it worth less.
    """
    if not (candidate.kept and error and candidate.reason in (ERROR_REASON, FORCE)):
        return None
    return Verdict(True, LATE_ERROR, candidate.policy, candidate.probability, Trigger.LATE, candidate.rules)
