"""The kernels and their slow twin give the same bytes, whatever comes. tests/test_wire.py compares them, too."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz
from tests.bench import generate
from tests.builders import (
    LOG_MS,
    any_value,
    framed,
    nested,
    raw_record,
    record,
    resource_spans,
    span,
    trace,
    trace_id,
    traces_data,
)
from tests.fuzz import RULES, decode_both_ways, fault_of, on_resource, on_span, rule_set
from tests.mutants import KINDS, Mutants
from tss import compiler, kernels, native, wire
from tss.consistent import trace_randomness
from tss.rules import RuleSet
from tss.wire import COPIES_BYTES_MAX

NO_RULES = RuleSet()
PLAIN = traces_data(*trace(1), *trace(2)).SerializeToString()


@pytest.mark.parametrize("rules", [NO_RULES, RULES], ids=["no rules", "rules"])
@pytest.mark.parametrize("layout", generate.LAYOUTS)
def test_realistic_batches_are_the_same_and_take_the_fast_path(layout: str, rules: RuleSet) -> None:
    """Batch after batch of each layout; no record of them is odd."""
    records = generate.records(layout, 3000)
    decoder = kernels.Decoder()
    for at in range(0, len(records), 7):
        assert fault_of(decoder, records[at : at + 7], rules) is None
    assert decoder.odd == 0


# One span that is a little more than plain, which kernels take in all the same.
PLAIN_ENOUGH = {
    "bare": resource_spans(span()).SerializeToString(),
    "text beyond ASCII": raw_record(span(name="Größe €𝄞" * 9).SerializeToString()),
    "all values": raw_record(
        span(
            attrs={"a": [1, None, {"b": b"\xff"}], "f": 0.5, "t": True, "n": None, "": -1}
        ).SerializeToString()
    ),
    "events and links": raw_record(
        span(events=[{"name": "e", "attributes": []}], links=[{"trace_id": b"x"}]).SerializeToString()
    ),
    "unknown fields": raw_record(span().SerializeToString() + framed(99, b"\xff") + b"\xf8\x07\x01"),
    "status twice": raw_record(span(error=True).SerializeToString() + framed(15, framed(2, b"why"), b"")),
    "trace id twice": raw_record(framed(1, b"x" * 16) + span().SerializeToString()),
    "no resource": raw_record(span().SerializeToString(), scope=b""),
    "empty resource": framed(1, framed(1, b"") + framed(2, framed(2, span().SerializeToString()))),
    "scope after spans": framed(1, framed(2, framed(2, span().SerializeToString()) + framed(1, b""))),
    "empty frames": framed(1, b"") + framed(1, framed(2, b"")) + PLAIN + framed(1, b""),
    "nested": raw_record(span(attrs={"k": nested(20)}).SerializeToString()),
}


@pytest.mark.parametrize("name", PLAIN_ENOUGH)
def test_ordinary_variety_takes_the_fast_path(name: str) -> None:
    """What real producers send is not left to the slow twin, and comes out the same."""
    decoder = kernels.Decoder()
    assert fault_of(decoder, [record(value=PLAIN_ENOUGH[name]), record(value=PLAIN, offset=1)], RULES) is None
    assert decoder.odd == 0


ODD = {
    "tombstone": None,
    "empty": b"",
    "JSON": b'{"resourceSpans": []}',
    "blanks, JSON": b'\n {"resourceSpans": []}',
    "garbage": b"garbage",
    "cut off": PLAIN[:-1],
    "no spans": traces_data(resource_spans()).SerializeToString(),
    "bad trace id": traces_data(span(1), span(2, trace_id=b"short"), span(3)).SerializeToString(),
    "zero span id": traces_data(span(1), span(2, span_id=bytes(8))).SerializeToString(),
    "no UTF-8": raw_record(span().SerializeToString(), framed(5, b"\xff") + span(2).SerializeToString()),
    "surrogate": raw_record(span(2).SerializeToString() + framed(5, b"\xed\xa0\x80")),
    "overlong text": raw_record(span(2).SerializeToString() + framed(5, b"\xc0\x80")),
    "resource twice": framed(1, framed(1, b"", b"") + framed(2, framed(2, span().SerializeToString()))),
    "schema twice": framed(1, framed(3, b"a", b"b") + framed(2, framed(2, span().SerializeToString()))),
    "scope twice": framed(1, framed(2, framed(1, b"", b"") + framed(2, span().SerializeToString()))),
    "group": raw_record(span().SerializeToString() + b"\xa3\x01\xa4\x01"),
    "field of another type": raw_record(span().SerializeToString() + b"\x08\x01"),
    "long tag": raw_record(span().SerializeToString() + b"\xb0\x80\x00\x01"),
    "long size": raw_record(span().SerializeToString() + b"\x2a\x81\x80\x80\x80\x80\x00x"),
    "huge number": raw_record(span().SerializeToString() + b"\x30" + b"\xff" * 9 + b"\x02"),
    "deep": raw_record(span(attrs={"k": nested(40)}).SerializeToString()),
    "value twice": raw_record(
        span().SerializeToString() + framed(9, framed(1, b"k") + framed(2, b"\x18\x05", b""))
    ),
}


@pytest.mark.parametrize("rules", [NO_RULES, RULES], ids=["no rules", "rules"])
@pytest.mark.parametrize("name", ODD)
def test_odd_records_are_joined_as_if_all_were_slow(name: str, rules: RuleSet) -> None:
    """Odd records lie between plain ones of the same traces; facts, order and dead letters are those of the twin."""
    values = [PLAIN, ODD[name], PLAIN, ODD[name], ODD[name], PLAIN]
    records = [
        record(value=v, offset=i, partition=i % 2, timestamp_ms=LOG_MS - i) for i, v in enumerate(values)
    ]
    decoder = kernels.Decoder()
    assert fault_of(decoder, records, rules) is None
    assert decoder.odd == 3


def test_a_batch_of_odd_records_only_and_one_of_none() -> None:
    """There is nothing for the kernels to do, then."""
    odd = [record(value=value, offset=i) for i, value in enumerate(ODD.values())]
    for batch in (odd, odd[:2], []):
        assert fault_of(kernels.Decoder(), batch, RULES) is None


def test_a_stated_randomness_is_the_last_one_in_the_order_of_records() -> None:
    """Also where an odd record states just what the trace id would give."""
    own = f"ot=rv:{trace_randomness(trace_id(1)):014x}"
    bad = span(2, span_id=b"")
    for states in (
        ("ot=rv:0000000000000f", own),
        (own, "ot=rv:0000000000000f"),
        ("ot=rv:0000000000000f", "ot=th:8"),
    ):
        plain, odd = (span(1, i, trace_state=state) for i, state in enumerate(states, start=1))
        for parts in ((plain,), (odd, bad)), ((odd, bad), (plain,)):
            batch = [record(*spans, offset=i) for i, spans in enumerate(parts)]
            assert fault_of(kernels.Decoder(), batch, NO_RULES) is None


@pytest.mark.parametrize("shape", ["traces", "spans"])
def test_copies_are_bounded_as_in_the_twin(shape: str) -> None:
    """A big resource is copied for each trace; spans of one trace share a copy."""
    big = {"blob": "x" * (COPIES_BYTES_MAX // 50)}
    ids = range(1, 61)
    spans = [span(i, i) if shape == "traces" else span(1, i) for i in ids]
    assert fault_of(kernels.Decoder(), [record(resource_spans(*spans, resource=big))], RULES) is None


def test_values_beyond_the_memory_of_the_rules_are_judged_all_the_same() -> None:
    """More distinct values than are remembered, and one that is longer than any that is."""
    sizes = [kernels.VALUE_BYTES_MAX - 100] * 12 + [kernels.VALUE_BYTES_MAX + 1, 3]
    spans = [span(i, i, attrs={"k": str(i) * (size // len(str(i)))}) for i, size in enumerate(sizes, start=1)]
    rules = rule_set(on_span("k", "starts_with", "1"), on_span("k", "ends_with", "0"))
    decoder = kernels.Decoder()
    for _ in range(2):
        assert fault_of(decoder, [record(one, offset=i) for i, one in enumerate(spans)], rules) is None
    assert decoder.odd == 2


def test_rules_may_change_between_batches() -> None:
    """Nothing that was remembered for other rules is used."""
    decoder = kernels.Decoder()
    batch = [record(span(attrs={"k": 5, "other": 5}), resource_spans(span(2), service="cart"))]
    for key in ("k", "other", "none", "k"):
        for rules in (
            rule_set(on_span(key, "eq", 5)),
            rule_set(on_resource("service.name", "eq", "cart")),
            NO_RULES,
        ):
            assert fault_of(decoder, batch, rules) is None


attribute_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
OPERANDS = (
    {
        "exists": st.none() | st.booleans(),
        "in": st.lists(st.booleans() | st.integers(0, 9) | st.text(max_size=2), min_size=1, max_size=3),
        "regex": st.sampled_from(["^a", "[0-9]+$", "ä|ö", "."]),
    }
    | {op: st.sampled_from(["a", "1", "tru", "[", "é"]) for op in ("contains", "starts_with", "ends_with")}
    | {op: st.integers(-9, 9) | st.floats(-9, 9) for op in ("gt", "gte", "lt", "lte")}
    | {op: st.booleans() | st.integers(-9, 9) | st.text(max_size=2) for op in ("eq", "neq")}
)
KEYS = st.sampled_from(["k", "ö", "a.long.key.of.more.than.8"])
matchers = st.sampled_from(sorted(OPERANDS)).flatmap(
    lambda op: st.builds(lambda key, value: {"key": key, "op": op, "value": value}, KEYS, OPERANDS[op])
)
matches = st.fixed_dictionaries(
    {}, optional={side: st.lists(matchers, min_size=1, max_size=3) for side in ("span", "resource")}
).filter(bool)


@given(
    st.lists(matches, min_size=1, max_size=5),
    st.lists(
        st.tuples(
            st.dictionaries(KEYS, attribute_values), st.lists(st.tuples(KEYS, attribute_values), max_size=4)
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_masks_are_exact_for_all_operators(
    given_matches: list[dict[str, object]], frames: list[tuple[dict[str, object], list[tuple[str, object]]]]
) -> None:
    """Any value of any type under any operator, keys repeated, on resource and span."""
    groups = []
    for resource, pairs in frames:
        one = span(len(pairs) + 1)
        for key, value in pairs:
            one.attributes.add(key=key, value=any_value(value))
        groups.append(resource_spans(one, service=None, resource=resource))
    assert fault_of(kernels.Decoder(), [record(*groups)], rule_set(*given_matches)) is None


@settings(max_examples=150)
@given(st.text(max_size=40), st.binary(max_size=12), st.integers(0, 12))
def test_texts_are_checked_as_the_official_class_checks_them(text: str, raw: bytes, at: int) -> None:
    """Valid UTF-8 of any length is plain; with any bytes put in, both ways still agree."""
    encoded = text.encode()
    decoder = kernels.Decoder()
    whole = raw_record(span().SerializeToString() + framed(5, encoded))
    assert fault_of(decoder, [record(value=whole)], NO_RULES) is None
    assert decoder.odd == 0
    mixed = raw_record(span().SerializeToString() + framed(5, encoded[:at] + raw + encoded[at:]))
    assert fault_of(decoder, [record(value=mixed)], NO_RULES) is None


def test_mutants() -> None:
    """Some thousand of the mutants that `bin/fuzz` makes by the million, most of them changed once."""
    tally = fuzz.run(8000, seed=5)
    assert not tally.faults
    found = tally.sum()
    assert found.mutants == 8000
    assert 0.4 < found.taken / found.mutants < 0.8, "both paths must be tried"
    assert found.refused / found.mutants < 0.4, "what is refused says little of what is read"
    assert tally.kinds.keys() == {kind for kinds in KINDS.values() for kind in kinds}


def test_a_seed_always_makes_the_same_mutants() -> None:
    """So a run can be repeated, or continued by another process."""
    one, other = Mutants(3), Mutants(3)
    kinds = [one.kind() for _ in range(1000)]
    assert kinds == [other.kind() for _ in range(1000)]
    assert list(map(one.make, kinds)) == list(map(other.make, kinds))


@pytest.mark.parametrize("seed", [1, 2])
def test_every_mutant_begins_as_a_record_that_the_kernels_take_in(seed: int) -> None:
    """Else all that is made of it would only try the way to the twin."""
    source = Mutants(seed)
    for sample in source.samples:
        decoder = kernels.Decoder()
        assert decode_both_ways([record(value=sample.value)], RULES).dead == []
        decoder.decode([record(value=sample.value)], RULES)
        assert decoder.odd == 0, sample.value.hex()


def test_a_reader_that_says_something_else_is_found() -> None:
    """The fuzzer sees one bit of one payload."""
    whole = [record(value=PLAIN)]
    expected = wire.decode(whole, RULES)
    changed = bytearray(expected.chunks.buffer)
    changed[-1] ^= 1
    other = replace(expected, chunks=replace(expected.chunks, buffer=memoryview(bytes(changed))))
    assert fault_of(kernels.Decoder(), whole, RULES, other) == "buffer"
    assert fault_of(kernels.Decoder(), whole, RULES, expected) is None


def test_nothing_is_compiled_while_records_are_read() -> None:
    """After all that these tests did, each kernel knows the one kind of arguments that `warm_up` compiles it for."""
    kernels.warm_up()
    for batch in ([record(value=PLAIN)], [record(value=PLAIN), record(value=ODD["bad trace id"], offset=1)]):
        kernels.decode(batch, RULES)
    own = [kernel for kernel in native.KERNELS if kernel.__module__ == kernels.__name__]
    assert {kernel.__name__: len(kernel.signatures) for kernel in own if len(kernel.signatures) != 1} == {}


def test_a_copy_or_a_load_outside_of_its_buffer_is_refused() -> None:
    """The two accesses that numba cannot check are checked, in production too."""
    eight, u = np.zeros(8, np.uint8), np.uint64
    copy_bytes, load_word = fuzz.from_python(native.copy_bytes), fuzz.from_python(native.load_word)
    assert copy_bytes(eight, u(0), eight, u(0), u(8)) == 8
    for to_at, at, size in ((1, 0, 8), (0, 1, 8), (0, 0, 9), (9, 0, 0), (0, 2**64 - 1, 2), (0, 0, 2**64 - 1)):
        with pytest.raises(IndexError):
            copy_bytes(eight, u(to_at), eight, u(at), u(size))
    assert load_word(eight, u(0)) == 0
    for at in (1, 8, 2**64 - 8, 2**64 - 1):
        with pytest.raises(IndexError):
            load_word(eight, u(at))


# --- choosing and warming up -------------------------------------------------------------------------------------


def test_the_slow_twin_can_be_chosen() -> None:
    """`app.kernels=python` decodes by the twin, `numba` by kernels that are ready."""
    assert compiler.load("python") is compiler.PYTHON
    ready = compiler.load("numba").decode
    assert ready is not wire.decode
    assert (
        fuzz.difference(ready([record(value=PLAIN)], RULES), wire.decode([record(value=PLAIN)], RULES))
        is None
    )


def test_the_cache_moves_to_a_private_folder_where_its_own_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder that others can write to is not trusted: what lies there is run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert compiler._cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/kernels")
    private = compiler._cache_folder()
    assert (private.parent, private.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert compiler._cache_folder() == private
    private.chmod(0o777)
    assert compiler._cache_folder() != private


def test_a_change_of_any_compiled_source_means_another_folder() -> None:
    """What was compiled before would be run else: numba looks at the file of a kernel, not at what is pasted in."""
    package = Path(compiler.__file__).parent
    compiled = {path.name for path in package.glob("*.py") if "from tss.native import" in path.read_text()}
    assert set(compiler.SOURCES) == compiled | {"native.py"}


def test_folders_of_states_that_nobody_used_are_removed(tmp_path: Path) -> None:
    """The newest stay, and all that were used within the hour; what is not ours is left alone."""
    now = time.time()
    ages_hours = {f"{number:016x}": number / 4 for number in range(1, 13)}
    for name, hours in {**ages_hours, "numba_of_others": 99.0}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / compiler.COMPLETE).touch()
        os.utime(tmp_path / name, (now, now - hours * 3600))
    compiler._remove_unused(tmp_path)
    newest = set(list(ages_hours)[: compiler.STATES_KEPT])
    assert {path.name for path in tmp_path.iterdir()} == newest | {"numba_of_others"}
    for path in tmp_path.iterdir():
        os.utime(path)
    for name in ages_hours:
        (tmp_path / name).mkdir(exist_ok=True)
    compiler._remove_unused(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(ages_hours) + 1


def test_shipped_kernels_are_copied_once_and_whole(tmp_path: Path) -> None:
    """Two processes that begin with the same copy leave one, and nothing half done beside it."""
    (tmp_path / "shipped" / "kernels").mkdir(parents=True)
    (tmp_path / "shipped" / "kernels" / "one").write_text("compiled")
    (tmp_path / "private").mkdir()
    for _ in range(2):
        compiler._copy(tmp_path / "shipped", tmp_path / "private" / "state")
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["state"]
    assert (tmp_path / "private" / "state" / "kernels" / "one").read_text() == "compiled"
