"""SQL over the tables: who may ask how much at a time, and what happens to a query that asks for too much.

Queries run in child processes (`query_worker`), one query at a time each, at most `api.query_concurrency` of them.
DataFusion can run inside this process, and its streams can be cancelled; it was tried and rejected, because strange
SQL then reaches further than its own answer (DataFusion 55, measured):

- cancelling is cooperative. `SELECT count(*) FROM spans a, spans b, spans c WHERE a.x + b.x + c.x = 3` never comes to
  a point where it looks: it held a core, and two of them held up every later query, for as long as the process lived.
  Planning some 2 kB of SQL cannot be cancelled either.
- the memory pool counts operators, not expressions: `SELECT length(repeat('x', 2000000000))` took 8 GB; an allocation
  that fails aborts the process, and a crash in native code would end a process that holds claims.

A child can be killed, bounded by the system and made to give way to the pipeline. It costs 0.7 s once (`start` does
that ahead of the first query) and 200 MB each. The rows come back as JSON text and are passed on as they are, so
that the event loop neither waits for a query nor converts its result.

    too much SQL 413 · wrong SQL 400 · anything but reading 403 · too slow 408 · too much memory 422 · too many 429
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import shutil
import signal
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tss import config
from tss.errors import BadRequest, Unavailable

SQL_MAX_BYTES = 8 << 10  # planning time grows with its square; the longest sensible query is a tenth of it
RESULT_MAX_BYTES = 64 << 20  # of rows as JSON; wide rows reach it before the row cap does
QUEUE_MAX = 16  # queries that wait their turn; more would only wait to be timed out
REFRESH_SECS = 1.0  # how long a look at the catalog is good for
FRAME = struct.Struct("<IQ")  # lengths of the two parts of a message between this process and a child

READY_LIMIT_DEFAULT = 10
READY_LIMIT_MAX = 1000
READY_HOURS_DEFAULT = 24.0
READY_HOURS_MAX = 24.0 * 366

TOO_MUCH_MEMORY = (
    "the query needs more memory than api.query_memory_bytes allows; "
    "select fewer columns, group by fewer values, or narrow it down by start_time"
)

logger = logging.getLogger("tss")


@dataclass(frozen=True)
class TableFiles:
    """The data files of exactly one Iceberg snapshot; None and no paths for a table without one.

    A file that is missing from the start is an error, one that goes while queries run is silently left out by
    DataFusion: whoever deletes the files of old snapshots must let them be for longer than a query may take.
    """

    snapshot_id: int | None
    schema: pa.Schema
    paths: tuple[str, ...]


@dataclass(frozen=True)
class S3Access:
    """How to reach the object store; None of endpoint means AWS."""

    endpoint: str | None
    region: str
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None


@dataclass(frozen=True)
class Limits:
    """What one child may take; it makes the folder, and whoever ends it removes it."""

    max_rows: int
    max_result_bytes: int
    memory_bytes: int
    spill_folder: Path


@dataclass(frozen=True)
class Tables:
    """One consistent look at the catalog."""

    files: Mapping[str, TableFiles]
    s3: S3Access | None


@dataclass(frozen=True)
class Question:
    """`tables` is None when they are the ones the child already knows."""

    sql: str
    tables: Tables | None


@dataclass(frozen=True)
class QueryResult:
    """Columns as [{name, type}]; rows as a JSON array of objects, `truncated` when a cap cut them."""

    columns: list[dict[str, str]]
    rows_json: bytes
    row_count: int
    truncated: bool
    elapsed_ms: float

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.rows_json)
        return rows


class QueryEngine:
    """Runs SQL on what `tables` says, which may block and is asked at most once in `REFRESH_SECS`."""

    def __init__(
        self, api: config.Api, tables: Callable[[], dict[str, TableFiles]], s3: S3Access | None
    ) -> None:
        self._api = api
        self._read_tables = tables
        self._s3 = s3
        self._catalog_thread = ThreadPoolExecutor(1, thread_name_prefix="query-catalog")
        self._refreshing = asyncio.Lock()
        self._tables: Tables | None = None
        self._read_at = 0.0
        self._slots = asyncio.Semaphore(api.query_concurrency)
        self._queued = 0
        self._idle: list[_Child] = []
        self._endings: set[asyncio.Task[None]] = set()
        logger.info("DataFusion session initialized")

    async def start(self) -> None:
        """Have a child ready, so that the first query does not wait for it."""
        self._idle.append(await self._new_child())

    async def run(self, sql: str) -> QueryResult:
        """The rows that `sql` selects, or BadRequest with one of the codes above; Unavailable when files are."""
        size = len(sql.encode("utf-8", "replace"))
        if size > SQL_MAX_BYTES:
            raise BadRequest(f"the SQL has {size} bytes; at most {SQL_MAX_BYTES} are taken", status=413)
        started = time.monotonic()
        doing = "waiting for other queries"
        try:
            async with asyncio.timeout(self._api.query_timeout_secs), self._slot():
                doing = "reading the catalog"
                tables = await self._current_tables()
                doing = "running"
                header, rows = await self._ask(sql, tables)
        except TimeoutError:
            raise BadRequest(
                f"the query was stopped after {self._api.query_timeout_secs:g} s (api.query_timeout_secs) while "
                f"{doing}; ask for less, for example with a condition on start_time or trace_id",
                status=408,
            ) from None
        elapsed_ms = round((time.monotonic() - started) * 1000, 3)
        if fault := header.get("unreadable"):
            logger.warning("A query found its files unreadable: %s", header["cause"])
            raise Unavailable("a data file", self._files_setting, fault)
        if refusal := header.get("refusal"):
            raise BadRequest(refusal, status=header["status"])
        return QueryResult(header["columns"], rows, header["row_count"], header["truncated"], elapsed_ms)

    async def close(self) -> None:
        """End the children. No query may be running."""
        for child in self._idle:
            self._end(child)
        self._idle.clear()
        await asyncio.gather(*self._endings)
        self._catalog_thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _files_setting(self) -> str:
        return "storage.iceberg.s3_endpoint" if self._s3 else "storage.local.path"

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._queued >= QUEUE_MAX:
            raise BadRequest(
                f"{QUEUE_MAX} queries are waiting already; try again later (api.query_concurrency is "
                f"{self._api.query_concurrency})",
                status=429,
            )
        self._queued += 1
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            self._slots.release()

    async def _current_tables(self) -> Tables:
        async with self._refreshing:
            if self._tables is None or time.monotonic() - self._read_at >= REFRESH_SECS:
                loop = asyncio.get_running_loop()
                files = await loop.run_in_executor(self._catalog_thread, self._read_tables)
                self._read_at = time.monotonic()
                if self._tables is None or files != self._tables.files:
                    self._tables = Tables(files, self._s3)
            return self._tables

    async def _ask(self, sql: str, tables: Tables) -> tuple[dict[str, Any], bytes]:
        child = self._idle.pop() if self._idle else await self._new_child()
        try:
            answer = await child.ask(sql, tables)
        except asyncio.IncompleteReadError:
            code = await child.process.wait()
            self._end(child)
            if code not in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV):
                raise RuntimeError(f"the query process ended with code {code}") from None
            raise BadRequest(TOO_MUCH_MEMORY, status=422) from None
        except BaseException:  # timed out, or the caller went away: only an end stops the query
            self._end(child)
            raise
        self._idle.append(child)
        return answer

    async def _new_child(self) -> _Child:
        limits = Limits(
            max_rows=self._api.query_max_rows,
            max_result_bytes=RESULT_MAX_BYTES,
            memory_bytes=self._api.query_memory_bytes // self._api.query_concurrency,
            spill_folder=Path(tempfile.gettempdir()) / f"tss-query-{os.getpid()}-{uuid.uuid4()}",
        )
        return await _Child.start(limits)

    def _end(self, child: _Child) -> None:
        ending = asyncio.get_running_loop().create_task(child.end())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


class _Child:
    """One process of `query_worker` and the two pipes to it."""

    def __init__(self, process: asyncio.subprocess.Process, limits: Limits) -> None:
        self.process = process
        self._limits = limits
        self._knows: Tables | None = None

    @classmethod
    async def start(cls, limits: Limits) -> _Child:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tss.query_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=config.child_environment(os.environ) | {"RUST_BACKTRACE": "0"},
            start_new_session=True,  # Ctrl-C is for us to handle; a child ends when its pipe does
        )
        child = cls(process, limits)
        child._send(limits)
        return child

    async def ask(self, sql: str, tables: Tables) -> tuple[dict[str, Any], bytes]:
        """The header and the rows of the answer."""
        assert self.process.stdin
        assert self.process.stdout
        self._send(Question(sql, None if tables is self._knows else tables))
        try:
            await self.process.stdin.drain()
        except ConnectionError:
            raise asyncio.IncompleteReadError(b"", None) from None
        sizes = FRAME.unpack(await self.process.stdout.readexactly(FRAME.size))
        header = json.loads(await self.process.stdout.readexactly(sizes[0]))
        self._knows = None if "unreadable" in header else tables
        return header, await self.process.stdout.readexactly(sizes[1])

    async def end(self) -> None:
        """Kill it and remove what it spilled to disk."""
        if self.process.returncode is None:
            # Not process.kill(): it looks for the exit code itself, and may take it from asyncio's watcher.
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        if self.process.stdin:
            self.process.stdin.close()
        await self.process.wait()
        await asyncio.to_thread(shutil.rmtree, self._limits.spill_folder, ignore_errors=True)

    def _send(self, message: Limits | Question) -> None:
        assert self.process.stdin
        body = pickle.dumps(message)
        self.process.stdin.write(FRAME.pack(0, len(body)) + body)


# --- what every table can be asked -------------------------------------------------------------------------------


def traces_select(where: str = "TRUE") -> str:
    """One row per trace, from the spans that `where` leaves; also the view `traces`."""
    root = "FILTER (WHERE parent_span_id IS NULL OR parent_span_id = '')"
    first = "ORDER BY start_time_unix_nano"
    return f"""
        SELECT
            trace_id,
            min(start_time) AS start_time,
            (max(end_time_unix_nano) - min(start_time_unix_nano)) / 1e6 AS duration_ms,
            count(*) AS span_count,
            count(*) FILTER (WHERE status_code = 2) AS error_count,
            first_value(service_name {first}) {root} AS root_service,
            first_value(operation_name {first}) {root} AS root_operation,
            first_value(service_name {first}) FILTER (WHERE status_code = 2) AS error_service,
            first_value(operation_name {first}) FILTER (WHERE status_code = 2) AS error_operation
        FROM spans WHERE {where} GROUP BY trace_id"""  # noqa: S608


@dataclass(frozen=True)
class Window:
    """How many rows of a ready-made query, and of what time."""

    limit: int
    since_ms: int

    @classmethod
    def parse(cls, parameters: Mapping[str, str], now_ms: int) -> Window:
        """From `limit` and `hours` of a URL's query string; BadRequest names every fault."""
        faults: list[dict[str, str]] = []

        def read(name: str, default: float, most: float) -> float:
            text = parameters.get(name, str(default))
            try:
                value = float(text)
            except ValueError:
                value = 0.0
            if not 0 < value <= most or (isinstance(default, int) and value != int(value)):
                kind = "a whole number" if isinstance(default, int) else "a number"
                faults.append(
                    {"parameter": name, "detail": f"{text[:40]!r} is not {kind} above 0, at most {most:g}"}
                )
                return default
            return value

        limit = read("limit", READY_LIMIT_DEFAULT, READY_LIMIT_MAX)
        hours = read("hours", READY_HOURS_DEFAULT, READY_HOURS_MAX)
        faults += [
            {"parameter": name[:40], "detail": "is not known; there are limit and hours"}
            for name in parameters
            if name not in ("limit", "hours")
        ]
        if faults:
            raise BadRequest("; ".join(f"{f['parameter']}: {f['detail']}" for f in faults), errors=faults)
        return cls(int(limit), now_ms - int(hours * 3_600_000))


def slowest_traces(window: Window) -> str:
    """SQL for the traces that took longest."""
    return f"""
        SELECT trace_id, root_service, root_operation, start_time, duration_ms, span_count, error_count
        FROM ({traces_select(f"timestamp_ms >= {window.since_ms}")})
        ORDER BY duration_ms DESC, trace_id LIMIT {window.limit}"""  # noqa: S608


def error_traces(window: Window) -> str:
    """SQL for the latest traces with an error, and where it happened first."""
    return f"""
        SELECT trace_id, root_service, root_operation, error_service, error_operation, start_time, duration_ms,
            span_count, error_count
        FROM ({traces_select(f"timestamp_ms >= {window.since_ms}")}) WHERE error_count > 0
        ORDER BY start_time DESC, trace_id LIMIT {window.limit}"""  # noqa: S608


def service_stats(window: Window) -> str:
    """SQL for the kept spans of each service: how many, how many with errors, how long they took."""
    return f"""
        SELECT
            service_name,
            count(*) AS span_count,
            count(DISTINCT trace_id) AS trace_count,
            count(*) FILTER (WHERE status_code = 2) AS error_count,
            100.0 * count(*) FILTER (WHERE status_code = 2) / count(*) AS error_percent,
            approx_percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_ms) AS p50_ms,
            approx_percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms) AS p95_ms,
            max(duration_ms) AS max_ms
        FROM spans WHERE timestamp_ms >= {window.since_ms}
        GROUP BY service_name ORDER BY span_count DESC, service_name LIMIT {window.limit}"""  # noqa: S608


READY_MADE: Mapping[str, Callable[[Window], str]] = {
    "slowest-traces": slowest_traces,
    "error-traces": error_traces,
    "service-stats": service_stats,
}
