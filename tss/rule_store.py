"""Force rules in Redis: one hash for the fleet, the last good set in every process.

`tss:rules` is a hash of rule id -> JSON, with the revision under the field `#revision` (no rule id can contain a
`#`). Being one key it lives on one node of a cluster, so that one script is one atomic change: it writes, counts
the revision up and publishes it on `force_sampling.pubsub_channel`. Changes to a rule are compare-and-set on its
JSON, so nothing here is decoded or encoded by Lua, whose numbers are doubles.

Readers take the whole hash each time: it is 64 rules at most, and a Redis that lost its last seconds then needs no
special case. Pub/sub makes a change act at once; polling makes up for the messages it may lose.

A stored rule that cannot be read never replaces a good one: the rule of that id read before stays in force until it
expires, and the fault is logged and counted.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeAlias, cast

import redis
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool, SSLConnection, parse_url
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from tss.config import Config
from tss.config import Redis as RedisConfig
from tss.errors import BadRequest, ConfigError, Unavailable
from tss.rules import FORCE_RULES_MAX, ForceRule, RuleSet

KEY = "tss:rules"
REVISION = "#revision"

LISTEN_SECS = 0.25  # one wait for a message; also how long `run` may take to notice `stop`
BACKOFF_FIRST_SECS = 0.2
BACKOFF_MAX_SECS = 5.0
CHANGE_ATTEMPTS = 50  # of a compare-and-set; people change rules, so one collision is already rare
CHANGE_PAUSE_SECS = 0.01  # at most, between two of them: two that collided must not go on in step

# KEYS[1] the hash. Each answers with the new revision, or with a word that says why nothing was done. The client may
# send one again when the answer was lost; an addition then meets itself: `same`.
_ADD = """
-- ARGV: revision field, channel, id, json, most rules
local there = redis.call('HGET', KEYS[1], ARGV[3])
if there then return there == ARGV[4] and 'same' or 'exists' end
if redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], ARGV[1]) >= tonumber(ARGV[5]) then return 'full' end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[4])
local revision = redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
redis.call('PUBLISH', ARGV[2], revision)
return revision
"""
_REPLACE = """
-- ARGV: revision field, channel, id, json seen, json wanted
if redis.call('HGET', KEYS[1], ARGV[3]) ~= ARGV[4] then return 'changed' end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[5])
local revision = redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
redis.call('PUBLISH', ARGV[2], revision)
return revision
"""
_REMOVE = """
-- ARGV: revision field, channel, then pairs of id and json seen ('' = whatever it is); answers the number removed
local removed = 0
for i = 3, #ARGV, 2 do
  if ARGV[i + 1] == '' or redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    removed = removed + redis.call('HDEL', KEYS[1], ARGV[i])
  end
end
if removed > 0 then redis.call('PUBLISH', ARGV[2], redis.call('HINCRBY', KEYS[1], ARGV[1], 1)) end
return removed
"""

Client: TypeAlias = "redis.Redis | redis.cluster.RedisCluster"

logger = logging.getLogger("tss")


def connect(config: RedisConfig) -> Client:
    """A client for `config`: one retry for a connection that went stale, none of the library's long waits."""
    try:
        options: dict[str, Any] = dict(parse_url(config.url))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(f"redis.url: {error}") from None
    if config.password is not None:
        options["password"] = config.password.get_secret_value()
    if config.db is not None:
        options["db"] = config.db
    options |= {
        "socket_timeout": config.connection_timeout_secs,
        "socket_connect_timeout": config.connection_timeout_secs,
        "retry": Retry(NoBackoff(), 1),
        "decode_responses": True,
        "encoding_errors": "replace",  # a damaged value is one bad rule, not a failed reading
    }
    if not config.cluster_enabled:
        return redis.Redis.from_pool(ConnectionPool(**options))
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    if options.pop("db", 0):
        raise ConfigError("redis.db: a Redis Cluster has database 0 only")
    return redis.cluster.RedisCluster(**options)


class RuleStore:
    """The fleet's rules. Methods block; every one but `current` raises Unavailable while Redis does not answer."""

    def __init__(self, config: Config) -> None:
        self._redis = config.redis
        self._settings = config.force_sampling
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._good: dict[str, ForceRule] = {}
        self._reported: dict[str, str] = {}
        self._current = RuleSet()
        self.revision = 0
        self.refreshed_at: float | None = None  # time.monotonic() of the last good reading
        self.last_error: str | None = None  # why the last reading failed; None when it did not
        self.failures = 0  # readings that failed, ever
        self.bad_rules = 0  # stored rules that the last reading had to skip

    @property
    def current(self) -> RuleSet:
        """The last good set; empty when force_sampling.enabled is off. Costs nothing."""
        return self._current

    def add(self, rule: ForceRule) -> None:
        """Store a new rule; BadRequest (409) when its id is taken or the fleet has its fill of rules."""
        answer = self._eval(_ADD, rule.id, rule.model_dump_json(), str(FORCE_RULES_MAX))
        if answer == "exists":
            raise BadRequest(f"there is a rule {rule.id!r} already", status=409)
        if answer == "full":
            raise BadRequest(
                f"there are {FORCE_RULES_MAX} rules, the most there can be; "
                "delete some, or remove the expired ones with POST /admin/force-rules/cleanup",
                status=409,
            )

    def get(self, rule_id: str) -> ForceRule | None:
        """The stored rule, or None when there is none that can be read."""
        stored = self._stored(rule_id)
        return _parse(rule_id, stored)[0] if stored else None

    def list(self) -> tuple[ForceRule, ...]:
        """All stored rules that can be read, expired and disabled ones too, the most important first."""
        rules = [rule for rule_id, json in self._all().items() if (rule := _parse(rule_id, json)[0])]
        return tuple(sorted(rules, key=lambda rule: (-rule.priority, rule.id)))

    def delete(self, rule_id: str) -> bool:
        """Remove the rule, readable or not; False when there was none."""
        return bool(self._eval(_REMOVE, rule_id, ""))

    def extend(self, rule_id: str, duration_secs: float, now: datetime) -> ForceRule | None:
        """Give the rule more time, see `ForceRule.extended`; None when there is no such rule."""
        return self._change(rule_id, lambda rule: rule.extended(duration_secs, now))

    def set_enabled(self, rule_id: str, enabled: bool) -> ForceRule | None:
        """Switch the rule on or off; None when there is no such rule."""
        return self._change(rule_id, lambda rule: rule.model_copy(update={"enabled": enabled}))

    def cleanup(self, now: datetime) -> int:
        """Remove what has expired and was not extended meanwhile; how many rules that were."""
        pairs: list[str] = []
        for rule_id, json in self._all().items():
            rule, _ = _parse(rule_id, json)
            if rule and rule.expired(now):
                pairs += [rule_id, json]
        return int(self._eval(_REMOVE, *pairs)) if pairs else 0

    def refresh(self) -> RuleSet:
        """Read the rules from Redis now. When that fails the set stays as it was and Unavailable is raised."""
        try:
            return self._read()
        except Unavailable as error:
            self._failed(error)
            raise

    def run(self, stop: threading.Event) -> None:
        """Keep `current` up to date until `stop`: by messages and by polling, through outages of Redis."""
        backoff_secs = BACKOFF_FIRST_SECS
        while not stop.is_set():
            try:
                for _ in self._follow(stop):
                    backoff_secs = BACKOFF_FIRST_SECS
            except Unavailable as error:
                self._failed(error)
                logger.warning("Force rules cannot be read, the last good set stays: %s", error)
                stop.wait(backoff_secs * random.uniform(0.5, 1))
                backoff_secs = min(backoff_secs * 2, BACKOFF_MAX_SECS)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _read(self) -> RuleSet:
        with self._lock:  # a slow reading must not overwrite a later one
            with self._talking() as client:
                stored = _texts(client.hgetall(KEY))
            revision = stored.pop(REVISION, "")
            self.revision = int(revision) if revision.isdecimal() else 0
            self._adopt(stored)
            self.last_error = None
            self.refreshed_at = time.monotonic()
            return self._current

    def _failed(self, error: Unavailable) -> None:
        self.last_error = error.detail
        self.failures += 1

    def _follow(self, stop: threading.Event) -> Iterator[RuleSet]:
        """Subscribe, then yield each new reading; subscribed first, so that no change falls between."""
        with self._talking() as client:
            messages = client.pubsub() if self._settings.use_pubsub else None  # type: ignore[no-untyped-call]
            try:
                if messages:
                    messages.subscribe(self._settings.pubsub_channel)
                yield self._read()
                read_at = time.monotonic()
                while not stop.is_set():
                    if messages:
                        news = messages.get_message(timeout=LISTEN_SECS) is not None
                        while news and messages.get_message(timeout=0):
                            pass  # one reading answers for all of them
                    else:
                        news = False
                        stop.wait(LISTEN_SECS)
                    if news or time.monotonic() - read_at >= self._settings.poll_interval_secs:
                        yield self._read()
                        read_at = time.monotonic()
            finally:
                if messages:
                    messages.close()

    def _adopt(self, stored: Mapping[str, str]) -> None:
        good: dict[str, ForceRule] = {}
        faults: dict[str, str] = {}
        for rule_id, json in stored.items():
            rule, fault = _parse(rule_id, json)
            if rule is None:
                faults[rule_id] = fault
                rule = self._good.get(rule_id)
            if rule is not None:
                good[rule_id] = rule
        # More than fit can only be there when someone wrote to Redis by hand.
        ordered = sorted((r for r in good.values() if r.enabled), key=lambda r: (-r.priority, r.id))
        for rule in ordered[FORCE_RULES_MAX:]:
            faults[rule.id] = f"more than {FORCE_RULES_MAX} rules are enabled"
        for rule_id, fault in faults.items():
            if self._reported.get(rule_id) != fault:
                logger.error("Force rule %r in Redis hash %s is skipped: %s", rule_id, KEY, fault)
        self._reported = faults
        self.bad_rules = len(faults)
        self._good = good
        fresh = RuleSet(ordered[:FORCE_RULES_MAX]) if self._settings.enabled else RuleSet()
        if fresh.version != self._current.version:
            logger.info("Force rules: %d in force, revision %d", len(fresh), self.revision)
        self._current = fresh

    def _change(self, rule_id: str, change: Callable[[ForceRule], ForceRule]) -> ForceRule | None:
        for _ in range(CHANGE_ATTEMPTS):
            seen = self._stored(rule_id)
            if seen is None:
                return None
            rule, fault = _parse(rule_id, seen)
            if rule is None:
                raise BadRequest(
                    f"the stored rule {rule_id!r} cannot be read ({fault}); delete it", status=409
                )
            changed = change(rule)
            if self._eval(_REPLACE, rule_id, seen, changed.model_dump_json()) != "changed":
                return changed
            time.sleep(random.uniform(0, CHANGE_PAUSE_SECS))
        raise BadRequest(f"others keep changing the rule {rule_id!r}; try again", status=409)

    def _stored(self, rule_id: str) -> str | None:
        if rule_id == REVISION:
            return None
        with self._talking() as client:
            return cast("str | None", client.hget(KEY, rule_id))

    def _all(self) -> dict[str, str]:
        with self._talking() as client:
            stored = _texts(client.hgetall(KEY))
        stored.pop(REVISION, None)
        return stored

    def _eval(self, script: str, *arguments: str) -> Any:
        with self._talking() as client:
            return client.eval(script, 1, KEY, REVISION, self._settings.pubsub_channel, *arguments)

    @contextmanager
    def _talking(self) -> Iterator[Client]:
        """The client, made when first needed (a cluster's connects at once); its errors as Unavailable."""
        try:
            if self._client is None:
                self._client = connect(self._redis)
            yield self._client
        except AuthenticationError as error:
            raise Unavailable("Redis", "redis.password", str(error)) from error
        except (RedisError, OSError) as error:
            raise Unavailable("Redis", "redis.url", str(error)) from error


def _texts(reply: Any) -> dict[str, str]:
    return cast("dict[str, str]", dict(reply))


def _parse(rule_id: str, json: str) -> tuple[ForceRule | None, str]:
    """The rule, or None and what is wrong with it."""
    try:
        rule = ForceRule.model_validate_json(json)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return None, f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    if rule.id != rule_id:
        return None, f"it calls itself {rule.id!r}"
    return rule, ""
