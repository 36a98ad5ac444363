"""The compiled kernels: where they are kept, how they are loaded, and who compiles them.

Compiling takes some twenty seconds of CPU, once for each machine; the result is kept in a folder on disk and loads in
half a second. A worker loads before it takes in its first record. Where there is nothing to load it does not wait: it
begins with the slow twins, which give the same results, and a process of its own compiles (`compile_apart`), since a
thread would take the interpreter from the worker, and would leave it 300 MB larger.

Any number of processes may share the folder. In it each state has a folder of its own: sources, numba, Python and
processor; numba compares only the file of a kernel, and kernels are made of several. One process compiles a state and
the others wait for it, or compile as well where files cannot be locked: they are put in place whole, and all write
the same. States that nobody used lately are removed.

The folder is NUMBA_CACHE_DIR, else one in the user's cache. Where that cannot be written to (a read-only container), a
private one among the temporary files serves, beginning with a copy of what the first holds: numba refuses to read
where it cannot write.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tss import config, model, resp, rows, wire
from tss.judge import ListRecords
from tss.model import Record
from tss.resp import ChunkWrites
from tss.rows import KeptTrace
from tss.rules import RuleSet
from tss.wire import Decoded

log = logging.getLogger("tss")

Choice: TypeAlias = Literal["numba", "python"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions of the hot path, compiled or not. `decode` is for one thread, the others for any number."""

    decode: Callable[[Sequence[Record], RuleSet], Decoded]
    chunk_writes: ChunkWrites
    list_records: ListRecords
    span_table: Callable[[Iterable[KeptTrace], datetime], tuple[pa.Table, int]]


PYTHON = Kernels(wire.decode, resp.chunk_writes, model.list_records, rows.span_table)

SOURCES = ("native.py", "kernels.py", "chunk_writes.py", "origins.py", "gather.py")

COMPLETE = "complete"  # a file in the folder of a state that holds all kernels
STATES_KEPT = 8  # of 4 MB each: an upgrade that is taken back compiles nothing
UNUSED_SECS = 3600.0  # states used since then are kept in any case: somebody may be compiling there
STATE_NAME = re.compile("[0-9a-f]{16}")

APART = "--apart"
POLL_SECS = 0.1
SAID_CHARS_MAX = 500  # of what a failed compiler said, in our log


# --- loading -----------------------------------------------------------------------------------------------------


def load(kernels: Choice) -> Kernels:
    """What `app.kernels` asks for, compiled here and now where that was not done before."""
    cached = load_cached(kernels)
    return _compiled(use_cache()) if cached is None else cached


def load_cached(kernels: Choice) -> Kernels | None:
    """What `app.kernels` asks for; None where it must be compiled. Without numba, the slow twins and a warning."""
    if kernels == "python":
        return PYTHON
    try:
        state = use_cache()
    except (ImportError, OSError) as fault:
        log.warning("Decoding is slow: app.kernels=python is used, as numba cannot be: %s", fault)
        return PYTHON
    if not (state / COMPLETE).exists():
        return None
    try:
        return _loaded()
    except Exception as fault:  # noqa: BLE001 - a machine that lost its power may leave any damage in a file
        log.warning("The compiled kernels in %s are damaged and are removed: %r", state, fault)
        _remove(state)
        return None


def _loaded() -> Kernels:
    """Compiles what is missing after all."""
    from tss import chunk_writes, gather, kernels, origins

    for module in (kernels, chunk_writes, origins, gather):
        module.warm_up()
    return Kernels(
        kernels.Decoder().decode,
        chunk_writes.chunk_writes,
        origins.list_records,
        gather.Gatherer().span_table,
    )


# --- compiling ---------------------------------------------------------------------------------------------------


def _compiled(state: Path) -> Kernels:
    started = time.monotonic()
    with _alone_in(state):
        if not (state / COMPLETE).exists():
            log.info("Compiling kernels for this machine, once; this takes some 20 s")
        kernels = _loaded()
        (state / COMPLETE).touch()
    log.info("Kernels are ready after %.1f s", time.monotonic() - started)
    return kernels


@contextlib.contextmanager
def _alone_in(state: Path) -> Iterator[None]:
    """While another process is in there, waits; the lock of a process that dies is free."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_apart(stop: threading.Event) -> Kernels:
    """The kernels, once a process of its own has compiled them. The slow twins if it cannot, or `stop` came first."""
    log.info("Kernels are being compiled for this machine, once; until then the slow twins do their work")
    started = time.monotonic()
    try:
        said = _run_compiler(stop)
    except OSError as fault:
        said = str(fault)
    if stop.is_set():
        return PYTHON
    kernels = load_cached("numba")
    if kernels is None:
        log.warning("Decoding stays slow, compiling the kernels failed: %s", said[-SAID_CHARS_MAX:])
        return PYTHON
    log.info("Compiled kernels take over after %.1f s", time.monotonic() - started)
    return kernels


def _run_compiler(stop: threading.Event) -> str:
    """Fills the cache, or is killed when `stop` comes; what it said."""
    cache = {"NUMBA_CACHE_DIR": str(use_cache().parent)}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            (sys.executable, "-P", "-m", "tss.compiler", APART),
            stdin=subprocess.PIPE,  # nothing is written to it: it closes when this process ends, however it ends
            stdout=said,
            stderr=said,
            env=config.child_environment(os.environ) | cache,
            start_new_session=True,  # Ctrl-C is for us to handle
        ) as child,
    ):
        while child.poll() is None:
            if stop.wait(POLL_SECS):
                child.kill()
                break
        said.seek(0)
        return f"exit code {child.wait()}. {said.read()}"


def _end_with_parent() -> None:
    """Reads until the other end of standard input is closed, be it by kill -9."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> None:
    """`python -m tss.compiler` fills the cache."""
    logging.basicConfig(level=logging.INFO, format="tss: %(message)s")
    if APART in arguments:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        with contextlib.suppress(OSError):  # Linux: where memory is short, it is this process that must go
            Path("/proc/self/oom_score_adj").write_text("1000")
    load("numba")


# --- the cache ---------------------------------------------------------------------------------------------------


@functools.cache
def use_cache() -> Path:
    """Has numba keep what it compiles, and says where. To be called before anything that is compiled is imported."""
    import numba.core.config
    from numba.core.registry import cpu_target

    cache = _cache_folder()
    target = (cpu_target.target_context.codegen().magic_tuple(), numba.__version__, sys.version)
    state = cache / _name_of_state(repr(target))
    shipped = _shared_folder() / state.name
    if shipped.is_dir() and not state.exists():
        _copy(shipped, state)
    state.mkdir(parents=True, exist_ok=True)
    os.utime(state)  # used now
    _remove_unused(cache)
    numba_config: Any = numba.core.config
    numba_config.CACHE_DIR = str(state)
    return state


def _name_of_state(target: str) -> str:
    package = Path(__file__).parent
    contents = [(package / name).read_bytes() for name in SOURCES]
    return hashlib.sha256(b"\0".join([target.encode(), bytes(package), *contents])).hexdigest()[:16]


def _copy(shipped: Path, state: Path) -> None:
    """Put in place whole: another process may be about to do the same."""
    copy = Path(tempfile.mkdtemp(dir=state.parent))
    shutil.copytree(shipped, copy, dirs_exist_ok=True)
    try:
        copy.rename(state)
    except OSError:  # it was faster
        shutil.rmtree(copy)


def _remove_unused(cache: Path) -> None:
    """Whoever begins to use a state in this very moment compiles again."""
    used = {path: path.stat().st_mtime for path in cache.iterdir() if STATE_NAME.fullmatch(path.name)}
    newest_first = sorted(used, key=lambda path: used[path], reverse=True)
    for state in newest_first[STATES_KEPT:]:
        if time.time() - used[state] > UNUSED_SECS:
            _remove(state)


def _remove(state: Path) -> None:
    with contextlib.suppress(OSError):  # another process was faster
        (state / COMPLETE).unlink()
    shutil.rmtree(state, ignore_errors=True)


def _shared_folder() -> Path:
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return Path(wanted) if wanted else caches / "tss-kernels"


def _cache_folder() -> Path:
    """The shared one, or a private one where that cannot be written to."""
    shared = _shared_folder()
    if _is_writable(shared):
        return shared
    # The name is one that others could take first, and what lies there is run: so it must be ours alone.
    private = Path(tempfile.gettempdir(), f"tss-kernels-{os.getuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    owner = private.lstat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077 or private.is_symlink():
        private = Path(tempfile.mkdtemp(prefix="tss-kernels-"))
    return private


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
