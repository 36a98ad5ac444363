"""The kernels and their slow twin, each as a whole worker over the same topic, end in the same tables."""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from pyiceberg.catalog.sql import SqlCatalog

from tests.builders import attributes, framed, raw_record, span
from tests.e2e.conftest import PARTITIONS
from tests.e2e.parts import Parts, Worker, wait_for
from tests.e2e.test_truth import FORCE_RULE, SEED, decided_all, thousand
from tests.e2e.traces import Trace, scattered
from tss import compiler, config
from tss.rule_store import RuleStore
from tss.rules import new_rule

TRACES = 500
OF_A_RUN = {"decided_at", "writer", "sequence"}  # who decided, when, and in which of its commits

STATES = ("", "a=b", "ot=th:8", "a=b,ot=th:c;rv:00000000000001", "ot=rv:ffffffffffffff")
ATTRIBUTES = attributes(
    {
        "http.route": "/cart/{id}",
        "http.response.status_code": 503,
        "ratio": 0.1,
        "text": 'äöü €𝄞 "quoted" \n',
        "huge": 2**63 - 1,
        "none": None,
        "bytes": b"\0\xff",
        "list": [1, "two", 3.5, None, {"in": [b"it"]}],
        "server.port": True,
    }
)
ROUTE_RULE = FORCE_RULE | {
    "match": {
        "span": [
            {"key": "http.route", "op": "starts_with", "value": "/cart"},
            {"key": "none", "op": "exists"},
        ]
    }
}


def enrich(rng: random.Random, trace: Trace) -> None:
    """Gives its spans all that a table can hold."""
    state = rng.choice(STATES)
    for one in trace.spans:
        one.trace_state = state
        one.attributes.extend(rng.sample(ATTRIBUTES, rng.randint(0, len(ATTRIBUTES))))
        one.flags = rng.getrandbits(32)
        one.dropped_attributes_count = rng.randrange(3)
        thrown = attributes({"exception.type": "TimeoutError", "at": [rng.random()]})
        for _ in range(rng.choice((0, 0, 1, 3))):
            one.events.add(name="exception", time_unix_nano=one.start_time_unix_nano, attributes=thrown)
        for _ in range(rng.choice((0, 0, 1))):
            one.links.add(trace_id=rng.randbytes(16), span_id=rng.randbytes(8), trace_state=state)


def odd_records(rng: random.Random) -> tuple[list[bytes], list[bytes]]:
    """What kernels leave to the twin: records that it takes in, each with a trace of its own, and such that it does not."""
    good = [span(trace_id=rng.randbytes(16), error=True).SerializeToString() for _ in range(4)]
    resource = Resource(attributes=attributes({"service.name": "odd"})).SerializeToString()
    json_text = (
        b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"5b8efff798038103d269b633813fc60c",'
        b'"spanId":"eee19b7ec3c1b174","name":"json","status":{"code":2}}]}]}]}'
    )
    taken = [
        raw_record(good[0] + b"\xa3\x01\xa4\x01"),  # a group
        raw_record(good[1] + good[1]),
        raw_record(good[2] + b"\xba\x3e\x04junk"),  # an unknown field
        framed(1, framed(1, resource, resource) + framed(2, framed(2, good[3]))),
        json_text,
    ]
    return taken, [
        b"\x0a\xffgarbage",
        raw_record(span(trace_id=b"short").SerializeToString()),
        b'{"resourceSpans": [',
    ]


def tables(folder: Path) -> dict[str, pa.Table]:
    """What a worker wrote, by trace and span, without what is of its run."""
    catalog = SqlCatalog("tss", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/warehouse")
    found = {}
    for name, order in (("spans", ("trace_id", "span_id")), ("decisions", ("trace_id",))):
        rows = catalog.load_table(("default", name)).scan().to_arrow()
        rows = rows.select([column for column in rows.column_names if column not in OF_A_RUN])
        found[name] = rows.sort_by([(column, "ascending") for column in order]).combine_chunks()
    return found


def parquet(rows: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(rows, out)
    return out.getvalue()


@pytest.mark.embedded
@pytest.mark.parametrize("parts", ["embedded"], indirect=True)
def test_kernels_and_their_twin_write_the_same_bytes(parts: Parts) -> None:
    """Of a topic with all that spans can hold and odd records, in batches cut elsewhere, both make the same tables."""
    rng = random.Random(SEED + 3)
    traces = thousand(rng, TRACES)
    for trace in traces:
        enrich(rng, trace)
    base_ms = int(time.time() * 1000) - 60_000
    taken, refused = odd_records(rng)
    odd = [(rng.randrange(PARTITIONS), value, base_ms + i) for i, value in enumerate([*taken, *refused])]
    parts.produce([*odd, *scattered(rng, traces, base_ms, partitions=PARTITIONS, spread_ms=20_000)])

    compiler.load("numba")  # else the worker that is to use them would begin with the twins
    folders = {kernels: parts.folder / kernels for kernels in ("numba", "python")}
    workers = [
        _worker(parts, kernels, folder, database)
        for database, (kernels, folder) in enumerate(folders.items())
    ]
    for worker in workers:
        worker.ready()
    wait_for(
        lambda: all(decided_all([worker], TRACES + len(taken)) for worker in workers),
        60,
        lambda: [worker.log[-2000:] for worker in workers],
    )
    used = [worker.pipeline()["kernels"] for worker in workers]
    assert used == ["compiled", "python"]
    letters = Counter(value for _, value in parts.dead_letters(2 * len(refused)))
    for worker in workers:
        assert worker.terminate() == 0

    kernels, twin = map(tables, folders.values())
    assert set(kernels["decisions"]["reason"].to_pylist()) == {
        "error",
        "latency",
        "force",
        "probabilistic",
        "not_sampled",
    }
    assert kernels["decisions"].num_rows == TRACES + len(taken)
    for name in ("spans", "decisions"):
        for column in twin[name].column_names:
            assert kernels[name][column].to_pylist() == twin[name][column].to_pylist(), column
        assert parquet(kernels[name]) == parquet(twin[name])
    assert letters == dict.fromkeys(letters, 2)
    assert len(letters) == len(refused)


def _worker(parts: Parts, kernels: str, folder: Path, database: int) -> Worker:
    """One with a group, a Redis database and tables of its own. Rules are there before it reads."""
    own = {
        "app__kernels": kernels,
        "kafka__consumer_group": kernels,
        "redis__db": database,
        "storage__local__path": folder,
        "sampling__normal_sample_rate": 0.3,
        "app__inactivity_timeout_secs": 22,
    }
    rules = RuleStore(
        config.load(parts.env | {f"TSS__{key.upper()}": str(value) for key, value in own.items()})
    )
    for name, rule in (("forced", FORCE_RULE), ("route", ROUTE_RULE)):
        rules.add(new_rule(rule, rule_id=name, now=datetime.now(UTC)))
    rules.close()
    return parts.worker(**own)
