"""A machine where nothing is compiled yet: the worker does not wait for the compiler, and never leaves it behind."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import PARTITIONS
from tests.e2e.parts import Parts, Worker, total, wait_for
from tests.e2e.traces import make_trace, record

COMPILE_SECS = 240  # on a busy machine
STOP_SECS = 15  # half of what a worker allows itself

pytestmark = [pytest.mark.embedded, pytest.mark.parametrize("parts", ["embedded"], indirect=True)]


def is_compiling(folder: Path) -> bool:
    """Whether a process holds the lock that compilers take, and that goes with them."""
    for path in folder.glob("*/lock"):
        with path.open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def decide(parts: Parts, worker: Worker, traces: int, *, seed: int) -> None:
    """All of them errors, which are kept; returns when their rows can be read."""
    rng = random.Random(seed)
    made = [make_trace(rng, time.time_ns(), reason="error") for _ in range(traces)]
    parts.produce([(i % PARTITIONS, record("shop", *t.spans), None) for i, t in enumerate(made)])
    wait_for(
        lambda: (
            {t.id for t in made} <= {row["trace_id"] for row in worker.query("SELECT trace_id FROM spans")}
        ),
        60,
        lambda: worker.log[-3000:],
    )


COMPILE = """
from tss import compiler
compiler.load("numba")
from tss.native import compilations
print(compilations())
"""
LOAD = "from tss import compiler; print(compiler.load_cached('numba'))"


def test_a_worker_begins_at_once_and_changes_to_compiled_kernels(parts: Parts, tmp_path: Path) -> None:
    """It decides before and after they take over; who comes later waits for them or loads them, and finds damage."""
    folder = tmp_path / "kernels"
    parts.env["NUMBA_CACHE_DIR"] = str(folder)
    env = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    worker = parts.worker().ready()
    assert worker.pipeline()["kernels"] == "compiling"
    wait_for(lambda: is_compiling(folder), 30, lambda: worker.log[-3000:])
    with subprocess.Popen([sys.executable, "-c", COMPILE], env=env, stdout=subprocess.PIPE) as other:
        decide(parts, worker, 20, seed=1)
        wait_for(lambda: worker.pipeline()["kernels"] == "compiled", COMPILE_SECS, lambda: worker.log[-3000:])
        assert other.communicate()[0] == b"0\n", "it waits instead of compiling the same"
    decide(parts, worker, 20, seed=2)
    assert total([worker], "tail_sampling_kernels_compiled") == 1
    assert total([worker], "tail_sampling_traces_ingested_total") == 40
    assert worker.terminate() == 0

    def load() -> str:
        return subprocess.run([sys.executable, "-c", LOAD], env=env, stdout=subprocess.PIPE, text=True).stdout

    assert load().startswith("Kernels(")
    for file in folder.glob("*/*/kernels._scan*.nbc"):
        file.write_bytes(b"")
    assert load() == "None\n", "what a power failure left is removed, and compiled again"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("how", ["SIGTERM", "kill -9"])
def test_the_compiler_ends_with_its_worker(parts: Parts, tmp_path: Path, how: str) -> None:
    """Asked to stop, a worker does not wait for it; killed, it leaves none behind."""
    folder = tmp_path / "kernels"
    parts.env["NUMBA_CACHE_DIR"] = str(folder)
    worker = parts.worker().ready()
    wait_for(lambda: is_compiling(folder), 30, lambda: worker.log[-3000:])
    if how == "SIGTERM":
        assert worker.terminate(STOP_SECS) == 0
        assert not is_compiling(folder)
    else:
        worker.kill()
        wait_for(lambda: not is_compiling(folder), 10, lambda: "it still compiles")
