"""The forwarder in front of the catalog does to clients what networks and Lakekeeper do."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import RESTError

from tests.stack import Fault, Lakekeeper, RestProxy, Stack
from tests.stack.stack import S3_KEY_ID, S3_SECRET

pytestmark = pytest.mark.stack

ROWS = pa.table({"id": pa.array([1, 2, 3], pa.int64())})
UNKNOWN_HOST = "http://minio.invalid:9000"


def connect(stack: Stack, uri: str, **more: str) -> Catalog:
    properties = {
        "type": "rest",
        "uri": uri,
        "warehouse": "traces",
        "s3.endpoint": stack.minio.url,
        "s3.access-key-id": S3_KEY_ID,
        "s3.secret-access-key": S3_SECRET,
    }
    return load_catalog("test", **{**properties, **more})


@pytest.fixture
def table(stack: Stack) -> Iterator[str]:
    """An empty table, made without the proxy."""
    namespace = f"t{uuid.uuid4().hex[:12]}"
    catalog = connect(stack, stack.catalog.url)
    catalog.create_namespace(namespace)
    catalog.create_table(f"{namespace}.t", ROWS.schema)
    yield f"{namespace}.t"
    catalog.drop_table(f"{namespace}.t")


def rows(stack: Stack, table: str) -> int:
    return int(connect(stack, stack.catalog.url).load_table(table).scan().count())


@pytest.mark.parametrize("answer", [500, 502, 503, 504, None])
def test_a_commit_can_land_and_its_answer_be_lost(stack: Stack, table: str, answer: int | None) -> None:
    """The client sees an error, the rows are there, once; the next commit is answered again."""
    with RestProxy(stack.catalog.url) as proxy:
        opened = connect(stack, proxy.url).load_table(table)
        proxy.fail_next(Fault(answer))
        with pytest.raises(Exception):  # noqa: B017  which one depends on the answer, and is the client's affair
            opened.append(ROWS)
        assert rows(stack, table) == len(ROWS)
        opened.refresh().append(ROWS)
    assert rows(stack, table) == 2 * len(ROWS)


def test_a_commit_can_be_lost_altogether(stack: Stack, table: str) -> None:
    """The client sees the same error, and nothing has landed."""
    with RestProxy(stack.catalog.url) as proxy:
        proxy.fail_next(Fault(503, lands="never"))
        with pytest.raises(Exception, match="injected fault"):
            connect(stack, proxy.url).load_table(table).append(ROWS)
    assert rows(stack, table) == 0


def test_a_commit_can_land_late(stack: Stack, table: str) -> None:
    """While the client waits nothing has landed; after the hold it has."""
    with RestProxy(stack.catalog.url) as proxy:
        opened = connect(stack, proxy.url).load_table(table)
        proxy.fail_next(Fault(504, hold_secs=1.5, lands="after"))
        caught: list[Exception] = []

        def append() -> None:
            try:
                opened.append(ROWS)
            except Exception as error:  # noqa: BLE001
                caught.append(error)

        client = threading.Thread(target=append)
        client.start()
        time.sleep(1)
        meanwhile = rows(stack, table)
        client.join()
    assert meanwhile == 0
    assert caught
    assert rows(stack, table) == len(ROWS)


def test_closing_ends_a_hang(stack: Stack) -> None:
    """A test that is done need not wait for the requests that it made hang."""
    caught: list[Exception] = []

    def ask(url: str) -> None:
        try:
            connect(stack, url)
        except Exception as error:  # noqa: BLE001
            caught.append(error)

    with RestProxy(stack.catalog.url) as proxy:
        proxy.fail_next(Fault(None, hold_secs=600), when=lambda request: True)
        client = threading.Thread(target=ask, args=[proxy.url])
        client.start()
        while not proxy.requests:
            time.sleep(0.01)
        started = time.monotonic()
    client.join()
    assert time.monotonic() - started < 10
    assert caught


def test_lakekeeper_decides_the_endpoint(stack: Stack, table: str) -> None:
    """Its S3 settings win over the client's, its prefix is used, and the static keys are never sent."""
    with RestProxy(stack.catalog.url, lakekeeper=Lakekeeper(UNKNOWN_HOST)) as proxy:
        properties = connect(stack, proxy.url).load_table(table).io.properties
        assert properties["s3.endpoint"] == f"{UNKNOWN_HOST}/"
        assert properties["s3.access-key-id"] == S3_KEY_ID
        assert all(r.path.startswith("/catalog/v1/") for r in proxy.requests)
        assert "rest-page-size" in properties


def test_lakekeeper_serves_a_whole_session(stack: Stack, table: str) -> None:
    """With an endpoint that the client can reach, tables are made, written and read through it."""
    with RestProxy(stack.catalog.url, lakekeeper=Lakekeeper(stack.minio.url)) as proxy:
        catalog = connect(stack, proxy.url)
        made = catalog.create_table(table + "2", ROWS.schema)
        made.append(ROWS)
        assert catalog.load_table(table + "2").scan().count() == len(ROWS)
        catalog.drop_table(table + "2")


def test_lakekeeper_signs_unless_told_not_to(stack: Stack, table: str) -> None:
    """With remote signing on, only a client that asks for `client-managed` access keeps its own keys."""
    lakekeeper = Lakekeeper(stack.minio.url, remote_signing=True)
    with RestProxy(stack.catalog.url, lakekeeper=lakekeeper) as proxy:
        own_keys = {"header.X-Iceberg-Access-Delegation": "client-managed"}
        opened = connect(stack, proxy.url, **own_keys).load_table(table)
        assert "s3.signer" not in opened.io.properties
        told = connect(stack, proxy.url).load_table(table).io
        assert told.properties["s3.signer"] == "S3V4RestSigner"
        assert type(told).__name__ == "FsspecFileIO"


@pytest.mark.parametrize("wrong", [{"warehouse": "other"}, {"header.x-project-id": str(uuid.uuid4())}])
def test_lakekeeper_knows_its_names(stack: Stack, wrong: dict[str, str]) -> None:
    """Another warehouse or project is refused, as the plain adapter never does."""
    with (
        RestProxy(stack.catalog.url, lakekeeper=Lakekeeper(stack.minio.url)) as proxy,
        pytest.raises(RESTError),
    ):
        connect(stack, proxy.url, **wrong)


def test_lakekeeper_sends_clients_elsewhere(stack: Stack) -> None:
    """Clients follow LAKEKEEPER__BASE_URI, also to a host that they cannot reach."""
    lakekeeper = Lakekeeper(stack.minio.url, base_uri="http://lakekeeper.invalid:8181/catalog")
    with RestProxy(stack.catalog.url, lakekeeper=lakekeeper) as proxy:
        catalog = connect(stack, proxy.url)
        with pytest.raises(OSError, match=r"lakekeeper\.invalid"):
            catalog.list_namespaces()
