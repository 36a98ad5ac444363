"""What must be there before the first start gets made, once, whoever asks and however often."""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from confluent_kafka.admin import AdminClient

from tests.ports import LOOPBACK, free_port
from tests.stack import Stack
from tests.stack.stack import s3_filesystem
from tss import bootstrap, config
from tss.bootstrap import Plan
from tss.errors import ConfigError, Unavailable

DEFAULT_PROJECT = "00000000-0000-0000-0000-000000000000"
S3 = {
    "TSS__STORAGE__STORAGE_TYPE": "iceberg",
    "TSS__STORAGE__ICEBERG__S3_ENDPOINT": "http://minio:9000",
    "TSS__STORAGE__ICEBERG__S3_ACCESS_KEY_ID": "minioadmin",
    "TSS__STORAGE__ICEBERG__S3_SECRET_ACCESS_KEY": "minioadmin123",
    "TSS__STORAGE__ICEBERG__S3_PATH_STYLE": "true",
    "TSS__STORAGE__ICEBERG__WAREHOUSE": "traces",
    "TSS__STORAGE__ICEBERG__NAMESPACE": "default",
}

Answer = tuple[int, dict[str, Any] | None]


def failure(status: int, kind: str, message: str) -> Answer:
    return status, {"error": {"message": message, "type": kind, "code": status, "stack": []}}


@dataclass
class Lakekeeper:
    """The statuses and bodies of Lakekeeper 0.13.3, for the requests that bootstrapping takes."""

    url: str = ""
    bootstrapped: bool = False
    projects: set[str] = field(default_factory=lambda: {DEFAULT_PROJECT})
    warehouses: list[dict[str, Any]] = field(default_factory=list)
    namespaces: set[tuple[str, ...]] = field(default_factory=set)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    """Method with path, and headers."""
    once: dict[str, list[Answer]] = field(default_factory=dict)
    """Answers to give first, by method with path, instead of the right ones."""
    faster: dict[str, Any] = field(default_factory=dict)
    """A warehouse that somebody else makes just before ours."""

    @property
    def made(self) -> list[str]:
        return [what for what, _ in self.requests if what.startswith("POST")]

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        url = urlsplit(target)
        what = f"{method} {url.path}"
        self.requests.append((what, headers))
        if self.once.get(what):
            return self.once[what].pop(0)
        project = headers.get("x-project-id", DEFAULT_PROJECT)
        match what.replace("/management/v1", "").replace("/catalog/v1", ""):
            case "GET /info":
                return 200, {
                    "version": "0.13.3",
                    "bootstrapped": self.bootstrapped,
                    "authz-backend": "allow-all",
                }
            case "POST /bootstrap" if self.bootstrapped:
                return failure(400, "CatalogAlreadyBootstrapped", "Catalog is not open for bootstrap")
            case "POST /bootstrap":
                self.bootstrapped = body["accept-terms-of-use"]
                return 204, None
            case "GET /project" if project not in self.projects:
                return failure(404, "ProjectNotFound", f"Project with id {project} not found.")
            case "GET /project":
                return 200, {"project-id": project, "project-name": "a project"}
            case "POST /project":
                self.projects.add(body["project-id"])
                return 201, {"project-id": body["project-id"]}
            case "GET /warehouse":
                return 200, {"warehouses": self.warehouses}
            case "POST /warehouse":
                return self.make_warehouse(body)
            case "GET /config":
                (name,) = parse_qs(url.query)["warehouse"]
                for warehouse in self.warehouses:
                    if warehouse["name"] == name:
                        return 200, {"overrides": {"uri": self.url}, "defaults": {"prefix": warehouse["id"]}}
                return failure(404, "NoSuchWarehouseException", f"Warehouse {name} not found")
            case path if path.startswith("POST /") and path.endswith("/namespaces"):
                assert path.split("/")[1] in {warehouse["id"] for warehouse in self.warehouses}
                namespace = tuple(body["namespace"])
                if namespace in self.namespaces:
                    return failure(409, "AlreadyExistsException", "Namespace already exists")
                self.namespaces.add(namespace)
                return 200, {"namespace": list(namespace), "properties": {}}
        return failure(404, "NotFound", what)

    def make_warehouse(self, body: dict[str, Any]) -> Answer:
        if self.faster:
            self.warehouses.append(self.faster)
        wanted = body["storage-profile"]
        for there in self.warehouses:
            profile = there["storage-profile"]
            if (profile["bucket"], profile["key-prefix"]) == (wanted["bucket"], wanted["key-prefix"]):
                message = f"Storage profile overlaps with existing warehouse {there['name']}"
                return failure(400, "CreateWarehouseStorageProfileOverlap", message)
        made = {
            "id": str(uuid.uuid4()),
            "name": body["warehouse-name"],
            "storage-profile": wanted,
            "sent": body,
        }
        self.warehouses.append(made)
        return 201, {"warehouse-id": made["id"]}


@pytest.fixture
def lakekeeper() -> Iterator[Lakekeeper]:
    """A fresh server, never bootstrapped."""
    state = Lakekeeper()

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = state.answer(self.command, self.path, headers, body)
            data = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        state.url = f"http://{LOOPBACK}:{server.server_port}/catalog"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def run(*steps: str, plan: Plan | None = None, **changes: str) -> None:
    """With the settings above; `catalog_uri=…` stands for TSS__STORAGE__ICEBERG__CATALOG_URI=…."""
    own = {f"TSS__STORAGE__ICEBERG__{name.upper()}": value for name, value in changes.items()}
    bootstrap.run(config.load(S3 | own), steps, plan)


# --- catalog -----------------------------------------------------------------------------------------------------


def test_fresh_server(lakekeeper: Lakekeeper) -> None:
    """A server just installed ends up with a warehouse in which tss's own S3 keys are used, and the namespace."""
    run("catalog", catalog_uri=lakekeeper.url)
    assert lakekeeper.bootstrapped
    (warehouse,) = lakekeeper.warehouses
    assert warehouse["sent"] == {
        "warehouse-name": "traces",
        "delete-profile": {"type": "hard"},
        "storage-profile": {
            "type": "s3",
            "bucket": "iceberg-warehouse",
            "key-prefix": "warehouse",
            "endpoint": "http://minio:9000",
            "region": "us-east-1",
            "path-style-access": True,
            "flavor": "s3-compat",
            "sts-enabled": False,
            "remote-signing-enabled": False,
        },
        "storage-credential": {
            "type": "s3",
            "credential-type": "access-key",
            "access-key-id": "minioadmin",
            "secret-access-key": "minioadmin123",
        },
    }
    assert lakekeeper.namespaces == {("default",)}


def test_second_run(lakekeeper: Lakekeeper, caplog: pytest.LogCaptureFixture) -> None:
    """A second run changes nothing, succeeds, and says that all is there."""
    run("catalog", catalog_uri=lakekeeper.url, project_id=DEFAULT_PROJECT)
    before = lakekeeper.warehouses.copy()
    lakekeeper.requests.clear()
    caplog.set_level(logging.INFO)
    run("catalog", catalog_uri=lakekeeper.url, project_id=DEFAULT_PROJECT)
    assert lakekeeper.warehouses == before
    assert lakekeeper.made == [f"POST /catalog/v1/{before[0]['id']}/namespaces"]
    assert caplog.messages == [
        "Catalog server: is bootstrapped",
        f"Project {DEFAULT_PROJECT}: is there",
        "Warehouse traces: is there, on s3://iceberg-warehouse/warehouse",
        "Namespace default: is there",
    ]


def test_lost_races(lakekeeper: Lakekeeper) -> None:
    """Where another bootstrap is faster at every step, ours succeeds all the same."""
    lakekeeper.bootstrapped = True
    lakekeeper.once["GET /management/v1/info"] = [(200, {"bootstrapped": False})]
    profile = {"bucket": "iceberg-warehouse", "key-prefix": "warehouse"}
    lakekeeper.faster = {"id": "theirs", "name": "traces", "storage-profile": profile}
    lakekeeper.namespaces = {("default",)}
    run("catalog", catalog_uri=lakekeeper.url)
    assert [warehouse["id"] for warehouse in lakekeeper.warehouses] == ["theirs"]


def test_folder_of_another_warehouse(lakekeeper: Lakekeeper) -> None:
    """A folder that belongs to another warehouse is an error that names what to change."""
    run("catalog", catalog_uri=lakekeeper.url, warehouse="metrics")
    with pytest.raises(
        ConfigError, match=r"warehouse=traces.*overlaps with existing warehouse metrics.*--key-prefix"
    ):
        run("catalog", catalog_uri=lakekeeper.url)
    run("catalog", catalog_uri=lakekeeper.url, plan=Plan(key_prefix="traces"))


def test_server_cannot_write(lakekeeper: Lakekeeper) -> None:
    """Keys that the server cannot write with are an error at once that names the settings and hides the secret."""
    refusal = failure(400, "ValidationError", "S3 write failed: SignatureDoesNotMatch")
    lakekeeper.once["POST /management/v1/warehouse"] = [refusal]
    with pytest.raises(ConfigError, match=r"S3 write failed.*s3_endpoint.*s3_access_key_id") as caught:
        run("catalog", catalog_uri=lakekeeper.url)
    assert "minioadmin123" not in str(caught.value)


def test_own_project(lakekeeper: Lakekeeper) -> None:
    """A project id that is not the default one gets its project, and rides with the token on every request."""
    project = str(uuid.uuid4())
    run("catalog", catalog_uri=lakekeeper.url, project_id=project, catalog_token="sesame")
    assert lakekeeper.projects == {DEFAULT_PROJECT, project}
    sent = {(headers["x-project-id"], headers["authorization"]) for _, headers in lakekeeper.requests}
    assert sent == {(project, "Bearer sesame")}


def test_wrong_token(lakekeeper: Lakekeeper) -> None:
    """A token the catalog refuses is an error at once that names its setting."""
    lakekeeper.once["GET /management/v1/info"] = [failure(401, "Unauthorized", "Unauthorized")]
    with pytest.raises(ConfigError, match=r"storage\.iceberg\.catalog_token"):
        run("catalog", catalog_uri=lakekeeper.url)
    assert len(lakekeeper.requests) == 1


def test_busy_server(lakekeeper: Lakekeeper, caplog: pytest.LogCaptureFixture) -> None:
    """A server whose database is not up yet is asked again until it is, and the log says why we wait."""
    caplog.set_level(logging.INFO)
    busy = failure(503, "ServiceUnavailable", "database")
    lakekeeper.once["GET /management/v1/info"] = [busy, busy]
    run("catalog", catalog_uri=lakekeeper.url)
    assert lakekeeper.namespaces
    assert "503 ServiceUnavailable database" in caplog.messages[0]
    assert caplog.messages[1].startswith("Still waiting for the catalog")


def test_unknown_warehouse_without_management(lakekeeper: Lakekeeper) -> None:
    """Where tss may not make warehouses, one that is missing is an error that names its setting."""
    lakekeeper.once["GET /management/v1/info"] = [failure(404, "NotFound", "no such route")]
    with pytest.raises(ConfigError, match=r"storage\.iceberg\.warehouse=traces.*Warehouse traces not found"):
        run("catalog", catalog_uri=lakekeeper.url)


@pytest.mark.parametrize(
    ("step", "setting"),
    [
        ("catalog", "storage.iceberg.catalog_uri"),
        ("buckets", "storage.iceberg.s3_endpoint"),
        ("topics", "kafka.brokers"),
    ],
)
def test_nobody_there(step: str, setting: str) -> None:
    """A part that does not answer within the stated time is named with its setting and address."""
    address = f"{LOOPBACK}:{free_port()}"
    addresses = {
        "TSS__STORAGE__ICEBERG__CATALOG_URI": f"http://{address}/catalog",
        "TSS__STORAGE__ICEBERG__S3_ENDPOINT": f"http://{address}",
        "TSS__KAFKA__BROKERS": address,
    }
    with pytest.raises(Unavailable, match=f"{address}.*gave up after 0.5 s") as caught:
        bootstrap.run(config.load(S3 | addresses), [step], Plan(wait_secs=0.5))
    assert caught.value.setting == setting


def test_embedded_parts_need_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """With local storage and the embedded broker every step says that there is nothing to make."""
    caplog.set_level(logging.INFO)
    bootstrap.run(config.load({"TSS__KAFKA__BROKERS": "embedded", "TSS__STORAGE__STORAGE_TYPE": "local"}))
    assert [message.split(",")[0] for message in caplog.messages] == [
        "Buckets: none needed",
        "Topics: none needed",
        "Catalog: none needed",
    ]


def test_command_line() -> None:
    """Each step can be had alone, and every option of the plan can be set."""
    parser = argparse.ArgumentParser()
    bootstrap.add_arguments(parser)
    assert bootstrap.plan_of(parser.parse_args(["all"])) == (bootstrap.STEPS, Plan())
    given = [
        "buckets",
        "--bucket=a",
        "--extra-bucket=b",
        "--extra-bucket=c",
        "--key-prefix=d",
        "--partitions=3",
    ]
    plan = Plan("a", ("b", "c"), "d", 3, 4)
    assert bootstrap.plan_of(parser.parse_args([*given, "--wait-secs=4"])) == (("buckets",), plan)


# --- the real parts ----------------------------------------------------------------------------------------------


@pytest.mark.stack
def test_buckets_in_minio(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    """Buckets are made where missing, left where present, and a wrong secret is an error at once."""
    caplog.set_level(logging.INFO)
    name = f"bucket-{uuid.uuid4().hex}"
    plan = Plan(name, (f"{name}-2",))
    settings = config.load(stack.environment())
    bootstrap.run(settings, ["buckets"], plan)
    with s3_filesystem(stack.minio).open_output_stream(f"{name}/kept") as file:
        file.write(b"data")
    bootstrap.run(settings, ["buckets"], plan)
    assert caplog.messages == [
        f"Bucket {name}: made",
        f"Bucket {name}-2: made",
        f"Bucket {name}: is there",
        f"Bucket {name}-2: is there",
    ]
    assert s3_filesystem(stack.minio).get_file_info(f"{name}/kept").size == 4

    wrong = stack.environment() | {"TSS__STORAGE__ICEBERG__S3_SECRET_ACCESS_KEY": "wrong-secret"}
    with pytest.raises(ConfigError, match="s3_access_key_id=minioadmin") as caught:
        bootstrap.run(config.load(wrong), ["buckets"], plan)
    assert "wrong-secret" not in str(caught.value)


@pytest.mark.stack
def test_topics_in_kafka(stack: Stack) -> None:
    """The input topic and its dead-letter topic are made once; a second run leaves their partitions as they are."""
    topic = f"spans-{uuid.uuid4().hex}"
    settings = config.load(stack.environment() | {"TSS__KAFKA__INPUT_TOPIC": topic})
    bootstrap.run(settings, ["topics"], Plan(partitions=5))
    bootstrap.run(settings, ["topics"], Plan(partitions=7))
    admin = AdminClient({"bootstrap.servers": stack.kafka.url})
    there = described(admin, topic, f"{topic}.dlq")
    assert there == {topic: 5, f"{topic}.dlq": bootstrap.DEAD_LETTER_PARTITIONS}


def described(admin: AdminClient, *topics: str) -> dict[str, int]:
    """Topics with their partitions. A topic just made takes a moment to be known to every broker."""
    give_up_at = time.monotonic() + 10
    while True:
        there = admin.list_topics(timeout=10).topics
        if all(topic in there for topic in topics) or time.monotonic() > give_up_at:
            return {topic: len(there[topic].partitions) for topic in topics if topic in there}
        time.sleep(0.05)


@pytest.mark.stack
def test_bad_topic_name(stack: Stack) -> None:
    """A topic that Kafka refuses to make is an error that names the setting and Kafka's reason."""
    settings = config.load(stack.environment() | {"TSS__KAFKA__INPUT_TOPIC": "a topic"})
    with pytest.raises(ConfigError, match=r"kafka\.input_topic=a topic: .*is invalid"):
        bootstrap.run(settings, ["topics"])


@pytest.mark.stack
def test_plain_catalog(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    """Of Iceberg's own REST catalog, which has no management API, only the namespace is made, and this is said."""
    caplog.set_level(logging.INFO)
    namespace = f"n{uuid.uuid4().hex}"
    settings = config.load(stack.environment() | {"TSS__STORAGE__ICEBERG__NAMESPACE": namespace})
    bootstrap.run(settings, ["catalog"])
    bootstrap.run(settings, ["catalog"])
    no_management = f"Catalog: no management API at {stack.catalog.url}/management/v1, taken as a plain Iceberg REST catalog"
    assert caplog.messages == [
        no_management,
        f"Namespace {namespace}: made",
        no_management,
        f"Namespace {namespace}: is there",
    ]
