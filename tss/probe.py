"""`tss check --connect`: would Kafka, Redis, the catalog and the object store serve us, and if not, whose fault is it?

All are asked at once, each in a thread that nobody waits for beyond one deadline: pyiceberg sets no timeout on its
requests, and a name server or a firewall that swallows packets can hold up any client. The threads are daemons, so
one that still hangs ends with the process.

A part that serves can still come with advice: it would work, and lose something on a bad day.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from pyarrow import fs
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import (
    ForbiddenError,
    NoSuchNamespaceError,
    NoSuchTableError,
    OAuthError,
    RESTError,
    ServerError,
    ServiceUnavailableError,
    UnauthorizedError,
)
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry

from tss import config as settings
from tss.config import EMBEDDED
from tss.config.keys import SETTINGS
from tss.errors import TssError

DEADLINE_SECS = 20.0  # a person waits for the answer, and the slowest part (below) needs to get to its own
KAFKA_METADATA_SECS = 10.0  # AutoMQ's first answer takes several seconds
KAFKA_LEADER_SECS = 3.0
S3_CONNECT_SECS = 3.0
S3_REQUEST_SECS = 10.0
REDIS_OLDEST = (7, 0)
LOW_DISK_BYTES = 1 << 30  # a busy table writes so much in an hour; below it the first full disk is near

BROKERS, TOPIC = "kafka.brokers", "kafka.input_topic"
REDIS_URL, REDIS_PASSWORD = "redis.url", "redis.password"
CATALOG_URI, WAREHOUSE = "storage.iceberg.catalog_uri", "storage.iceberg.warehouse"
S3_ENDPOINT = "storage.iceberg.s3_endpoint"
S3_KEY, S3_SECRET = "storage.iceberg.s3_access_key_id", "storage.iceberg.s3_secret_access_key"
LOCAL_PATH = "storage.local.path"


@dataclass(frozen=True, slots=True)
class Result:
    """What one part said. `setting` is the one at fault when it is not ok, else the one that points at the part."""

    name: str
    ok: bool
    setting: str
    detail: str
    elapsed_ms: float
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A part that serves."""

    detail: str
    advice: tuple[str, ...] = ()


class Refused(TssError):
    """A part that does not serve: the setting to look at, what was seen, what to do."""

    def __init__(self, setting: str, detail: str) -> None:
        super().__init__(detail)
        self.setting = setting
        self.detail = detail


Check = tuple[str, str, Callable[[], Answer]]  # name, setting that points at it, question


def probe(config: settings.Config, deadline_secs: float = DEADLINE_SECS) -> list[Result]:
    """One result a part, in a fixed order, at the latest after `deadline_secs`."""
    checks = _checks(config)
    results: dict[str, Result] = {}
    threads = []
    for check in checks:
        threads.append(
            threading.Thread(target=_ask, args=(check, results), name=f"probe {check[0]}", daemon=True)
        )
        threads[-1].start()
    until = time.monotonic() + deadline_secs
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    late = f"no answer within {deadline_secs:g} s; is something between here and there dropping packets?"
    return [
        results.get(name) or Result(name, False, setting, late, deadline_secs * 1000)
        for name, setting, _ in checks
    ]


def render(results: Sequence[Result]) -> str:
    """The results for people, a line a part, and what to do below it."""
    lines = []
    for result in results:
        verdict = "ok" if result.ok else "FAILED"
        cause = "" if result.ok else f"{result.setting}: "
        lines.append(f"{verdict:<7} {result.name:<13} {cause}{result.detail} ({result.elapsed_ms:.0f} ms)")
        lines += [f"{'advice':>7} {'':<13} {advice}" for advice in result.advice]
    ready = sum(result.ok for result in results)
    lines.append(f"{ready} of {len(results)} parts are ready")
    return "\n".join(lines)


def _checks(config: settings.Config) -> list[Check]:
    kafka, link, storage = config.kafka, config.redis, config.storage
    checks: list[Check] = [
        ("Kafka", BROKERS, lambda: _ask_kafka(kafka)),
        ("Redis", REDIS_URL, lambda: _ask_redis(link)),
    ]
    if storage.storage_type == "local":
        return [*checks, ("Local storage", LOCAL_PATH, lambda: _ask_folder(storage.local.path))]
    return [
        *checks,
        ("Catalog", CATALOG_URI, lambda: _ask_catalog(storage.iceberg)),
        ("Object store", S3_ENDPOINT, lambda: _ask_object_store(storage.iceberg)),
    ]


def _ask(check: Check, results: dict[str, Result]) -> None:
    name, setting, question = check
    started = time.monotonic()
    ok = False
    advice: tuple[str, ...] = ()
    try:
        answer = question()
        ok, detail, advice = True, answer.detail, answer.advice
    except Refused as error:
        setting, detail = error.setting, error.detail
    except Exception as error:  # noqa: BLE001 - four client libraries; whatever they raise is this part's answer
        detail = f"{type(error).__name__}: {error}"
    results[name] = Result(name, ok, setting, _one_line(detail), (time.monotonic() - started) * 1000, advice)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- Kafka -------------------------------------------------------------------------------------------------------

KAFKA_FAULTS = {
    KafkaError._AUTHENTICATION: "kafka.sasl_username, kafka.sasl_password",
    KafkaError.SASL_AUTHENTICATION_FAILED: "kafka.sasl_username, kafka.sasl_password",
    KafkaError._SSL: "kafka.security_protocol",
    KafkaError._INVALID_ARG: "kafka.security_protocol",
}


def _ask_kafka(kafka: settings.Kafka) -> Answer:
    if kafka.brokers == EMBEDDED:
        return Answer("embedded: starts with the process")
    complaints: list[KafkaError] = []  # why no broker is reached; the failed request itself does not know
    own: dict[str, Any] = {
        "group.id": kafka.consumer_group,  # never joined: nothing is subscribed to
        "client.id": "tss-check",
        "log_level": 2,
        "error_cb": complaints.append,
    }
    try:
        consumer = Consumer(kafka.client_properties() | own)
    except KafkaException as error:
        raise _kafka_refusal(kafka, [error.args[0]]) from error
    try:
        metadata = _metadata(consumer, kafka, complaints)
        topic = metadata.topics.get(kafka.input_topic)
        if topic is None or topic.error is not None:
            raise Refused(
                TOPIC,
                f"{kafka.input_topic} is not there, or not for this user to see: make it with `tss bootstrap topics`, or "
                f"kafka-topics.sh --bootstrap-server {kafka.brokers} --create --topic {kafka.input_topic} --partitions 8",
            )
        _ask_leaders(consumer, kafka, metadata)
    finally:
        consumer.close()
    advice = (
        ()
        if kafka.dlq in metadata.topics
        else (f"topic {kafka.dlq} is not there: `tss bootstrap topics` makes it",)
    )
    return Answer(
        f"{_count(len(metadata.brokers), 'broker')}, topic {kafka.input_topic} "
        f"with {_count(len(topic.partitions), 'partition')}",
        advice,
    )


def _metadata(consumer: Consumer, kafka: settings.Kafka, complaints: list[KafkaError]) -> Any:
    until = time.monotonic() + KAFKA_METADATA_SECS
    while True:
        try:
            return consumer.list_topics(timeout=1)
        except KafkaException as error:
            consumer.poll(0)  # delivers the complaints
            if complaints or time.monotonic() > until:
                raise _kafka_refusal(kafka, [*complaints, error.args[0]]) from error


def _kafka_refusal(kafka: settings.Kafka, errors: Sequence[KafkaError]) -> Refused:
    reasons = [error for error in errors if error.code() != KafkaError._ALL_BROKERS_DOWN]
    error = next((error for error in reasons if error.code() in KAFKA_FAULTS), reasons[0])
    # A broker that hangs up on a client of the wrong protocol; librdkafka guesses as much, in words.
    hung_up = "security.protocol" in error.str()
    setting = "kafka.security_protocol" if hung_up else KAFKA_FAULTS.get(error.code(), BROKERS)
    return Refused(setting, f"{kafka.brokers}: {error.str()}")


def _ask_leaders(consumer: Consumer, kafka: settings.Kafka, metadata: Any) -> None:
    """One partition of every leader: its advertised address may differ from the one that gave the metadata."""
    partitions = metadata.topics[kafka.input_topic].partitions
    for leader, partition in {state.leader: number for number, state in partitions.items()}.items():
        try:
            consumer.get_watermark_offsets(
                TopicPartition(kafka.input_topic, partition), timeout=KAFKA_LEADER_SECS, cached=False
            )
        except KafkaException as error:
            broker, said = metadata.brokers.get(leader), error.args[0].str()
            if broker is None:
                raise Refused(
                    TOPIC, f"partition {partition} of {kafka.input_topic} has no leader: {said}"
                ) from error
            raise Refused(
                BROKERS,
                f"{kafka.brokers} answers, but sends us to {broker.host}:{broker.port} for partition {partition} of "
                f"{kafka.input_topic}, which does not ({said}): name in that broker's advertised.listeners an address "
                "that can be reached from here",
            ) from error


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


# --- Redis -------------------------------------------------------------------------------------------------------


def _ask_redis(link: settings.Redis) -> Answer:
    if link.url == EMBEDDED:
        return Answer("embedded: starts with the process")
    pool = ConnectionPool.from_url(
        link.url,
        decode_responses=True,
        socket_connect_timeout=link.connection_timeout_secs,
        socket_timeout=link.connection_timeout_secs,
        retry=Retry(NoBackoff(), 0),
    )
    if link.password is not None:
        pool.connection_kwargs["password"] = link.password.get_secret_value()
    if link.db is not None:
        pool.connection_kwargs["db"] = link.db
    with redis.Redis(connection_pool=pool) as client:
        try:
            client.ping()
            info: dict[str, Any] = client.info()
            sync = _sync_policy(client)
        except redis.RedisError as error:
            raise _redis_refusal(link, error) from error
        finally:
            pool.disconnect()
    server = (
        f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
    )
    if tuple(map(int, info["redis_version"].split(".")[:2])) < REDIS_OLDEST:
        raise Refused(REDIS_URL, f"this is {server}; Redis 7.0 or newer is needed, or Valkey")
    if info.get("role") == "slave":
        raise Refused(REDIS_URL, "this server is a read-only replica; name the primary")
    is_cluster = bool(info.get("cluster_enabled"))
    if is_cluster != link.cluster_enabled:
        kind = "a node of a Redis Cluster" if is_cluster else "a single server"
        raise Refused("redis.cluster_enabled", f"this is {kind}; set it to {is_cluster}".lower())
    return Answer(server, _redis_advice(link, info, sync))


def _sync_policy(client: redis.Redis) -> str | None:
    """None where the server keeps its settings to itself, as managed ones do."""
    try:
        found: dict[str | None, str | None] = client.config_get("appendfsync")
    except redis.ResponseError:
        return None
    return found.get("appendfsync")


def _redis_advice(link: settings.Redis, info: dict[str, Any], sync: str | None) -> tuple[str, ...]:
    policy, limit = info.get("maxmemory_policy"), info.get("maxmemory", 0)
    rows = (
        (
            not info.get("aof_enabled"),
            "appendonly is no: set `appendonly yes`, or a restart of Redis sends every worker back to Kafka",
        ),
        (
            info.get("aof_enabled") and sync == "no",
            "appendfsync is no: set `appendfsync everysec`, or a crash of its machine forgets more than a second",
        ),
        (
            policy != "noeviction",
            f"maxmemory-policy is {policy}: set `maxmemory-policy noeviction`, or a full Redis throws spans away",
        ),
        (
            not limit and not link.max_memory_bytes,
            "neither `maxmemory` of Redis nor redis.max_memory_bytes is set: nothing stops Redis from filling the machine",
        ),
    )
    return tuple(advice for wrong, advice in rows if wrong)


def _redis_refusal(link: settings.Redis, error: redis.RedisError) -> Refused:
    address = SETTINGS[("redis", "url")].shown(link.url)
    said = _one_line(str(error))
    match error:
        case redis.AuthenticationError() | redis.exceptions.AuthenticationWrongNumberOfArgsError():
            missing = link.password is None and "@" not in link.url
            fix = "set it (or redis.password_file)" if missing else "it is not the one this server knows"
            return Refused(REDIS_PASSWORD, f"{address} refuses us: {fix} ({said})")
        case redis.exceptions.NoPermissionError():
            return Refused(REDIS_URL, f"{address}: its user may not do what tss does: {said}")
        case redis.BusyLoadingError():
            return Refused(REDIS_URL, f"{address} is still loading its data; try again in a moment")
        case redis.ResponseError() if "DB index" in said:
            return Refused("redis.db", f"{address} has no such database: {said}")
        case redis.TimeoutError():
            wait = f"{link.connection_timeout_secs:g} s"
            return Refused(
                REDIS_URL, f"{address} does not answer within redis.connection_timeout_secs ({wait})"
            )
        case _:
            return Refused(REDIS_URL, f"{address} is not reached: {said}")


# --- catalog -----------------------------------------------------------------------------------------------------


def _ask_catalog(iceberg: settings.Iceberg) -> Answer:
    try:
        catalog = load_catalog("tss", **iceberg.catalog_properties())
    except (RESTError, OSError, ValueError, NotImplementedError) as error:
        raise _catalog_refusal(iceberg, error) from error
    try:
        there = catalog.namespace_exists(iceberg.namespace)
    except (RESTError, OSError, ValueError) as error:
        uri = str(getattr(catalog, "uri", iceberg.catalog_uri))
        if uri.rstrip("/") == iceberg.catalog_uri.rstrip("/"):
            raise _catalog_refusal(iceberg, error) from error
        raise Refused(
            CATALOG_URI,
            f"{iceberg.catalog_uri} answers and sends us on to {uri}, which does not: give the catalog a base URI that "
            f"can be reached from here (Lakekeeper: LAKEKEEPER__BASE_URI) ({_reason(error)})",
        ) from error
    state = "is there" if there else "will be made"
    return Answer(f"warehouse {iceberg.warehouse}, namespace {iceberg.namespace} {state}")


def _catalog_refusal(iceberg: settings.Iceberg, error: Exception) -> Refused:
    said = _reason(error)
    match error:
        case UnauthorizedError() | ForbiddenError() | OAuthError():
            missing = (
                "set it (or storage.iceberg.catalog_token_file)"
                if iceberg.catalog_token is None
                else "renew it"
            )
            return Refused(
                "storage.iceberg.catalog_token", f"{iceberg.catalog_uri} refuses us: {missing} ({said})"
            )
        case ServerError() | ServiceUnavailableError():
            return Refused(CATALOG_URI, f"{iceberg.catalog_uri} is in trouble itself: {said}")
        case RESTError() if "json payload" in said.lower():
            return Refused(
                CATALOG_URI, f"{iceberg.catalog_uri} is no Iceberg REST catalog; check host, port and path"
            )
        case RESTError() if "project" in said.lower() and "warehouse" not in said.lower():
            return Refused(
                "storage.iceberg.project_id", f"{iceberg.project_id or 'unset'} is not taken: {said}"
            )
        case RESTError():
            return Refused(
                WAREHOUSE,
                f"{iceberg.warehouse} is not taken by {iceberg.catalog_uri}: name a warehouse that exists in project "
                f"{iceberg.project_id or '(default)'}, or make it with `tss bootstrap catalog` ({said})",
            )
        case OSError():  # requests raises nothing else when there is no answer
            return Refused(CATALOG_URI, f"{iceberg.catalog_uri} is not reached: {said}")
        case _:
            return Refused(
                CATALOG_URI, f"{iceberg.catalog_uri} is no Iceberg REST catalog; check host, port and path"
            )


def _reason(error: Exception) -> str:
    """What urllib3 saw, without the layers that requests puts around it."""
    seen = str(getattr(next(iter(error.args), None), "reason", error))
    return _one_line(seen.partition("): ")[2] or seen)


# --- object store ------------------------------------------------------------------------------------------------

# Words of S3 servers and of the client, in the order in which they are looked for; what they mean to the operator.
S3_FAULTS = (
    ("invalid_access_key_id", S3_KEY, "the key id is unknown there"),
    ("invalidaccesskeyid", S3_KEY, "the key id is unknown there"),
    ("xadminusernotfound", S3_KEY, "the key id is unknown there"),
    ("authorizationheadermalformed", "storage.iceberg.s3_region", "the region is another one there"),
    ("signature", S3_SECRET, "the secret does not belong to the key id"),
    ("no_such_bucket", WAREHOUSE, "the bucket of the warehouse is missing; `tss bootstrap buckets` makes it"),
    ("token", "storage.iceberg.s3_session_token", "the session token is not taken"),
    ("access_denied", S3_KEY, "this key may not write and delete in the warehouse"),
    ("network_connection", S3_ENDPOINT, "it is not reached"),
)


def _ask_object_store(iceberg: settings.Iceberg) -> Answer:
    where = iceberg.s3_endpoint or "AWS"
    location = _warehouse_location(iceberg)
    scheme, _, path = (location or "").partition("://")
    if location and scheme not in ("s3", "s3a", "s3n"):
        return Answer(f"the tables are at {location}, which is not S3: nothing tried")
    secret, token = iceberg.s3_secret_access_key, iceberg.s3_session_token
    s3 = fs.S3FileSystem(
        access_key=iceberg.s3_access_key_id,
        secret_key=secret.get_secret_value() if secret else None,
        session_token=token.get_secret_value() if token else None,
        region=iceberg.s3_region,
        endpoint_override=iceberg.s3_endpoint,
        force_virtual_addressing=not iceberg.s3_path_style,
        connect_timeout=S3_CONNECT_SECS,
        request_timeout=S3_REQUEST_SECS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    try:
        if location is None:
            s3.get_file_info(fs.FileSelector(""))
            return Answer(
                f"{where} takes the keys; where the tables will be is not known yet, so nothing was written"
            )
        trial = f"{path.rstrip('/')}/tss-check-{uuid.uuid4()}"
        with s3.open_output_stream(trial) as stream:
            stream.write(b"written by `tss check --connect`, may be deleted")
        s3.delete_file(trial)
    except OSError as error:
        raise _s3_refusal(where, error) from error
    return Answer(f"{where}: wrote and deleted an object under {location}")


def _s3_refusal(where: str, error: OSError) -> Refused:
    said = _one_line(str(error))
    said = said[max(0, said.find("AWS Error")) :]
    for word, setting, meaning in S3_FAULTS:
        if word in said.lower():
            return Refused(setting, f"{where}: {meaning} ({said})")
    return Refused(S3_ENDPOINT, f"{where}: {said}")


def _warehouse_location(iceberg: settings.Iceberg) -> str | None:
    """Where the tables are or will be; None as long as only the catalog knows."""
    if "://" in iceberg.warehouse:
        return iceberg.warehouse
    try:
        catalog = load_catalog("tss", **iceberg.catalog_properties())
        return _table_location(catalog, iceberg) or catalog.load_namespace_properties(iceberg.namespace).get(
            "location"
        )
    except (RESTError, NoSuchNamespaceError, OSError, ValueError):
        return None  # the catalog's own check tells


def _table_location(catalog: Catalog, iceberg: settings.Iceberg) -> str | None:
    try:
        return catalog.load_table((iceberg.namespace, iceberg.table_name)).location()
    except NoSuchTableError:
        return None


# --- local storage -----------------------------------------------------------------------------------------------


def _ask_folder(path: Path) -> Answer:
    """Nothing is made: a folder that is not there yet is judged by the one it would be made in."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise Refused(LOCAL_PATH, f"{there} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise Refused(LOCAL_PATH, f"{there} cannot be written to: {error.strerror}") from error
    free_bytes = shutil.disk_usage(there).free
    low = (f"only {free_bytes / 2**20:.0f} MiB are free",) if free_bytes < LOW_DISK_BYTES else ()
    state = "is writable" if there == path.absolute() else "can be made"
    return Answer(f"{path} {state}, {free_bytes / 2**30:.1f} GiB free", low)
