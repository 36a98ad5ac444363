"""How a process holds memory: what it has freed goes back to the system, what it needs once it does not keep.

Measured while a backlog is drained of which 10 % is kept, in MB: glibc's arenas, one a thread, keep 100 to 200 that
nobody uses, as buffers of some MB are freed between small things that live on; 90 are code that only the start ran,
most of it the compiler's; 50 to 80 stay in Arrow's own pool, of which those for its inputs and outputs can only be
chosen before it loads (`tss/__init__.py`); and huge pages hold 20 to 30 around buffers that use a part of them.

Rejected: mapping each large buffer for itself (M_MMAP_THRESHOLD), which frees all at once, but makes every batch touch
fresh memory: reading took one and a half times the CPU.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

ARENAS_MAX = 2  # of glibc; few threads allocate at the same time, as most of them want the interpreter
GIVE_BACK_SECS = 1.0  # between two looks for free memory: some ms each, and what comes back is touched anew
NEW_OBJECTS_MAX = 20_000  # between two looks for garbage; a claim makes as many, which soon are freed or stay

_M_ARENA_MAX = -8  # of glibc's malloc.h
_MADV_DONTNEED = 4  # of Linux
_PR_SET_THP_DISABLE = 41

_libc: Any = ctypes.CDLL(None)
IS_LINUX = sys.platform == "linux"
IS_GLIBC = hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim")  # another C library has its own ways


def hold_little() -> None:
    """One heap for all, of few parts and small pages. To be called before there are threads."""
    if IS_GLIBC:
        _libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)
    if IS_LINUX:
        _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def give_back() -> None:
    """Hands whole pages in which nothing is in use to the system."""
    if IS_GLIBC:
        _libc.malloc_trim(0)


def settle() -> None:
    """What is there now stays, and is not looked at for garbage again; what comes is looked at less often.

    Hardly anything of a worker is garbage in cycles: each look is for nothing, and costs as much as there are objects.
    """
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS_MAX)


def forget_code() -> int:
    """Drops all code, and returns how many bytes are mapped; what is still run comes back, page by page.

    Only code of files, which is their own bytes: what was written to, relocations included, is not touched.
    """
    maps = Path("/proc/self/maps")
    dropped = 0
    for line in maps.read_text(encoding="utf-8").splitlines() if maps.exists() else ():
        where, access, _, _, _, *path = line.split(maxsplit=5)
        if access == "r-xp" and path and path[0].startswith("/"):
            begin, end = (int(side, 16) for side in where.split("-"))
            if _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED) == 0:
                dropped += end - begin
    return dropped
