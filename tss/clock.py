"""Time as an argument: one moment on both clocks, and who tells it.

Stories take `now`; only what must wait or stamp in the middle of a step asks a `Clock`. A simulation brings its own.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from tss.model import Now


class Clock(Protocol):
    """Tells and passes time."""

    def now(self) -> Now: ...

    def sleep(self, secs: float) -> None: ...

    def wait(self, stop: threading.Event, secs: float) -> bool:
        """Sleeps, but no longer than until `stop` is set; returns whether it is."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> Now:
        return Now(time.time_ns() // 1_000_000, time.monotonic())

    def sleep(self, secs: float) -> None:
        time.sleep(secs)

    def wait(self, stop: threading.Event, secs: float) -> bool:
        return stop.wait(secs)


SYSTEM = SystemClock()
