"""The values that are stored: what is written can be read again, whatever it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tss.model import (
    FACTS,
    Claimed,
    Origin,
    Trigger,
    Verdict,
    decode_origins,
    encode_origins,
    format_records,
    parse_records,
)

partitions = st.integers(0, 2**31 - 1)
offsets = st.one_of(st.integers(0, 50), st.integers(0, 2**63 - 1))
origins = st.builds(Origin, st.integers(0, 3) | partitions, offsets, st.integers(1, 2**32 - 1))


@given(st.lists(origins))
def test_origins_are_read_as_they_were_written(given_: list[Origin]) -> None:
    """In any order, with repeats, over any partitions: nothing is sorted, joined or lost."""
    assert list(decode_origins(encode_origins(given_))) == given_


def test_origins_are_small() -> None:
    """A record after the one before it costs two bytes, as there is one for each record of each trace."""
    some = [Origin(3, 1_000_000_000_000 + i, 4) for i in range(100)]
    assert len(encode_origins(some)) < 10 + 2 * 100


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([], ""),
        ([(0, 17)], "0:17"),
        ([(0, 17), (0, 18), (0, 19), (0, 23), (4, 2)], "0:17-19,23;4:2"),
        ([(4, 2), (0, 19), (0, 17), (0, 18), (0, 17)], "0:17-19;4:2"),
        ([(0, 0), (0, 1), (10, 1), (2, 1)], "0:0-1;2:1;10:1"),
    ],
)
def test_records_as_text(records: list[tuple[int, int]], text: str) -> None:
    """Partitions and offsets ascend, neighbours are joined: the column of the decisions table."""
    assert format_records(records) == text
    assert parse_records(text) == set(records)


@given(st.sets(st.tuples(st.integers(0, 3) | partitions, offsets)))
def test_records_are_read_as_they_were_written(records: set[tuple[int, int]]) -> None:
    """Any set of records comes back from its text."""
    assert parse_records(format_records(records)) == records


verdicts = st.builds(
    Verdict,
    kept=st.booleans(),
    reason=st.sampled_from(["error", "latency", "force", "not_sampled"]),
    policy=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1f")),
    probability=st.floats(0, 1),
    trigger=st.sampled_from(Trigger),
    rules=st.integers(0, 2**64 - 1),
)


@given(verdicts)
def test_a_verdict_is_read_as_it_was_written(verdict: Verdict) -> None:
    """To the last digit of its probability; the first byte alone tells a script kept from dropped."""
    encoded = verdict.encode()
    assert Verdict.decode(encoded) == verdict
    assert encoded[:1] == (b"1" if verdict.kept else b"0")


def test_a_policy_name_cannot_break_a_verdict() -> None:
    """The separator inside of a name becomes a blank."""
    encoded = Verdict(True, "force", "a\x1fb", 1.0, Trigger.LATE, 7).encode()
    assert Verdict.decode(encoded).policy == "a b"


def test_stored_layouts_do_not_move() -> None:
    """Scripts read the log time and the spans from the front of a field; workers of two versions share a Redis."""
    assert FACTS.descr == [
        ("log_time_ms", "<i8"),
        ("spans", "<u4"),
        ("bits", "<u4"),
        ("log_span_ms", "<u4"),
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
        ("randomness", "<u8"),
        ("rules", "<u8"),
        ("mask", "<u8"),
    ]
    assert FACTS.itemsize == 60
    assert (
        encode_origins([Origin(1, 300, 2), Origin(1, 301, 1), Origin(2, 0, 1)]).hex()
        == "0102ac02020101" + "02010001"
    )
    assert (
        Verdict(True, "error", "error", 0.5, Trigger.MAX_SIZE, 255).encode()
        == b"1\x1ferror\x1ferror\x1f0.5\x1f3\x1fff"
    )


def test_a_claim_knows_its_records() -> None:
    """From the fields alone, over all chunks, each record once."""
    zero = bytes(FACTS.itemsize)
    fields = (
        zero + encode_origins([Origin(0, 1, 2), Origin(1, 7, 1)]),
        zero + encode_origins([Origin(0, 1, 2), Origin(0, 9, 1)]),
    )
    claimed = Claimed(bytes(16), Trigger.INACTIVITY, fields)
    assert claimed.records() == {(0, 1), (1, 7), (0, 9)}
    assert len(claimed.facts) == 2


def test_triggers_have_names_for_people() -> None:
    """Lower case, as in the tables and the metrics."""
    assert [trigger.label for trigger in Trigger] == [
        "inactivity",
        "root_seen",
        "max_duration",
        "max_size",
        "memory_pressure",
        "shutdown",
        "late",
    ]
