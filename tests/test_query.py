"""SQL over real Parquet files: right answers, exact values, and hostile SQL that harms nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stack import Stack, s3_filesystem
from tests.stack.stack import S3_KEY_ID, S3_REGION, S3_SECRET
from tss.config import Api
from tss.errors import BadRequest, Unavailable
from tss.query import (
    QUEUE_MAX,
    READY_MADE,
    SQL_MAX_BYTES,
    QueryEngine,
    QueryResult,
    S3Access,
    TableFiles,
    Window,
    error_traces,
    service_stats,
    slowest_traces,
)
from tss.query_worker import plain

pytestmark = pytest.mark.embedded

T = TypeVar("T")

START_MS = 1_795_255_200_000  # 2026-11-21T10:00:00Z
STRINGS: pa.DataType = pa.map_(pa.string(), pa.string())
EVENT: pa.DataType = pa.struct(
    [("time_unix_nano", pa.int64()), ("name", pa.string()), ("attributes", STRINGS)]
)
COLUMNS: dict[str, pa.DataType] = {
    "trace_id": pa.string(),
    "span_id": pa.string(),
    "parent_span_id": pa.string(),
    "timestamp_ms": pa.int64(),
    "duration_ms": pa.float64(),
    "status_code": pa.int32(),
    "span_kind": pa.int32(),
    "service_name": pa.string(),
    "operation_name": pa.string(),
    "start_time": pa.timestamp("us", "UTC"),
    "end_time": pa.timestamp("us", "UTC"),
    "start_time_unix_nano": pa.int64(),
    "end_time_unix_nano": pa.int64(),
    "duration_ns": pa.int64(),
    "attributes": STRINGS,
    "resource_attributes": STRINGS,
    "events": pa.list_(EVENT),
    "sampling_reason": pa.string(),
    "sampling_probability": pa.float64(),
    "late": pa.bool_(),
}
SPANS = pa.schema(COLUMNS)
NINE = SPANS.names[:9]
DECISION_COLUMNS: dict[str, pa.DataType] = {
    "trace_id": pa.string(),
    "kept": pa.bool_(),
    "reason": pa.string(),
}
DECISIONS = pa.schema(DECISION_COLUMNS)
ENDLESS = (
    "SELECT count(*) FROM spans a, spans b, spans c, spans d, spans e, spans f, spans g "
    "WHERE a.timestamp_ms + c.timestamp_ms + g.timestamp_ms = 3"
)


def span(trace: int, number: int, *, start_ns: int, duration_ns: int, **changes: Any) -> dict[str, Any]:
    start = datetime.fromtimestamp((START_MS * 1_000_000 + start_ns) / 1e9, UTC)
    return {
        "trace_id": f"{trace:032x}",
        "span_id": f"{trace * 100 + number:016x}",
        "parent_span_id": f"{trace * 100:016x}" if number else None,
        "timestamp_ms": START_MS + start_ns // 1_000_000,
        "duration_ms": duration_ns / 1e6,
        "status_code": 0,
        "span_kind": 2,
        "service_name": "shop" if number == 0 else "bank",
        "operation_name": "GET /buy" if number == 0 else "charge",
        "start_time": start,
        "end_time": start,
        "start_time_unix_nano": START_MS * 1_000_000 + start_ns,
        "end_time_unix_nano": START_MS * 1_000_000 + start_ns + duration_ns,
        "duration_ns": duration_ns,
        "attributes": {"http.method": "GET"},
        "resource_attributes": {"service.name": "shop"},
        "events": [
            {"time_unix_nano": START_MS * 1_000_000 + 1, "name": "exception", "attributes": {"a": "b"}}
        ],
        "sampling_reason": "error",
        "sampling_probability": 1.0,
        "late": False,
        **changes,
    }


def shop_spans(traces: int) -> list[dict[str, Any]]:
    """Trace t starts t ms after the start and lasts t ms; its second span fails in every third trace."""
    ms = 1_000_000
    return [
        row
        for t in range(1, traces + 1)
        for row in (
            span(t, 0, start_ns=t * ms, duration_ns=t * ms),
            span(t, 1, start_ns=t * ms + 1, duration_ns=10, status_code=2 if t % 3 == 0 else 0),
        )
    ]


def table(
    folder: Path, rows: list[dict[str, Any]], schema: pa.Schema, snapshot: int, files: int = 3
) -> TableFiles:
    paths = []
    for i in range(files):
        path = folder / f"it's {snapshot}-{i}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[i::files], schema), path)
        paths.append(str(path))
    return TableFiles(snapshot, schema, tuple(paths))


def shop(folder: Path, traces: int = 30, snapshot: int = 1) -> dict[str, TableFiles]:
    return {
        "spans": table(folder, shop_spans(traces), SPANS, snapshot),
        "decisions": TableFiles(None, DECISIONS, ()),
    }


@asynccontextmanager
async def engine(
    tables: dict[str, TableFiles] | Callable[[], dict[str, TableFiles]], **api: Any
) -> AsyncIterator[QueryEngine]:
    catalog = tables if callable(tables) else lambda: tables
    made = QueryEngine(Api(**{"query_timeout_secs": 20, **api}), catalog, None)
    try:
        yield made
    finally:
        await made.close()
        assert not spill_folders()


def spill_folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"tss-query-{os.getpid()}-*"))


def query_processes() -> list[int]:
    """The query processes that this one has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"tss.query_worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes in /proc")


def ask(tables: Mapping[str, TableFiles], *questions: str, **api: Any) -> list[QueryResult | BadRequest]:
    """Each question's answer or refusal, from one engine."""

    async def run() -> list[QueryResult | BadRequest]:
        answers: list[QueryResult | BadRequest] = []
        async with engine(dict(tables), **api) as made:
            for sql in questions:
                try:
                    answers.append(await made.run(sql))
                except BadRequest as error:
                    answers.append(error)
        return answers

    return asyncio.run(run())


def rows(answer: QueryResult | BadRequest) -> list[dict[str, Any]]:
    assert isinstance(answer, QueryResult), answer
    return answer.rows


def in_time(work: Coroutine[Any, Any, T], most_secs: float = 60) -> T:
    return asyncio.run(asyncio.wait_for(work, most_secs))


def test_documented_query(tmp_path: Path) -> None:
    """The query of the documentation answers with columns, types, rows by name and the true count."""
    (answer,) = ask(shop(tmp_path), "SELECT trace_id, status_code, duration_ms FROM spans LIMIT 10")
    assert isinstance(answer, QueryResult)
    assert answer.columns == [
        {"name": "trace_id", "type": "string"},
        {"name": "status_code", "type": "int32"},
        {"name": "duration_ms", "type": "double"},
    ]
    assert answer.row_count == len(answer.rows) == 10
    assert not answer.truncated
    assert answer.elapsed_ms > 0
    assert len(answer.rows[0]["trace_id"]) == 32


def test_all_files_are_read_and_both_names_work(tmp_path: Path) -> None:
    """Every file of the snapshot counts, under the plain and the qualified name, and empty tables are empty."""
    answers = ask(
        shop(tmp_path),
        "SELECT count(*) AS n FROM spans",
        "SELECT count(*) AS n FROM default.spans",
        "SELECT count(*) AS n FROM default.decisions",
        "SELECT * FROM decisions",
    )
    assert [rows(a) for a in answers] == [[{"n": 60}], [{"n": 60}], [{"n": 0}], []]
    (no_traces,) = ask({"spans": TableFiles(None, SPANS, ())}, "SELECT * FROM traces")
    assert rows(no_traces) == []
    assert isinstance(answers[3], QueryResult)
    assert [c["name"] for c in answers[3].columns] == DECISIONS.names


def test_values_are_safe_for_json(tmp_path: Path) -> None:
    """Stamps are ISO in UTC, 64-bit integers exact, bytes hex, NaN null, maps and lists nested as they are."""
    (answer,) = ask(
        shop(tmp_path),
        """SELECT start_time, start_time_unix_nano, attributes, events, x'00ff' AS bytes, 'nan'::double AS nan,
               9223372036854775807 AS big, -1.5 AS float, true AS yes, NULL AS nothing,
               timestamp '2026-01-02T03:04:05.123456789' AS nanos, date '2026-01-02' AS day,
               interval '1 month 2 days 3 seconds' AS span, end_time - start_time AS diff,
               cast(1.25 AS decimal(10, 2)) AS dec, [1, NULL] AS list, {a: 1, b: 'x'} AS struct
           FROM spans ORDER BY start_time_unix_nano LIMIT 1""",
    )
    assert rows(answer) == [
        {
            "start_time": "2026-11-21T10:00:00.001000Z",
            "start_time_unix_nano": START_MS * 1_000_000 + 1_000_000,
            "attributes": {"http.method": "GET"},
            "events": [
                {"time_unix_nano": START_MS * 1_000_000 + 1, "name": "exception", "attributes": {"a": "b"}}
            ],
            "bytes": "00ff",
            "nan": None,
            "big": 9223372036854775807,
            "float": -1.5,
            "yes": True,
            "nothing": None,
            "nanos": "2026-01-02T03:04:05.123456789Z",
            "day": "2026-01-02",
            "span": "P1M2DT3S",
            "diff": "PT0S",
            "dec": "1.25",
            "list": [1, None],
            "struct": {"a": 1, "b": "x"},
        }
    ]


def test_slices_and_nulls_of_nested_values() -> None:
    """Nested arrays convert the same whole or in slices, with nulls at every level."""
    values: list[Any] = [[("a", [1, None])], None, [], [("b", None), ("c", [])], [("d", [4])]]
    array = pa.array(values, pa.map_(pa.string(), pa.list_(pa.int64())))
    expected: list[Any] = [{"a": [1, None]}, None, {}, {"b": None, "c": []}, {"d": [4]}]
    for first in range(len(values)):
        assert plain(array[first:]) == expected[first:]
    fixed = pa.array([[1.0, float("inf")], None], pa.list_(pa.float64(), 2))
    assert plain(fixed) == [[1.0, None], None]
    years = pa.array([-62135596800000001, None, 253402300800000000], pa.timestamp("us", "UTC"))
    assert plain(years) == ["0000-12-31T23:59:59.999999Z", None, "10000-01-01T00:00:00.000000Z"]
    assert plain(pa.array([1500, -1, None], pa.duration("ms"))) == ["PT1.5S", "-PT0.001S", None]


def test_same_names_in_a_join_stay_apart(tmp_path: Path) -> None:
    """Columns of the same name from two tables are both in the answer."""
    (answer,) = ask(
        shop(tmp_path),
        "SELECT a.span_id, b.span_id FROM spans a JOIN spans b ON a.span_id = b.parent_span_id LIMIT 1",
    )
    assert list(rows(answer)[0]) == ["span_id", "span_id_2"]


def test_traces_view(tmp_path: Path) -> None:
    """The view has one row per trace, from the earliest start to the latest end, named by its root span."""
    answers = ask(
        shop(tmp_path),
        "SELECT count(*) AS n FROM traces",
        f"SELECT * FROM traces WHERE trace_id = '{3:032x}'",
    )
    assert rows(answers[0]) == [{"n": 30}]
    assert rows(answers[1]) == [
        {
            "trace_id": f"{3:032x}",
            "start_time": "2026-11-21T10:00:00.003000Z",
            "duration_ms": 3.0,
            "span_count": 2,
            "error_count": 1,
            "root_service": "shop",
            "root_operation": "GET /buy",
            "error_service": "bank",
            "error_operation": "charge",
        }
    ]


@pytest.mark.parametrize("columns", [SPANS.names, NINE], ids=["our table", "a table with nine columns"])
def test_ready_made_queries(tmp_path: Path, columns: list[str]) -> None:
    """Slowest, failed and per-service answers are right, also on a table that others made with few columns."""
    schema = pa.schema([SPANS.field(name) for name in columns])
    some = [{name: row[name] for name in columns} for row in shop_spans(30)]
    tables = {"spans": table(tmp_path, some, schema, 1)}
    answers = ask(
        tables,
        slowest_traces(Window(2, START_MS)),
        error_traces(Window(2, START_MS)),
        service_stats(Window(10, START_MS)),
        slowest_traces(Window(2, START_MS + 1000)),
    )
    assert [(r["trace_id"], r["duration_ms"]) for r in rows(answers[0])] == [
        (f"{30:032x}", 30),
        (f"{29:032x}", 29),
    ]
    assert rows(answers[0])[0]["root_operation"] == "GET /buy"
    assert [(r["trace_id"], r["error_service"]) for r in rows(answers[1])] == [
        (f"{30:032x}", "bank"),
        (f"{27:032x}", "bank"),
    ]
    stats = {r["service_name"]: r for r in rows(answers[2])}
    assert (stats["bank"]["span_count"], stats["bank"]["error_count"]) == (30, 10)
    assert round(stats["bank"]["error_percent"], 3) == 33.333
    assert (stats["shop"]["error_count"], stats["shop"]["max_ms"]) == (0, 30)
    assert rows(answers[3]) == []


def test_window_parameters() -> None:
    """limit and hours have defaults and bounds; every fault is named with its parameter."""
    now_ms = 10**13
    assert Window.parse({}, now_ms) == Window(10, now_ms - 24 * 3_600_000)
    assert Window.parse({"limit": "3", "hours": "0.5"}, now_ms) == Window(3, now_ms - 1_800_000)
    for bad in ("0", "-1", "1.5", "1001", "x", "nan", "inf", "", "1; DROP TABLE spans"):
        with pytest.raises(BadRequest, match="limit"):
            Window.parse({"limit": bad}, now_ms)
    with pytest.raises(BadRequest) as caught:
        Window.parse({"limit": "x", "hours": "1e9", "hour": "1"}, now_ms)
    assert [e["parameter"] for e in caught.value.errors] == ["limit", "hours", "hour"]


REFUSED = [
    ("SELEC 1", 400, "SELEC"),
    ("", 400, "No SQL statements"),
    ("SELECT 1; SELECT 2", 400, "single SQL statement"),
    ("SELECT nope FROM spans", 400, "spans.trace_id"),
    ("SELECT * FROM nope", 400, "the tables are decisions, spans, traces"),
    ("SHOW TABLES", 400, "the tables are decisions, spans, traces"),
    ("SELECT 1/0", 400, "Divide by zero"),
    ("SELECT $1", 400, "Placeholder"),
    ("DROP TABLE spans", 403, "only reading"),
    ("CREATE TABLE x AS SELECT 1", 403, "only reading"),
    ("CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '/etc/passwd'", 403, "only reading"),
    ("INSERT INTO decisions SELECT * FROM decisions", 403, "only reading"),
    ("DELETE FROM spans", 403, "only reading"),
    ("SET datafusion.execution.batch_size = 1", 403, "only reading"),
    ("EXPLAIN SELECT * FROM spans", 403, "EXPLAIN"),
    ("explain analyze verbose SELECT * FROM spans", 403, "EXPLAIN"),
    ("SELECT * FROM '/etc/passwd'", 400, "not found"),
    ("SELECT * FROM read_csv('/etc/passwd')", 400, "not found"),
    ("SELECT * FROM information_schema.views", 400, "not found"),
    ("SELECT input_file_name() FROM spans", 400, "input_file_name"),
    ("SELECT repeat('x', 2000000000)", 400, "repeat"),
    ("SELECT " + "(" * 2000 + "1" + ")" * 2000, 400, "ecursion"),
    (
        "SELECT array_agg(v) FROM generate_series(1, 100000000) t(v)",
        422,
        "api.query_memory_bytes",
    ),
    ("SELECT '" + "x" * SQL_MAX_BYTES + "'", 413, "8192"),
]


def test_refused_sql(tmp_path: Path) -> None:
    """SQL that is wrong, writes, reads files or takes too much gets its own code and says what is wrong."""
    answers = ask(
        shop(tmp_path), *(sql for sql, _, _ in REFUSED), "SELECT 1 AS one", query_memory_bytes=32 << 20
    )
    for (sql, status, words), refused in zip(REFUSED, answers, strict=False):
        assert isinstance(refused, BadRequest), sql
        assert (refused.status, words in refused.detail) == (status, True), (sql, refused.detail)
        assert str(tmp_path) not in refused.detail
        assert ".parquet" not in refused.detail
    assert rows(answers[-1]) == [{"one": 1}]


def test_copy_writes_nothing(tmp_path: Path) -> None:
    """COPY is refused and leaves no file."""
    target = tmp_path / "out.parquet"
    (refused,) = ask(shop(tmp_path), f"COPY spans TO '{target}'")
    assert isinstance(refused, BadRequest)
    assert refused.status == 403
    assert str(tmp_path) not in refused.detail
    assert not target.exists()


def test_endless_sql_ends_in_time_while_the_loop_ticks(tmp_path: Path) -> None:
    """A query without end is stopped at the limit and really ends; meanwhile the event loop is never held up."""

    async def run() -> None:
        tables = shop(tmp_path, 300)
        async with engine(tables, query_timeout_secs=3) as made:
            await made.run("SELECT 1")
            lags: list[float] = []

            async def tick() -> None:
                while True:
                    asked = time.monotonic()
                    await asyncio.sleep(0.01)
                    lags.append(time.monotonic() - asked - 0.01)

            ticking = asyncio.create_task(tick())
            for endless in (
                ENDLESS,
                "SELECT sum(v) FROM generate_series(1, 100000000000000) t(v)",
                "WITH RECURSIVE a AS (SELECT 1 x UNION ALL SELECT x + 1 FROM a) SELECT * FROM a WHERE x < 0",
            ):
                started = time.monotonic()
                with pytest.raises(BadRequest, match="query_timeout_secs") as stopped:
                    await made.run(endless)
                assert stopped.value.status == 408
                assert time.monotonic() - started < 4
            ticking.cancel()
            assert len(lags) > 200
            assert sorted(lags)[int(len(lags) * 0.99)] < 0.1
            assert (await made.run("SELECT count(*) AS n FROM spans")).rows == [{"n": 600}]

    in_time(run())


def test_who_goes_away_stops_the_query(tmp_path: Path) -> None:
    """Cancelling the request frees its place at once, although the query would run on for ever."""

    async def run() -> None:
        async with engine(shop(tmp_path), query_concurrency=1) as made:
            running = asyncio.create_task(made.run(ENDLESS))
            await asyncio.sleep(1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert (await asyncio.wait_for(made.run("SELECT 1 AS one"), 5)).rows == [{"one": 1}]

    in_time(run())


def test_queries_run_side_by_side_within_bounds(tmp_path: Path) -> None:
    """As many as configured run at once, a bounded number waits, and the rest is told to come back."""

    async def run() -> None:
        async with engine(shop(tmp_path), query_concurrency=2, query_timeout_secs=6) as made:
            endless = asyncio.create_task(made.run(ENDLESS))
            await asyncio.sleep(0.1)
            answers = await asyncio.gather(*(made.run(f"SELECT {i} AS i") for i in range(5)))
            assert [a.rows for a in answers] == [[{"i": i}] for i in range(5)]
            assert not endless.done()
            flood = await asyncio.gather(
                *(made.run("SELECT 1") for _ in range(QUEUE_MAX + 5)), return_exceptions=True
            )
            refused = [a for a in flood if isinstance(a, BadRequest)]
            assert {r.status for r in refused} == {429}
            assert 0 < len(refused) <= 5
            with pytest.raises(BadRequest):
                await endless

    in_time(run())


def test_memory_that_no_pool_counts(tmp_path: Path) -> None:
    """SQL that builds gigabytes in one expression ends its own process and nothing else."""
    doubling = "SELECT s || s AS s FROM (" * 32 + "SELECT span_id AS s FROM spans LIMIT 1" + ")" * 32
    refused, after = ask(shop(tmp_path), f"SELECT length(s) FROM ({doubling})", "SELECT 1 AS one")
    assert isinstance(refused, BadRequest)
    assert refused.status in (400, 422), refused
    assert rows(after) == [{"one": 1}]


@needs_proc
def test_a_crash_of_the_query_process_is_survived(tmp_path: Path) -> None:
    """When the process of a query is killed from outside, that query fails with a clear word and the next works."""

    async def run() -> None:
        async with engine(shop(tmp_path), query_concurrency=1) as made:
            running = asyncio.create_task(made.run(ENDLESS))
            await asyncio.sleep(1.5)
            victims = query_processes()
            assert len(victims) == 1
            os.kill(victims[0], signal.SIGKILL)
            with pytest.raises(BadRequest) as failed:
                await running
            assert failed.value.status == 422
            assert (await made.run("SELECT 1 AS one")).rows == [{"one": 1}]

    in_time(run())


def test_rows_are_capped(tmp_path: Path) -> None:
    """The cap cuts the rows and says so; a result that just fits is whole."""
    cut, whole = ask(
        shop(tmp_path),
        "SELECT v FROM generate_series(1, 100000000) t(v)",
        "SELECT span_id FROM spans",
        query_max_rows=60,
    )
    assert isinstance(cut, QueryResult)
    assert isinstance(whole, QueryResult)
    assert (cut.row_count, len(cut.rows), cut.truncated) == (60, 60, True)
    assert (whole.row_count, len(whole.rows), whole.truncated) == (60, 60, False)


def test_bytes_are_capped(tmp_path: Path) -> None:
    """Wide rows are cut before they fill the memory of whoever asked."""
    (cut,) = ask(
        shop(tmp_path),
        "SELECT replace('"
        + "a" * 1000
        + "', 'a', '"
        + "b" * 1000
        + "') AS wide FROM generate_series(1, 200) t(v)",
    )
    assert isinstance(cut, QueryResult)
    assert cut.truncated
    assert cut.row_count == len(cut.rows) < 100
    assert len(cut.rows_json) <= 64 << 20


def test_a_new_snapshot_is_seen(tmp_path: Path) -> None:
    """After a commit, queries read the new snapshot within a second or so, without a restart; reads are shared."""
    looks = 0
    now = shop(tmp_path)

    def tables() -> dict[str, TableFiles]:
        nonlocal looks
        looks += 1
        return now

    async def run() -> None:
        nonlocal now
        async with engine(tables) as made:
            await asyncio.gather(*(made.run("SELECT 1") for _ in range(5)))
            assert (await made.run("SELECT count(*) AS n FROM spans")).rows == [{"n": 60}]
            assert looks <= 3
            now = shop(tmp_path, 40, snapshot=2)
            await asyncio.sleep(1.1)
            assert (await made.run("SELECT count(*) AS n FROM traces")).rows == [{"n": 40}]

    in_time(run())


def test_catalog_trouble_is_told_as_such(tmp_path: Path) -> None:
    """A catalog that is down, hangs, or names files that are gone, gives three different clear faults."""

    def down() -> dict[str, TableFiles]:
        raise Unavailable("catalog", "storage.iceberg.catalog_uri", "refused")

    def hangs() -> dict[str, TableFiles]:
        time.sleep(1.5)
        return {}

    gone = {"spans": TableFiles(1, SPANS, (str(tmp_path / "gone.parquet"),))}
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but not really PAR1")

    async def run() -> None:
        async with engine(down) as made:
            with pytest.raises(Unavailable, match="catalog_uri"):
                await made.run("SELECT 1")
        async with engine(hangs, query_timeout_secs=0.5) as made:
            with pytest.raises(BadRequest, match="reading the catalog"):
                await made.run("SELECT 1")
        for files in (gone, {"spans": TableFiles(1, SPANS, (str(broken),))}):
            async with engine(files) as made:
                with pytest.raises(Unavailable, match=r"storage\.local\.path") as unreadable:
                    await made.run("SELECT count(*) FROM spans")
                assert str(tmp_path) not in str(unreadable.value)

    in_time(run())


@needs_proc
def test_no_setting_of_ours_reaches_a_query_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that run other people's SQL do not hold the passwords of this one."""
    monkeypatch.setenv("TSS__REDIS__PASSWORD", "geheim")

    async def run() -> None:
        async with engine(shop(tmp_path)) as made:
            await made.run("SELECT 1")  # a process that has only just begun has no command line yet
            (pid,) = query_processes()
            environment = await asyncio.to_thread(Path(f"/proc/{pid}/environ").read_bytes)
            assert b"PATH=" in environment
            assert b"geheim" not in environment

    in_time(run())


@pytest.mark.stack
def test_files_in_an_object_store(stack: Stack) -> None:
    """Files in S3 are read with the keys given, whatever characters their names have; wrong keys are told as such."""
    bucket = "query-test"
    files = s3_filesystem(stack.minio)
    files.create_dir(bucket)
    paths = []
    for i, name in enumerate(("plain", "a b=c%20d'e")):
        pq.write_table(
            pa.Table.from_pylist(shop_spans(10)[i::2], SPANS), f"{bucket}/{name}.parquet", filesystem=files
        )
        paths.append(f"s3://{bucket}/{name}.parquet")
    tables = {"spans": TableFiles(1, SPANS, tuple(paths))}

    async def run() -> None:
        for secret, works in ((S3_SECRET, True), ("wrong-secret", False)):
            access = S3Access(stack.minio.url, S3_REGION, S3_KEY_ID, secret, None)
            made = QueryEngine(Api(query_timeout_secs=20), lambda: tables, access)
            try:
                if works:
                    assert (await made.run("SELECT count(*) AS n FROM spans")).rows == [{"n": 20}]
                else:
                    with pytest.raises(Unavailable, match=r"storage\.iceberg\.s3_endpoint") as refused:
                        await made.run("SELECT count(*) AS n FROM spans")
                    assert bucket not in str(refused.value)
                    assert secret not in str(refused.value)
            finally:
                await made.close()

    in_time(run())


def test_ready_made_names() -> None:
    """The three ready-made queries have the names that the routes promise."""
    assert set(READY_MADE) == {"slowest-traces", "error-traces", "service-stats"}
