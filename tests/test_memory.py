"""What a process holds: the allocator, the compiler's code, and the sizes of traces it has seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.builders import trace_id
from tss import memory
from tss.ingest import SIZES_CHUNKS, Sizes
from tss.model import FACTS, Chunks

BLOCK_BYTES = 64 << 10
BLOCKS = 1000

# Frees all blocks but the last, below which the heap cannot shrink by itself.
FREED = f"""
from tss import memory
from pathlib import Path
memory.hold_little()
blocks = [bytearray({BLOCK_BYTES}) for _ in range({BLOCKS})]
del blocks[:-1]
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
memory.give_back()
print(before - resident())
"""

# Compiles, drops the code, the compiler's too, and compiles again.
FORGOTTEN = """
from pathlib import Path
from tss import memory
import numba
assert numba.njit(lambda x: x + 1)(1) == 2
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
mapped = memory.forget_code()
freed = before - resident()
assert mapped > freed
print(freed)
assert numba.njit(lambda x: x * 3)(2) == 6
"""

# Whether a worker's Arrow asks the C library for memory, as its inputs and outputs do without being told.
POOLED = """
import tss.service
import pyarrow
print(int(pyarrow.default_memory_pool().backend_name == "system"))
"""

# How many of a hundred thousand objects are looked at for garbage.
SETTLED = """
from tss import memory
import gc
objects = [[] for _ in range(100_000)]
memory.settle()
print(len(gc.get_objects()))
"""


def printed(program: str) -> int:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not memory.IS_GLIBC, reason="another C library has its own ways")
def test_what_was_freed_is_given_back() -> None:
    """Memory between blocks that live on goes to the system."""
    assert printed(FREED) > BLOCK_BYTES * BLOCKS * 0.9


def test_arrow_keeps_no_memory_of_its_own() -> None:
    """Its files and tables come from the allocator that gives back what is free."""
    assert printed(POOLED) == 1


def test_what_stays_is_not_looked_at_for_garbage() -> None:
    """Objects from before a worker began cost its collector nothing."""
    assert printed(SETTLED) < 1000


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_code_is_dropped_and_comes_back() -> None:
    """That of the compiler alone is some 80 MB; whoever compiles again finds it whole."""
    assert printed(FORGOTTEN) > 40 << 20


def chunks(*traces: int, spans: int = 1) -> Chunks:
    ids = b"".join(map(trace_id, traces))
    facts = np.zeros(len(traces), FACTS)
    facts["spans"] = spans
    ends = np.arange(len(traces) + 1, dtype=np.int64) * 100
    table = np.frombuffer(ids, np.uint8).reshape(-1, 16)
    return Chunks(table, facts, memoryview(bytes(int(ends[-1]))), ends, ends[:-1])


def test_the_size_of_a_trace_is_that_of_its_chunks() -> None:
    """Spans and bytes add up for each trace by itself, whether its chunks come together or not."""
    sizes = Sizes()
    assert sizes.add(chunks(1, 2, spans=3)).tolist() == [[3, 3], [100, 100]]
    assert sizes.add(chunks(2)).tolist() == [[4], [200]]
    assert sizes.add(chunks(3, 1)).tolist() == [[1, 4], [100, 200]]


def test_sizes_of_long_ago_are_forgotten() -> None:
    """A trace is remembered for a number of chunks of others, and not for ever."""
    sizes = Sizes()
    sizes.add(chunks(1))
    many = chunks(*range(2, 2 + SIZES_CHUNKS // 2))
    sizes.add(many)
    assert sizes.add(chunks(1))[0, 0] == 2
    for _ in range(5):
        sizes.add(many)
    assert sizes.add(chunks(1))[0, 0] < 10, "only those that share its counter are left"
