"""Force rules: an operator's live orders to keep or drop certain traces, as data.

A rule holds on a trace when, for one of its spans, every resource matcher holds on that span's resource and every
span matcher holds on that very span. `RuleSet` turns up to 64 rules into the bits of one integer; judging by those
bits is done elsewhere.

What a matcher means (`text` and `number` are the functions below; a null value counts as a missing key):

    op             key missing   otherwise true when
    exists         false         always; with value false: the other way round
    eq             false         rule value a number: number(attribute) equals it;  a boolean: the attribute is that
                                 boolean, or its text;  a string: text(attribute) equals it
    neq            false         eq is false
    in             false         eq is true for one of the values
    contains       false         text(attribute) contains it
    starts_with    false         text(attribute) starts with it
    ends_with      false         text(attribute) ends with it
    regex          false         the pattern is found somewhere in text(attribute); RE2 syntax, case-sensitive
    gt gte lt lte  false         number(attribute) compares so; false when it is not a number

So `http.response.status_code` eq 500 holds on 500, 500.0 and "500", because instrumentations disagree on the type.
A missing key never matches (but for `exists: false`): "neq" reads as "has another value", since a rule that took
every span without the key would take nearly every trace.

Patterns run on RE2 (through pyarrow), whose time is linear in the text: Python's `re` can be stopped for hours by a
short pattern, and rejecting the known bad shapes does not catch them all. Lookaround and back-references do not
exist there. Length bounds keep the worst pattern at some 30 ms.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeAlias, get_args

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from tss.errors import BadRequest

AttributeValue: TypeAlias = str | bool | int | float | bytes | list[Any] | dict[str, Any] | None
Attributes: TypeAlias = Mapping[str, AttributeValue]

FORCE_RULES_MAX = 64  # bits of the mask that every chunk carries
MATCHERS_MAX = 16  # of one rule; each costs a look-up per span
VALUES_MAX = 256  # of one `in`
KEY_CHARS_MAX = 256
VALUE_CHARS_MAX = 1024
PATTERN_CHARS_MAX = 256
PATTERN_SUBJECT_CHARS_MAX = 1024  # a pattern sees so much of a text; attributes are rarely longer
DESCRIPTION_CHARS_MAX = 1000
PRIORITY_MAX = 10_000
PRIORITY_DEFAULT = 100
DURATION_MAX_SECS = 30 * 24 * 3600  # a force rule is a temporary measure; it can be extended
PATTERN_CACHE_SIZE = 8192  # attribute values repeat: services, routes, hosts
RULE_ID = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

Op = Literal[
    "eq", "neq", "contains", "starts_with", "ends_with", "regex", "in", "exists", "gt", "gte", "lt", "lte"
]
Action = Literal["force_keep", "force_drop"]

_TEXT_OPS = ("contains", "starts_with", "ends_with", "regex")
_NUMBER_OPS = ("gt", "gte", "lt", "lte")
_NUMERAL = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,3})?", re.ASCII)


def _known(choices: tuple[str, ...]) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, str) and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{value[:40]!r} is not known{hint} Known: {', '.join(choices)}")
        return value

    return BeforeValidator(check)


def _bounded(value: str | bool | int | float) -> str | bool | int | float:
    if isinstance(value, str) and len(value) > VALUE_CHARS_MAX:
        raise ValueError(f"has {len(value)} characters; at most {VALUE_CHARS_MAX}")
    if isinstance(value, int) and abs(value) > 1 << 64:
        raise ValueError("is beyond 64 bits; no attribute can hold it")
    return value


Scalar = Annotated[
    StrictBool | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictStr,
    AfterValidator(_bounded),
]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Matcher(_Value):
    """One condition on one attribute; the module's table says what each operator means."""

    key: str = Field(min_length=1, max_length=KEY_CHARS_MAX)
    op: Annotated[Op, _known(get_args(Op))]
    value: Scalar | Annotated[tuple[Scalar, ...], Field(min_length=1, max_length=VALUES_MAX)] | None = None

    @model_validator(mode="after")
    def _value_fits_op(self) -> Matcher:
        value = self.value
        if self.op == "exists":
            if value is not None and not isinstance(value, bool):
                raise ValueError("op exists takes no value, or true or false")
        elif self.op == "in":
            if not isinstance(value, tuple):
                raise ValueError("op in takes a list of values")
        elif value is None or isinstance(value, tuple):
            raise ValueError(f"op {self.op} takes one value")
        elif self.op in _TEXT_OPS and (not isinstance(value, str) or not value):
            raise ValueError(f"op {self.op} takes a text of at least one character")
        elif self.op in _NUMBER_OPS and number(value) is None:
            raise ValueError(f"op {self.op} takes a number")
        if self.op == "regex":
            _check_pattern(str(value))
        return self

    def holds(self, attributes: Attributes) -> bool:
        """True when the condition holds on `attributes`."""
        attribute = attributes.get(self.key)
        if attribute is None:
            return self.op == "exists" and self.value is False
        value: Any = self.value
        match self.op:
            case "exists":
                return value is not False
            case "eq":
                return _equal(attribute, value)
            case "neq":
                return not _equal(attribute, value)
            case "in":
                return any(_equal(attribute, one) for one in value)
            case "contains":
                return value in text(attribute)
            case "starts_with":
                return text(attribute).startswith(value)
            case "ends_with":
                return text(attribute).endswith(value)
            case "regex":
                return _found(value, text(attribute)[:PATTERN_SUBJECT_CHARS_MAX])
            case _:
                return _compares(self.op, number(attribute), number(value))

    def holds_on_texts(self, texts: Sequence[str]) -> Sequence[bool]:
        """`holds` for each of these as the attribute; patterns take them all at once, some fifty times faster."""
        if self.op == "eq" and isinstance(self.value, str):
            return [one == self.value for one in texts]
        if self.op == "regex":
            # A lone surrogate (OTLP/JSON can hold one) is no UTF-8.
            subjects = [one[:PATTERN_SUBJECT_CHARS_MAX].encode("utf-8", "replace") for one in texts]
            array = pa.array(subjects, pa.binary()).cast(pa.string())
            return [bool(found) for found in pc.match_substring_regex(array, str(self.value)).to_pylist()]
        return [self.holds({self.key: one}) for one in texts]


def text(value: AttributeValue) -> str:
    """An attribute as text: JSON for lists and maps, hex for bytes, whole doubles without `.0`."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case bytes():
            return value.hex()
        case float():
            return str(int(value)) if value.is_integer() and abs(value) < 1 << 53 else repr(value)
        case list() | dict():
            return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=text)
        case _:
            return str(value)


def number(value: AttributeValue) -> int | float | None:
    """An attribute as a number: itself, or the decimal numeral a text consists of; never a boolean or NaN."""
    match value:
        case bool():
            return None
        case int():
            return value
        case float():
            return None if math.isnan(value) else value
        case str() if len(value) <= 100 and _NUMERAL.fullmatch(value):
            return int(value) if value.lstrip("+-").isdigit() else float(value)
        case _:
            return None


def _equal(attribute: AttributeValue, value: str | bool | int | float) -> bool:
    if isinstance(value, bool):
        return text(attribute) == text(value)
    if isinstance(value, str):
        return text(attribute) == value
    return number(attribute) == value


def _compares(op: Op, attribute: int | float | None, value: int | float | None) -> bool:
    if attribute is None or value is None:
        return False
    match op:
        case "gt":
            return attribute > value
        case "gte":
            return attribute >= value
        case "lt":
            return attribute < value
        case _:
            return attribute <= value


@functools.lru_cache(PATTERN_CACHE_SIZE)
def _found(pattern: str, subject: str) -> bool:
    # A lone surrogate (OTLP/JSON can hold one) is no UTF-8.
    scalar = pa.scalar(subject.encode("utf-8", "replace").decode())
    return bool(pc.match_substring_regex(scalar, pattern).as_py())


def _check_pattern(pattern: str) -> None:
    if len(pattern) > PATTERN_CHARS_MAX:
        raise ValueError(f"pattern has {len(pattern)} characters; at most {PATTERN_CHARS_MAX}")
    try:
        pc.match_substring_regex(pa.scalar(""), pattern)
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        reason = str(error).removeprefix("Invalid regular expression: ")
        raise ValueError(f"pattern is not valid RE2 (no lookaround, no back-references): {reason}") from None


class Match(_Value):
    """All of these, on one span and its resource."""

    resource: tuple[Matcher, ...] = Field((), max_length=MATCHERS_MAX)
    span: tuple[Matcher, ...] = Field((), max_length=MATCHERS_MAX)

    @model_validator(mode="after")
    def _bounded(self) -> Match:
        matchers = len(self.resource) + len(self.span)
        if not matchers:
            raise ValueError(
                "needs at least one matcher in resource or span; a rule for everything is a sampling rate"
            )
        if matchers > MATCHERS_MAX:
            raise ValueError(f"has {matchers} matchers; at most {MATCHERS_MAX}")
        return self


class ForceRule(_Value):
    """A stored rule. It acts while it is enabled and `expires_at` lies ahead."""

    id: str = Field(pattern=RULE_ID)
    description: str = Field("", max_length=DESCRIPTION_CHARS_MAX)
    enabled: bool = True
    priority: int = Field(PRIORITY_DEFAULT, ge=0, le=PRIORITY_MAX)
    match: Match
    action: Annotated[Action, _known(get_args(Action))] = "force_keep"
    created_at: AwareDatetime
    expires_at: AwareDatetime
    created_by: str = Field("", max_length=200)

    def expired(self, now: datetime) -> bool:
        return self.expires_at <= now

    def extended(self, duration_secs: float, now: datetime) -> ForceRule:
        """The rule with `duration_secs` more, counted from its end or, when that has passed, from now."""
        expires_at = max(self.expires_at, now) + timedelta(seconds=check_duration(duration_secs))
        if expires_at > now + timedelta(seconds=DURATION_MAX_SECS):
            raise BadRequest(
                f"the rule would end at {_stamp(expires_at)}, more than {_DURATION_LIMIT} from now"
            )
        return self.model_copy(update={"expires_at": expires_at})


_DURATION_LIMIT = f"{DURATION_MAX_SECS} s ({DURATION_MAX_SECS // 86400} days)"


class _NewRule(_Value):
    """What the caller of the API sends to make a rule."""

    id: str | None = Field(None, pattern=RULE_ID)
    description: str = Field("", max_length=DESCRIPTION_CHARS_MAX)
    enabled: StrictBool = True
    priority: StrictInt = Field(PRIORITY_DEFAULT, ge=0, le=PRIORITY_MAX)
    match: Match
    action: Annotated[Action, _known(get_args(Action))]
    duration_secs: StrictInt | StrictFloat | None = Field(
        None, gt=0, le=DURATION_MAX_SECS, allow_inf_nan=False
    )
    expires_at: AwareDatetime | None = None
    created_by: str = Field("", max_length=200)

    @model_validator(mode="after")
    def _one_end(self) -> _NewRule:
        if (self.duration_secs is None) == (self.expires_at is None):
            raise ValueError("needs exactly one of duration_secs and expires_at: a force rule always ends")
        return self


def new_rule(body: object, *, rule_id: str, now: datetime) -> ForceRule:
    """The rule that a creation body asks for, under `rule_id` unless it names its own; BadRequest lists all faults."""
    try:
        wanted = _NewRule.model_validate(body)
    except ValidationError as error:
        raise BadRequest("the rule is not valid", status=422, errors=_faults(error)) from None
    expires_at = wanted.expires_at or now + timedelta(seconds=wanted.duration_secs or 0)
    if not now < expires_at <= now + timedelta(seconds=DURATION_MAX_SECS):
        fault = {"pointer": "/expires_at", "detail": f"must lie ahead, at most {_DURATION_LIMIT}"}
        raise BadRequest("the rule is not valid", status=422, errors=[fault])
    return ForceRule(
        id=wanted.id or rule_id,
        description=wanted.description,
        enabled=wanted.enabled,
        priority=wanted.priority,
        match=wanted.match,
        action=wanted.action,
        created_at=now.astimezone(UTC),
        expires_at=expires_at.astimezone(UTC),
        created_by=wanted.created_by,
    )


def check_duration(value: object) -> float:
    """`value` as a finite number of seconds within bounds, or BadRequest."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= DURATION_MAX_SECS:
        return float(value)
    fault = {"pointer": "/duration_secs", "detail": f"must be a number above 0, at most {_DURATION_LIMIT}"}
    raise BadRequest("the duration is not valid", status=422, errors=[fault])


def _faults(error: ValidationError) -> list[dict[str, str]]:
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_input=False):
        # Members of a union add their type's name to the path; keep what points into the body.
        path = [str(part) for part in fault["loc"] if isinstance(part, int) or part in _BODY_KEYS]
        pointer = "/" + "/".join(path)
        faults.setdefault(pointer, fault["msg"].removeprefix("Value error, "))
        if fault["type"] == "extra_forbidden":
            faults.pop(pointer)
            faults[f"{pointer.rstrip('/')}/{fault['loc'][-1]}"] = "is not a field of a rule"
    return [{"pointer": pointer, "detail": detail} for pointer, detail in faults.items()]


_BODY_KEYS = {*_NewRule.model_fields, *Match.model_fields, *Matcher.model_fields}


class RuleSet:
    """The enabled rules, in the order in which they decide; bit i of a mask stands for `rules[i]`.

    Order: priority descending; at equal priority keep before drop, then by id. The lowest bit that is set and
    active therefore names the rule that decides.
    """

    def __init__(self, rules: Iterable[ForceRule] = ()) -> None:
        enabled = [rule for rule in rules if rule.enabled]
        if len(enabled) > FORCE_RULES_MAX:
            raise ValueError(f"{len(enabled)} enabled rules; at most {FORCE_RULES_MAX}")
        enabled.sort(key=lambda rule: (-rule.priority, rule.action != "force_keep", rule.id))
        self.rules = tuple(enabled)
        self.version = _version(self.rules)

    def mask(self, resource: Attributes, span: Attributes) -> int:
        """Bit i is set when `rules[i]` holds on this one span and its resource."""
        bits = 0
        for i, rule in enumerate(self.rules):
            if all(m.holds(resource) for m in rule.match.resource) and all(
                m.holds(span) for m in rule.match.span
            ):
                bits |= 1 << i
        return bits

    def active(self, now: datetime) -> int:
        """Bits of the rules that have not expired at `now`."""
        return sum(1 << i for i, rule in enumerate(self.rules) if not rule.expired(now))

    def __len__(self) -> int:
        return len(self.rules)


def _version(rules: tuple[ForceRule, ...]) -> int:
    """Stable 64-bit hash of what gives a mask its meaning: which rule each bit is, its match and its action.

    Expiry is left out on purpose: it is applied when judging, so extending a rule makes no stored mask stale.
    """
    if not rules:
        return 0
    content = [[rule.id, rule.action, rule.match.model_dump(mode="json")] for rule in rules]
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


_WORDS = {
    "eq": "is",
    "neq": "is present and not",
    "contains": "contains",
    "starts_with": "starts with",
    "ends_with": "ends with",
    "regex": "matches",
    "in": "is one of",
    "gt": "is above",
    "gte": "is at least",
    "lt": "is below",
    "lte": "is at most",
}


def describe(rule: ForceRule) -> str:
    """The rule in words, for people."""
    conditions = [_in_words(f"resource {m.key}", m) for m in rule.match.resource]
    conditions += [_in_words(m.key, m) for m in rule.match.span]
    verb = "keep" if rule.action == "force_keep" else "drop"
    state = "" if rule.enabled else " (disabled)"
    until = _stamp(rule.expires_at)
    return f"{verb} traces with a span where {' and '.join(conditions)}; priority {rule.priority}, until {until}{state}"


def _in_words(subject: str, matcher: Matcher) -> str:
    if matcher.op == "exists":
        return f"{subject} is {'absent' if matcher.value is False else 'present'}"
    return f"{subject} {_WORDS[matcher.op]} {json.dumps(matcher.value, ensure_ascii=False)}"


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
