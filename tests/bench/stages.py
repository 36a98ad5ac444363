"""Where a process spends its CPU time: by stage for its own Python, by thread for the libraries' threads.

A stage is a function of tss, wrapped where it stands (`SEAMS` in worker.py). Stages nest, and each counts only what
is not in a stage within it, so that they add up. Threads that no Python code runs in are told apart by name; what
is left of the process's total after all that is nobody's: other loops, the interpreter, threads that ended.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NS = 1_000_000_000
TICKS = os.sysconf("SC_CLK_TCK")
LIBRDKAFKA = "rdk:"  # how its threads' names begin


@dataclass(frozen=True, slots=True)
class Moment:
    """CPU seconds so far: of the process, of each stage, of each thread by its system-wide number."""

    process: float
    stages: dict[str, float]
    threads: dict[int, float]


class _Thread(threading.local):
    """What one thread is in, and since when, on its own CPU clock."""

    def __init__(self) -> None:
        self.within: list[str] = []
        self.since_ns = 0
        self.spent_ns: dict[str, int] | None = None


class Stages:
    """Wraps functions, from then on knows what ran in them. Any number of threads."""

    def __init__(self) -> None:
        self._thread = _Thread()
        self._spent: dict[int, dict[str, int]] = {}  # by thread number

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return run

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Replaces `owner.name`. A name that is gone raises: the table of seams must follow the code."""
        setattr(owner, name, self.timed(stage, getattr(owner, name)))

    def _enter(self, stage: str) -> None:
        mine = self._thread
        if mine.spent_ns is None:
            mine.spent_ns = self._spent.setdefault(threading.get_native_id(), {})
        now_ns = time.thread_time_ns()
        self._charge(now_ns)
        mine.within.append(stage)

    def _leave(self) -> None:
        self._charge(time.thread_time_ns())
        self._thread.within.pop()

    def _charge(self, now_ns: int) -> None:
        mine = self._thread
        if mine.within:
            assert mine.spent_ns is not None
            stage = mine.within[-1]
            mine.spent_ns[stage] = mine.spent_ns.get(stage, 0) + now_ns - mine.since_ns
        mine.since_ns = now_ns

    @property
    def threads(self) -> set[int]:
        """Those that were ever in a stage."""
        return set(self._spent)

    def moment(self) -> Moment:
        stages: dict[str, float] = {}
        for spent in list(self._spent.values()):
            for stage, ns in list(spent.items()):
                stages[stage] = stages.get(stage, 0.0) + ns / NS
        return Moment(time.process_time(), stages, _thread_seconds())


def _thread_seconds() -> dict[int, float]:
    """CPU of this process's threads. In nanoseconds where the kernel keeps them, else in its ticks of 10 ms."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            schedstat = task / "schedstat"
            if schedstat.exists():
                found[int(task.name)] = int(schedstat.read_text().split()[0]) / NS
            else:
                found[int(task.name)] = cpu_seconds(task, with_children=False)
        except OSError:
            continue  # it ended meanwhile
    return found


def thread_name(number: int) -> str:
    """The name that the system knows, which for Python's threads is that of the process."""
    try:
        return Path(f"/proc/self/task/{number}/comm").read_text().strip()
    except OSError:
        return ""


def cpu_seconds(process: Path, *, with_children: bool) -> float:
    """User and system time of /proc/<pid>; children are those that it has waited for."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if with_children else 13])) / TICKS


def peak_rss_bytes(process: Path) -> int:
    return told_bytes(process / "status", "VmHWM")


def rss_bytes(process: Path) -> int:
    """0 when the process is gone."""
    try:
        return told_bytes(process / "status", "VmRSS")
    except OSError:
        return 0


def told_bytes(file: Path, name: str) -> int:
    """Of a file of /proc that tells sizes by name, in kB."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {name}")
