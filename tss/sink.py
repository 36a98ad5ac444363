"""Iceberg: the durable memory of what was kept and what was decided.

Two tables. `decisions` has a row for every decided trace, kept or dropped; `spans` has the kept spans. What makes a
sequence land once, whoever finishes it and however often: its append carries, in the same commit, the table property
`tss.committed.<group>` = {writer: sequence}. Each attempt loads the table afresh, looks there first, and commits
against exactly that base. The library's own retry would re-apply a stale transaction on a new base, without looking;
so `commit.retry.num-retries` is 0 on both tables. A property must ride with an append: a commit of properties alone
asserts nothing about the base, and a stale one goes through.

`tss.epochs.<group>` names the lives of Redis, the current one last. A commit checks it on the base it commits to, so
a writer of a lost life cannot land anything.

Files are written before the commit and belong to nobody until it lands; a crash leaves orphans, never rows. They are
sorted by trace id, with a bloom filter and a page index, which makes looking up one trace read one page.

Rows come in parts, and each is in its file before the next one is asked for: a part is all that is in memory.

Any number of threads may use a Sink; uploads of one process go one after another, for the same reason, and so do
commits, since two at once would only conflict.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
from numpy.typing import NDArray
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.exceptions import (
    CommitFailedException,
    CommitStateUnknownException,
    ForbiddenError,
    NamespaceAlreadyExistsError,
    NoSuchNamespaceError,
    NoSuchTableError,
    RESTError,
    TableAlreadyExistsError,
    UnauthorizedError,
)
from pyiceberg.expressions import GreaterThanOrEqual, Or
from pyiceberg.io import FileIO
from pyiceberg.io.pyarrow import (
    MetricModeTypes,
    MetricsMode,
    StatisticsCollector,
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
    pyarrow_to_schema,
    schema_to_pyarrow,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionField, PartitionFieldValue, PartitionKey, PartitionSpec
from pyiceberg.schema import assign_fresh_schema_ids
from pyiceberg.table import Table, Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.name_mapping import MappedField, NameMapping
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.sorting import SortField, SortOrder
from pyiceberg.table.update import TableUpdate
from pyiceberg.table.update.snapshot import ExpireSnapshots
from pyiceberg.transforms import DayTransform, IdentityTransform
from pyiceberg.typedef import Record
from pyiceberg.types import TimestampType, TimestamptzType

from tss import config
from tss.errors import ConfigError, Fenced, LinkLost, Unavailable
from tss.metrics import Metrics
from tss.query import S3Access, TableFiles
from tss.rows import DECISIONS, SPANS, from_millis

log = logging.getLogger("tss")

Kind = Literal["spans", "decisions"]

SCHEMAS: dict[Kind, pa.Schema] = {"spans": SPANS, "decisions": DECISIONS}
PARTITION_COLUMN: dict[Kind, str] = {"spans": "start_time", "decisions": "decided_at"}
SECOND_SORT_COLUMN: dict[Kind, str] = {"spans": "start_time", "decisions": "decided_at"}

ROW_GROUP_ROWS = 131_072  # at most; a part of an upload is one, or several
FILES_OPEN_MAX = 8  # of one upload, each with some MB on its way to the store; spans of more days take turns
PAGE_ROWS = 4096
BLOOM_FALSE_POSITIVES = 0.01
ZSTD_LEVEL = 1  # level 9 saves 8 % and takes 2.7 times as long
EPOCHS_KEPT = 8
REQUEST_TIMEOUT = "tss.request-timeout-secs"  # a catalog property: must be there before the first request
CONFLICT_ATTEMPTS_MAX = 20  # then the caller backs off and reports
CONFLICT_WAIT_SECS = 0.05
LOADED_SECS = 60.0  # files may be laid out as the table was so long ago: a catalog's keys last longer
HOUR_MICROS = 3_600_000_000

TABLE_PROPERTIES = {
    "format-version": "2",
    "commit.retry.num-retries": "0",  # see the top of this file
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "10",
    "write.parquet.compression-codec": "zstd",
}
# Columns with few different values; the others do not shrink by a dictionary, and cost the building of one.
PLAIN_COLUMNS = frozenset(
    (
        *("trace_id", "span_id", "parent_span_id", "timestamp_ms", "duration_ms", "start_time", "end_time"),
        *("start_time_unix_nano", "end_time_unix_nano", "duration_ns", "records"),
    )
)

# For what is in maps and lists: the least and the greatest key rule out no file and no page, and cost a seventh.
NO_METRICS = MetricsMode(MetricModeTypes.NONE)


@dataclass(frozen=True, slots=True)
class Upload:
    """Files that are written and belong to no table yet."""

    kind: Kind
    files: tuple[DataFile, ...]
    rows: int


class Sink:
    """Both tables. `open` before anything else; every method may raise Unavailable, which waiting can mend."""

    def __init__(self, settings: config.Storage, group: str, metrics: Metrics) -> None:
        self._settings = settings
        self._committed_property = f"tss.committed.{group}"
        self._epochs_property = f"tss.epochs.{group}"
        self._metrics = metrics
        self._catalog: Catalog | None = None
        self._catalog_errors = _catalog_errors(settings)
        self._upload_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._layouts: dict[Kind, _Layout] = {}
        self._loaded: dict[Kind, tuple[float, Table]] = {}
        self.fault: str | None = "not connected yet"
        self.heard_secs: float | None = None

    # --- opening ---

    def open(self) -> None:
        """Connects, makes what is missing, and checks what is there. Raises ConfigError where a table cannot fit."""
        with self._outside("connect"):
            self._catalog = self._catalog or _catalog(self._settings)
            namespace = self._namespace
            if not self._namespace_exists(namespace):
                try:
                    self._catalog.create_namespace(namespace)
                except NamespaceAlreadyExistsError:
                    log.debug("Namespace %s was made by another worker", namespace)
            for kind in SCHEMAS:
                self._open_table(kind)

    def _namespace_exists(self, namespace: str) -> bool:
        assert self._catalog is not None
        try:
            self._catalog.load_namespace_properties(namespace)
        except NoSuchNamespaceError:
            return False
        return True

    def _open_table(self, kind: Kind) -> None:
        assert self._catalog is not None
        try:
            table = self._catalog.load_table(self._identifier(kind))
        except NoSuchTableError:
            table = self._create(kind)
        if table.properties.get("commit.retry.num-retries") != "0":
            table.transaction().set_properties({"commit.retry.num-retries": "0"}).commit_transaction()
        _check_fits(kind, table)

    def _create(self, kind: Kind) -> Table:
        assert self._catalog is not None
        schema = assign_fresh_schema_ids(_with_ids(SCHEMAS[kind]))
        day = schema.find_field(PARTITION_COLUMN[kind]).field_id
        trace_id = schema.find_field("trace_id").field_id
        second = schema.find_field(SECOND_SORT_COLUMN[kind]).field_id
        try:
            table = self._catalog.create_table(
                self._identifier(kind),
                schema,
                partition_spec=PartitionSpec(
                    PartitionField(day, 1000, DayTransform(), f"{PARTITION_COLUMN[kind]}_day")
                ),
                sort_order=SortOrder(
                    SortField(trace_id, IdentityTransform()), SortField(second, IdentityTransform())
                ),
                properties=TABLE_PROPERTIES,
            )
        except TableAlreadyExistsError:
            return self._catalog.load_table(self._identifier(kind))
        log.info("Created table %s", ".".join(self._identifier(kind)))
        return table

    @property
    def _namespace(self) -> str:
        return self._settings.iceberg.namespace

    def _identifier(self, kind: Kind) -> tuple[str, str]:
        iceberg = self._settings.iceberg
        return (self._namespace, iceberg.table_name if kind == "spans" else iceberg.decisions_table_name)

    def _load(self, kind: Kind) -> Table:
        if self._catalog is None:
            raise Unavailable("catalog", self.where, "not connected yet")
        table = self._catalog.load_table(self._identifier(kind))
        self._loaded[kind] = time.monotonic(), table
        return table

    def _recent(self, kind: Kind) -> Table:
        """For what a commit later checks anyway: not always loaded anew."""
        loaded_secs, table = self._loaded.get(kind, (0.0, None))
        if table is None or time.monotonic() - loaded_secs > LOADED_SECS:
            return self._load(kind)
        return table

    @property
    def catalog_uri(self) -> str:
        if self._settings.storage_type == "iceberg":
            return self._settings.iceberg.catalog_uri
        return f"sqlite:///{Path(self._settings.local.path).resolve()}/catalog.db"

    @property
    def where(self) -> str:
        """The setting that points at the catalog."""
        rest = self._settings.storage_type == "iceberg"
        return "storage.iceberg.catalog_uri" if rest else "storage.local.path"

    def _outside(self, what: str) -> _Outside:
        return _Outside(self, what, self.where)

    # --- steps 11 and 12: upload and commit ---

    def upload(self, kind: Kind, parts: Iterable[pa.Table]) -> Upload:
        """Step 11. At least one file a partition; parts are in the order of the table, one after the other.

        What `parts` raises is raised.
        """
        rows = 0
        with self._upload_lock, self._outside("upload"):
            table = self._recent(kind)
            with _Files(table, self._layout(kind, table)) as files:
                for part in parts:
                    files.write(part)
                    rows += part.num_rows
                    del part  # before the next one is made
                written = files.finish()
        return Upload(kind, written, rows)

    def _layout(self, kind: Kind, table: Table) -> _Layout:
        made = self._layouts.get(kind)
        if made is None or made.of != _Layout.key(table):
            made = self._layouts[kind] = _Layout.make(table)
        return made

    def commit(self, upload: Upload, writer: str, sequence: int, epoch: str) -> bool:
        """Step 12 for one table: True when this call landed it, False when it had landed before.

        Raises Fenced when the table is of another epoch, and Unavailable when the catalog did not answer or its
        answer was lost: call again, and the look at the table settles it.
        """
        started = time.monotonic()
        for attempt in range(CONFLICT_ATTEMPTS_MAX):
            with self._commit_lock:
                try:
                    with self._outside("commit"):
                        landed = self._attempt(upload, writer, sequence, epoch)
                except CommitFailedException:
                    self._metrics.commit_retries.labels("conflict").inc()
                else:
                    self._metrics.commit_seconds.labels(upload.kind).observe(time.monotonic() - started)
                    if landed:
                        self._metrics.files_written.labels(upload.kind).inc(len(upload.files))
                        size = sum(file.file_size_in_bytes for file in upload.files)
                        self._metrics.file_bytes.labels(upload.kind).inc(size)
                    return landed
            time.sleep(CONFLICT_WAIT_SECS * (attempt + 1) * random.uniform(0.5, 1.5))
        raise Unavailable("catalog", self.where, f"{CONFLICT_ATTEMPTS_MAX} commits in a row met a conflict")

    def _attempt(self, upload: Upload, writer: str, sequence: int, epoch: str) -> bool:
        table = self._load(upload.kind)
        self._check_epoch(table, epoch)
        committed: dict[str, int] = json.loads(table.properties.get(self._committed_property, "{}"))
        if committed.get(writer, 0) >= sequence:
            return False
        committed[writer] = sequence
        self._append(table, {self._committed_property: json.dumps(committed)}, upload.files)
        self._expire_snapshots(table)
        return True

    def _append(self, table: Table, properties: dict[str, str], files: Sequence[DataFile]) -> None:
        transaction = _Transaction(table)
        transaction.set_properties(properties)
        with transaction.update_snapshot().merge_append() as append:
            for file in files:
                append.append_data_file(file)
        transaction.commit_transaction()

    def _check_epoch(self, table: Table, epoch: str) -> None:
        current = self._epoch_of(table)
        if current != epoch:
            raise Fenced(f"{'.'.join(table.name())} is of epoch {current}, this writer of {epoch}")

    def _epoch_of(self, table: Table) -> str | None:
        epochs: list[str] = json.loads(table.properties.get(self._epochs_property, "[]"))
        return epochs[-1] if epochs else None

    def _expire_snapshots(self, table: Table) -> None:
        """Half as many again are let grow, so that not every commit pays for this one."""
        keep = self._settings.keep_snapshots
        snapshots: list[Snapshot] = sorted(table.metadata.snapshots, key=lambda s: s.timestamp_ms)
        if len(snapshots) <= keep + keep // 2:
            return
        oldest_kept = from_millis(snapshots[-keep].timestamp_ms)
        faults: tuple[type[Exception], ...] = (
            CommitFailedException,
            *self._catalog_errors,
            OSError,
            ValueError,
        )
        try:
            old = ExpireSnapshots(_Transaction(table, autocommit=True))
            old.older_than(oldest_kept.replace(tzinfo=None)).commit()
        except faults as fault:
            # ValueError: another worker expired them just now. Whatever it is, the rows have landed.
            log.debug("Snapshots of %s are left to the next commit: %s", table.name(), fault)

    # --- epochs and reading back (step 15) ---

    def epochs(self) -> tuple[str | None, str | None]:
        """The current epoch of `spans` and of `decisions`."""
        with self._outside("read"):
            return self._epoch_of(self._load("spans")), self._epoch_of(self._load("decisions"))

    def enter_epoch(self, epoch: str) -> None:
        """Makes `epoch` the current one of both tables, riding on an append of nothing."""
        for kind in SCHEMAS:
            for _ in range(CONFLICT_ATTEMPTS_MAX):
                try:
                    with self._commit_lock, self._outside("commit"):
                        table = self._load(kind)
                        epochs: list[str] = json.loads(table.properties.get(self._epochs_property, "[]"))
                        if epochs[-1:] == [epoch]:
                            break
                        kept = [*epochs, epoch][-EPOCHS_KEPT:]
                        self._append(table, {self._epochs_property: json.dumps(kept)}, ())
                        break
                except CommitFailedException:
                    self._metrics.commit_retries.labels("conflict").inc()
                    time.sleep(CONFLICT_WAIT_SECS)
            else:
                raise Unavailable("catalog", self.where, f"epoch {epoch} could not enter the {kind} table")

    def landed(self, kind: Kind) -> dict[str, int]:
        """Highest committed sequence by writer."""
        with self._outside("read"):
            committed: dict[str, int] = json.loads(
                self._load(kind).properties.get(self._committed_property, "{}")
            )
        return committed

    def decisions_since(self, log_time_ms: int, decided_ms: int) -> Iterator[pa.RecordBatch]:
        """Rows of `decisions` whose newest record is of that log time or later, or that were made since then."""
        wanted = Or(
            GreaterThanOrEqual(term="last_log_time", value=from_millis(log_time_ms).isoformat()),
            GreaterThanOrEqual(term="decided_at", value=from_millis(decided_ms).isoformat()),
        )
        with self._outside("read"):
            scan = self._load("decisions").scan(row_filter=wanted)
            yield from scan.to_arrow_batch_reader()

    # --- what queries read ---

    def files(self) -> dict[str, TableFiles]:
        """The files of one snapshot of each table."""
        out = {}
        with self._outside("read"):
            for kind in SCHEMAS:
                table = self._load(kind)
                tasks = list(table.scan().plan_files()) if table.current_snapshot() else []
                if any(task.delete_files for task in tasks):
                    raise Unavailable(
                        "catalog",
                        self.where,
                        f"{kind} has delete files, which queries cannot apply; compact it",
                    )
                snapshot = table.current_snapshot()
                out[str(kind)] = TableFiles(
                    snapshot_id=snapshot.snapshot_id if snapshot else None,
                    schema=_arrow_schema(table),
                    paths=tuple(_plain_path(task.file.file_path) for task in tasks),
                )
        return out

    @property
    def s3(self) -> S3Access | None:
        """How DataFusion reaches the object store; None for local files."""
        iceberg = self._settings.iceberg
        if self._settings.storage_type != "iceberg":
            return None
        return S3Access(
            endpoint=iceberg.s3_endpoint,
            region=iceberg.s3_region,
            access_key_id=iceberg.s3_access_key_id,
            secret_access_key=_secret(iceberg.s3_secret_access_key),
            session_token=_secret(iceberg.s3_session_token),
        )


class _Outside:
    """Turns what catalog and object store raise into Unavailable, and keeps `Sink.fault` true."""

    def __init__(self, sink: Sink, what: str, where: str) -> None:
        self._sink = sink
        self._what = what
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: Any) -> None:
        if fault is None or isinstance(fault, CommitFailedException | Fenced | ConfigError | GeneratorExit):
            self._sink.fault, self._sink.heard_secs = None, time.monotonic()
            return
        detail = f"{self._what}: {type(fault).__name__}: {fault}"[:1000]
        if isinstance(fault, UnauthorizedError | ForbiddenError):
            detail += ". Check storage.iceberg.catalog_token"
        match fault:
            case LinkLost():
                return  # of Redis, where the rows came from
            case Unavailable():
                self._sink.fault = str(fault)
                return
            case CommitStateUnknownException():
                self._sink._metrics.commit_retries.labels("unknown_outcome").inc()
            case _ if isinstance(fault, self._sink._catalog_errors):
                if self._what == "commit":
                    self._sink._metrics.commit_retries.labels("unknown_outcome").inc()
            case NoSuchTableError() | NoSuchNamespaceError():
                detail += ". The table was dropped; restart tss to make it again"
            case OSError():
                self._where = _file_setting(detail) if self._sink.s3 else "storage.local.path"
            case _:
                return
        self._sink.fault = detail
        raise Unavailable("storage", self._where, detail) from fault


class _Transaction(Transaction):
    """The library's own makes the metadata anew, in a deep copy, at each of twenty looks: most of a commit's time."""

    _made: tuple[TableMetadata, tuple[TableUpdate, ...], TableMetadata] | None = None

    @property
    def table_metadata(self) -> TableMetadata:
        base = self._table.metadata
        if self._made is None or self._made[0] is not base or self._made[1] is not self._updates:
            self._made = base, self._updates, super().table_metadata
        return self._made[2]


def _file_setting(detail: str) -> str:
    """The setting that an error of the object store points at."""
    refused = ("ACCESS_DENIED", "ACCESS_KEY", "SIGNATURE", "FORBIDDEN")
    if any(word in detail for word in refused):
        return "storage.iceberg.s3_access_key_id / storage.iceberg.s3_secret_access_key"
    return "storage.iceberg.s3_endpoint"


# --- catalogs ----------------------------------------------------------------------------------------------------


class _OwnS3RestCatalog(RestCatalog):
    """A REST catalog whose tables are reached through our S3 settings.

    The server's answer would win by the precedence of the specification; but an endpoint that is right for the
    catalog (`http://minio:9000`) can be unreachable for a worker elsewhere, and the operator knows better.
    """

    def _load_file_io(self, properties: dict[str, str] | None = None, location: str | None = None) -> FileIO:
        own = {k: v for k, v in self.properties.items() if k.startswith("s3.") or k == "py-io-impl"}
        return super()._load_file_io({**(properties or {}), **own}, location)


class _TimeoutAdapter(requests.adapters.HTTPAdapter):
    """requests waits for ever by default; a hung catalog must not hang a writer."""

    def __init__(self, timeout_secs: float) -> None:
        super().__init__()
        self._timeout_secs = timeout_secs

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = kwargs.get("timeout") or self._timeout_secs
        return super().send(*args, **kwargs)


class _BoundedRestCatalog(_OwnS3RestCatalog):
    """Every request ends within REQUEST_TIMEOUT."""

    def _create_session(self) -> requests.Session:
        session: requests.Session = super()._create_session()
        adapter = _TimeoutAdapter(float(self.properties[REQUEST_TIMEOUT]))
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        return session


def _catalog(settings: config.Storage) -> Catalog:
    if settings.storage_type == "local":
        folder = Path(settings.local.path).resolve()
        if set("#?") & set(str(folder)):  # file locations are URLs, which would end there
            raise ConfigError(f"storage.local.path is {folder}: choose a folder without # and ? in its path")
        folder.mkdir(parents=True, exist_ok=True)
        from pyiceberg.catalog.sql import SqlCatalog
        from sqlalchemy.engine import URL

        database = URL.create("sqlite", database=f"{folder}/catalog.db").render_as_string()
        return SqlCatalog("tss", uri=database, warehouse=f"file://{folder}/warehouse")
    return _BoundedRestCatalog("tss", **_rest_properties(settings))


def _catalog_errors(settings: config.Storage) -> tuple[type[Exception], ...]:
    """What a catalog raises that does not answer. SQLAlchemy is a seventh of a start, and REST does without."""
    if settings.storage_type == "local":
        from sqlalchemy.exc import SQLAlchemyError

        return (SQLAlchemyError,)
    return (requests.RequestException, RESTError)


def _rest_properties(settings: config.Storage) -> dict[str, str]:
    timeout = str(settings.request_timeout_secs)
    bounds = ("s3.connect-timeout", "s3.request-timeout", REQUEST_TIMEOUT)
    return settings.iceberg.catalog_properties() | dict.fromkeys(bounds, timeout)


def _secret(value: Any) -> str | None:
    return None if value is None else str(value.get_secret_value())


# --- schemas and files -------------------------------------------------------------------------------------------


def _with_ids(schema: pa.Schema) -> Any:
    """The Iceberg schema of an Arrow schema; the ids are placeholders, the catalog assigns its own."""
    counter = iter(range(1, 100_000))

    def mapped(field: Any) -> MappedField:
        return MappedField(field_id=next(counter), names=[field.name], fields=children(field.type))

    def children(kind: pa.DataType) -> list[MappedField]:
        if pa.types.is_struct(kind):
            return [mapped(kind.field(i)) for i in range(kind.num_fields)]
        if pa.types.is_list(kind):
            return [mapped(kind.value_field.with_name("element"))]
        if pa.types.is_map(kind):
            return [mapped(kind.key_field.with_name("key")), mapped(kind.item_field.with_name("value"))]
        return []

    return pyarrow_to_schema(schema, name_mapping=NameMapping([mapped(field) for field in schema]))


def _arrow_schema(table: Table) -> pa.Schema:
    """The table's columns as the files have them: field ids kept, no `large_` types, which DataFusion's maps refuse."""
    return pa.schema([_small(field) for field in schema_to_pyarrow(table.schema())])


def _small(field: Any) -> Any:
    kind = field.type
    if pa.types.is_large_string(kind):
        kind = pa.string()
    elif pa.types.is_large_binary(kind):
        kind = pa.binary()
    elif pa.types.is_large_list(kind) or pa.types.is_list(kind):
        kind = pa.list_(_small(kind.value_field))
    elif pa.types.is_map(kind):
        kind = pa.map_(_small(kind.key_field), _small(kind.item_field))
    elif pa.types.is_struct(kind):
        kind = pa.struct([_small(kind.field(i)) for i in range(kind.num_fields)])
    return pa.field(field.name, kind, field.nullable, field.metadata)


def _check_fits(kind: Kind, table: Table) -> None:
    """A table made by somebody else: columns we lack must be optional, columns we have must take our values."""
    ours = SCHEMAS[kind]
    for field in _arrow_schema(table):
        name = f"{'.'.join(table.name())}.{field.name}"
        if field.name not in ours.names:
            if not field.nullable:
                raise ConfigError(
                    f"storage.iceberg: column {name} is required, and tss has no value for it. "
                    "Make it optional, or name another table in TSS__STORAGE__ICEBERG__TABLE_NAME"
                )
            continue
        mine = ours.field(field.name)
        try:
            pa.array([], mine.type).cast(field.type, safe=False)
        except pa.ArrowException as fault:
            raise ConfigError(
                f"storage.iceberg: column {name} is {field.type}, tss writes {mine.type}: {fault}"
            ) from fault


@dataclass(frozen=True, slots=True)
class _Layout:
    """How files of a table are written; `of` is all that it follows from, as making it takes 30 ms."""

    of: tuple[Any, ...]
    schema: pa.Schema
    leaves: list[str]
    statistics: dict[int, StatisticsCollector]
    field_ids: dict[str, int]

    @classmethod
    def key(cls, table: Table) -> tuple[Any, ...]:
        metrics = {k: v for k, v in table.properties.items() if k.startswith("write.metadata.metrics")}
        return (table.metadata.table_uuid, table.metadata.current_schema_id, metrics)

    @classmethod
    def make(cls, table: Table) -> _Layout:
        schema = table.schema()
        statistics = {
            number: replace(column, mode=NO_METRICS) if "." in column.column_name else column
            for number, column in compute_statistics_plan(schema, table.properties).items()
        }
        arrow = _arrow_schema(table)
        return cls(cls.key(table), arrow, _leaves(arrow), statistics, parquet_path_to_id_mapping(schema))


def _adapt(rows: pa.Table, target: pa.Schema) -> pa.Table:
    """Our rows with the table's columns and types. A column we lack is null; a required one of ours never is."""
    columns, ours = [], frozenset(rows.column_names)
    for field in target:
        if field.name not in ours:
            columns.append(pa.nulls(rows.num_rows, field.type))
            continue
        column = rows.column(field.name)
        if column.type != field.type:
            column = column.cast(field.type, safe=False)
        if not field.nullable and column.null_count:
            empty: Any = pa.scalar("" if pa.types.is_string(field.type) else 0).cast(field.type)
            column = column.fill_null(empty)
        columns.append(column)
    return pa.table(columns, schema=target)


def _partitions(table: Table, rows: pa.Table) -> list[tuple[tuple[Any, ...], pa.Table]]:
    """Rows by the values of their partition, for any transforms the table's specification has."""
    spec, schema = table.spec(), table.schema()
    if spec.is_unpartitioned():
        return [((), rows)]
    columns: list[list[Any]] = []
    numbers = np.zeros(rows.num_rows, np.int64)  # of each row's combination of values
    for field in spec.fields:
        source = schema.find_field(field.source_id)
        transform: Callable[[Any], Any] = field.transform.transform(source.field_type)
        values, own = _transformed(rows.column(source.name), source.field_type, transform)
        columns.append(values)
        numbers = numbers * len(values) + own
    found = np.unique(numbers)
    combinations = np.unravel_index(found, [len(values) for values in columns])
    groups = []
    for number, *places in zip(found, *combinations, strict=True):
        key = tuple(column[place] for column, place in zip(columns, places, strict=True))
        part = rows if len(found) == 1 else rows.take(np.flatnonzero(numbers == number))
        groups.append((key, part))
    return groups


def _transformed(
    column: Any, kind: Any, transform: Callable[[Any], Any]
) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct partition values, and each row's number among them; one transform a distinct hour or value."""
    if isinstance(kind, TimestampType | TimestamptzType):
        micros = column.cast(pa.int64()).fill_null(0).to_numpy()
        hours, inverse = np.unique(micros // HOUR_MICROS, return_inverse=True)
        found = [int(hour) * HOUR_MICROS for hour in hours]
    else:
        known = column.unique()
        found, inverse = known.to_pylist(), pc.index_in(column, value_set=known).to_numpy()
    values = [transform(one) for one in found]
    distinct = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(distinct), np.array([distinct[value] for value in values], np.int64)[inverse]


class _File:
    """A Parquet file that grows by a row group or more with each part."""

    def __init__(self, table: Table, layout: _Layout, values: tuple[Any, ...], first: pa.Table) -> None:
        self._table, self._layout = table, layout
        spec = table.spec()
        fields = list(map(PartitionFieldValue, spec.fields, values))
        self._key = PartitionKey(fields, spec, table.schema()) if values else None
        self._path = table.location_provider().new_data_location(f"{uuid.uuid4()}.parquet", self._key)
        bloom = {}
        if "trace_id" in first.column_names:
            traces = pc.count_distinct(first["trace_id"]).as_py()
            bloom = {"trace_id": {"ndv": traces, "fpp": BLOOM_FALSE_POSITIVES}}
        writer_class: Any = pq.ParquetWriter  # its published types know neither streams nor bloom filters
        self._stream: Any = table.io.new_output(self._path).create(overwrite=True)  # a name nobody has
        self._writer = writer_class(
            self._stream,
            layout.schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=[leaf for leaf in layout.leaves if leaf not in PLAIN_COLUMNS],
            write_statistics=[leaf for leaf in layout.leaves if "." not in leaf],  # see NO_METRICS
            write_page_index=True,
            max_rows_per_page=PAGE_ROWS,
            store_decimal_as_integer=True,
            bloom_filter_options=bloom,
        )

    def write(self, rows: pa.Table) -> None:
        self._writer.write_table(_in_order(rows), row_group_size=ROW_GROUP_ROWS)

    def abandon(self) -> None:
        """Ends a file that nobody will name."""
        self._writer.is_open = False  # else it would write its end when it is collected
        with contextlib.suppress(OSError):
            self._stream.close()

    def finish(self) -> DataFile:
        self._writer.close()
        size = self._stream.tell()
        self._stream.close()
        layout = self._layout
        statistics = data_file_statistics_from_parquet_metadata(
            self._writer.writer.metadata, layout.statistics, layout.field_ids
        )
        return DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=self._path,
            file_format=FileFormat.PARQUET,
            partition=self._key.partition if self._key else Record(),
            file_size_in_bytes=size,
            spec_id=self._table.spec().spec_id,
            sort_order_id=None,
            equality_ids=None,
            key_metadata=None,
            **statistics.to_serialized_dict(),
        )


class _Files:
    """The files of one upload, one open for each partition."""

    def __init__(self, table: Table, layout: _Layout) -> None:
        self._table, self._layout = table, layout
        self._open: dict[tuple[Any, ...], _File] = {}
        self._finished: list[DataFile] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():  # those of an upload that failed
            file.abandon()

    def write(self, rows: pa.Table) -> None:
        for values, part in _partitions(self._table, _adapt(rows, self._layout.schema)):
            if values not in self._open:
                if len(self._open) == FILES_OPEN_MAX:
                    self._finish(next(iter(self._open)))
                self._open[values] = _File(self._table, self._layout, values, part)
            self._open[values].write(part)

    def _finish(self, values: tuple[Any, ...]) -> None:
        self._finished.append(self._open[values].finish())
        del self._open[values]

    def finish(self) -> tuple[DataFile, ...]:
        while self._open:
            self._finish(next(iter(self._open)))
        return tuple(self._finished)


def _in_order(rows: pa.Table) -> pa.Table:
    """By trace and start, as `span_table` gives them already: moving rows with maps costs half of writing them."""
    names = [name for name in ("trace_id", "start_time") if name in rows.column_names]
    ordered: Any = True  # as rows of one trace and moment stand
    for name in reversed(names):
        before, after = rows[name][:-1], rows[name][1:]
        ordered = pc.or_(pc.less(before, after), pc.and_(pc.equal(before, after), ordered))
    keys: Any = [(name, "ascending") for name in names]
    return rows if pc.all(ordered).as_py() else rows.sort_by(keys)


@functools.lru_cache(8)
def _leaves(schema: pa.Schema) -> list[str]:
    """The paths that Parquet gives a schema's leaves, read from a file without rows."""
    out = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), out)
    names: Any = pq.ParquetFile(pa.BufferReader(out.getvalue())).schema
    return [names.column(i).path for i in range(len(names))]


def _plain_path(location: str) -> str:
    """DataFusion percent-decodes file URLs, and partition folders hold `%`; a plain path is taken as it is."""
    return location.removeprefix("file://")
