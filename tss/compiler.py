"""The compiled kernels, ready before the first record comes.

Compiling takes some fifteen seconds, once for each machine: the result is kept in a folder on disk, as it is bound
to the version of tss and the kind of processor, and loads in under a second. Any number of processes may share the
folder, and compile at the same time: files are put in place whole, and all write the same. In it, each state of the
sources has a folder of its own: numba compares only the file of a kernel, and kernels are made of several.

The folder is NUMBA_CACHE_DIR, else one in the user's cache. Where that cannot be written to (a read-only container), a
private one among the temporary files serves, beginning with a copy of what the first holds: numba refuses to read
where it cannot write.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from tss import model, resp, rows, wire
from tss.judge import ListRecords
from tss.model import Record
from tss.resp import ChunkWrites
from tss.rows import KeptTrace
from tss.rules import RuleSet
from tss.wire import Decoded

log = logging.getLogger("tss")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions of the hot path, compiled or not. `decode` is for one thread, the others for any number."""

    decode: Callable[[Sequence[Record], RuleSet], Decoded]
    chunk_writes: ChunkWrites
    list_records: ListRecords
    span_table: Callable[[Iterable[KeptTrace], datetime], tuple[pa.Table, int]]


PYTHON = Kernels(wire.decode, resp.chunk_writes, model.list_records, rows.span_table)

NOTICE_SECS = 1.0  # loading takes less; whoever waits longer is told why
SOURCES = ("native.py", "kernels.py", "chunk_writes.py", "origins.py", "gather.py")


def load(kernels: Literal["numba", "python"]) -> Kernels:
    """What `app.kernels` asks for, compiled and loaded. Without numba, the slow twins and a warning."""
    if kernels == "python":
        return PYTHON
    try:
        use_cache()
    except ImportError as missing:
        log.warning("Decoding is slow: numba cannot be imported (%s); app.kernels=python is used", missing)
        return PYTHON
    from tss import chunk_writes, gather, origins
    from tss import kernels as decoding
    from tss.native import compilations

    started, before = time.monotonic(), compilations()
    notice = threading.Timer(
        NOTICE_SECS, log.info, ("Compiling kernels for this machine, once; this takes some 15 s",)
    )
    notice.daemon = True
    notice.start()
    try:
        for module in (decoding, chunk_writes, origins, gather):
            module.warm_up()
    finally:
        notice.cancel()
    compiled = compilations() - before
    if compiled:
        log.info("Compiled %d kernels in %.1f s", compiled, time.monotonic() - started)
    return Kernels(
        decoding.Decoder().decode,
        chunk_writes.chunk_writes,
        origins.list_records,
        gather.Gatherer().span_table,
    )


def use_cache() -> None:
    """Has numba keep what it compiles; to be called before anything that is compiled is imported."""
    import numba.core.config

    numba_config: Any = numba.core.config
    numba_config.CACHE_DIR = str(_cache_folder() / _state_of_sources())


def _state_of_sources() -> str:
    contents = [Path(__file__).with_name(name).read_bytes() for name in SOURCES]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def _cache_folder() -> Path:
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = Path(wanted) if wanted else caches / "tss-kernels"
    if _is_writable(folder):
        return folder
    # The name is one that others could take first, and what lies there is run: so it must be ours alone.
    private = Path(tempfile.gettempdir(), f"tss-kernels-{os.getuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    owner = private.lstat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077 or private.is_symlink():
        private = Path(tempfile.mkdtemp(prefix="tss-kernels-"))
    if folder.is_dir() and not any(private.iterdir()):
        shutil.copytree(folder, private, dirs_exist_ok=True)
    return private


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="tss: %(message)s")
    load("numba")
