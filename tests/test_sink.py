"""The tables: one suite over SQLite with files, and over the REST catalog with MinIO.

Tables are read back with pyiceberg, pyarrow or DuckDB alone, never through the sink that wrote them.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.transforms import DayTransform, IdentityTransform
from pyiceberg.types import (
    DoubleType,
    IntegerType,
    ListType,
    LongType,
    NestedField,
    StringType,
    TimestamptzType,
)

from tests.ports import LOOPBACK
from tests.stack import Fault, Lakekeeper, RestProxy, Stack, s3_filesystem
from tests.stack.proxy import Request
from tests.stack.stack import S3_KEY_ID, S3_SECRET
from tss import config
from tss.errors import ConfigError, Fenced, LinkLost, Unavailable
from tss.metrics import Metrics
from tss.model import NO_START, Trigger, Verdict
from tss.rows import DECISIONS, SPANS, Decision, decision_table
from tss.sink import FILES_OPEN_MAX, Kind, Sink

pytestmark = pytest.mark.embedded

GROUP = "fleet"
EPOCH = "life-1"
T0 = datetime(2026, 11, 21, 23, 59, 59, tzinfo=UTC)
T0_MS = int(T0.timestamp() * 1000)
PROJECT = "00000000-0000-0000-0000-000000000000"


# --- where tables live -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Settings of a sink, and the same tables seen without it."""

    settings: config.Storage
    catalog: Catalog

    def open(self, group: str = GROUP) -> Sink:
        sink = Sink(self.settings, group, Metrics())
        sink.open()
        return sink

    def begin(self) -> Sink:
        """Opened, in the first epoch."""
        sink = self.open()
        sink.enter_epoch(EPOCH)
        return sink

    def table(self, kind: Kind = "spans") -> Table:
        return self.catalog.load_table((self.settings.iceberg.namespace, kind))

    def rows(self, kind: Kind = "spans") -> pa.Table:
        return self.table(kind).scan().to_arrow()

    def span_ids(self) -> list[str]:
        return sorted(map(str, self.rows()["span_id"].to_pylist()))


def local(folder: Path, **more: Any) -> Place:
    settings = config.Storage(storage_type="local", local=config.Local(path=folder), **more)
    folder.mkdir(parents=True, exist_ok=True)
    return Place(
        settings,
        SqlCatalog("tss", uri=f"sqlite:///{quote(str(folder))}/catalog.db", warehouse=f"file://{folder}/w"),
    )


def rest(
    stack: Stack, catalog_uri: str | None = None, *, s3: dict[str, Any] | None = None, **more: Any
) -> Place:
    """In a namespace of its own; the sink may be sent another way than the reader."""
    namespace = f"t{uuid.uuid4().hex[:12]}"
    iceberg: dict[str, Any] = {
        "catalog_uri": catalog_uri or stack.catalog.url,
        "namespace": namespace,
        "project_id": PROJECT,
        "s3_endpoint": stack.minio.url,
        "s3_access_key_id": S3_KEY_ID,
        "s3_secret_access_key": SecretStr(S3_SECRET),
        **(s3 or {}),
    }
    settings = config.Storage(storage_type="iceberg", iceberg=config.Iceberg(**iceberg), **more)
    reader = {
        "uri": stack.catalog.url,
        "s3.endpoint": stack.minio.url,
        "s3.access-key-id": S3_KEY_ID,
        "s3.secret-access-key": S3_SECRET,
    }
    return Place(settings, RestCatalog("reader", **reader))


@pytest.fixture(params=["local", pytest.param("rest", marks=pytest.mark.stack)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return local(tmp_path / "data")
    return rest(request.getfixturevalue("stack"))


def spans(*span_ids: str, start: datetime = T0, trace: str = "01") -> pa.Table:
    """A row a span, all of one trace; what is not said here is null."""
    rows = [
        {
            "trace_id": trace * 16,
            "span_id": span_id,
            "timestamp_ms": int(start.timestamp() * 1000),
            "duration_ms": 1.75,
            "status_code": 2,
            "span_kind": 1,
            "service_name": "shop",
            "operation_name": "buy",
            "start_time": start,
            "attributes": [("http.method", "GET")],
            "events": [{"time_unix_nano": 1, "name": "e", "attributes": [], "dropped_attributes_count": 0}],
        }
        for span_id in span_ids
    ]
    return pa.Table.from_pylist(rows, schema=SPANS)


def decisions(*traces: int, last_log_ms: int = T0_MS, writer: str = "w", sequence: int = 1) -> pa.Table:
    verdict = Verdict(True, "error", "", 1.0, Trigger.INACTIVITY, 7)
    rows = [
        Decision(
            t.to_bytes(16, "big"),
            verdict,
            verdict.trigger,
            False,
            1,
            True,
            NO_START,
            0.0,
            last_log_ms,
            f"0:{t}",
        )
        for t in traces
    ]
    return decision_table(rows, T0, writer, sequence)


def land(sink: Sink, *span_ids: str, writer: str = "w", sequence: int = 1, epoch: str = EPOCH) -> bool:
    return sink.commit(sink.upload("spans", [spans(*span_ids)]), writer, sequence, epoch)


# --- opening -----------------------------------------------------------------------------------------------------


def test_tables_are_made(place: Place) -> None:
    """Both tables are there after the first start, laid out as documented; a second start changes nothing."""
    sink = place.open()
    assert sink.fault is None
    for kind, schema, day, second in (
        ("spans", SPANS, "start_time", "start_time"),
        ("decisions", DECISIONS, "decided_at", "decided_at"),
    ):
        table = place.table(kind)  # type: ignore[arg-type]
        columns = table.schema()
        (partition,) = table.spec().fields
        assert (columns.find_field(partition.source_id).name, partition.transform) == (day, DayTransform())
        sorted_by = [columns.find_field(field.source_id).name for field in table.sort_order().fields]
        assert sorted_by == ["trace_id", second]
        assert [column.name for column in columns.columns] == schema.names
        assert table.properties["commit.retry.num-retries"] == "0"
        assert table.format_version == 2
    before = place.table().metadata
    place.open()
    assert place.table().metadata == before


def test_many_may_open_at_once(place: Place) -> None:
    """Workers that start together on an empty catalog all get their tables; a loser of a race may have to try again."""

    def opened(_: int) -> Sink:
        for _ in range(20):
            try:
                return place.open()
            except Unavailable:
                time.sleep(0.05)
        return place.open()

    with ThreadPoolExecutor(4) as pool:
        sinks = list(pool.map(opened, range(4)))
    sinks[0].enter_epoch(EPOCH)
    assert [land(sink, f"s{i}", writer=f"w{i}") for i, sink in enumerate(sinks)] == [True] * 4
    assert place.span_ids() == ["s0", "s1", "s2", "s3"]


def test_a_sink_must_be_opened(place: Place) -> None:
    """Before `open` every use says that it is not connected, and names the setting."""
    sink = Sink(place.settings, GROUP, Metrics())
    with pytest.raises(Unavailable, match="not connected"):
        sink.epochs()
    assert sink.fault


# The table that a reader of an older guide has made by hand.
FOREIGN = Schema(
    NestedField(1, "trace_id", StringType(), required=True),
    NestedField(2, "span_id", StringType(), required=True),
    NestedField(3, "parent_span_id", StringType(), required=False),
    NestedField(4, "timestamp_ms", LongType(), required=True),
    NestedField(5, "duration_ms", LongType(), required=True),
    NestedField(6, "status_code", IntegerType(), required=True),
    NestedField(7, "span_kind", IntegerType(), required=False),
    NestedField(8, "service_name", StringType(), required=True),
    NestedField(9, "operation_name", StringType(), required=True),
)


def with_table(place: Place, schema: Schema) -> Table:
    place.catalog.create_namespace(place.settings.iceberg.namespace)
    return place.catalog.create_table((place.settings.iceberg.namespace, "spans"), schema)


def test_a_table_of_nine_columns_is_filled(place: Place) -> None:
    """A table made by hand is taken as it is: its columns, its types, its layout; only retries are switched off."""
    with_table(place, FOREIGN)
    sink = place.begin()
    assert land(sink, "s1")
    table = place.table()
    assert [column.name for column in table.schema().columns] == [column.name for column in FOREIGN.columns]
    assert table.properties["commit.retry.num-retries"] == "0"
    (row,) = place.rows().to_pylist()
    assert row == {
        "trace_id": "01" * 16,
        "span_id": "s1",
        "parent_span_id": None,
        "timestamp_ms": T0_MS,
        "duration_ms": 1,
        "status_code": 2,
        "span_kind": 1,
        "service_name": "shop",
        "operation_name": "buy",
    }


def test_optional_columns_of_others_stay_null(place: Place) -> None:
    """A column that tss does not know is left alone, and one it writes null into may be required: it gets no null."""
    with_table(
        place,
        Schema(
            NestedField(1, "trace_id", StringType(), required=True),
            NestedField(2, "parent_span_id", StringType(), required=True),
            NestedField(3, "flags", LongType(), required=True),
            NestedField(4, "sampling_probability", DoubleType(), required=True),
            NestedField(5, "team", StringType(), required=False),
        ),
    )
    assert land(place.begin(), "s1")
    (row,) = place.rows().to_pylist()
    assert row == {
        "trace_id": "01" * 16,
        "parent_span_id": "",
        "flags": 0,
        "sampling_probability": 0.0,
        "team": None,
    }


def test_a_required_column_of_others_is_refused(place: Place) -> None:
    """What tss cannot fill is said at the start, with the column and the way out."""
    with_table(place, Schema(*FOREIGN.columns, NestedField(10, "tenant", StringType(), required=True)))
    with pytest.raises(ConfigError, match=r"spans\.tenant is required") as caught:
        place.open()
    assert "TSS__STORAGE__ICEBERG__TABLE_NAME" in str(caught.value)


def test_a_column_of_another_type_is_refused(place: Place) -> None:
    """A column of ours that cannot hold our values is said at the start, with both types."""
    strange = NestedField(6, "status_code", ListType(20, IntegerType()), required=False)
    columns = [column for column in FOREIGN.columns if column.name != "status_code"]
    with_table(place, Schema(*columns, strange))
    with pytest.raises(ConfigError, match=r"spans\.status_code is list.*tss writes int32"):
        place.open()


def test_a_dropped_table_is_said(place: Place) -> None:
    """When a table goes away under a running worker, the message tells what brings it back, and a start does."""
    sink = place.begin()
    place.catalog.drop_table((place.settings.iceberg.namespace, "spans"))
    with pytest.raises(Unavailable, match="restart tss"):
        land(sink, "s1")
    place.open()
    assert place.rows().num_rows == 0


# --- once --------------------------------------------------------------------------------------------------------


def test_a_sequence_lands_once(place: Place) -> None:
    """The second commit of a sequence, by the same or another process, with the same or other files, adds nothing."""
    sink, adopter = place.begin(), place.open()
    upload = sink.upload("spans", [spans("s1", "s2")])
    assert upload.rows == 2
    assert place.rows().num_rows == 0, "an upload is in no table"
    assert sink.commit(upload, "w", 1, EPOCH)
    assert not sink.commit(upload, "w", 1, EPOCH)
    assert not land(adopter, "s1", "s2")
    assert place.span_ids() == ["s1", "s2"]
    assert sink.landed("spans") == {"w": 1}
    assert sink.landed("decisions") == {}


def test_sequences_go_up(place: Place) -> None:
    """Each writer counts for itself, and a sequence at or below its last one has landed."""
    sink = place.begin()
    assert land(sink, "s1", sequence=1)
    assert land(sink, "s3", sequence=3)
    assert not land(sink, "s2", sequence=2)
    assert land(sink, "t1", writer="v", sequence=1)
    assert place.span_ids() == ["s1", "s3", "t1"]
    assert sink.landed("spans") == {"w": 3, "v": 1}


def test_a_stale_writer_adds_nothing(place: Place) -> None:
    """A writer that was paused with its files uploaded finds that its adopter was first."""
    paused, adopter = place.begin(), place.open()
    upload = paused.upload("spans", [spans("s1")])
    assert land(adopter, "s1")
    assert land(adopter, "a1", writer="adopter", sequence=9)
    assert not paused.commit(upload, "w", 1, EPOCH)
    assert place.span_ids() == ["a1", "s1"]


def test_both_tables_count_apart(place: Place) -> None:
    """A sequence can be in `decisions` and not yet in `spans`, and is finished there."""
    sink = place.begin()
    assert sink.commit(sink.upload("decisions", [decisions(1)]), "w", 1, EPOCH)
    assert (sink.landed("decisions"), sink.landed("spans")) == ({"w": 1}, {})
    assert land(sink, "s1")
    assert not sink.commit(sink.upload("decisions", [decisions(1)]), "w", 1, EPOCH)
    assert place.rows("decisions").num_rows == 1


def test_fleets_do_not_count_together(place: Place) -> None:
    """Two consumer groups that write to one table each have their writers and their epochs."""
    one, two = place.begin(), place.open("other fleet")
    assert two.epochs() == (None, None)
    two.enter_epoch("life-9")
    assert land(one, "s1")
    assert land(two, "t1", epoch="life-9")
    assert one.epochs() == (EPOCH, EPOCH)
    assert place.span_ids() == ["s1", "t1"]


def test_racing_sinks_land_everything_once(place: Place) -> None:
    """Several processes and their adopters commit at once, snapshots expire meanwhile: every sequence is there once."""
    shared = place.settings.model_copy(update={"keep_snapshots": 2})
    place = Place(shared, place.catalog)
    place.begin()
    writers, sequences = ["a", "b", "c"], 8

    def work(worker: int) -> list[bool]:
        """Each writer's sequences are committed by two workers, so that they meet."""
        sink, outcomes = place.open(), []
        writer = writers[worker % len(writers)]
        for sequence in range(1, sequences + 1):
            upload = sink.upload("spans", [spans(f"{writer}{sequence}")])
            while True:
                try:
                    outcomes.append(sink.commit(upload, writer, sequence, EPOCH))
                    break
                except Unavailable:
                    continue  # too many conflicts in a row, or SQLite was locked for long
        return outcomes

    with ThreadPoolExecutor(2 * len(writers)) as pool:
        outcomes = list(pool.map(work, range(2 * len(writers))))
    assert place.span_ids() == sorted(f"{writer}{n + 1}" for writer in writers for n in range(sequences))
    assert sum(landed for worker in outcomes for landed in worker) == sequences * len(writers)
    assert place.open().landed("spans") == dict.fromkeys(writers, sequences)


# --- epochs ------------------------------------------------------------------------------------------------------


def test_an_old_life_lands_nothing(place: Place) -> None:
    """Once a new epoch is in the tables, a writer of the former one is fenced, whatever it has uploaded."""
    old, new = place.begin(), place.open()
    upload = old.upload("spans", [spans("old")])
    new.enter_epoch("life-2")
    assert new.epochs() == ("life-2", "life-2")
    with pytest.raises(Fenced, match=r"life-2.*life-1"):
        old.commit(upload, "w", 1, EPOCH)
    assert land(new, "new", writer="v", epoch="life-2")
    assert place.span_ids() == ["new"]


def test_a_table_without_an_epoch_takes_nothing(place: Place) -> None:
    """Nobody writes before a first epoch is agreed on."""
    sink = place.open()
    assert sink.epochs() == (None, None)
    with pytest.raises(Fenced):
        land(sink, "s1")


def test_entering_twice_is_entering_once(place: Place) -> None:
    """Two processes that restore at once leave one entry, and only so many former lives are remembered."""
    sink = place.begin()
    before = place.table().metadata.current_snapshot_id
    place.open().enter_epoch(EPOCH)
    assert place.table().metadata.current_snapshot_id == before
    for life in range(2, 15):
        sink.enter_epoch(f"life-{life}")
    remembered = json.loads(place.table().properties[f"tss.epochs.{GROUP}"])
    assert remembered == [f"life-{life}" for life in range(7, 15)]
    assert sink.landed("spans") == {}


# --- bad days of the catalog -------------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize("answer", [500, 502, 503, 504, None])
@pytest.mark.parametrize("kept", [1, 20])
def test_a_lost_answer_is_settled(stack: Stack, answer: int | None, kept: int) -> None:
    """A commit that landed while its answer got lost is Unavailable once, and found by the next call."""
    with RestProxy(stack.catalog.url) as proxy:
        place = rest(stack, proxy.url)
        sink = place.begin()
        upload = sink.upload("spans", [spans(*(f"s{i:02}" for i in range(kept)))])
        proxy.fail_next(Fault(answer))
        with pytest.raises(Unavailable, match=r"storage\.iceberg\.catalog_uri"):
            sink.commit(upload, "w", 1, EPOCH)
        assert (sink.fault or "").startswith("commit: ")
        assert not sink.commit(upload, "w", 1, EPOCH)
        assert not sink.fault
        assert place.span_ids() == [f"s{i:02}" for i in range(kept)]
        assert land(sink, "x", sequence=2)


@pytest.mark.stack
def test_old_snapshots_do_not_hold_up_commits(stack: Stack) -> None:
    """A commit has landed when its rows have, whatever becomes of the tidying after it; the next one tidies again."""
    with RestProxy(stack.catalog.url) as proxy:
        place = rest(stack, proxy.url, keep_snapshots=2)
        sink = place.begin()
        proxy.fail_next(Fault(503, lands="never"), Fault(None), when=lambda r: b"remove-snapshots" in r.body)
        assert [land(sink, f"s{n}", sequence=n) for n in range(1, 8)] == [True] * 7
        assert len(place.table().metadata.snapshots) <= 3
        assert place.span_ids() == [f"s{n}" for n in range(1, 8)]


@pytest.mark.stack
def test_a_lost_request_is_sent_again(stack: Stack) -> None:
    """A commit that never arrived looks the same to us, and lands with the next call."""
    with RestProxy(stack.catalog.url) as proxy:
        place = rest(stack, proxy.url)
        sink = place.begin()
        upload = sink.upload("spans", [spans("s1")])
        proxy.fail_next(Fault(503, lands="never"), Fault(409, lands="never"))
        with pytest.raises(Unavailable):
            sink.commit(upload, "w", 1, EPOCH)
        assert sink.commit(upload, "w", 1, EPOCH), "a plain conflict is tried again at once"
        assert place.span_ids() == ["s1"]


@pytest.mark.stack
@pytest.mark.parametrize("lands", ["before", "after"])
def test_a_hanging_catalog_is_given_up(stack: Stack, lands: Any) -> None:
    """A request ends within its time limit; whether it lands before or after that, the sequence is there once."""
    with RestProxy(stack.catalog.url) as proxy:
        place = rest(stack, proxy.url, request_timeout_secs=0.5)
        sink = place.begin()
        upload = sink.upload("spans", [spans("s1")])
        proxy.fail_next(Fault(None, hold_secs=1.5, lands=lands))
        started = time.monotonic()
        with pytest.raises(Unavailable, match="Timeout"):
            sink.commit(upload, "w", 1, EPOCH)
        assert time.monotonic() - started < 1.4
        assert sink.commit(upload, "w", 1, EPOCH) == (lands == "after")
        time.sleep(1.5)
        assert place.span_ids() == ["s1"]
        assert land(sink, "s2", sequence=2)


@pytest.mark.stack
def test_a_late_commit_of_an_old_life_is_refused(stack: Stack) -> None:
    """A commit that was under way while a new epoch entered the tables does not land behind it."""
    with RestProxy(stack.catalog.url) as proxy:
        slow, place = rest(stack, proxy.url), rest(stack)
        iceberg = place.settings.iceberg.model_copy(update={"namespace": slow.settings.iceberg.namespace})
        place = Place(place.settings.model_copy(update={"iceberg": iceberg}), place.catalog)
        old = slow.begin()
        upload = old.upload("spans", [spans("old")])
        proxy.fail_next(Fault(504, hold_secs=1, lands="after"))
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(old.commit, upload, "w", 1, EPOCH)
            time.sleep(0.3)
            place.open().enter_epoch("life-2")
            with pytest.raises(Unavailable):
                late.result()
        with pytest.raises(Fenced):
            old.commit(upload, "w", 1, EPOCH)
        assert place.span_ids() == []


@pytest.mark.stack
def test_a_catalog_comes_back(stack: Stack) -> None:
    """While the catalog is away everything is Unavailable and names it; afterwards the same sink goes on."""
    place = rest(stack)
    sink = place.begin()
    upload = sink.upload("spans", [spans("s1")])
    fresh = Sink(place.settings, GROUP, Metrics())
    with stack.catalog.down():
        for attempt in (lambda: sink.commit(upload, "w", 1, EPOCH), sink.files, sink.epochs, fresh.open):
            with pytest.raises(Unavailable, match=r"storage\.iceberg\.catalog_uri"):
                attempt()
        assert "ConnectionError" in (sink.fault or "")
    assert sink.commit(upload, "w", 1, EPOCH)
    assert not sink.fault
    fresh.open()
    assert fresh.landed("spans") == {"w": 1}


@pytest.mark.stack
@pytest.mark.parametrize(
    ("wrong", "setting"),
    [
        ({"s3_secret_access_key": SecretStr("wrong")}, "s3_secret_access_key"),
        ({"s3_access_key_id": "nobody"}, "s3_access_key_id"),
        ({"s3_endpoint": f"http://{LOOPBACK}:1"}, r"storage\.iceberg\.s3_endpoint"),
    ],
)
def test_an_object_store_that_refuses_is_named(stack: Stack, wrong: dict[str, Any], setting: str) -> None:
    """A wrong key and a wrong address of the object store are told apart, and name their settings, not the catalog's."""
    place = rest(stack, s3=wrong, request_timeout_secs=2)
    sink = place.open()
    started = time.monotonic()
    with pytest.raises(Unavailable, match=setting) as caught:
        sink.upload("spans", [spans("s1")])
    assert "catalog_uri" not in caught.value.setting
    assert "wrong" not in str(caught.value).replace("WRONG", "")
    assert time.monotonic() - started < 30
    assert sink.fault


@pytest.mark.stack
def test_a_refused_token_is_named(stack: Stack) -> None:
    """A catalog that answers 401 points at the token."""
    with RestProxy(stack.catalog.url) as proxy:
        sink = rest(stack, proxy.url).open()
        refused = Fault(401, lands="never")  # twice: the client tries again with a fresh token
        proxy.fail_next(refused, refused, when=lambda request: True)
        with pytest.raises(Unavailable, match=r"storage\.iceberg\.catalog_token"):
            sink.epochs()


@pytest.mark.stack
def test_a_mute_catalog_ends_the_start(stack: Stack) -> None:
    """The very first request is bounded, too."""
    with RestProxy(stack.catalog.url) as proxy:
        place = rest(stack, proxy.url, request_timeout_secs=0.5)
        proxy.fail_next(Fault(None, hold_secs=60), when=lambda request: True)
        started = time.monotonic()
        with pytest.raises(Unavailable, match="Timeout"):
            place.open()
        assert time.monotonic() - started < 5


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Where the folder of the embedded catalog is a file, the setting is named."""
    (tmp_path / "data").write_text("in the way")
    sink = Sink(config.Storage(local=config.Local(path=tmp_path / "data")), GROUP, Metrics())
    with pytest.raises(Unavailable, match=r"storage\.local\.path"):
        sink.open()


# --- Lakekeeper --------------------------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize("remote_signing", [False, True])
def test_our_endpoint_wins(stack: Stack, remote_signing: bool) -> None:
    """Lakekeeper sends an endpoint that only it can reach; tables are made, written and read through ours.

    Its prefix and its own address are followed, and every request carries the project and asks for no credentials.
    """
    setup = Lakekeeper("http://minio.invalid:9000", remote_signing=remote_signing)
    with RestProxy(stack.catalog.url, lakekeeper=setup) as proxy:
        place = rest(stack, proxy.url)
        sink = place.begin()
        assert land(sink, "s1")
        assert sink.commit(sink.upload("decisions", [decisions(1)]), "w", 1, EPOCH)
        assert place.span_ids() == ["s1"]
        assert [batch.num_rows for batch in sink.decisions_since(0, 0)] == [1]
        assert sink.s3 is not None
        assert sink.s3.endpoint == stack.minio.url
        config_asked, *others = proxy.requests
        assert config_asked.path.startswith("/catalog/v1/config?warehouse=traces")
        assert {request.path.split("/")[3] for request in others} == {setup.prefix}
        assert {headers_of(request) for request in proxy.requests} == {(PROJECT, "client-managed")}


def headers_of(request: Request) -> tuple[str | None, str | None]:
    return request.headers.get("x-project-id"), request.headers.get("x-iceberg-access-delegation")


@pytest.mark.stack
def test_another_project_is_named(stack: Stack) -> None:
    """A project that the catalog does not know is Unavailable, with what it said."""
    with RestProxy(stack.catalog.url, lakekeeper=Lakekeeper(stack.minio.url)) as proxy:
        place = rest(stack, proxy.url, s3={"project_id": "11111111-1111-1111-1111-111111111111"})
        with pytest.raises(Unavailable, match="no such project"):
            place.open()


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_file_a_day(place: Place) -> None:
    """Rows go to the partition of their start, sorted by trace."""
    sink = place.begin()
    tomorrow = datetime(2026, 11, 22, 0, 0, 1, tzinfo=UTC)
    rows = pa.concat_tables([spans("b", trace="0b"), spans("t", start=tomorrow), spans("a", trace="0a")])
    upload = sink.upload("spans", [rows])
    assert len(upload.files) == 2
    assert sink.commit(upload, "w", 1, EPOCH)
    tasks = list(place.table().scan(row_filter="start_time >= '2026-11-22T00:00:00+00:00'").plan_files())
    assert len(tasks) == 1
    by_size = sorted(sink.files()["spans"].paths, key=lambda path: read_parquet(place, path).num_rows)
    assert [read_parquet(place, path)["span_id"].to_pylist() for path in by_size] == [["t"], ["a", "b"]]


def test_parts_of_an_upload_are_one_file(place: Place) -> None:
    """However many parts rows come in, a partition has one file; a part is written before the next is asked for."""
    sink = place.begin()
    held: list[weakref.ref[pa.Table]] = []

    def parts() -> Iterator[pa.Table]:
        for number in range(3):
            assert not any(part() for part in held)
            rows = pa.concat_tables([spans(f"b{number}", trace=f"{number}b"), spans("a", trace=f"{number}a")])
            held.append(weakref.ref(rows))
            yield rows
            del rows

    upload = sink.upload("spans", parts())
    assert (len(upload.files), upload.rows) == (1, 6)
    assert sink.commit(upload, "w", 1, EPOCH)
    (path,) = sink.files()["spans"].paths
    assert read_parquet(place, path)["span_id"].to_pylist() == ["a", "b0", "a", "b1", "a", "b2"]
    assert upload.files[0].record_count == 6


def test_days_take_turns(place: Place) -> None:
    """Spans of more days than files are open at once all land, each under its day."""
    sink = place.begin()
    days = FILES_OPEN_MAX + 2
    part = pa.concat_tables([spans(f"d{day}", start=T0 + timedelta(days=day)) for day in range(days)])
    assert sink.commit(sink.upload("spans", [part, part]), "w", 1, EPOCH)
    assert place.span_ids() == sorted([f"d{day}" for day in range(days)] * 2)
    for task in place.table().scan().plan_files():
        assert len(read_parquet(place, task.file.file_path)["start_time"].unique()) == 1


def test_a_fault_of_redis_is_not_one_of_the_storage(place: Place) -> None:
    """Where the rows of an upload cannot be read, the storage is not said to be away, and nothing is uploaded."""
    sink = place.begin()

    def parts() -> Iterator[pa.Table]:
        yield spans("s1")
        raise LinkLost("gone")

    with pytest.raises(LinkLost):
        sink.upload("spans", parts())
    assert sink.fault is None
    assert land(sink, "s2")
    assert place.span_ids() == ["s2"]


def test_any_partitions_of_others(place: Place) -> None:
    """A table partitioned by day and by a nullable text has a file for each combination that there is."""
    place.catalog.create_namespace(place.settings.iceberg.namespace)
    schema = Schema(
        *FOREIGN.fields[:8],
        NestedField(10, "start_time", TimestamptzType(), required=False),
        NestedField(11, "http_route", StringType(), required=False),
    )
    parts = PartitionSpec(
        PartitionField(10, 1000, DayTransform(), "day"),
        PartitionField(11, 1001, IdentityTransform(), "route"),
    )
    place.catalog.create_table((place.settings.iceberg.namespace, "spans"), schema, partition_spec=parts)
    sink = place.begin()
    tomorrow = datetime(2026, 11, 22, 0, 0, 1, tzinfo=UTC)
    plain, later = spans("a"), spans("d", start=tomorrow)
    routed = spans("b", "c").set_column(
        SPANS.get_field_index("http_route"), "http_route", pa.array(["/", "/cart"])
    )
    rows = pa.concat_tables([plain, routed, later, plain])
    assert sink.commit(sink.upload("spans", [rows]), "w", 1, EPOCH)
    found = [read_parquet(place, path)["span_id"].to_pylist() for path in sink.files()["spans"].paths]
    assert sorted(found) == [["a", "a"], ["b"], ["c"], ["d"]]
    kept = place.table().scan(row_filter="http_route = '/cart'")
    assert (len(list(kept.plan_files())), kept.to_arrow()["span_id"].to_pylist()) == (1, ["c"])


def test_statistics_are_kept_where_they_leave_out_files(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Columns have their least and greatest value in the file and in Iceberg; what is in maps and lists has none."""
    sink = place.begin()
    assert land(sink, "s1")
    (path,) = sink.files()["spans"].paths
    with place.table().io.new_input(path if "://" in path else f"file://{path}").open() as stream:
        group = pq.ParquetFile(pa.BufferReader(stream.read())).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {c.path_in_schema for c in columns if not c.is_stats_set} == {
        c.path_in_schema for c in columns if "." in c.path_in_schema
    }
    (task,) = place.table().scan().plan_files()
    bounds = task.file.lower_bounds
    assert bounds[place.table().schema().find_field("service_name").field_id] == b"shop"
    assert not caplog.records, "a missing statistic is meant"


def read_parquet(place: Place, path: str) -> pa.Table:
    """One file, by pyarrow alone."""
    with place.table().io.new_input(path if "://" in path else f"file://{path}").open() as stream:
        return pq.ParquetFile(pa.BufferReader(stream.read())).read()


def test_snapshots_and_manifests_stay_few(tmp_path: Path) -> None:
    """After many commits the table has about as many snapshots as were asked for, few manifests, and every row."""
    place = local(tmp_path / "data", keep_snapshots=5)
    sink = place.begin()
    for sequence in range(1, 61):
        assert land(sink, f"s{sequence:02}", sequence=sequence)
        metadata = place.table().metadata
        assert len(metadata.snapshots) <= 8
    current = place.table().current_snapshot()
    assert current is not None
    assert len(current.manifests(place.table().io)) <= 21
    assert len(metadata.metadata_log) <= 10
    assert place.span_ids() == [f"s{n:02}" for n in range(1, 61)]
    assert len(sink.files()["spans"].paths) == 60


def test_decisions_are_found_by_log_time(place: Place) -> None:
    """Reading back starts at a log time, to the millisecond."""
    sink = place.begin()
    for sequence, late_ms in enumerate((0, 1, 1000), start=1):
        rows = decisions(sequence, last_log_ms=T0_MS + late_ms, sequence=sequence)
        assert sink.commit(sink.upload("decisions", [rows]), "w", sequence, EPOCH)
    found = pa.Table.from_batches(sink.decisions_since(T0_MS + 1, T0_MS + 1))
    assert set(found["sequence"].to_pylist()) == {2, 3}
    assert set(found["records"].to_pylist()) == {"0:2", "0:3"}
    assert list(sink.decisions_since(T0_MS + 5000, T0_MS + 1)) == []


# --- what others read --------------------------------------------------------------------------------------------


def test_files_are_those_of_one_snapshot(place: Place) -> None:
    """Queries get the files of the current snapshot, all and only; a table without rows has none."""
    sink = place.open()
    assert sink.files()["spans"].paths == ()
    sink.enter_epoch(EPOCH)
    land(sink, "s1")
    sink.upload("spans", [spans("orphan")])
    land(sink, "s2", sequence=2)
    files = sink.files()["spans"]
    current = place.table().current_snapshot()
    assert current is not None
    assert files.snapshot_id == current.snapshot_id
    listed = {str(path).removeprefix("file://") for path in place.table().inspect.files()["file_path"]}
    assert set(files.paths) == listed
    assert {str(read_parquet(place, path)["span_id"][0]) for path in files.paths} == {"s1", "s2"}
    assert files.schema.names == SPANS.names


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "with space",
        "50%25 off",
        "%41",
        "größe-测试",
        "plus+and&",
        "semi;colon=1",
        "a'b\"c",
        "[x]{y}",
    ],
)
def test_odd_folders_are_folders(tmp_path: Path, name: str) -> None:
    """Whatever characters the folder's name has, the paths given to queries are the files on disk."""
    place = local(tmp_path / name)
    sink = place.begin()
    assert land(sink, "s1")
    (path,) = sink.files()["spans"].paths
    assert Path(path).is_file()
    assert Path(path).is_relative_to(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["a#b", "what?", "a#b?c"])
def test_a_folder_that_no_url_can_name_is_refused(tmp_path: Path, name: str) -> None:
    """A `#` or `?` would cut the location of every file: it is refused at the start, and nothing is written."""
    sink = Sink(config.Storage(local=config.Local(path=tmp_path / name)), GROUP, Metrics())
    with pytest.raises(ConfigError, match=r"storage\.local\.path"):
        sink.open()
    assert list(tmp_path.iterdir()) == []


def test_others_read_what_we_write(tmp_path: Path) -> None:
    """DuckDB and pyarrow read the data files by themselves, maps and lists included; a trace is found by its filter."""
    place = local(tmp_path / "data")
    sink = place.begin()
    land(sink, "s1", "s2")
    land(sink, "s3", sequence=2)
    paths = list(sink.files()["spans"].paths)
    with duckdb.connect() as connection:
        rows = connection.execute(
            "SELECT span_id, attributes['http.method'], events[1].name, epoch_ms(start_time)"
            " FROM read_parquet(?) WHERE trace_id = ? ORDER BY span_id",
            [paths, "01" * 16],
        ).fetchall()
        probe = "SELECT bloom_filter_excludes FROM parquet_bloom_probe(?, 'trace_id', ?)"
        assert {excluded for (excluded,) in connection.execute(probe, [paths, "ff" * 16]).fetchall()} == {
            True
        }
        assert {excluded for (excluded,) in connection.execute(probe, [paths, "01" * 16]).fetchall()} == {
            False
        }
    assert rows == [(name, "GET", "e", T0_MS) for name in ("s1", "s2", "s3")]
    for path in paths:
        with pq.ParquetFile(path) as file:
            assert file.schema_arrow.field("trace_id").metadata == {b"PARQUET:field_id": b"1"}
            assert file.metadata.row_group(0).column(0).compression == "ZSTD"
            assert file.read(["trace_id", "attributes"]).num_rows == file.metadata.num_rows


@pytest.mark.stack
def test_others_read_the_object_store(stack: Stack) -> None:
    """The files lie in the bucket where the catalog says, readable with nothing but its keys."""
    place = rest(stack)
    sink = place.begin()
    land(sink, "s1")
    (path,) = sink.files()["spans"].paths
    found = pq.read_table(path.removeprefix("s3://"), filesystem=s3_filesystem(stack.minio))
    assert found["span_id"].to_pylist() == ["s1"]


def test_commits_of_one_process_take_turns(place: Place) -> None:
    """Threads that share a sink never meet a conflict of their own making."""
    sink = place.begin()
    start = threading.Barrier(4)

    def work(worker: int) -> list[bool]:
        start.wait()
        return [land(sink, f"{worker}-{n}", writer=f"w{worker}", sequence=n) for n in range(1, 4)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(outcomes) for outcomes in pool.map(work, range(4)))
    assert len(place.span_ids()) == 12
    conflicts = sink._metrics.commit_retries.labels("conflict")._value.get()
    assert conflicts == 0
