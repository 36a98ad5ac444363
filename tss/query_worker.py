"""One query process: DataFusion over the files it is told, a question in, JSON rows out, until its pipe closes.

Started by `query`, which says why queries have processes of their own. It holds one session for life, so that the
footers it has read stay cached; a new snapshot replaces the tables in it. User SQL runs with read-only options, on a
session from which the few functions are removed that would show file names or make much out of nothing.

Messages both ways are a `FRAME` and its two parts. The body of an answer is the rows as a JSON array; its header
is a JSON object, which also carries a refusal. Nothing else writes to that pipe: descriptor 1 is made to be 2.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import queue
import re
import resource
import shutil
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datafusion import DataFrame, RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions
from datafusion.object_store import AmazonS3

from tss.query import FRAME, TOO_MUCH_MEMORY, Limits, Question, S3Access, TableFiles, Tables, traces_select

SPILL_MAX_BYTES = 1 << 30  # a query that spills more would not end in time anyway
ADDRESS_HEADROOM_BYTES = 2 << 30  # beyond the memory pool: decoded pages and rows, what expressions make
ADDRESS_PER_CPU_BYTES = 64 << 20  # allocator arenas and thread stacks, which reserve more than they use
NICE = 10  # queries take what the pipeline leaves
ROWS_PER_CHUNK = 20  # between two looks at the size of the result
DETAIL_MAX_CHARS = 500
STORED = "_stored"  # what a table is called whose own name is given to a view with more columns

# They show paths, or make gigabytes from a short text where no memory pool counts.
REMOVED_FUNCTIONS = (
    "input_file_name",
    "repeat",
    "lpad",
    "rpad",
    "space",
    "array_repeat",
    "list_repeat",
    "array_resize",
    "list_resize",
    "range",
    "generate_series",  # the function that makes a list; the table function of that name streams, and stays
)
READ_ONLY = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)


class RefusalError(Exception):
    """The question cannot be answered; `status` is the HTTP code for it."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class UnreadableError(Exception):
    """The files of the snapshot cannot be read."""


class Session:
    """The tables of one snapshot pair, and what may be asked of them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        limits.spill_folder.mkdir(mode=0o700)
        settings = (
            SessionConfig()
            .with_default_catalog_and_schema("tss", "default")
            .with_create_default_catalog_and_schema(enabled=True)
            .set("datafusion.execution.parquet.pushdown_filters", "true")
            .set("datafusion.execution.parquet.schema_force_view_types", "false")
        )
        runtime = (
            RuntimeEnvBuilder()
            .with_fair_spill_pool(limits.memory_bytes)
            .with_disk_manager_specified(str(limits.spill_folder))
        )
        self._context = SessionContext(settings, runtime)
        self._trusted(f"SET datafusion.runtime.max_temp_directory_size = '{SPILL_MAX_BYTES >> 20}M'")
        for name in REMOVED_FUNCTIONS:
            self._context.deregister_udf(name)
        self._names: list[str] = []

    def use(self, tables: Tables) -> None:
        """Replace all tables by these."""
        try:
            self._replace(tables)
        except BaseException as error:  # a Rust panic is no Exception; a damaged file can cause one
            raise UnreadableError(str(error)) from error

    def _replace(self, tables: Tables) -> None:
        for name in self._names:
            self._trusted(f'DROP VIEW IF EXISTS "{name}"')
            self._trusted(f'DROP TABLE IF EXISTS "{name}"')
        self._names = []
        for name, files in tables.files.items():
            missing = _computed(files.schema) if name == "spans" else []
            stored = name + STORED if missing else name
            self._register(stored, files, tables.s3)
            if missing:
                self._view(name, f'SELECT *, {", ".join(missing)} FROM "{stored}"')  # noqa: S608
            if name == "spans":
                self._view("traces", traces_select())

    def ask(self, sql: str) -> tuple[dict[str, Any], bytes]:
        """Header and rows, up to the caps."""
        try:
            frame = self._context.sql_with_options(sql, READ_ONLY)
            self._check(frame)
            schema = frame.schema()
            batches = (
                batch.to_pyarrow() for batch in frame.limit(self._limits.max_rows + 1).execute_stream()
            )
            rows, count, truncated = self._encode(_unique(schema.names), batches)
        except RefusalError:
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise self._translated(error) from error
        columns = [
            {"name": name, "type": str(kind)}
            for name, kind in zip(_unique(schema.names), schema.types, strict=True)
        ]
        return {"columns": columns, "row_count": count, "truncated": truncated}, rows

    def _check(self, frame: DataFrame) -> None:
        top = frame.logical_plan().display_indent().split("\n", 1)[0].strip()
        if top in ("Explain", "Analyze"):
            raise RefusalError(403, "EXPLAIN is not served here: plans show where the files are")

    def _encode(self, names: list[str], batches: Iterator[pa.RecordBatch]) -> tuple[bytes, int, bool]:
        chunks: list[bytes] = []
        count = size = 0
        for rows in _chunks(names, batches):
            room = self._limits.max_rows - count
            text = json.dumps(rows[:room], ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            chunk = text[1:-1].encode()
            size += len(chunk)
            if chunks and size > self._limits.max_result_bytes:
                return _array(chunks), count, True
            if chunk:
                chunks.append(chunk)
            count += min(len(rows), room)
            if len(rows) > room:
                return _array(chunks), count, True
        return _array(chunks), count, False

    def _register(self, name: str, files: TableFiles, s3: S3Access | None) -> None:
        paths = [_location(path) for path in files.paths]
        self._names.append(name)
        if not paths:
            nothing = pa.RecordBatch.from_pylist([], files.schema)
            self._context.register_record_batches(name, [[nothing]])
            return
        for bucket in {urllib.parse.urlsplit(path).netloc for path in paths if path.startswith("s3://")}:
            self._context.register_object_store("s3://", _object_store(bucket, s3), bucket)
        locations = ", ".join(_quoted(path) for path in paths)
        self._trusted(f'CREATE EXTERNAL TABLE "{name}" STORED AS PARQUET LOCATION ({locations})')

    def _view(self, name: str, select: str) -> None:
        self._trusted(f'CREATE VIEW "{name}" AS {select}')
        self._names.append(name)

    def _trusted(self, sql: str) -> None:
        self._context.sql(sql).collect()

    def _translated(self, error: BaseException) -> RefusalError | UnreadableError:
        """What an error of DataFusion means to the one who asked, without paths in it."""
        text = str(error).removeprefix("DataFusion error: ").split("This issue was likely caused")[0]
        if any(f"{kind} not supported:" in text for kind in ("DDL", "DML", "Statement")):
            what = text.rsplit(": ", 1)[-1]
            return RefusalError(
                403, f"only reading is served here (SELECT, WITH, VALUES, DESCRIBE), not {what}"
            )
        if "Resources exhausted" in text:
            return RefusalError(422, TOO_MUCH_MEMORY)
        if _UNREADABLE.search(text):
            return UnreadableError(text)
        if re.search(r"table '[^']*' not found|SHOW ", text):
            names = sorted(name for name in self._names if not name.endswith(STORED))
            text += f"; the tables are {', '.join(names)}, and DESCRIBE spans shows the columns of one"
        return RefusalError(400, f"DataFusion cannot run this: {_scrubbed(text)}")


# --- files -------------------------------------------------------------------------------------------------------


def _location(path: str) -> str:
    """A path as DataFusion takes it: it decodes `%` in URLs, and local paths must be none."""
    if path.startswith("file:"):
        return urllib.parse.urlsplit(path).path
    scheme, separator, rest = path.partition("://")
    if scheme in ("s3", "s3a", "s3n") and separator:
        return "s3://" + rest.replace("%", "%25")
    return path


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "''") + "'"


def _object_store(bucket: str, access: S3Access | None) -> AmazonS3:
    if access is None:
        raise UnreadableError("the table lies in S3, but no storage.iceberg.s3_* settings are given")
    return AmazonS3(
        bucket_name=bucket,
        region=access.region,
        access_key_id=access.access_key_id,
        secret_access_key=access.secret_access_key,
        session_token=access.session_token,
        endpoint=access.endpoint,
        allow_http=(access.endpoint or "").startswith("http://"),
    )


def _computed(schema: pa.Schema) -> list[str]:
    """The times that a table made by others lacks, from the columns that every spans table has."""
    computed = {
        "start_time": "to_timestamp_millis(timestamp_ms)",
        "start_time_unix_nano": "timestamp_ms * 1000000",
        "end_time_unix_nano": "timestamp_ms * 1000000 + CAST(duration_ms * 1000000 AS BIGINT)",
    }
    return [f"{how} AS {name}" for name, how in computed.items() if name not in schema.names]


_UNREADABLE = re.compile(
    r"Object ?Store error|Parquet error|IO error|No files found|Generic S3 error", re.IGNORECASE
)
_PATH = re.compile(r"""(?:[a-z0-9]+://|(?<![\w*])/)[^\s'",;)\]]+|[^\s'",;(\[]+\.parquet""")


def _scrubbed(text: str) -> str:
    """`text` in one line, bounded, without anything that looks like a URL or a path."""
    text = " ".join(_PATH.sub("<path>", text).split())
    return text if len(text) <= DETAIL_MAX_CHARS else text[: DETAIL_MAX_CHARS - 1] + "…"


# --- values ------------------------------------------------------------------------------------------------------


def _chunks(names: list[str], batches: Iterator[pa.RecordBatch]) -> Iterator[list[dict[str, Any]]]:
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS_PER_CHUNK):
            columns = [plain(column) for column in batch.slice(first, ROWS_PER_CHUNK).columns]
            yield [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _array(chunks: list[bytes]) -> bytes:
    return b"[" + b",".join(chunks) + b"]"


def _unique(names: list[str]) -> list[str]:
    """Column names fit for keys: the second `id` of a join becomes `id_2`."""
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def plain(array: Any) -> list[Any]:
    """The values as JSON knows them: stamps ISO-8601 in UTC, bytes as hex, no NaN, maps as objects, integers exact."""
    kind = array.type
    types = pa.types
    if types.is_floating(kind):
        return [None if v is None or not math.isfinite(v) else float(v) for v in array.to_pylist()]
    if types.is_timestamp(kind) or types.is_date(kind):
        return _stamps(array)
    if types.is_duration(kind):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        return [
            None if v is None else _iso_seconds(v, per_second) for v in array.cast(pa.int64()).to_pylist()
        ]
    if types.is_interval(kind):
        return [
            v if v is None else f"P{v[0]}M{v[1]}D{_iso_seconds(v[2], 10**9)[1:]}" for v in array.to_pylist()
        ]
    if (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    ):
        return [None if v is None else v.hex() for v in array.to_pylist()]
    if types.is_struct(kind):
        names = _unique([kind.field(i).name for i in range(kind.num_fields)])
        rows = zip(*(plain(child) for child in array.flatten()), strict=True)
        return _nulled(array, [dict(zip(names, row, strict=True)) for row in rows])
    if types.is_map(kind):
        return _nulled(
            array, [dict(zip(map(_key, k), v, strict=True)) for k, v in _runs(array, array.keys, array.items)]
        )
    if types.is_fixed_size_list(kind):
        return plain(array.cast(pa.list_(kind.value_type)))
    if types.is_list(kind) or types.is_large_list(kind):
        return _nulled(array, [values for (values,) in _runs(array, array.values)])
    if types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    values: list[Any] = array.to_pylist()
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or _is_text(kind):
        return values
    return [None if v is None else str(v) for v in values]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _key(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _nulled(array: Any, values: list[Any]) -> list[Any]:
    return [
        value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)
    ]


def _runs(array: Any, *children: Any) -> Iterator[tuple[list[Any], ...]]:
    """What of each child array belongs to each entry of a list or map array, slices included."""
    offsets = array.offsets.to_pylist()
    columns = [plain(child[offsets[0] : offsets[-1]]) for child in children]
    for i in range(len(array)):
        first, last = offsets[i] - offsets[0], offsets[i + 1] - offsets[0]
        yield tuple(column[first:last] for column in columns)


def _stamps(array: Any) -> list[str | None]:
    # By numpy: Python's datetime has no nanoseconds and ends with the year 9999.
    zone = "" if pa.types.is_date(array.type) else "Z"
    texts = np.datetime_as_string(array.to_numpy(zero_copy_only=False))
    return [None if text == "NaT" else f"{text}{zone}" for text in texts.tolist()]


def _iso_seconds(ticks: int, per_second: int) -> str:
    seconds, rest = divmod(abs(ticks), per_second)
    fraction = f".{rest:0{len(str(per_second)) - 1}d}".rstrip("0") if rest else ""
    return f"{'-' if ticks < 0 else ''}PT{seconds}{fraction}S"


# --- the process -------------------------------------------------------------------------------------------------


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits = _receive(sys.stdin.buffer)
    assert isinstance(limits, Limits)
    questions: queue.SimpleQueue[Question] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(sys.stdin.buffer, questions, limits), daemon=True)
    reader.start()
    session = Session(limits)
    _confine(limits)
    while True:
        header, rows = _answer(session, questions.get())
        encoded = json.dumps(header).encode()
        answers.write(FRAME.pack(len(encoded), len(rows)) + encoded + rows)
        answers.flush()


def _answer(session: Session, question: Question) -> tuple[dict[str, Any], bytes]:
    try:
        if question.tables is not None:
            session.use(question.tables)
        return session.ask(question.sql)
    except RefusalError as refusal:
        return {"refusal": str(refusal), "status": refusal.status}, b""
    except UnreadableError as error:
        return {"unreadable": _scrubbed(str(error)), "cause": str(error)}, b""


def _receive(pipe: BinaryIO) -> Any:
    """The next message of the parent; EOFError when there will be none."""
    lengths = pipe.read(FRAME.size)
    if len(lengths) < FRAME.size:
        raise EOFError
    return pickle.loads(pipe.read(FRAME.unpack(lengths)[1]))  # noqa: S301  # from the process that started this one


def _read(pipe: BinaryIO, questions: queue.SimpleQueue[Question], limits: Limits) -> None:
    """Pass questions on; when the parent is gone, end at once, whatever is running."""
    with contextlib.suppress(EOFError):
        while True:
            questions.put(_receive(pipe))
    shutil.rmtree(limits.spill_folder, ignore_errors=True)
    os._exit(0)


def _confine(limits: Limits) -> None:
    """Give way to the pipeline, be the first to go when memory runs out, and fail rather than take it all."""
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        per_cpu = ADDRESS_PER_CPU_BYTES * (os.cpu_count() or 1)
        most = taken + limits.memory_bytes + ADDRESS_HEADROOM_BYTES + per_cpu
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
