"""Consistent probability sampling: the specification's examples, and the laws it promises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tss.consistent import (
    RANDOMNESS_BITS,
    TWO_56,
    OtState,
    adjusted_count,
    parse_ot_state,
    threshold,
    trace_randomness,
)

probabilities = st.floats(0, 1)


def hex_digits(value: int) -> str:
    """As `ot=th:` states it: 14 digits without the zeros at the end."""
    return f"{value:014x}".rstrip("0") or "0"


@pytest.mark.parametrize(
    ("probability", "th"),
    [
        (1.0, "0"),
        (0.75, "4"),
        (0.5, "8"),
        (0.25, "c"),
        (0.1, "e6666"),
        (0.01, "fd70a"),
        (0.99, "028f5"),
        (2**-8, "ff"),
        (2**-56, "ffffffffffffff"),
    ],
)
def test_thresholds_are_those_of_the_specification(probability: float, th: str) -> None:
    """T = (1 − p)·2^56: one per cent begins fd70a, 99 % begins with a zero."""
    assert hex_digits(threshold(probability)).startswith(th)
    if len(th) != 5:  # a power of two has no more digits
        assert hex_digits(threshold(probability)) == th


def test_probability_zero_keeps_nothing() -> None:
    """Its threshold is above the largest random value."""
    assert threshold(0) == TWO_56 > TWO_56 - 1


@pytest.mark.parametrize(
    ("trace_state", "rv", "th"),
    [
        ("", None, None),
        ("vendor=1", None, None),
        ("ot=", None, None),
        ("ot=p:8;r:62", None, None),
        ("ot=th:0", None, 0),
        ("ot=th:8", None, 1 << 55),
        ("ot=th:fd70a4", None, 0xFD70A4 << 32),
        ("ot=th:028f5", None, 0x028F5 << 36),
        ("ot=th:00000000000001", None, 1),
        ("ot=th:ffffffffffffff", None, TWO_56 - 1),
        ("ot=rv:00000000000000", 0, None),
        ("ot=rv:0000000000000f", 15, None),
        ("ot=rv:ffffffffffffff", TWO_56 - 1, None),
        ("ot=th:8;rv:6e6d1a75832a2f", 0x6E6D1A75832A2F, 1 << 55),
        ("ot=rv:6e6d1a75832a2f;x:y;th:8", 0x6E6D1A75832A2F, 1 << 55),
        ("a=1,ot=th:c,b=2", None, 0xC << 52),
        ("a=1 , \tot=th:c , b=2", None, 0xC << 52),
        (",,ot=th:c", None, 0xC << 52),
        ("not=th:c", None, None),
        ("a=ot=th:c", None, None),
    ],
)
def test_ot_state_is_read(trace_state: str, rv: int | None, th: int | None) -> None:
    """`th` is padded with zeros on the right, `rv` has exactly 14 digits; other members and keys are passed over."""
    assert parse_ot_state(trace_state) == OtState(rv, th)


@pytest.mark.parametrize(
    "member",
    [
        "rv:6e6d1a75832a2",  # 13 digits
        "rv:6e6d1a75832a2ff",  # 15
        "rv:6E6D1A75832A2F",
        "rv:",
        "rv: e6d1a75832a2f",
        "th:",
        "th:FD70",
        "th:-1",
        "th:0x8",
        "th:fffffffffffffff",  # 15 digits
        "th:8\n",
        "th",
        ":",
        "th=8",
        "th:８",
    ],
)
def test_malformed_values_count_as_absent(member: str) -> None:
    """A value that is not as the specification writes it is not guessed at, and does not spoil what is beside it."""
    assert parse_ot_state(f"ot={member}") == OtState()
    assert parse_ot_state(f"ot=x:y;{member}") == OtState()
    other = "th:8" if member.startswith("rv") else "rv:0000000000000f"
    assert parse_ot_state(f"ot={member};{other}") == parse_ot_state(f"ot={other}")


@given(st.text(), st.text(alphabet="ot=:;,rvth0f "))
def test_no_trace_state_is_an_error(anything: str, close: str) -> None:
    """Whatever a producer writes there, reading it returns; numbers have at most 56 bits."""
    for state in (parse_ot_state(anything), parse_ot_state(f"ot={close}")):
        assert all(value is None or 0 <= value < TWO_56 for value in (state.rv, state.th))


def test_randomness_is_the_low_56_bits_of_the_trace_id() -> None:
    """The first nine bytes do not count."""
    assert trace_randomness(bytes(9) + b"\x01\x02\x03\x04\x05\x06\x07") == 0x01020304050607
    assert trace_randomness(b"\xff" * 9 + bytes(7)) == 0
    assert trace_randomness(b"\xff" * 16) == TWO_56 - 1


@given(probabilities, probabilities, st.integers(0, TWO_56 - 1))
def test_kept_at_one_probability_is_kept_at_every_larger_one(p: float, q: float, randomness: int) -> None:
    """So samplers in a row agree, and raising a rate never loses what it kept before."""
    low, high = sorted((p, q))
    if randomness >= threshold(low):
        assert randomness >= threshold(high)


@pytest.mark.parametrize("probability", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_the_probability(probability: float) -> None:
    """Over 200 000 ids, within five standard deviations."""
    ids, draw = 200_000, random.Random(f"{probability}")
    kept = sum(trace_randomness(draw.randbytes(16)) >= threshold(probability) for _ in range(ids))
    deviation = (ids * probability * (1 - probability)) ** 0.5
    assert abs(kept - ids * probability) < 5 * deviation


@pytest.mark.parametrize(
    ("incoming_th", "probability", "count"),
    [
        (None, 1.0, 1.0),
        (None, 0.5, 2.0),
        (None, 0.25, 4.0),
        (None, 0.01, 100.0),
        (0, 0.01, 100.0),
        (1 << 55, 1.0, 2.0),
        (1 << 55, 0.5, 2.0),
        (1 << 55, 0.75, 2.0),
        (1 << 55, 0.25, 4.0),
        (0xFD70A4 << 32, 1.0, 100.0),
        (TWO_56 - 1, 1.0, float(TWO_56)),
        (None, 2**-56, float(TWO_56)),
        (None, 0.0, None),
        (1 << 55, 0.0, None),
    ],
)
def test_adjusted_count(incoming_th: int | None, probability: float, count: float | None) -> None:
    """The stricter of the two thresholds counts, as both look at the same random value."""
    found = adjusted_count(incoming_th, probability)
    assert found == (None if count is None else pytest.approx(count, rel=1e-5))


@pytest.mark.parametrize(("head", "tail"), [(1.0, 0.1), (0.5, 0.1), (0.1, 0.5), (0.2, 0.2)])
def test_adjusted_counts_add_up_to_what_there_was(head: float, tail: float) -> None:
    """Behind a head sampler too: over 200 000 traces the kept ones stand for all, within five deviations."""
    traces, draw, total = 200_000, random.Random(f"{head} {tail}"), 0.0
    for _ in range(traces):
        randomness = draw.getrandbits(RANDOMNESS_BITS)
        if randomness >= threshold(head) and randomness >= threshold(tail):
            total += adjusted_count(threshold(head), tail) or 0
    share = min(head, tail)
    deviation = (traces * share * (1 - share)) ** 0.5 / share
    assert abs(total - traces) < 5 * deviation
