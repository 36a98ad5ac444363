"""Judging: which policy decides, with which probability; the same for one trace as for thousands at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import (
    LOG_MS,
    NS_PER_MS,
    START_MS,
    fields_of,
    record,
    resource_spans,
    span,
    trace,
    trace_id,
)
from tests.test_rules import NOW, rule
from tss.consistent import TWO_56, threshold, trace_randomness
from tss.judge import Policies, judge, late_upgrade, summarise
from tss.model import ERROR, FACTS, NO_START, ROOT, Claimed, Origin, Trigger, Verdict, encode_origins
from tss.rules import RuleSet
from tss.wire import decode

PLAN = Policies(error_rate=1.0, latency_rate=1.0, latency_threshold_ms=5000, base_rate=0.0)
RULES = RuleSet(
    [
        rule("keep-200", priority=200),
        rule("drop-100", priority=100, action="force_drop"),
        rule("keep-100", priority=100),
        rule("drop-50", priority=50, action="force_drop"),
        rule("keep-1", priority=1),
    ]
)
ALL = (1 << len(RULES)) - 1


def bits(*ids: str) -> int:
    """The mask of some rules."""
    return sum(1 << i for i, known in enumerate(RULES.rules) if known.id in ids)


def field(*origins: Origin, took_ms: float = 10, **facts: int) -> bytes:
    """A chunk's field name: facts of a quick trace without errors unless said otherwise, and its records."""
    row = np.zeros(1, FACTS)
    start_ns = START_MS * NS_PER_MS
    values = {
        "log_time_ms": LOG_MS,
        "spans": sum(origin.spans for origin in origins),
        "bits": ROOT,
        "start_ns": start_ns,
        "end_ns": start_ns + int(took_ms * NS_PER_MS),
        "rules": RULES.version,
        "randomness": trace_randomness(trace_id(1)),
        **facts,
    }
    for name, value in values.items():
        row[name] = value
    return row.tobytes() + encode_origins(origins)


def claimed(*fields: bytes, trace: int = 1, trigger: Trigger = Trigger.INACTIVITY) -> Claimed:
    return Claimed(trace_id(trace), trigger, fields or (field(Origin(0, 1, 3)),))


def judged(
    *fields: bytes, policies: Policies = PLAN, active: int = ALL, masks: dict[int, int] | None = None
) -> Verdict:
    """The verdict of one trace with these fields."""
    traces = [claimed(*fields)]
    [verdict] = judge(traces, summarise(traces, RULES), policies, RULES, active, masks or {})
    return verdict


def outcome(verdict: Verdict) -> tuple[bool, str, str, float]:
    return verdict.kept, verdict.reason, verdict.policy, verdict.probability


# --- who decides -------------------------------------------------------------------------------------------------

ONE = Origin(0, 1, 3)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param({}, (False, "not_sampled", "not_sampled", 0.0), id="nothing special"),
        pytest.param({"bits": ERROR}, (True, "error", "error", 1.0), id="error"),
        pytest.param({"took_ms": 5000.001}, (True, "latency", "latency", 1.0), id="slow"),
        pytest.param({"took_ms": 5000}, (False, "not_sampled", "not_sampled", 0.0), id="at the threshold"),
        pytest.param({"bits": ERROR, "took_ms": 9000}, (True, "error", "error", 1.0), id="error and slow"),
        pytest.param({"mask": bits("keep-1")}, (True, "force", "keep-1", 1.0), id="forced"),
        pytest.param(
            {"mask": bits("keep-1"), "bits": ERROR}, (True, "force", "keep-1", 1.0), id="forced and error"
        ),
        pytest.param(
            {"mask": bits("drop-50"), "bits": ERROR, "took_ms": 9000},
            (False, "force_drop", "drop-50", 0.0),
            id="a drop rule beats errors and latency",
        ),
        pytest.param(
            {"mask": bits("drop-50", "keep-1")},
            (False, "force_drop", "drop-50", 0.0),
            id="the higher priority decides: drop",
        ),
        pytest.param(
            {"mask": bits("drop-50", "keep-200")},
            (True, "force", "keep-200", 1.0),
            id="the higher priority decides: keep",
        ),
        pytest.param(
            {"mask": bits("drop-100", "keep-100")},
            (True, "force", "keep-100", 1.0),
            id="equal priority keeps",
        ),
        pytest.param({"mask": ALL}, (True, "force", "keep-200", 1.0), id="all rules"),
    ],
)
def test_precedence(facts: dict[str, Any], expected: tuple[bool, str, str, float]) -> None:
    """Force rules by priority, then error, latency, the base rate; each names itself."""
    assert outcome(judged(field(ONE, **facts))) == expected


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        (ALL, "keep-200"),
        (bits("drop-100", "keep-1"), "drop-100"),
        (bits("keep-1"), "keep-1"),
        (0, "error"),
    ],
)
def test_rules_that_are_not_active_do_not_count(active: int, expected: str) -> None:
    """A rule that expired since its bit was set has no say; the next one decides."""
    assert judged(field(ONE, mask=ALL, bits=ERROR), active=active).policy == expected


def test_a_rule_acts_until_its_end() -> None:
    """By the active bits of the moment of judging, not of ingest."""
    row = field(ONE, mask=bits("keep-200"))
    assert judged(row, active=RULES.active(NOW + timedelta(seconds=299))).kept
    assert not judged(row, active=RULES.active(NOW + timedelta(seconds=300))).kept


def test_masks_of_older_rules_are_replaced() -> None:
    """A stale row is marked, and what was matched anew counts in place of its facts' mask."""
    old = field(ONE, rules=RULES.version ^ 1, mask=bits("drop-50"))
    traces = [claimed(), claimed(old), claimed(field(ONE), field(Origin(0, 2, 1), rules=0))]
    summary = summarise(traces, RULES)
    assert summary.stale.tolist() == [False, True, True]
    verdicts = judge(traces, summary, PLAN, RULES, ALL, {1: bits("keep-1"), 2: 0})
    assert [v.policy for v in verdicts] == ["not_sampled", "keep-1", "not_sampled"]
    assert {v.rules for v in verdicts} == {RULES.version}


# --- rates -------------------------------------------------------------------------------------------------------


def policies(error: float = 0, latency: float = 0, base: float = 0) -> Policies:
    return Policies(error, latency, 5000, base)


@pytest.mark.parametrize(
    ("rates", "facts", "largest", "reason"),
    [
        pytest.param(policies(base=0.1), {}, 0.1, "probabilistic", id="base"),
        pytest.param(policies(base=1.0), {}, 1.0, "probabilistic", id="base keeps all"),
        pytest.param(policies(error=0.5), {"bits": ERROR}, 0.5, "error", id="error"),
        pytest.param(policies(error=0.5, base=0.1), {"bits": ERROR}, 0.5, "error", id="error over base"),
        pytest.param(
            policies(error=0.1, base=0.5), {"bits": ERROR}, 0.5, "probabilistic", id="base over error"
        ),
        pytest.param(
            policies(error=0.1, latency=0.3, base=0.2),
            {"bits": ERROR, "took_ms": 9000},
            0.3,
            "latency",
            id="latency over both",
        ),
        pytest.param(policies(latency=0.3, base=0.2), {"bits": ERROR}, 0.2, "probabilistic", id="not slow"),
        pytest.param(policies(error=0.001), {"bits": ERROR}, 0.001, "error", id="small"),
    ],
)
def test_the_largest_matching_rate_is_the_probability(
    rates: Policies, facts: dict[str, Any], largest: float, reason: str
) -> None:
    """All policies look at one random value: kept from T of the largest rate on, and the verdict states that rate."""
    at = threshold(largest)
    kept = judged(field(ONE, randomness=at, **facts), policies=rates)
    assert (kept.kept, kept.reason, kept.probability) == (True, reason, largest)
    if at:
        dropped = judged(field(ONE, randomness=at - 1, **facts), policies=rates)
        assert outcome(dropped) == (False, "not_sampled", "not_sampled", largest)


def test_the_first_policy_that_keeps_gives_the_reason() -> None:
    """An error that its own rate keeps is kept for the error, though the base rate would keep it as well."""
    rates = policies(error=0.1, base=0.5)
    assert judged(field(ONE, bits=ERROR, randomness=TWO_56 - 1), policies=rates).reason == "error"
    assert judged(field(ONE, bits=ERROR, randomness=threshold(0.3)), policies=rates).reason == "probabilistic"


def test_a_rate_of_zero_switches_a_policy_off() -> None:
    """Also for the largest random value there is."""
    row = field(ONE, bits=ERROR, took_ms=9000, randomness=TWO_56 - 1)
    assert outcome(judged(row, policies=policies())) == (False, "not_sampled", "not_sampled", 0.0)


# --- summaries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "duration_ms"),
    [
        pytest.param([field(ONE, took_ms=12.5)], 12.5, id="one chunk"),
        pytest.param(
            [
                field(ONE, start_ns=5 * NS_PER_MS, end_ns=6 * NS_PER_MS),
                field(ONE, start_ns=1 * NS_PER_MS, end_ns=2 * NS_PER_MS),
            ],
            5.0,
            id="earliest start to latest end",
        ),
        pytest.param([field(ONE, start_ns=7, end_ns=3)], 0.0, id="end before start"),
        pytest.param([field(ONE, start_ns=NO_START, end_ns=7)], 0.0, id="no start"),
        pytest.param([field(ONE, start_ns=7, end_ns=0)], 0.0, id="no end"),
        pytest.param(
            [field(ONE, start_ns=NO_START, end_ns=9 * NS_PER_MS), field(ONE, start_ns=NS_PER_MS, end_ns=0)],
            8.0,
            id="start and end of different chunks",
        ),
        pytest.param([field(ONE, start_ns=1, end_ns=2**64 - 1)], (2**64 - 2) / NS_PER_MS, id="end of time"),
    ],
)
def test_latency_of_a_trace(fields: list[bytes], duration_ms: float) -> None:
    """Over all chunks, earliest start to latest end; 0 where it cannot be known."""
    assert summarise([claimed(*fields)], RULES).duration_ms.tolist() == [duration_ms]


def test_bits_masks_and_log_times_join_over_chunks() -> None:
    """An error, a root or a match in any chunk is the trace's."""
    summary = summarise(
        [
            claimed(
                field(ONE, bits=0, mask=1, log_time_ms=500, log_span_ms=10),
                field(Origin(0, 2, 1), bits=ERROR, mask=4, log_time_ms=100, log_span_ms=800),
            ),
            claimed(field(ONE, bits=ROOT, log_time_ms=7)),
        ],
        RULES,
    )
    assert summary.errors.tolist() == [True, False]
    assert (summary.bits & ROOT).astype(bool).tolist() == [False, True]
    assert summary.mask.tolist() == [5, 0]
    assert summary.first_log_ms.tolist() == [100, 7]
    assert summary.last_log_ms.tolist() == [900, 7]


@pytest.mark.parametrize(
    ("origins", "spans"),
    [
        ([[Origin(0, 1, 3)]], 3),
        ([[Origin(0, 1, 3)], [Origin(0, 2, 2)]], 5),
        ([[Origin(0, 1, 3)], [Origin(1, 1, 2)]], 5),
        ([[Origin(0, 1, 3), Origin(0, 2, 2)], [Origin(0, 2, 2), Origin(0, 3, 4)]], 9),
        ([[Origin(0, 1, 3)], [Origin(0, 1, 3), Origin(0, 2, 1)], [Origin(0, 2, 1)]], 4),
    ],
)
def test_spans_of_a_record_in_two_chunks_count_once(origins: list[list[Origin]], spans: int) -> None:
    """After a redelivery in other batches, chunks overlap."""
    traces = [claimed(*(field(*chunk, log_time_ms=i) for i, chunk in enumerate(origins)))]
    assert summarise(traces, RULES).spans.tolist() == [spans]


@pytest.mark.parametrize("stated", [0, 1, TWO_56 - 1])
def test_an_explicit_random_value_wins_over_the_trace_id(stated: int) -> None:
    """Whichever chunk saw it, and whether it is smaller or larger."""
    own, other = field(ONE), field(Origin(0, 2, 1), randomness=stated)
    for fields in ([own, other], [other, own], [own, other, own], [other]):
        assert summarise([claimed(*fields)], RULES).randomness.tolist() == [stated]
    assert summarise([claimed(own)], RULES).randomness.tolist() == [trace_randomness(trace_id(1))]


def test_no_traces_no_verdicts() -> None:
    """An empty claim is no special case for the caller."""
    summary = summarise([], RULES)
    assert len(summary) == 0
    assert summary.duration_ms.tolist() == summary.errors.tolist() == []
    assert judge([], summary, PLAN, RULES, ALL, {}) == []


def test_the_trigger_is_the_claims() -> None:
    """Why a trace was judged now is passed on."""
    traces = [claimed(trigger=trigger) for trigger in Trigger]
    verdicts = judge(traces, summarise(traces, RULES), PLAN, RULES, ALL, {})
    assert [v.trigger for v in verdicts] == list(Trigger)


def test_decoded_traces_are_judged_as_the_plan_says() -> None:
    """From records to verdicts: errors, slow and forced traces are kept, the rest is not."""
    records = [
        record(*trace(1, error=True)),
        record(*trace(2, took_ms=5001), offset=1),
        record(*trace(3, took_ms=4999), offset=2),
        record(span(4, 1, start_ms=START_MS), span(4, 2, parent=1, start_ms=START_MS + 6000), offset=3),
    ]
    none = RuleSet()
    traces = [
        Claimed(t, Trigger.INACTIVITY, tuple(fields))
        for t, fields in fields_of(decode(records, none)).items()
    ]
    verdicts = judge(traces, summarise(traces, none), PLAN, none, 0, {})
    assert [v.reason for v in verdicts] == ["error", "latency", "not_sampled", "latency"]


def test_a_trace_of_a_forced_service_is_kept() -> None:
    """From a record that a rule matches to its verdict."""
    batch = decode([record(resource_spans(*trace(5), service="demo-service"))], RULES)
    traces = [Claimed(t, Trigger.INACTIVITY, tuple(fields)) for t, fields in fields_of(batch).items()]
    [verdict] = judge(traces, summarise(traces, RULES), PLAN, RULES, ALL, {})
    assert outcome(verdict) == (True, "force", "keep-200", 1.0)


# --- laws --------------------------------------------------------------------------------------------------------

rates = st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1)
chunks = st.builds(
    field,
    st.builds(Origin, st.integers(0, 1), st.integers(0, 3), st.just(2)),
    took_ms=st.sampled_from([0, 10, 5000, 5001]),
    bits=st.integers(0, 3),
    mask=st.integers(0, ALL),
    rules=st.sampled_from([RULES.version, 0]),
    randomness=st.integers(0, TWO_56 - 1),
    log_time_ms=st.integers(0, 2**40),
)
claims = st.builds(
    lambda number, fields, trigger: Claimed(trace_id(number), trigger, tuple(fields)),
    st.integers(1, 2**70),
    st.lists(chunks, min_size=1, max_size=4),
    st.sampled_from(Trigger),
)
plans = st.builds(Policies, rates, rates, st.sampled_from([0.0, 10.0, 5000.0]), rates)


@given(
    st.lists(claims, max_size=8),
    plans,
    st.integers(0, ALL),
    st.dictionaries(st.integers(0, 7), st.integers(0, ALL)),
)
def test_many_traces_are_judged_like_one(
    traces: list[Claimed], plan: Policies, active: int, masks: dict[int, int]
) -> None:
    """What else is in the claim, and in which order, changes no verdict."""
    masks = {row: mask for row, mask in masks.items() if row < len(traces)}
    together = judge(traces, summarise(traces, RULES), plan, RULES, active, masks)
    for row, one in enumerate(traces):
        mine = {0: masks[row]} if row in masks else {}
        assert judge([one], summarise([one], RULES), plan, RULES, active, mine) == [together[row]]


@given(claims, plans, st.integers(0, ALL), st.randoms(use_true_random=False))
def test_the_order_of_chunks_does_not_matter(one: Claimed, plan: Policies, active: int, order: Any) -> None:
    """Redis gives fields in any order."""
    shuffled = list(one.fields)
    order.shuffle(shuffled)
    other = Claimed(one.trace_id, one.trigger, tuple(shuffled))
    verdicts = [judge([t], summarise([t], RULES), plan, RULES, active, {}) for t in (one, other)]
    assert verdicts[0] == verdicts[1]


@given(claims, plans, plans)
def test_raising_rates_never_loses_a_trace(one: Claimed, plan: Policies, other: Policies) -> None:
    """Kept at some rates is kept at larger ones."""
    higher = Policies(
        max(plan.error_rate, other.error_rate),
        max(plan.latency_rate, other.latency_rate),
        plan.latency_threshold_ms,
        max(plan.base_rate, other.base_rate),
    )
    [low], [high] = (judge([one], summarise([one], RULES), p, RULES, 0, {}) for p in (plan, higher))
    assert high.kept or not low.kept


# --- late spans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "reason", "error", "upgraded"),
    [
        (True, "error", True, True),
        (True, "force", True, True),
        (False, "not_sampled", True, False),
        (False, "error", True, False),
        (True, "latency", True, False),
        (True, "probabilistic", True, False),
        (True, "force", False, False),
        (False, "force_drop", True, False),
    ],
)
def test_only_a_late_error_turns_a_drop_around(kept: bool, reason: str, error: bool, upgraded: bool) -> None:
    """And it says so: reason late_error, trigger late, the policy and probability of what keeps it."""
    candidate = Verdict(kept, reason, "some policy", 0.5, Trigger.INACTIVITY, 7)
    expected = Verdict(True, "late_error", "some policy", 0.5, Trigger.LATE, 7) if upgraded else None
    assert late_upgrade(candidate, error) == expected
