"""Rules in a real Redis: atomic changes, every process sees them soon, outages and bad data do no harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from tests.ports import free_port
from tests.stack import Part, cluster_options, join_cluster
from tss.buffer import LAG_SECS
from tss.config import Config, ForceSampling
from tss.config import Redis as RedisConfig
from tss.errors import BadRequest, ConfigError, Unavailable
from tss.rule_store import KEY, REVISION, RuleStore, connect
from tss.rules import FORCE_RULES_MAX, ForceRule, new_rule

NOW = datetime(2026, 11, 21, 10, tzinfo=UTC)
DEMO = {"resource": [{"key": "service.name", "op": "eq", "value": "demo-service"}]}


def config(url: str, *, redis_settings: dict[str, Any] | None = None, **force: Any) -> Config:
    force = {"poll_interval_secs": 60, **force}
    return Config(
        redis=RedisConfig(url=url, connection_timeout_secs=2, **redis_settings or {}),
        force_sampling=ForceSampling(**force),
    )


def rule(rule_id: str = "r1", **changes: Any) -> ForceRule:
    body = {"match": DEMO, "action": "force_keep", "duration_secs": 300, **changes}
    return new_rule(body, rule_id=rule_id, now=NOW)


def eventually(holds: Callable[[], bool], within_secs: float) -> bool:
    deadline = time.monotonic() + within_secs
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def store(redis_server: Part) -> Iterator[RuleStore]:
    store = RuleStore(config(redis_server.url))
    yield store
    store.close()


@pytest.fixture
def raw(redis_server: Part) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        yield client


@contextmanager
def running(settings: Config) -> Iterator[RuleStore]:
    store, stop = RuleStore(settings), threading.Event()
    thread = threading.Thread(target=store.run, args=(stop,))
    thread.start()
    try:
        yield store
    finally:
        stop.set()
        thread.join(5)
        assert not thread.is_alive()
        store.close()


def test_a_rule_is_stored_and_read_back(store: RuleStore) -> None:
    """What was added is what is got, listed and applied; what was deleted is gone."""
    store.add(rule("a"))
    store.add(rule("b", priority=500))
    assert store.get("a") == rule("a")
    assert [r.id for r in store.list()] == ["b", "a"]
    assert [r.id for r in store.refresh().rules] == ["b", "a"]
    assert store.revision == 2
    assert store.delete("a")
    assert not store.delete("a")
    assert store.get("a") is None
    assert store.get(REVISION) is None
    assert [r.id for r in store.refresh().rules] == ["b"]
    assert store.revision == 3


def test_an_id_is_taken_once(store: RuleStore) -> None:
    """A second rule of the same id is refused; the very same rule sent again is not a conflict."""
    store.add(rule("a"))
    store.add(rule("a"))
    with pytest.raises(BadRequest) as refused:
        store.add(rule("a", priority=7))
    assert refused.value.status == 409
    assert store.get("a") == rule("a")


def test_the_number_of_rules_is_bounded(store: RuleStore) -> None:
    """The rule beyond the last bit is refused with a way out; after cleaning up there is room again."""
    for i in range(FORCE_RULES_MAX):
        store.add(rule(f"r{i}", duration_secs=10 if i < 3 else 300))
    with pytest.raises(BadRequest, match="cleanup"):
        store.add(rule("more"))
    assert store.cleanup(NOW + timedelta(seconds=10)) == 3
    assert store.cleanup(NOW + timedelta(seconds=10)) == 0
    store.add(rule("more"))
    assert len(store.list()) == FORCE_RULES_MAX - 2


def test_changes_keep_the_rest_of_a_rule(store: RuleStore) -> None:
    """Extending and switching change one thing, are stored, and answer None for an unknown rule."""
    store.add(rule("a"))
    extended = store.extend("a", 60, NOW)
    assert extended == rule("a", duration_secs=360) == store.get("a")
    off = store.set_enabled("a", False)
    assert off == store.get("a")
    assert off == rule("a", duration_secs=360, enabled=False)
    assert len(store.refresh()) == 0
    assert store.set_enabled("a", True)
    assert len(store.refresh()) == 1
    assert store.extend("none", 60, NOW) is None
    assert store.set_enabled("none", True) is None


def test_concurrent_changes_all_land(redis_server: Part, store: RuleStore) -> None:
    """Two processes that extend a rule at the same time both get their extension."""
    store.add(rule("a"))
    others = [RuleStore(config(redis_server.url)) for _ in range(2)]

    def extend(other: RuleStore) -> None:
        for _ in range(20):
            assert other.extend("a", 1, NOW)

    threads = [threading.Thread(target=extend, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        other.close()
    stored = store.get("a")
    assert stored
    assert stored.expires_at == NOW + timedelta(seconds=300 + 40)


def test_a_bad_stored_rule_harms_no_other(
    store: RuleStore, raw: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A rule that cannot be read is skipped, told once and counted; its last good version stays in force."""
    store.add(rule("a"))
    store.add(rule("b"))
    good = store.refresh()
    for bad in ("{", "null", '{"id": "a"}', rule("other").model_dump_json()):
        raw.hset(KEY, "a", bad)
        raw.hset(KEY, "unknown", bad)
        assert [r.id for r in store.refresh().rules] == ["a", "b"]
        assert store.current.version == good.version
        assert store.bad_rules == 2
    caplog.clear()
    store.refresh()
    assert not caplog.records
    assert [r.id for r in store.list()] == ["b"]
    assert store.get("a") is None
    with pytest.raises(BadRequest, match="delete it"):
        store.extend("a", 60, NOW)
    assert store.delete("a")
    assert store.delete("unknown")
    assert [r.id for r in store.refresh().rules] == ["b"]
    assert store.bad_rules == 0


def test_bytes_that_are_no_text_are_one_bad_rule(store: RuleStore, redis_server: Part) -> None:
    """Damaged bytes in one rule do not stop the others from being read."""
    store.add(rule("a"))
    with redis.Redis.from_url(redis_server.url) as client:
        client.hset(KEY, "bad", b"\xff\xfe")
        client.hset(KEY, REVISION, b"soon")
    assert [r.id for r in store.refresh().rules] == ["a"]
    assert store.bad_rules == 1


def test_more_rules_than_bits_written_by_hand(store: RuleStore, raw: redis.Redis) -> None:
    """When someone fills the hash by hand, the most important 64 act and the rest is counted."""
    for i in range(FORCE_RULES_MAX + 5):
        made = rule(f"r{i:02}", priority=i)
        raw.hset(KEY, made.id, made.model_dump_json())
    rules = store.refresh().rules
    assert len(rules) == FORCE_RULES_MAX
    assert rules[-1].priority == 5
    assert store.bad_rules == 5


def test_switched_off_rules_are_kept_but_not_applied(redis_server: Part) -> None:
    """With force_sampling.enabled off the set is empty, while rules can still be managed."""
    store = RuleStore(config(redis_server.url, enabled=False))
    store.add(rule("a"))
    assert len(store.refresh()) == 0
    assert len(store.list()) == 1
    store.close()


def test_changes_are_live_everywhere_within_a_second(redis_server: Part, store: RuleStore) -> None:
    """With pub/sub, every process applies a new, switched or deleted rule within a second."""
    settings = config(redis_server.url)
    with running(settings) as one, running(settings) as two:
        assert eventually(lambda: one.refreshed_at is not None and two.refreshed_at is not None, 5)
        time.sleep(0.3)
        store.add(rule("a"))
        assert eventually(lambda: len(one.current) == len(two.current) == 1, 1)
        assert one.current.version == two.current.version
        store.set_enabled("a", False)
        assert eventually(lambda: len(one.current) == len(two.current) == 0, 1)
        store.set_enabled("a", True)
        assert eventually(lambda: len(one.current) == len(two.current) == 1, 1)
        store.delete("a")
        assert eventually(lambda: len(one.current) == len(two.current) == 0, 1)


def test_polling_finds_changes_without_pubsub(redis_server: Part, store: RuleStore) -> None:
    """Where pub/sub is off, a change is found by the next poll."""
    with running(config(redis_server.url, use_pubsub=False, poll_interval_secs=0.3)) as reader:
        assert eventually(lambda: reader.refreshed_at is not None, 5)
        store.add(rule("a"))
        assert eventually(lambda: len(reader.current) == 1, 2)


def test_an_outage_keeps_the_last_good_set(redis_server: Part, store: RuleStore) -> None:
    """While Redis is down the rules stay in force and the fault is told; afterwards changes arrive again."""
    store.add(rule("a"))
    with running(config(redis_server.url)) as reader:
        assert eventually(lambda: len(reader.current) == 1, 5)
        time.sleep(LAG_SECS)  # a slow disk keeps what is confirmed from the log for two seconds
        with redis_server.down():
            assert eventually(lambda: reader.last_error is not None, 5)
            assert len(reader.current) == 1
            assert reader.failures > 0
            with pytest.raises(Unavailable) as down:
                store.list()
            assert down.value.setting == "redis.url"
        assert eventually(lambda: reader.last_error is None, 10)
        store.add(rule("b"))
        assert eventually(lambda: len(reader.current) == 2, 2)


def test_a_process_that_starts_before_redis(redis_server: Part, store: RuleStore) -> None:
    """A process that starts while Redis is down has no rules, waits, and takes them up once it can."""
    store.add(rule("a"))
    redis_server.stop()
    with running(config(redis_server.url)) as reader:
        assert eventually(lambda: reader.failures > 0, 5)
        assert len(reader.current) == 0
        redis_server.start()
        assert eventually(lambda: len(reader.current) == 1, 10)


@pytest.mark.parametrize("cluster", [False, True])
def test_a_closed_store_holds_no_connection(redis_server: Part, cluster: bool) -> None:
    """Whoever closes a store has closed its connections, those to nodes of a cluster, too."""
    if cluster:
        redis_server.stop()
        redis_server.command += cluster_options()
        redis_server.start()
        join_cluster([redis_server])
    store = RuleStore(config(redis_server.url, redis_settings={"cluster_enabled": cluster}))
    store.add(rule("a"))
    with redis.Redis.from_url(redis_server.url) as looking:
        assert len(looking.client_list()) > 1
        store.close()
        assert eventually(lambda: len(looking.client_list()) == 1, 2)


def test_settings_win_over_the_url(redis_server: Part) -> None:
    """redis.db chooses the database whatever the URL says; a password nobody asked for is named as the fault."""
    client = connect(RedisConfig(url=redis_server.url, db=3))
    client.set("here", "1")
    client.close()
    with redis.Redis.from_url(redis_server.url.removesuffix("/0") + "/3") as other:
        assert other.get("here") == b"1"
        other.config_set("requirepass", "right")
    wrong = RuleStore(config(redis_server.url, redis_settings={"password": "wrong"}))
    with pytest.raises(Unavailable) as refused:
        wrong.list()
    assert refused.value.setting == "redis.password"
    assert "wrong" not in str(refused.value).replace("wrong number", "")
    right = RuleStore(config(redis_server.url, redis_settings={"password": "right"}))
    assert right.list() == ()
    right.close()
    wrong.close()


def test_a_url_that_is_none() -> None:
    """A URL of an unknown kind is a fault of the setting, found before anything connects."""
    with pytest.raises(ConfigError, match=r"redis\.url"):
        connect(RedisConfig(url="http://localhost"))


def test_nobody_listens() -> None:
    """A port where nothing listens is Unavailable at once, without the library's long retries."""
    store = RuleStore(config(f"redis://127.0.0.1:{free_port()}"))
    started = time.monotonic()
    with pytest.raises(Unavailable):
        store.refresh()
    assert time.monotonic() - started < 1
