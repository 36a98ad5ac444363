"""`tss check --connect` against parts that serve, refuse, hang or are not what they should be."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.ports import LOOPBACK, free_port
from tests.stack import Part, Stack
from tss.config import load
from tss.embedded import EmbeddedKafka
from tss.probe import Result, probe, render

ICEBERG = "TSS__STORAGE__ICEBERG__"
NOTHING_ASKED = {"TSS__KAFKA__BROKERS": "embedded", "TSS__REDIS__URL": "embedded"}


def results(environ: dict[str, str], deadline_secs: float = 20) -> dict[str, Result]:
    """By part; parts that `environ` does not name are not asked."""
    return {result.name: result for result in probe(load({**NOTHING_ASKED, **environ}), deadline_secs)}


# --- what a stranger could be listening with ---------------------------------------------------------------------

Answers = dict[str, tuple[int, str]]  # path, without the query: status and body


@contextmanager
def http_server(answers: Answers) -> Iterator[str]:
    """A real HTTP server on loopback that gives these answers, else the one for "*"."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answers.get(self.path.partition("?")[0], answers["*"])
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Quiet."""

    server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def silent_port() -> Iterator[int]:
    """Something takes connections and never says a word."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


# --- Kafka -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker() -> Iterator[EmbeddedKafka]:
    """A broker with the input topic only."""
    kafka = EmbeddedKafka({"spans": 3})
    yield kafka
    kafka.close()


def test_a_broker_with_the_topic_is_ready(broker: EmbeddedKafka) -> None:
    """Brokers and partitions are counted, and the missing dead-letter topic is advice, not a fault."""
    kafka = results({"TSS__KAFKA__BROKERS": broker.brokers, "TSS__KAFKA__INPUT_TOPIC": "spans"})["Kafka"]
    assert (kafka.ok, kafka.detail) == (True, "1 broker, topic spans with 3 partitions")
    assert kafka.advice == ("topic spans.dlq is not there: `tss bootstrap topics` makes it",)


def test_a_missing_topic_is_named_with_how_to_make_it(broker: EmbeddedKafka) -> None:
    """Asking does not make the topic, and the answer is a command to paste."""
    environ = {"TSS__KAFKA__BROKERS": broker.brokers, "TSS__KAFKA__INPUT_TOPIC": "spam"}
    for _ in range(2):
        kafka = results(environ)["Kafka"]
        assert (kafka.ok, kafka.setting) == (False, "kafka.input_topic")
        assert f"kafka-topics.sh --bootstrap-server {broker.brokers} --create --topic spam" in kafka.detail


@pytest.mark.parametrize(
    ("environ", "setting", "seen"),
    [
        ({"TSS__KAFKA__BROKERS": "{refused}"}, "kafka.brokers", "Connection refused"),
        ({"TSS__KAFKA__BROKERS": "nobody.invalid:9092"}, "kafka.brokers", "Failed to resolve"),
        (
            {
                "TSS__KAFKA__BROKERS": "{broker}",
                "TSS__KAFKA__SECURITY_PROTOCOL": "sasl_plaintext",
                "TSS__KAFKA__SASL_MECHANISM": "PLAIN",
                "TSS__KAFKA__SASL_USERNAME": "u",
                "TSS__KAFKA__SASL_PASSWORD": "hush",
            },
            "kafka.sasl_username, kafka.sasl_password",
            "SASL",
        ),
        (
            {
                "TSS__KAFKA__BROKERS": "{broker}",
                "TSS__KAFKA__SECURITY_PROTOCOL": "ssl",
                "TSS__KAFKA__SSL_CA_LOCATION": __file__,
            },
            "kafka.security_protocol",
            "ssl.ca.location",
        ),
    ],
)
def test_kafka_faults_name_the_setting(
    broker: EmbeddedKafka, environ: dict[str, str], setting: str, seen: str
) -> None:
    """The reason is the connection's own, not that a request failed; it comes as soon as it is known."""
    fill = {"{refused}": f"{LOOPBACK}:{free_port()}", "{broker}": broker.brokers}
    started = time.monotonic()
    kafka = results({name: fill.get(value, value) for name, value in environ.items()})["Kafka"]
    assert (kafka.ok, kafka.setting) == (False, setting)
    assert seen in kafka.detail
    assert "hush" not in kafka.detail
    assert time.monotonic() - started < 8


# --- Redis -------------------------------------------------------------------------------------------------------


def test_a_durable_redis_needs_no_advice(redis_server: Part) -> None:
    """Append-only file, no eviction and a limit are all there is to ask for."""
    with redis.Redis.from_url(redis_server.url) as client:
        for name, value in [("appendonly", "yes"), ("appendfsync", "everysec"), ("maxmemory", "100mb")]:
            client.config_set(name, value)
        client.config_set("maxmemory-policy", "noeviction")
    answer = results({"TSS__REDIS__URL": redis_server.url})["Redis"]
    assert answer.ok
    assert answer.detail.startswith(("Redis ", "Valkey "))
    assert answer.advice == ()


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("appendonly", "no", "set `appendonly yes`"),
        ("appendfsync", "no", "set `appendfsync everysec`"),
        ("maxmemory-policy", "allkeys-lru", "set `maxmemory-policy noeviction`"),
        ("maxmemory", "0", "redis.max_memory_bytes"),
    ],
)
def test_a_careless_redis_serves_with_advice(redis_server: Part, name: str, value: str, advice: str) -> None:
    """Each setting of the server that can lose spans is named with the one to use."""
    with redis.Redis.from_url(redis_server.url) as client:
        for good, setting in [
            ("appendonly", "yes"),
            ("maxmemory", "100mb"),
            ("maxmemory-policy", "noeviction"),
        ]:
            client.config_set(good, setting)
        client.config_set(name, value)
    answer = results({"TSS__REDIS__URL": redis_server.url})["Redis"]
    assert answer.ok
    assert len(answer.advice) == 1
    assert advice in answer.advice[0]


def test_redis_faults_name_the_setting(redis_server: Part) -> None:
    """Password, database, replica, cluster and address are told apart, and no password is shown."""
    url, refused = redis_server.url, f"redis://:hush@{LOOPBACK}:{free_port()}"
    with redis.Redis.from_url(url) as client:
        client.config_set("requirepass", "right")
    environ = {"TSS__REDIS__URL": url, "TSS__REDIS__PASSWORD": "right"}
    cases = [
        ({"TSS__REDIS__URL": url}, "redis.password", "set it"),
        (environ | {"TSS__REDIS__PASSWORD": "hush"}, "redis.password", "not the one this server knows"),
        (environ | {"TSS__REDIS__DB": "99"}, "redis.db", "no such database"),
        (environ | {"TSS__REDIS__CLUSTER_ENABLED": "true"}, "redis.cluster_enabled", "set it to false"),
        ({"TSS__REDIS__URL": refused}, "redis.url", "refused"),
    ]
    for case, setting, seen in cases:
        answer = results(case)["Redis"]
        assert (answer.ok, answer.setting) == (False, setting)
        assert seen in answer.detail
        assert "hush" not in answer.detail
    assert results(environ)["Redis"].ok
    with redis.Redis.from_url(url, password="right") as client:
        client.replicaof(LOOPBACK, free_port())
    assert "name the primary" in results(environ)["Redis"].detail


def test_a_silent_redis_is_not_waited_for() -> None:
    """A port that accepts and never answers costs the connection timeout, no more."""
    with silent_port() as port:
        answer = results(
            {"TSS__REDIS__URL": f"redis://{LOOPBACK}:{port}", "TSS__REDIS__CONNECTION_TIMEOUT_SECS": "0.3"}
        )
    assert answer["Redis"].setting == "redis.url"
    assert "redis.connection_timeout_secs (0.3 s)" in answer["Redis"].detail
    assert answer["Redis"].elapsed_ms < 2000


# --- catalog -----------------------------------------------------------------------------------------------------


def problem(status: int, kind: str, message: str) -> tuple[int, str]:
    return status, json.dumps({"error": {"type": kind, "message": message, "code": status}})


def iceberg(catalog: str, store: str) -> dict[str, str]:
    return {
        "TSS__STORAGE__STORAGE_TYPE": "iceberg",
        f"{ICEBERG}CATALOG_URI": f"{catalog}/catalog",
        f"{ICEBERG}WAREHOUSE": "tracez",
        f"{ICEBERG}S3_ENDPOINT": store,
        f"{ICEBERG}S3_ACCESS_KEY_ID": "key",
        f"{ICEBERG}S3_SECRET_ACCESS_KEY": "hush",
    }


CONFIG = "/catalog/v1/config"


@pytest.mark.parametrize(
    ("config", "setting", "seen"),
    [
        (problem(401, "Unauthorized", "no token"), "storage.iceberg.catalog_token", "set it"),
        (problem(403, "Forbidden", "not you"), "storage.iceberg.catalog_token", "not you"),
        (
            problem(404, "WarehouseNotFound", "Warehouse 'tracez' not found"),
            "storage.iceberg.warehouse",
            "tracez",
        ),
        (
            problem(400, "BadRequest", "Invalid project id"),
            "storage.iceberg.project_id",
            "Invalid project id",
        ),
        (problem(503, "Unavailable", "database down"), "storage.iceberg.catalog_uri", "database down"),
        ((404, "<html>not here</html>"), "storage.iceberg.catalog_uri", "no Iceberg REST catalog"),
        ((200, "<html>hello</html>"), "storage.iceberg.catalog_uri", "no Iceberg REST catalog"),
        (
            (200, json.dumps({"defaults": {}, "overrides": {"uri": "http://nobody.invalid/catalog"}})),
            "storage.iceberg.catalog_uri",
            "sends us on to http://nobody.invalid/catalog",
        ),
    ],
)
def test_catalog_faults_name_the_setting(config: tuple[int, str], setting: str, seen: str) -> None:
    """Token, warehouse, project, address, and an address that the catalog itself gives are told apart."""
    with http_server({CONFIG: config, "*": (404, "")}) as url:
        answer = results(iceberg(url, f"http://{LOOPBACK}:{free_port()}"))["Catalog"]
    assert (answer.ok, answer.setting) == (False, setting)
    assert seen in answer.detail
    assert "hush" not in answer.detail


def test_a_catalog_that_serves_is_ready() -> None:
    """The namespace is looked for and not made."""
    good = {CONFIG: (200, '{"defaults": {}, "overrides": {}}')}
    for there, state in [
        ((200, '{"namespace": ["default"]}'), "is there"),
        (problem(404, "No", "no"), "will be made"),
    ]:
        with http_server({**good, "/catalog/v1/namespaces/default": there, "*": (404, "")}) as url:
            answer = results(iceberg(url, f"http://{LOOPBACK}:{free_port()}"))["Catalog"]
        assert (answer.ok, answer.detail) == (True, f"warehouse tracez, namespace default {state}")


def test_nobody_waits_beyond_the_deadline() -> None:
    """A catalog that never answers is one result of several, and the others are kept."""
    with silent_port() as port, http_server({"*": (404, "")}) as store:
        started = time.monotonic()
        answers = results(iceberg(f"http://{LOOPBACK}:{port}", store), deadline_secs=1)
    assert time.monotonic() - started < 3
    assert [answer.ok for answer in answers.values()] == [True, True, False, False]
    assert answers["Catalog"].setting == "storage.iceberg.catalog_uri"
    assert "no answer within 1 s" in answers["Catalog"].detail


# --- object store ------------------------------------------------------------------------------------------------


def s3_error(status: int, code: str) -> tuple[int, str]:
    return status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said so</Message></Error>"


@pytest.mark.parametrize(
    ("answer", "setting"),
    [
        (s3_error(403, "InvalidAccessKeyId"), "storage.iceberg.s3_access_key_id"),
        (s3_error(404, "XAdminUserNotFound"), "storage.iceberg.s3_access_key_id"),
        (s3_error(403, "SignatureDoesNotMatch"), "storage.iceberg.s3_secret_access_key"),
        (s3_error(403, "AccessDenied"), "storage.iceberg.s3_access_key_id"),
        (s3_error(404, "NoSuchBucket"), "storage.iceberg.warehouse"),
        (s3_error(400, "AuthorizationHeaderMalformed"), "storage.iceberg.s3_region"),
        (s3_error(403, "InvalidToken"), "storage.iceberg.s3_session_token"),
        (s3_error(500, "Confused"), "storage.iceberg.s3_endpoint"),
    ],
)
def test_object_store_faults_name_the_setting(answer: tuple[int, str], setting: str) -> None:
    """What S3 servers say about keys, region and bucket leads to the setting to change."""
    with http_server({"*": answer}) as store:
        environ = iceberg(f"http://{LOOPBACK}:{free_port()}", store) | {
            f"{ICEBERG}WAREHOUSE": "s3://bucket/spans"
        }
        result = results(environ)["Object store"]
    assert (result.ok, result.setting) == (False, setting)
    assert store in result.detail
    assert "hush" not in result.detail


def test_an_object_store_out_of_reach_is_named() -> None:
    """A refused port is the endpoint's fault."""
    store = f"http://{LOOPBACK}:{free_port()}"
    result = results(iceberg(f"http://{LOOPBACK}:{free_port()}", store))["Object store"]
    assert (result.ok, result.setting) == (False, "storage.iceberg.s3_endpoint")
    assert "not reached" in result.detail


# --- local storage -----------------------------------------------------------------------------------------------


def test_a_local_folder_is_judged_and_not_made(tmp_path: Path) -> None:
    """Writable, still to be made, or not a folder: nothing is left behind by asking."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    cases = [
        (tmp_path, True, "is writable"),
        (tmp_path / "a" / "b", True, "can be made"),
        (tmp_path / "file", False, "is not a folder"),
        (tmp_path / "file" / "below", False, "is not a folder"),
        (Path("/proc/tss"), False, "cannot be written to"),
    ]
    for path, ok, seen in cases:
        result = results({"TSS__STORAGE__LOCAL__PATH": str(path)})["Local storage"]
        assert (result.ok, result.setting) == (ok, "storage.local.path")
        assert seen in result.detail
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# --- all of them -------------------------------------------------------------------------------------------------


def test_embedded_parts_are_not_asked(tmp_path: Path) -> None:
    """What starts with the process cannot be reached before, and is fine."""
    answers = results({"TSS__STORAGE__LOCAL__PATH": str(tmp_path)})
    assert [answer.ok for answer in answers.values()] == [True, True, True]
    assert answers["Redis"].detail == "embedded: starts with the process"


def test_results_read_as_a_list_of_what_to_do() -> None:
    """A line a part; the setting at fault comes first, advice stands below, a count closes."""
    text = render(
        [
            Result("Kafka", True, "kafka.brokers", "3 brokers", 12.4, ("make the topic",)),
            Result("Redis", False, "redis.password", "refuses us", 3.0),
        ]
    )
    assert text.splitlines() == [
        "ok      Kafka         3 brokers (12 ms)",
        " advice               make the topic",
        "FAILED  Redis         redis.password: refuses us (3 ms)",
        "1 of 2 parts are ready",
    ]


@pytest.mark.stack
def test_the_real_parts_are_ready_and_their_faults_named(stack: Stack) -> None:
    """Kafka, Redis, MinIO and the Iceberg REST catalog: all ready, and each wrong key found where it is."""
    environ = {**stack.environment(), "TSS__KAFKA__INPUT_TOPIC": "no-such-topic"}
    answers = results(environ)
    assert {name: answer.ok for name, answer in answers.items()} == {
        "Kafka": False,
        "Redis": True,
        "Catalog": True,
        "Object store": True,
    }
    assert answers["Kafka"].setting == "kafka.input_topic"
    where = {f"{ICEBERG}WAREHOUSE": "s3://iceberg-warehouse/check"}
    wrong = [("S3_SECRET_ACCESS_KEY", "s3_secret_access_key"), ("S3_ACCESS_KEY_ID", "s3_access_key_id")]
    for variable, setting in wrong:
        answer = results({**environ, **where, f"{ICEBERG}{variable}": "wrong-one"})["Object store"]
        assert (answer.ok, answer.setting) == (False, f"storage.iceberg.{setting}")
    assert results({**environ, **where})["Object store"].detail.endswith("under s3://iceberg-warehouse/check")
