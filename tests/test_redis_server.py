"""The private Redis that tests get."""

from __future__ import annotations

import time

import pytest
import redis

from tests.stack import Part
from tss.buffer import LAG_SECS


def test_kill_keeps_what_was_answered(redis_server: Part) -> None:
    """What Redis confirmed so long ago as workers wait for is there after kill -9, on the same address."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("k", "v")
        time.sleep(LAG_SECS)  # a slow disk keeps what is confirmed from the log for two seconds
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
    client = redis.Redis.from_url(redis_server.url)
    with client, pytest.raises(redis.ConnectionError), redis_server.down():
        client.ping()
    assert redis_server.serves()
