"""Makes what tss needs from the outside parts before its first start: S3 buckets, Kafka topics, the Iceberg catalog.

Every step is idempotent: what is there stays as it is, what is missing is made, and losing a race against another
bootstrap counts as "is there". So a step that fails half-way is repeated as a whole, and one that an orchestrator
runs again does no harm. A part that does not answer is waited for; one that says no ends the run at once with the
setting at fault.

The catalog step speaks Lakekeeper's management API (server, project, warehouse) and then plain Iceberg REST
(namespace). Against a catalog without that API only the namespace is made: its warehouse belongs to its operator.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from pyarrow import fs

from tss import config
from tss.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

STEPS = ("buckets", "topics", "catalog")

# A first pause that a part just starting does not notice, and one that a part long down does not notice.
FIRST_PAUSE_SECS = 0.2
LAST_PAUSE_SECS = 5.0

# One try. Lakekeeper writes and deletes an object when a warehouse is made, and needs 8 s to find out that the
# host of the object store has no address.
REQUEST_TIMEOUT_SECS = 20.0
KAFKA_TIMEOUT_SECS = 10.0
S3_CONNECT_TIMEOUT_SECS = 5.0

# Undecodable records are few, and their order over partitions means nothing.
DEAD_LETTER_PARTITIONS = 1

# What pyarrow's S3 client says when asking again would not help: the keys are wrong, or the name of the bucket is.
S3_REFUSALS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE",
    "(HTTP status 400)",
    "(HTTP status 403)",
)

# Lakekeeper's own error types for "somebody was faster".
BOOTSTRAPPED_MEANWHILE = ("CatalogAlreadyBootstrapped", "ConcurrentBootstrap")
WAREHOUSE_EXISTS = (
    "WarehouseNameAlreadyTaken",
    "WarehouseAlreadyExists",
    "CreateWarehouseStorageProfileOverlap",
)

CATALOG_SETTING = "storage.iceberg.catalog_uri"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to make beyond what the settings already name."""

    bucket: str = "iceberg-warehouse"
    extra_buckets: tuple[str, ...] = ()
    key_prefix: str = "warehouse"
    partitions: int = 8
    wait_secs: float = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `tss bootstrap`; `run` takes what it parses."""
    plan = Plan()
    parser.add_argument("step", choices=[*STEPS, "all"], help="which part to prepare")
    parser.add_argument(
        "--bucket", default=plan.bucket, help="bucket of the warehouse (default: %(default)s)"
    )
    parser.add_argument(
        "--extra-bucket",
        action="append",
        default=[],
        metavar="BUCKET",
        help="one more bucket to make; may be repeated",
    )
    parser.add_argument(
        "--key-prefix",
        default=plan.key_prefix,
        help="folder of the warehouse in its bucket (default: %(default)s)",
    )
    parser.add_argument(
        "--partitions",
        type=int,
        default=plan.partitions,
        help="partitions of the input topic (default: %(default)s)",
    )
    parser.add_argument(
        "--wait-secs",
        type=float,
        default=plan.wait_secs,
        help="how long to wait for a part that does not answer (default: %(default)s)",
    )


def plan_of(arguments: argparse.Namespace) -> tuple[Sequence[str], Plan]:
    """Steps and plan from what `add_arguments` made the parser parse."""
    steps = STEPS if arguments.step == "all" else (arguments.step,)
    return steps, Plan(
        bucket=arguments.bucket,
        extra_buckets=tuple(arguments.extra_bucket),
        key_prefix=arguments.key_prefix,
        partitions=arguments.partitions,
        wait_secs=arguments.wait_secs,
    )


def run(settings: config.Config, steps: Sequence[str] = STEPS, plan: Plan | None = None) -> None:
    """Raises ConfigError when a part says no, Unavailable when one did not answer within `plan.wait_secs`."""
    plan = plan or Plan()
    work: dict[str, Callable[[], None]] = {
        "buckets": lambda: make_buckets(settings.storage, plan),
        "topics": lambda: make_topics(settings.kafka, plan),
        "catalog": lambda: make_catalog(settings.storage, plan),
    }
    for step in steps:
        _until_it_answers(plan.wait_secs, work[step])


def _until_it_answers(wait_secs: float, attempt: Callable[[], None]) -> None:
    give_up_at = time.monotonic() + wait_secs
    pause_secs = FIRST_PAUSE_SECS
    said = ""
    while True:
        try:
            return attempt()
        except Unavailable as error:
            left_secs = give_up_at - time.monotonic()
            if left_secs < pause_secs:
                detail = f"{error.detail}; gave up after {wait_secs:g} s"
                raise Unavailable(error.part, error.setting, detail) from error
            if str(error) == said:
                log.info("Still waiting for %s, %.0f s left", error.part, left_secs)
            else:
                said = str(error)
                log.info("Waiting for %s: %s", error.part, error)
        time.sleep(pause_secs)
        pause_secs = min(pause_secs * 2, LAST_PAUSE_SECS)


# --- buckets -----------------------------------------------------------------------------------------------------


def make_buckets(storage: config.Storage, plan: Plan) -> None:
    """The bucket of the warehouse and the extra ones, with tss's own S3 keys."""
    if storage.storage_type == "local":
        log.info("Buckets: none needed, storage.storage_type is local")
        return
    iceberg = storage.iceberg
    secret, token = iceberg.s3_secret_access_key, iceberg.s3_session_token
    s3 = fs.S3FileSystem(
        access_key=iceberg.s3_access_key_id,
        secret_key=secret.get_secret_value() if secret else None,
        session_token=token.get_secret_value() if token else None,
        region=iceberg.s3_region,
        endpoint_override=iceberg.s3_endpoint,
        force_virtual_addressing=not iceberg.s3_path_style,
        allow_bucket_creation=True,
        connect_timeout=S3_CONNECT_TIMEOUT_SECS,
        request_timeout=REQUEST_TIMEOUT_SECS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # `_until_it_answers` repeats
    )
    for bucket in (plan.bucket, *plan.extra_buckets):
        try:
            if s3.get_file_info(bucket).type == fs.FileType.Directory:
                log.info("Bucket %s: is there", bucket)
                continue
            s3.create_dir(bucket)
        except OSError as error:
            raise _s3_error(iceberg, bucket, error) from error
        log.info("Bucket %s: made", bucket)


def _s3_error(iceberg: config.Iceberg, bucket: str, error: OSError) -> Exception:
    where = iceberg.s3_endpoint or "AWS"
    if any(refusal in str(error) for refusal in S3_REFUSALS):
        return ConfigError(
            f"storage.iceberg.s3_access_key_id={iceberg.s3_access_key_id}: the object store at {where} refuses it: "
            f"check it, its secret, and that it may make a bucket named {bucket} ({error})"
        )
    return Unavailable("the object store", "storage.iceberg.s3_endpoint", f"{where}: {error}")


# --- topics ------------------------------------------------------------------------------------------------------


def make_topics(kafka: config.Kafka, plan: Plan) -> None:
    """The input topic and its dead-letter topic, replicated as the brokers do by default."""
    if kafka.brokers == config.EMBEDDED:
        log.info("Topics: none needed, the embedded broker makes its own")
        return
    complaints: list[KafkaError] = []  # why a broker is not reached; the failed request itself does not know
    own: dict[str, Any] = {"client.id": "tss-bootstrap", "log_level": 2, "error_cb": complaints.append}
    admin = AdminClient(kafka.client_properties() | own)
    try:
        there = admin.list_topics(timeout=min(KAFKA_TIMEOUT_SECS, plan.wait_secs)).topics
    except KafkaException as error:
        admin.poll(0)
        raise _kafka_error(kafka, [*complaints, error.args[0]]) from error
    for topic, partitions in ((kafka.input_topic, plan.partitions), (kafka.dlq, DEAD_LETTER_PARTITIONS)):
        if topic in there:
            log.info("Topic %s: is there, partitions: %d", topic, len(there[topic].partitions))
            continue
        new = NewTopic(topic, num_partitions=partitions)
        try:
            admin.create_topics([new], request_timeout=KAFKA_TIMEOUT_SECS)[topic].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _topic_error(kafka, topic, error.args[0]) from error
            log.info("Topic %s: is there", topic)  # made a moment ago, not yet told to every broker
            continue
        log.info("Topic %s: made, partitions: %d", topic, partitions)


def _kafka_error(kafka: config.Kafka, errors: Sequence[KafkaError]) -> Exception:
    for error in errors:
        if error.code() == KafkaError._AUTHENTICATION:
            return ConfigError(
                f"kafka.sasl_username={kafka.sasl_username}: the brokers refuse it: check it, kafka.sasl_password, "
                f"kafka.sasl_mechanism and kafka.security_protocol ({error.str()})"
            )
    return Unavailable("Kafka", "kafka.brokers", f"{kafka.brokers}: {errors[0].str()}")


def _topic_error(kafka: config.Kafka, topic: str, error: KafkaError) -> Exception:
    of_the_client = error.code() < 0  # a lost connection, a timeout
    if error.retriable() or of_the_client:
        return _kafka_error(kafka, [error])
    setting = "kafka.input_topic" if topic == kafka.input_topic else "kafka.dead_letter_topic"
    return ConfigError(
        f"{setting}={topic}: the brokers refuse to make it: {error.str()}: "
        "make the topic yourself, or set kafka.sasl_username to a user who may"
    )


# --- catalog -----------------------------------------------------------------------------------------------------


def make_catalog(storage: config.Storage, plan: Plan) -> None:
    """Server, project and warehouse where the catalog has Lakekeeper's management API; the namespace everywhere."""
    if storage.storage_type == "local":
        log.info("Catalog: none needed, storage.storage_type is local")
        return
    catalog = _Catalog(storage.iceberg)
    if _bootstrap_server(catalog):
        _make_project(catalog)
        _make_warehouse(catalog, plan)
    _make_namespace(catalog)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: dict[str, Any]  # empty when it was no JSON object

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def error_type(self) -> str:
        return str(self._error.get("type", ""))

    def __str__(self) -> str:
        return f"{self.status} {self.error_type} {self._error.get('message', '')}".strip()

    @property
    def _error(self) -> dict[str, Any]:
        error = self.body.get("error")
        return error if isinstance(error, dict) else {}


class _Catalog:
    """The two HTTP interfaces of one catalog: Iceberg REST at `rest`, Lakekeeper's management at `management`."""

    def __init__(self, iceberg: config.Iceberg) -> None:
        self.iceberg = iceberg
        root = iceberg.catalog_uri.rstrip("/")
        self.rest = f"{root}/v1"
        self.management = f"{root.removesuffix('/catalog')}/management/v1"

    def ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> _Answer:
        """Any answer but one that waiting or another token could change: those raise."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.iceberg.project_id:
            headers["x-project-id"] = self.iceberg.project_id
        if self.iceberg.catalog_token:
            headers["Authorization"] = f"Bearer {self.iceberg.catalog_token.get_secret_value()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - loading the settings has checked it
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_SECS) as response:  # noqa: S310
                answer = _Answer(response.status, _json_object(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                answer = _Answer(error.code, _json_object(error.read()))
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable("the catalog", CATALOG_SETTING, f"{method} {url}: {error}") from error
        if answer.status in (401, 403):
            raise ConfigError(
                f"storage.iceberg.catalog_token: {method} {url} was refused: {answer}: set a token that may"
            )
        if answer.status in (429, 500, 502, 503, 504):
            raise Unavailable("the catalog", CATALOG_SETTING, f"{method} {url}: {answer}")
        return answer

    def refused(self, setting: str, value: str, answer: _Answer, fix: str) -> ConfigError:
        return ConfigError(f"storage.iceberg.{setting}={value}: the catalog says {answer}: {fix}")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _bootstrap_server(catalog: _Catalog) -> bool:
    """False when there is no management API: Iceberg's own adapter answers 400 there, others 404 or a web page."""
    info = catalog.ask("GET", f"{catalog.management}/info")
    if not info.ok or "bootstrapped" not in info.body:
        log.info(
            "Catalog: no management API at %s, taken as a plain Iceberg REST catalog", catalog.management
        )
        return False
    if info.body["bootstrapped"]:
        log.info("Catalog server: is bootstrapped")
        return True
    answer = catalog.ask("POST", f"{catalog.management}/bootstrap", {"accept-terms-of-use": True})
    if not answer.ok and answer.error_type not in BOOTSTRAPPED_MEANWHILE:
        uri = catalog.iceberg.catalog_uri
        raise catalog.refused("catalog_uri", uri, answer, "bootstrap the server by hand, then run this again")
    log.info("Catalog server: bootstrapped")
    return True


def _make_project(catalog: _Catalog) -> None:
    """Bootstrapping made the default project; another one is made when `project_id` names it."""
    project_id = catalog.iceberg.project_id
    if project_id is None:
        return
    if catalog.ask("GET", f"{catalog.management}/project").ok:
        log.info("Project %s: is there", project_id)
        return
    wanted = {"project-name": f"tss-{project_id}", "project-id": project_id}
    answer = catalog.ask("POST", f"{catalog.management}/project", wanted)
    if not answer.ok and answer.status != 409:
        raise catalog.refused("project_id", project_id, answer, "set the id of a project that is there")
    log.info("Project %s: made", project_id)


def _make_warehouse(catalog: _Catalog, plan: Plan) -> None:
    name = catalog.iceberg.warehouse
    if _warehouse_is_there(catalog):
        return
    answer = catalog.ask("POST", f"{catalog.management}/warehouse", _warehouse(catalog.iceberg, plan))
    if answer.ok:
        log.info("Warehouse %s: made on s3://%s/%s", name, plan.bucket, plan.key_prefix)
    elif answer.error_type in WAREHOUSE_EXISTS:
        # Somebody was faster; or it is another warehouse that lives in the same folder.
        if not _warehouse_is_there(catalog):
            fix = f"s3://{plan.bucket}/{plan.key_prefix} is taken: choose another --bucket or --key-prefix, or its warehouse"
            raise catalog.refused("warehouse", name, answer, fix)
    else:
        fix = "the server itself must reach s3_endpoint and write to the bucket with s3_access_key_id and its secret"
        raise catalog.refused("warehouse", name, answer, fix)


def _warehouse_is_there(catalog: _Catalog) -> bool:
    answer = catalog.ask("GET", f"{catalog.management}/warehouse")
    if not answer.ok:
        raise catalog.refused(
            "project_id", str(catalog.iceberg.project_id), answer, "set the id of a project of yours"
        )
    for warehouse in answer.body.get("warehouses", []):
        if warehouse["name"] == catalog.iceberg.warehouse:
            profile = warehouse.get("storage-profile", {})
            log.info(
                "Warehouse %s: is there, on s3://%s/%s",
                warehouse["name"],
                profile.get("bucket"),
                profile.get("key-prefix"),
            )
            return True
    return False


def _warehouse(iceberg: config.Iceberg, plan: Plan) -> dict[str, Any]:
    if not iceberg.s3_access_key_id or not iceberg.s3_secret_access_key:
        raise ConfigError(
            "storage.iceberg.s3_access_key_id: a warehouse needs it and s3_secret_access_key: set both"
        )
    profile = {
        "type": "s3",
        "bucket": plan.bucket,
        "key-prefix": plan.key_prefix,
        "region": iceberg.s3_region,
        "path-style-access": iceberg.s3_path_style,
        "flavor": "s3-compat" if iceberg.s3_endpoint else "aws",
        # tss brings its own keys. Vended ones need an STS that most S3 servers lack; with remote signing the
        # server makes every client use another file layer, which cannot delete.
        "sts-enabled": False,
        "remote-signing-enabled": False,
    }
    if iceberg.s3_endpoint:
        profile["endpoint"] = iceberg.s3_endpoint
    return {
        "warehouse-name": iceberg.warehouse,
        "delete-profile": {"type": "hard"},
        "storage-profile": profile,
        "storage-credential": {
            "type": "s3",
            "credential-type": "access-key",
            "access-key-id": iceberg.s3_access_key_id,
            "secret-access-key": iceberg.s3_secret_access_key.get_secret_value(),
        },
    }


def _make_namespace(catalog: _Catalog) -> None:
    iceberg = catalog.iceberg
    query = urllib.parse.urlencode({"warehouse": iceberg.warehouse})
    answer = catalog.ask("GET", f"{catalog.rest}/config?{query}")
    if not answer.ok:
        raise catalog.refused(
            "warehouse", iceberg.warehouse, answer, f"make it, or correct it or {CATALOG_SETTING}"
        )
    stated = {**answer.body.get("defaults", {}), **answer.body.get("overrides", {})}
    prefix = f"/{stated['prefix']}" if stated.get("prefix") else ""
    wanted = {"namespace": iceberg.namespace.split("."), "properties": {}}
    answer = catalog.ask("POST", f"{catalog.rest}{prefix}/namespaces", wanted)
    if not answer.ok and answer.status != 409:
        raise catalog.refused("namespace", iceberg.namespace, answer, "choose a name that it allows")
    log.info("Namespace %s: %s", iceberg.namespace, "made" if answer.ok else "is there")
