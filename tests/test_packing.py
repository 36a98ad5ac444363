"""How payloads are packed, without a Redis: what comes out is what went in, and bounds hold."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard

from tests.builders import QUICK, record, resource_spans, trace
from tss.model import Chunks
from tss.packing import (
    ID_MAX,
    ID_MIN,
    SAMPLE_PAYLOAD_BYTES,
    Dictionary,
    Form,
    Packing,
    Training,
    Unpacking,
    dictionary_of,
)
from tss.rules import RuleSet
from tss.wire import decode


def chunks(first: int, count: int = 100) -> Chunks:
    """One small trace each."""
    records = [
        record(resource_spans(*trace(i), service="cart"), offset=i) for i in range(first, first + count)
    ]
    return decode(records, RuleSet()).chunks


def plain(batch: Chunks) -> list[bytes]:
    return [batch.payload(row) for row in range(len(batch))]


def unknown(number: int) -> Dictionary:
    raise AssertionError(f"dictionary {number} was asked for")


class Recorded(Training):
    """Keeps the samples of each training."""

    def make(self, samples: Sequence[bytes]) -> Dictionary:
        SAMPLES.append(samples)
        return QUICK.make(samples)


SAMPLES: list[Sequence[bytes]] = []


@pytest.mark.parametrize("form", ["none", "lz4", "zstd"])
def test_what_is_packed_unpacks_to_the_same(form: Form) -> None:
    """Without a dictionary at hand, nobody needs one."""
    batch = chunks(1)
    packed = Packing(form, Training()).pack(batch)
    assert [Unpacking().unpack(payload, unknown) for payload in packed] == plain(batch)
    assert [
        Unpacking().unpack(payload, unknown) for payload in Packing(form, Training()).pack(chunks(1, 0))
    ] == []


def test_a_dictionary_of_small_payloads_packs_three_times_as_well_as_lz4() -> None:
    """Made of some payloads, it serves others of the same services."""
    training = Training(dictionary_bytes=4096)
    dictionary = training.make(plain(chunks(1, 1000)))
    packing, batch = Packing("zstd", training), chunks(5000)
    by_lz4 = packing.pack(batch)
    packing.adopt(dictionary)
    by_zstd = packing.pack(batch)
    assert sum(map(len, by_zstd)) * 3 < sum(map(len, by_lz4))
    assert {dictionary_of(payload) for payload in by_zstd} == {dictionary.id}
    unpacking = Unpacking()
    assert [unpacking.unpack(payload, lambda _: dictionary) for payload in by_zstd] == plain(batch)
    assert unpacking.unpack(by_zstd[0], unknown) == plain(batch)[0], "it is asked for once"


def test_a_zstd_frame_without_a_dictionary_is_read() -> None:
    """It says that it needs none."""
    assert Unpacking().unpack(zstandard.compress(b"spans" * 9), unknown) == b"spans" * 9


def test_a_dictionary_is_named_by_its_content() -> None:
    """The same content has the same id, another has another, and one that was changed is found out."""
    one = Dictionary.named(b"\x37\xa4\x30\xec....content")
    assert ID_MIN <= one.id < ID_MAX
    assert one.is_whole
    assert one == Dictionary.named(one.content) != Dictionary.named(one.content + b"!")
    assert not any(Dictionary(bad).is_whole for bad in (b"", one.content[:8], one.content + b"!"))


def test_the_sample_is_bounded_and_may_take_several_batches() -> None:
    """Spread over a batch that is more than enough; of a large payload its beginning; and nothing after that."""
    SAMPLES.clear()
    packing = Packing("zstd", Recorded(sample_bytes=20_000, samples_min=1))
    small, large_batch = chunks(1, 20), chunks(1000, 1000)
    packing.sample(small)
    assert not SAMPLES
    packing.sample(large_batch)
    packing.sample(chunks(5000))
    (samples,) = SAMPLES
    assert 20_000 <= sum(map(len, samples)) < 2 * 20_000
    assert set(plain(small)) < set(samples)
    assert set(samples) & set(plain(large_batch)[900:]), "spread over the batch"
    assert packing.trained is not None

    large = random.Random(1).randbytes(3 * SAMPLE_PAYLOAD_BYTES)
    at = np.array([0], np.int64)
    one = Chunks(small.trace_ids[:1], small.facts[:1], memoryview(large), np.array([0, len(large)]), at)
    packing = Packing("zstd", Recorded(sample_bytes=1, samples_min=1))
    packing.sample(one)
    assert SAMPLES[1] == [large[:SAMPLE_PAYLOAD_BYTES]]


def test_few_payloads_are_no_sample(caplog: pytest.LogCaptureFixture) -> None:
    """However large: nothing can be learned from them. What cannot be trained stays with LZ4, and the log says so."""
    SAMPLES.clear()
    packing = Packing("zstd", Recorded(sample_bytes=10, samples_min=250))
    for i in range(2):
        packing.sample(chunks(1000 * i))
    assert not SAMPLES
    packing = Packing("zstd", Training(sample_bytes=10, samples_min=1))
    packing.sample(chunks(1, 1))
    assert packing.trained is None
    assert packing.wants_dictionary
    assert "no dictionary could be made" in caplog.text
    assert [Unpacking().unpack(p, unknown) for p in packing.pack(chunks(7))] == plain(chunks(7))


def test_what_was_learned_can_be_adopted() -> None:
    """A sample makes a dictionary, and with it no more is wanted."""
    packing = Packing("zstd", Training(1024, sample_bytes=5000, samples_min=10))
    assert packing.wants_dictionary
    packing.sample(chunks(1, 1000))
    made = packing.trained
    assert made is not None
    packing.adopt(made)
    assert not packing.wants_dictionary


def test_what_nothing_repeats_in_is_packed_all_the_same() -> None:
    """A payload of noise grows by a few bytes and comes back whole."""
    noise = os.urandom(50_000)
    template = chunks(1, 1)
    batch = Chunks(
        template.trace_ids,
        template.facts,
        memoryview(noise),
        np.array([0, len(noise)]),
        np.array([0], np.int64),
    )
    packing = Packing("zstd", QUICK)
    packing.adopt(QUICK.make([b"x"]))
    (packed,) = packing.pack(batch)
    assert len(packed) < len(noise) + 100
    assert Unpacking().unpack(packed, lambda _: QUICK.make([b"x"])) == noise
