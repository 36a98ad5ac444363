"""Force rules: what each operator means, which rules are refused, and how a set turns into bits."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tss.errors import BadRequest
from tss.rules import (
    DURATION_MAX_SECS,
    FORCE_RULES_MAX,
    MATCHERS_MAX,
    PATTERN_SUBJECT_CHARS_MAX,
    ForceRule,
    Matcher,
    RuleSet,
    describe,
    new_rule,
)

NOW = datetime(2026, 11, 21, 10, tzinfo=UTC)
DEMO = {"resource": [{"key": "service.name", "op": "eq", "value": "demo-service"}]}
ABSENT: Any = object()


def rule(rule_id: str = "r1", **changes: Any) -> ForceRule:
    body = {"id": rule_id, "match": DEMO, "action": "force_keep", "duration_secs": 300, **changes}
    return new_rule(body, rule_id="unused", now=NOW)


def refusal(**changes: Any) -> list[dict[str, str]]:
    with pytest.raises(BadRequest) as caught:
        rule(**changes)
    assert caught.value.status == 422
    return caught.value.errors


@pytest.mark.parametrize(
    ("op", "value", "holding", "failing"),
    [
        ("eq", "a", ["a"], ["A", "ab", "", 1, ABSENT, None]),
        ("eq", "500", ["500", 500, 500.0], ["0500", "500.0", 501]),
        ("eq", "true", [True, "true"], [False, 1]),
        ("eq", 500, [500, 500.0, "500", "5e2"], ["five", True, b"500", [500], ABSENT]),
        ("eq", 1, [1, 1.0, "1"], [True]),
        (
            "eq",
            9007199254740993,
            [9007199254740993, "9007199254740993"],
            [9007199254740992, 9007199254740992.0],
        ),
        ("eq", True, [True, "true"], [False, 1, "True", "1", ABSENT]),
        ("eq", "00ff", [b"\x00\xff", "00ff"], [b"\x00"]),
        ("eq", '["a",1]', [["a", 1]], [["a"], "a"]),
        ("neq", "a", ["b", 1, "", False], ["a", ABSENT, None]),
        ("neq", 500, [200, "x"], [500, "500", ABSENT]),
        ("in", ["a", 2, True], ["a", 2, "2", True], ["b", 1, False, ABSENT]),
        ("contains", "es", ["test", ["yes"], {"es": 1}], ["ES", "", ABSENT]),
        ("contains", "0", [500, 10.5], [7, ABSENT]),
        ("starts_with", "/pay", ["/pay", "/pay/1"], ["/ Pay", "x/pay", ABSENT]),
        ("ends_with", "/1", ["/pay/1", "/1"], ["/1/", ABSENT]),
        ("regex", "^/api/v[0-9]+/", ["/api/v2/x"], ["/api/vx/", "x/api/v2/", ABSENT]),
        ("regex", "(?i)ERR", ["an error"], ["fine"]),
        ("regex", "^5..$", [500, "503"], [5000, 404]),
        ("regex", "^$", [""], ["x", ABSENT, None]),
        ("exists", None, ["", 0, False, [], "x"], [ABSENT, None]),
        ("exists", True, ["x"], [ABSENT]),
        ("exists", False, [ABSENT, None], ["", 0, "x"]),
        ("gt", 10, [11, 10.5, "11", float("inf")], [10, 9, "x", True, float("nan"), ABSENT]),
        ("gte", 10, [10, "10.0", 11], [9.99, ABSENT]),
        ("lt", "10", [9, -1, "9.5"], [10, "abc", [], ABSENT]),
        ("lte", 10.5, [10.5, 10], [10.6, b"1", ABSENT]),
    ],
)
def test_operators(op: Any, value: Any, holding: list[Any], failing: list[Any]) -> None:
    """Each operator holds on exactly what the module's table says, for every type an attribute can have."""
    matcher = Matcher(key="k", op=op, value=tuple(value) if isinstance(value, list) else value)
    for attribute, expected in [(a, True) for a in holding] + [(a, False) for a in failing]:
        attributes = {} if attribute is ABSENT else {"k": attribute, "other": "a"}
        assert matcher.holds(attributes) is expected, (op, value, attribute)


@given(
    st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.binary(), st.lists(st.text())),
    st.sampled_from(["eq", "neq", "contains", "starts_with", "ends_with", "regex", "gt", "gte", "lt", "lte"]),
)
def test_no_attribute_can_break_a_matcher(attribute: Any, op: Any) -> None:
    """Whatever an attribute holds, a matcher answers, and eq and neq answer opposite things."""
    matcher = Matcher(key="k", op=op, value="7")
    assert isinstance(matcher.holds({"k": attribute}), bool)
    same = Matcher(key="k", op="eq", value="7").holds({"k": attribute})
    assert Matcher(key="k", op="neq", value="7").holds({"k": attribute}) is not same


any_text = st.text(alphabet="a7.\ud800é\x00", max_size=5) | st.text() | st.integers().map(str)


@given(
    st.lists(any_text, max_size=5),
    st.sampled_from(
        [
            *(("exists", value) for value in (None, True, False)),
            *((op, value) for op in ("eq", "neq") for value in ("7", 7, 7.0, True)),
            *(
                (op, "7")
                for op in ("contains", "starts_with", "ends_with", "regex", "gt", "gte", "lt", "lte")
            ),
            *(("regex", "^a.7$"), ("in", (7, "a"))),
        ]
    ),
)
def test_texts_are_matched_together_as_one_by_one(texts: list[str], condition: tuple[Any, Any]) -> None:
    """What else is looked at changes nothing."""
    op, value = condition
    matcher = Matcher(key="k", op=op, value=value)
    assert list(matcher.holds_on_texts(texts)) == [matcher.holds({"k": one}) for one in texts]


def test_lone_surrogates_do_not_break_patterns() -> None:
    """Text that is no valid Unicode, as JSON escapes can smuggle in, is matched like any other."""
    assert Matcher(key="k", op="regex", value="^a.b$").holds({"k": "a\ud800b"})


def test_patterns_take_linear_time() -> None:
    """A pattern that would stop a backtracking engine for years is answered at once."""
    evil = Matcher(key="k", op="regex", value="^(a+)+$")
    started = time.perf_counter()
    assert not evil.holds({"k": "a" * 60 + "!"})
    assert time.perf_counter() - started < 1


def test_patterns_see_a_bounded_text() -> None:
    """Of a long attribute a pattern sees only the first characters, as documented."""
    matcher = Matcher(key="k", op="regex", value="needle")
    assert matcher.holds({"k": "x" * (PATTERN_SUBJECT_CHARS_MAX - 6) + "needle"})
    assert not matcher.holds({"k": "x" * PATTERN_SUBJECT_CHARS_MAX + "needle"})


def test_creation_body_of_the_documented_curl() -> None:
    """The body that users paste makes a rule that ends after its duration."""
    made = new_rule(
        {
            "description": "Force sample all demo-service traces",
            "duration_secs": 300,
            "priority": 100,
            "match": DEMO,
            "action": "force_keep",
        },
        rule_id="abc",
        now=NOW,
    )
    assert (made.id, made.enabled, made.priority) == ("abc", True, 100)
    assert made.expires_at == NOW + timedelta(seconds=300)
    assert not made.expired(NOW + timedelta(seconds=299))
    assert made.expired(NOW + timedelta(seconds=300))
    assert ForceRule.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"match": {}}, "/match", "at least one matcher"),
        (
            {"match": {"span": [{"key": "a", "op": "contans", "value": "b"}]}},
            "/match/span/0/op",
            "'contains'?",
        ),
        ({"match": {"span": [{"key": "a", "op": "in", "value": "b"}]}}, "/match/span/0", "a list"),
        ({"match": {"span": [{"key": "a", "op": "in", "value": []}]}}, "/match/span/0/value", ""),
        ({"match": {"span": [{"key": "a", "op": "eq"}]}}, "/match/span/0", "takes one value"),
        ({"match": {"span": [{"key": "a", "op": "gt", "value": "x"}]}}, "/match/span/0", "takes a number"),
        ({"match": {"span": [{"key": "a", "op": "gt", "value": True}]}}, "/match/span/0", "takes a number"),
        (
            {"match": {"span": [{"key": "a", "op": "contains", "value": ""}]}},
            "/match/span/0",
            "one character",
        ),
        ({"match": {"span": [{"key": "a", "op": "regex", "value": "("}]}}, "/match/span/0", "missing )"),
        (
            {"match": {"span": [{"key": "a", "op": "regex", "value": "(?=x)"}]}},
            "/match/span/0",
            "no lookaround",
        ),
        ({"match": {"span": [{"key": "a", "op": "regex", "value": "x" * 300}]}}, "/match/span/0", "300"),
        ({"match": {"span": [{"key": "a", "op": "eq", "value": "x" * 2000}]}}, "/match/span/0/value", "2000"),
        ({"match": {"span": [{"key": "", "op": "exists"}]}}, "/match/span/0/key", ""),
        ({"match": {"spans": []}}, "/match/spans", "not a field"),
        ({"action": "keep"}, "/action", "'force_keep'"),
        ({"priority": 10**9}, "/priority", "10000"),
        ({"priority": "high"}, "/priority", ""),
        ({"duration_secs": 0}, "/duration_secs", ""),
        ({"duration_secs": float("inf")}, "/duration_secs", ""),
        ({"duration_secs": float("nan")}, "/duration_secs", ""),
        ({"duration_secs": DURATION_MAX_SECS + 1}, "/duration_secs", str(DURATION_MAX_SECS)),
        ({"duration_secs": None}, "/", "exactly one of"),
        ({"expires_at": "2026-11-21T11:00:00Z"}, "/", "exactly one of"),
        ({"duration_secs": None, "expires_at": "2026-11-21T09:00:00Z"}, "/expires_at", "ahead"),
        ({"duration_secs": None, "expires_at": "2027-11-21T09:00:00Z"}, "/expires_at", "30 days"),
        ({"duration_secs": None, "expires_at": "2026-11-21T11:00:00"}, "/expires_at", "timezone"),
        ({"rule_id": "../etc"}, "/id", ""),
        ({"enabeld": True}, "/enabeld", "not a field"),
        ({"description": "x" * 5000}, "/description", "1000"),
    ],
)
def test_refused_rules(changes: dict[str, Any], pointer: str, words: str) -> None:
    """A rule that cannot work is refused with a pointer at the fault and words that say what is wrong."""
    errors = refusal(**changes)
    assert [e["pointer"] for e in errors] == [pointer]
    assert words in errors[0]["detail"]


def test_too_many_matchers() -> None:
    """The number of matchers of a rule is bounded over resource and span together."""
    some = [{"key": "a", "op": "exists"}] * (MATCHERS_MAX // 2)
    assert rule(match={"resource": some, "span": some})
    assert "at most 16" in refusal(match={"resource": some, "span": [*some, *some[:1]]})[0]["detail"]


def test_all_faults_are_told_together() -> None:
    """Whoever makes two mistakes reads of both."""
    assert {e["pointer"] for e in refusal(action="x", priority=-1)} == {"/action", "/priority"}


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_bodies_that_are_no_object(body: object) -> None:
    """Any JSON value is answered with a refusal, never an exception of another kind."""
    with pytest.raises(BadRequest):
        new_rule(body, rule_id="a", now=NOW)


def test_extension_counts_from_the_end_or_from_now() -> None:
    """Extending adds to what is left, revives what has ended, and stays within the bound."""
    made = rule()
    assert made.extended(60, NOW).expires_at == NOW + timedelta(seconds=360)
    later = NOW + timedelta(hours=1)
    assert made.extended(60, later).expires_at == later + timedelta(seconds=60)
    for bad in (0, -1, float("nan"), float("inf"), DURATION_MAX_SECS):
        with pytest.raises(BadRequest):
            made.extended(bad, NOW)


def test_order_of_deciding() -> None:
    """Priority goes first, at equal priority keep goes before drop, then the id decides."""
    rules = [
        rule("d", priority=1),
        rule("c", priority=5, action="force_drop"),
        rule("b", priority=5),
        rule("a", priority=5),
        rule("z", priority=9, enabled=False),
    ]
    assert [r.id for r in RuleSet(rules).rules] == ["a", "b", "c", "d"]


def test_mask_asks_for_one_span_and_its_resource() -> None:
    """A bit is set when all matchers of the rule hold on the same span and its resource, not across spans."""
    both: dict[str, Any] = {
        "resource": [{"key": "service.name", "op": "eq", "value": "shop"}],
        "span": [{"key": "a", "op": "eq", "value": 1}, {"key": "b", "op": "eq", "value": 2}],
    }
    rules = RuleSet([rule("a", match=both), rule("b", match={"span": both["span"][:1]})])
    shop = {"service.name": "shop"}
    assert rules.mask(shop, {"a": 1, "b": 2}) == 0b11
    assert rules.mask(shop, {"a": 1}) | rules.mask(shop, {"b": 2}) == 0b10
    assert rules.mask({}, {"a": 1, "b": 2}) == 0b10


def test_the_highest_bit_fits() -> None:
    """A full set uses all 64 bits; one rule more is refused."""
    rules = [rule(f"r{i:02}") for i in range(FORCE_RULES_MAX)]
    assert RuleSet(rules).mask({"service.name": "demo-service"}, {}) == (1 << 64) - 1
    with pytest.raises(ValueError, match="at most 64"):
        RuleSet([*rules, rule("more")])


def test_active_leaves_out_expired_rules() -> None:
    """The mask of active rules loses a bit at the moment the rule ends."""
    rules = RuleSet([rule("a", duration_secs=10), rule("b", duration_secs=20)])
    seen = [rules.active(NOW + timedelta(seconds=s)) for s in (0, 10, 20)]
    assert seen == [0b11, 0b10, 0]


def test_version_names_what_a_mask_means() -> None:
    """The version is stable, changes with match, action and membership, and not with expiry or words."""
    base = RuleSet([rule("a"), rule("b")])
    assert RuleSet().version == 0
    assert base.version == RuleSet([rule("b"), rule("a")]).version
    assert base.version == 6517269188905050558  # the same in every process and release: it is stored in Redis
    assert 0 < base.version < 1 << 64
    extended = [rule("a", duration_secs=999, description="words"), rule("b")]
    assert RuleSet(extended).version == base.version
    others = [
        [rule("a")],
        [rule("a"), rule("b", action="force_drop")],
        [rule("a"), rule("b", priority=999)],
        [rule("a"), rule("b", match={"span": [{"key": "k", "op": "exists"}]})],
    ]
    assert len({RuleSet(o).version for o in [*others, [rule("a"), rule("b")]]}) == 5


def test_describe_reads_as_a_sentence() -> None:
    """A rule can be told in words with all its conditions."""
    made = rule(
        match={
            **DEMO,
            "span": [
                {"key": "n", "op": "in", "value": ["a", 1]},
                {"key": "x", "op": "exists", "value": False},
            ],
        },
        action="force_drop",
        enabled=False,
    )
    assert describe(made) == (
        'drop traces with a span where resource service.name is "demo-service" and n is one of ["a", 1] '
        "and x is absent; priority 100, until 2026-11-21T10:05:00Z (disabled)"
    )
