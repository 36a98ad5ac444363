"""Named places where a test lets the whole process die; in production each is a call that returns at once.

`TSS_CRASH_POINT=after-claim:2` is kill -9 of oneself at the second passage of `after-claim`. No setting: nobody who
runs tss has a use for it, so it appears in no list of settings and is read once, when the process starts.
"""

from __future__ import annotations

import itertools
import os
import signal

VARIABLE = "TSS_CRASH_POINT"
POINTS = (
    "after-write",  # a batch is in Redis, its offsets are not committed
    "after-claim",
    "after-record",
    "after-upload",
    "after-decisions",  # the first commit
    "after-spans",  # the second commit
    "before-release",
    "within-release",  # passed before each shard
)

_point, _, _passage = os.environ.get(VARIABLE, "").partition(":")
if _point and _point not in POINTS:
    raise SystemExit(f"{VARIABLE}={_point}: the points are {', '.join(POINTS)}")
_fatal = int(_passage or 1)
_passages = itertools.count(1)


def passed(point: str) -> None:
    """Does not return where the test wants the process dead."""
    if point == _point and next(_passages) == _fatal:
        os.kill(os.getpid(), signal.SIGKILL)
