"""The private Redis that tests get."""

from __future__ import annotations

import pytest
import redis

from tests.stack import Part


def test_kill_keeps_what_was_answered(redis_server: Part) -> None:
    """What Redis has confirmed is there after kill -9, on the same address."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("k", "v")
        redis_server.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("k")
        redis_server.start()
        assert client.get("k") == b"v"


def test_each_test_has_its_own(redis_server: Part) -> None:
    """A test finds nothing that another one left."""
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.dbsize() == 0


def test_down_brings_it_back_after_a_failure(redis_server: Part) -> None:
    """A test that fails while Redis is down does not leave it down for the next one."""
    with pytest.raises(redis.ConnectionError), redis_server.down():
        redis.Redis.from_url(redis_server.url).ping()
    assert redis_server.serves()
