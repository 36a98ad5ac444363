"""The compiled reading of coded records against its twin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tss import model
from tss.model import FACTS, Claimed, Origin, Trigger, encode_origins
from tss.origins import list_records

numbers = st.integers(0, 5) | st.integers(0, 2**63 - 1)
chunks = st.lists(st.builds(Origin, numbers, numbers, st.integers(1, 2**32 - 1)), min_size=1, max_size=40)


def claimed(*coded: bytes) -> Claimed:
    return Claimed(bytes(16), Trigger.INACTIVITY, tuple(bytes(FACTS.itemsize) + one for one in coded))


@given(st.lists(st.lists(chunks, min_size=1, max_size=4), max_size=6))
def test_it_gives_what_the_twin_gives(traces: list[list[list[Origin]]]) -> None:
    """The same text and the same mark for a record that is there twice, whatever the order and number of records."""
    given_ = [claimed(*map(encode_origins, trace)) for trace in traces]
    assert list_records(given_) == model.list_records(given_)


@pytest.mark.parametrize("coded", [b"\x00", b"\x00\x02\x05\x01", b"\x80", b"\x80" * 12, b"\x00\x01\x05\x81"])
def test_a_damaged_name_is_the_twins_business(coded: bytes) -> None:
    """What is cut off gives what the twin gives of it, be it an error, and nothing is read beyond its end."""

    def outcome(read: object) -> object:
        try:
            return read([claimed(b"\x00\x01\x05\x01"), claimed(coded)])  # type: ignore[operator]
        except (RuntimeError, StopIteration) as fault:
            return type(fault)

    assert outcome(list_records) == outcome(model.list_records)


def test_many_records_in_any_order() -> None:
    """A trace of a hundred thousand records costs no more than sorting them."""
    origins = [Origin(i % 3, (i * 7919) % 100_003, 1) for i in range(100_003)]
    given_ = [claimed(*(encode_origins(origins[i : i + 1000]) for i in range(0, len(origins), 1000)))]
    assert list_records(given_) == model.list_records(given_)
