"""Settings that are fine alone and cannot work together.

Every rule is a row: broken when true, the setting to change, what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tss.config.models import EMBEDDED, App, Config, Kafka, Observability, Redis, Storage

MAX_POLL_INTERVAL_MS = 300_000  # the Kafka client's default; it refuses a session that outlasts it

Rule = tuple[object, str, str]


def clashes(config: Config) -> Iterator[tuple[str, str]]:
    """(setting, fix) of every broken rule; the fix names the other settings concerned in full."""
    rules = (
        *_timer_rules(config.app, config.kafka),
        *_kafka_rules(config.kafka),
        *_redis_rules(config.redis),
        *_storage_rules(config.storage),
        *_listener_rules(config.observability),
    )
    return ((name, fix) for broken, name, fix in rules if broken)


def _timer_rules(app: App, kafka: Kafka) -> Iterator[Rule]:
    quiet = app.inactivity_timeout_secs
    yield (
        app.root_wait_secs is not None and app.root_wait_secs > quiet,
        "app.root_wait_secs",
        f"must be at most app.inactivity_timeout_secs ({quiet:g}), which it shortens",
    )
    yield (
        app.max_trace_duration_secs < quiet,
        "app.max_trace_duration_secs",
        f"must be at least app.inactivity_timeout_secs ({quiet:g}), else no trace can ever go quiet",
    )
    yield (
        kafka.session_timeout_ms > MAX_POLL_INTERVAL_MS,
        "kafka.session_timeout_ms",
        f"must be at most {MAX_POLL_INTERVAL_MS}, the poll interval of the Kafka client",
    )
    yield (
        kafka.commit_interval_secs * 1000 >= kafka.session_timeout_ms,
        "kafka.commit_interval_secs",
        f"must be shorter than kafka.session_timeout_ms ({kafka.session_timeout_ms})",
    )


def _kafka_rules(kafka: Kafka) -> Iterator[Rule]:
    sasl = kafka.security_protocol.startswith("sasl")
    ssl = kafka.security_protocol.endswith("ssl")
    by_password = (kafka.sasl_mechanism or "").upper().startswith(("PLAIN", "SCRAM"))
    yield (
        kafka.dlq == kafka.input_topic,
        "kafka.dead_letter_topic",
        "must not be kafka.input_topic: bad records would come back",
    )
    yield (
        kafka.brokers == EMBEDDED and kafka.security_protocol != "plaintext",
        "kafka.security_protocol",
        "must be plaintext when kafka.brokers is `embedded`",
    )
    yield (
        sasl and not kafka.sasl_mechanism,
        "kafka.sasl_mechanism",
        "must be set, kafka.security_protocol asks for SASL",
    )
    yield (
        kafka.sasl_mechanism and not sasl,
        "kafka.security_protocol",
        "must be sasl_plaintext or sasl_ssl for kafka.sasl_mechanism to be used",
    )
    yield (
        by_password and not kafka.sasl_username,
        "kafka.sasl_username",
        "must be set, kafka.sasl_mechanism asks for a user",
    )
    yield (
        by_password and not kafka.sasl_password,
        "kafka.sasl_password",
        "must be set, kafka.sasl_mechanism asks for a password",
    )
    yield (
        kafka.sasl_username and not kafka.sasl_mechanism,
        "kafka.sasl_mechanism",
        "must be set for kafka.sasl_username to be used, such as SCRAM-SHA-512",
    )
    for name in ("ssl_ca_location", "ssl_certificate_location", "ssl_key_location"):
        file = getattr(kafka, name)
        yield (
            file and not ssl,
            "kafka.security_protocol",
            f"must be ssl or sasl_ssl for kafka.{name} to be used",
        )
        yield file and not Path(file).is_file(), f"kafka.{name}", "is not a file; name one that exists"
    halves = (kafka.ssl_certificate_location, kafka.ssl_key_location)
    yield (
        halves[0] and not halves[1],
        "kafka.ssl_key_location",
        "must be set beside kafka.ssl_certificate_location",
    )
    yield (
        halves[1] and not halves[0],
        "kafka.ssl_certificate_location",
        "must be set beside kafka.ssl_key_location",
    )


def _redis_rules(redis: Redis) -> Iterator[Rule]:
    scheme = urlsplit(redis.url).scheme
    yield (
        redis.url != EMBEDDED and scheme not in ("redis", "rediss", "unix"),
        "redis.url",
        "must begin with redis://, rediss:// or unix://, or be `embedded`",
    )
    yield (
        scheme in ("redis", "rediss") and not _has_numbers(redis.url),
        "redis.url",
        "must have numbers for port and database; put a password with / # ? or @ in it into redis.password instead",
    )
    yield (
        redis.cluster_enabled and (redis.url == EMBEDDED or scheme == "unix"),
        "redis.cluster_enabled",
        "must be false when redis.url is `embedded` or a socket",
    )
    yield (
        redis.cluster_enabled and redis.db,
        "redis.db",
        "must be 0 or unset with redis.cluster_enabled: a cluster has one",
    )


def _has_numbers(url: str) -> bool:
    parts = urlsplit(url)
    try:
        return parts.port != 0 and int(parts.path.strip("/") or 0) >= 0
    except ValueError:
        return False


def _storage_rules(storage: Storage) -> Iterator[Rule]:
    iceberg = storage.iceberg
    yield (
        iceberg.table_name == iceberg.decisions_table_name,
        "storage.iceberg.decisions_table_name",
        "must differ from storage.iceberg.table_name",
    )
    if storage.storage_type != "iceberg":
        return
    uri = urlsplit(iceberg.catalog_uri)
    yield (
        uri.scheme not in ("http", "https") or not uri.netloc,
        "storage.iceberg.catalog_uri",
        "must be a URL such as http://lakekeeper:8181/catalog",
    )
    yield (
        uri.path.rstrip("/").endswith("/v1"),
        "storage.iceberg.catalog_uri",
        "must end before /v1, which is added",
    )
    endpoint = urlsplit(iceberg.s3_endpoint or "http://unset")
    yield (
        endpoint.scheme not in ("http", "https") or not endpoint.netloc,
        "storage.iceberg.s3_endpoint",
        "must be a URL such as http://minio:9000",
    )
    key, secret = iceberg.s3_access_key_id, iceberg.s3_secret_access_key
    yield (
        key and not secret,
        "storage.iceberg.s3_secret_access_key",
        "must be set beside storage.iceberg.s3_access_key_id",
    )
    yield (
        secret and not key,
        "storage.iceberg.s3_access_key_id",
        "must be set beside storage.iceberg.s3_secret_access_key",
    )
    yield (
        iceberg.s3_session_token and not (key and secret),
        "storage.iceberg.s3_session_token",
        "needs storage.iceberg.s3_access_key_id and storage.iceberg.s3_secret_access_key beside it",
    )


def _listener_rules(listen: Observability) -> Iterator[Rule]:
    wildcard = {"0.0.0.0", "::"}  # noqa: S104
    overlap = listen.health_addr == listen.metrics_addr or wildcard & {
        listen.health_addr,
        listen.metrics_addr,
    }
    yield (
        listen.health_port == listen.metrics_port != 0 and overlap,
        "observability.metrics_port",
        "must differ from observability.health_port",
    )
