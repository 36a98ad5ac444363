"""What must hold, whatever happened: one law each. A law returns its breaches in words; none is fine."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from tests.sim import redis
from tests.sim.history import INACTIVITY_SECS, SKEW_SECS, Outcome, span_bytes, trace_bytes
from tss.model import parse_records

Record = tuple[int, int]

TRIGGERS_OF_QUIET = ("inactivity", "late")


@dataclass(frozen=True, slots=True)
class Decided:
    """One row of `decisions`, in the order in which rows landed.

    `holds` is false for a kept row whose spans never landed: its writer lost its epoch between the two commits, so the
    records are decided again, with the same verdict.
    """

    trace: int
    kept: bool
    reason: str
    trigger: str
    records: frozenset[Record]
    holds: bool


def decided(outcome: Outcome) -> list[Decided]:
    numbers = {
        trace_bytes(span.trace).hex(): span.trace
        for written in outcome.log.values()
        for span in written.spans
    }
    table = outcome.fleet.catalog.tables["decisions"]
    landed = outcome.fleet.catalog.tables["spans"].committed
    names = ("trace_id", "kept", "reason", "trigger", "records", "writer", "sequence")
    rows = zip(*(table.column(name) for name in names), strict=True)
    return [
        Decided(
            numbers[trace],
            kept,
            reason,
            trigger,
            frozenset(parse_records(records)),
            holds=not kept or landed.get(writer, 0) >= sequence,
        )
        for trace, kept, reason, trigger, records, writer, sequence in rows
    ]


def rows_of(outcome: Outcome) -> dict[int, list[Decided]]:
    by_trace: dict[int, list[Decided]] = defaultdict(list)
    for row in decided(outcome):
        by_trace[row.trace].append(row)
    return by_trace


def records_of(outcome: Outcome) -> dict[int, set[Record]]:
    by_trace: dict[int, set[Record]] = defaultdict(set)
    for record, written in outcome.log.items():
        for span in written.spans:
            by_trace[span.trace].add(record)
    return by_trace


def progress(outcome: Outcome) -> list[str]:
    """Once faults stop, everything drains."""
    return [] if outcome.drained else [f"not drained after {outcome.drained_after_secs:.0f} s"]


def conservation(outcome: Outcome) -> list[str]:
    """What every record holds of a trace is decided, and decided once."""
    counts = Counter((row.trace, record) for row in decided(outcome) if row.holds for record in row.records)
    expected = {(trace, record) for trace, records in records_of(outcome).items() for record in records}
    found = [f"trace {t}: record {r} was never decided" for t, r in sorted(expected - counts.keys())]
    found += [f"trace {t}: record {r} was decided {n} times" for (t, r), n in sorted(counts.items()) if n > 1]
    return found + [f"trace {t}: record {r} is not its own" for t, r in sorted(counts.keys() - expected)]


def _expected_spans(outcome: Outcome) -> Counter[tuple[str, str]]:
    """Spans to be kept, and in how many records each is."""
    records = {(row.trace, record) for row in decided(outcome) if row.kept for record in row.records}
    return Counter(
        (trace_bytes(trace).hex(), span_bytes(trace, number).hex())
        for trace, record in records
        for number in {span.number for span in outcome.log[record].spans if span.trace == trace}
    )


def _spans(outcome: Outcome) -> Counter[tuple[str, str]]:
    table = outcome.fleet.catalog.tables["spans"]
    return Counter(zip(table.column("trace_id"), table.column("span_id"), strict=True))


def nothing_lost(outcome: Outcome) -> list[str]:
    """No span of a kept trace is missing from `spans`."""
    return [
        f"lost: span {span} of {trace}"
        for trace, span in sorted(_expected_spans(outcome).keys() - _spans(outcome).keys())
    ]


def nothing_doubled(outcome: Outcome) -> list[str]:
    """No span is in `spans` more often than in the log, and none is there that was not decided to be kept."""
    spans, kept = _spans(outcome), _expected_spans(outcome)
    found = [f"{n} times: span {s} of {t}" for (t, s), n in sorted(spans.items()) if n > max(1, kept[t, s])]
    return found + [f"not kept: span {s} of {t}" for t, s in sorted(spans.keys() - kept.keys())]


def one_verdict(outcome: Outcome) -> list[str]:
    """A trace has one verdict; only late spans with an error turn a drop, and from then on the trace is kept."""
    found = []
    for trace, rows in rows_of(outcome).items():
        for before, after in itertools.pairwise(rows):
            failing = any(
                span.error and span.trace == trace for r in after.records for span in outcome.log[r].spans
            )
            upgraded = not before.kept and after.reason == "late_error" and failing
            if before.kept != after.kept and not upgraded:
                found.append(
                    f"trace {trace}: kept={before.kept} ({before.reason}), then {after.kept} ({after.reason})"
                )
    return found


def errors_are_kept(outcome: Outcome) -> list[str]:
    """Unless a rule drops everything, every trace with an error ends kept."""
    if outcome.plan.drops_by_rule:
        return []
    failing = {span.trace for written in outcome.log.values() for span in written.spans if span.error}
    rows = rows_of(outcome)
    return [
        f"trace {t} has an error and was dropped" for t in sorted(failing) if rows[t] and not rows[t][-1].kept
    ]


def letters_arrive(outcome: Outcome) -> list[str]:
    """What cannot be read is in the dead-letter topic at least once, and nothing else is."""
    unreadable = {record for record, written in outcome.log.items() if not written.spans}
    letters = set(outcome.fleet.broker.letters)
    found = [f"record {r} can be read" for r in sorted(letters - unreadable)]
    return found + [f"record {r} is nowhere" for r in sorted(unreadable - letters) if outcome.drained]


def not_early(outcome: Outcome) -> list[str]:
    """No trace is judged before it was quiet by log time, unless a trigger says so."""
    if outcome.plan.decides_early or outcome.plan.root_wait_secs is not None:
        return []
    tolerance = SKEW_SECS if outcome.plan.skewed else 0.0
    wait_ms = (INACTIVITY_SECS - tolerance) * 1000 - 1
    records = records_of(outcome)
    found = []
    for trace, rows in rows_of(outcome).items():
        missing = set(records[trace])
        for row in rows:
            missing -= row.records
            if row.trigger not in TRIGGERS_OF_QUIET or (row.trigger == "late" and outcome.plan.backlog):
                continue  # a redelivery of what landed an hour ago makes its late spans look as old
            last_ms = max(outcome.log[record].timestamp_ms for record in row.records)
            early = [r for r in missing if outcome.log[r].reached_ms <= last_ms + wait_ms]
            found += [f"trace {trace}: judged without record {record}" for record in sorted(early)]
    return found


def keys_are_owned(outcome: Outcome) -> list[str]:
    """Every key of Redis has an owner or expires, at the end as at every look on the way."""
    return outcome.breaches + redis.faults(outcome.fleet.nodes.servers, outcome.fleet.settings.redis.shards)


def memory_is_given_back(outcome: Outcome) -> list[str]:
    """When nothing waits, nothing is counted as waiting: else readers would pause for ever in the end.

    Less than nothing is no harm: a wipe between a batch and its correction leaves that, until the next release.
    """
    return [
        f"{key.decode()} is {value.decode()}"
        for server in outcome.fleet.nodes.servers
        for key, value in server.store.keys.items()
        if outcome.drained and key.endswith(b":spans") and int(value) > 0
    ]


def memory_is_bounded(outcome: Outcome) -> list[str]:
    """While it runs, nothing grows beyond what its limit lets it hold (`bounds`)."""
    return outcome.excesses


LAWS: tuple[Callable[[Outcome], list[str]], ...] = (
    progress,
    conservation,
    nothing_lost,
    nothing_doubled,
    letters_arrive,
    one_verdict,
    errors_are_kept,
    not_early,
    keys_are_owned,
    memory_is_given_back,
    memory_is_bounded,
)


def breaches(outcome: Outcome) -> list[str]:
    """All of them, each with the name of its law."""
    return [f"{law.__name__}: {breach}" for law in LAWS for breach in law(outcome)]
