"""The compiled writes of chunks against their twin."""

from __future__ import annotations

import hiredis
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import record, span
from tss import resp
from tss.chunk_writes import chunk_writes
from tss.resp import Placed
from tss.rules import RuleSet
from tss.wire import decode

PREFIXES = [b"{tss:0}:", b"{tss:10}:", b""]


@st.composite
def placed(draw: st.DrawFn) -> Placed:
    """Chunks of some traces, dealt over parts, some of which get none."""
    traces = draw(st.lists(st.integers(1, 6), max_size=12))
    stamps = st.integers(0, 2**40)
    records = [record(span(t, i + 1), offset=i, timestamp_ms=draw(stamps)) for i, t in enumerate(traces)]
    chunks = decode(records, RuleSet()).chunks
    parts = np.array([draw(st.integers(0, len(PREFIXES) - 1)) for _ in range(len(chunks))], np.int64)
    order = np.argsort(parts, kind="stable")
    starts = np.searchsorted(parts[order], np.arange(len(PREFIXES) + 1))
    payloads = [draw(st.binary(max_size=300)) for _ in range(len(chunks))]
    return Placed(chunks, payloads, order, starts, PREFIXES)


@given(placed())
def test_it_gives_what_the_twin_gives(given_: Placed) -> None:
    """Byte for byte, whatever the sizes, the digits and the parts."""
    assert chunk_writes(given_) == resp.chunk_writes(given_)


@given(placed())
def test_the_server_reads_what_was_meant(given_: Placed) -> None:
    """Each part is as many whole commands as it says: its chunks, and both indexes over them."""
    for part, request in enumerate(resp.chunk_writes(given_)):
        reader, commands = hiredis.Reader(), []
        reader.feed(request.packed)
        while (command := reader.gets()) is not False:
            commands.append(command)
        assert len(commands) == request.commands
        rows, prefix = given_.rows(part).tolist(), PREFIXES[part]
        if not rows:
            assert not commands
            continue
        *chunks, seen, born = commands
        ids = [given_.chunks.trace_id(row) for row in rows]
        fields = [[given_.chunks.field(row), given_.payloads[row]] for row in rows]
        assert chunks == [[b"HSET", prefix + b"t:" + i, *field] for i, field in zip(ids, fields, strict=True)]
        newest, oldest = ([b"%d" % at[row] for row in rows] for at in (given_.newest_ms, given_.oldest_ms))
        assert seen[:3] + born[:3] == [b"ZADD", prefix + b"seen", b"GT", b"ZADD", prefix + b"born", b"LT"]
        assert seen[3:] == [part for pair in zip(newest, ids, strict=True) for part in pair]
        assert born[3:] == [part for pair in zip(oldest, ids, strict=True) for part in pair]
