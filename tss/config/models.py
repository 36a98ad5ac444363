"""The settings themselves: names, types, bounds, defaults; and how clients of Kafka and the catalog spell them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "TSS__"
EMBEDDED = "embedded"

Rate = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Lowercase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _reveal(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


class App(Section):
    """The two halves and their timers."""

    evaluation_workers: int = Field(4, ge=1, le=64, description="decide loops in this process")
    evaluation_interval_secs: float = Field(
        1, gt=0, le=60, description="pause between two looks for due traces"
    )
    inactivity_timeout_secs: float = Field(
        60, gt=0, description="a trace is due when no span came for so long"
    )
    root_wait_secs: float | None = Field(
        None, gt=0, description="shorter wait once the root span is in; unset = no such timer"
    )
    max_trace_duration_secs: float = Field(
        300, gt=0, description="a trace is due so long after its first span, active or not"
    )
    max_trace_spans: int = Field(
        100_000,
        ge=1,
        description="a trace is due at once when it has more spans; the rest follows its verdict",
    )
    max_trace_bytes: int = Field(
        64 << 20,
        ge=1 << 10,
        description="a trace is due at once when it is larger; the rest follows its verdict",
    )
    max_buffer_traces: int = Field(
        5_000_000, ge=1, description="pending traces of the whole fleet above which consumers pause"
    )
    max_buffer_spans: int = Field(
        200_000_000, ge=1, description="pending spans of the whole fleet above which consumers pause"
    )
    claim_max_traces: int = Field(2000, ge=1, le=20_000, description="traces one worker claims at a time")
    lease_secs: float = Field(
        15, ge=1, le=300, description="a writer not heard of for so long is taken over by another"
    )
    shutdown_timeout_secs: float = Field(30, gt=0, description="time to finish and leave after SIGTERM")
    kernels: Annotated[Literal["numba", "python"], Lowercase] = Field(
        "numba",
        description="the hot path: compiled, or the same in plain Python, some thirty times slower, to debug",
    )
    instance_id: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        max_length=200,
        description="name of this process in logs and health; default: the host name",
    )


class Kafka(Section):
    """Where spans come from."""

    brokers: str = Field("localhost:9092", min_length=1, description="host:port list, or `embedded`")
    input_topic: str = Field("otel-traces-raw", min_length=1, description="topic with OTLP records")
    dead_letter_topic: str | None = Field(
        None, description="undecodable records go here; default: `<input_topic>.dlq`"
    )
    consumer_group: str = Field(
        "tail-sampling-selector", min_length=1, description="shared by the whole fleet"
    )
    group_instance_id: str | None = Field(
        None, description="static membership: a restart keeps its partitions"
    )
    auto_offset_reset: Annotated[Literal["latest", "earliest"], Lowercase] = Field(
        "latest", description="where a group without committed offsets starts"
    )
    session_timeout_ms: int = Field(
        30_000, ge=1000, description="silence after which the broker gives up on us"
    )
    batch_max_records: int = Field(10_000, ge=1, le=100_000, description="records taken in one batch")
    batch_max_bytes: int = Field(4 << 20, ge=1 << 10, le=1 << 30, description="bytes taken in one batch")
    commit_interval_secs: float = Field(1, gt=0, le=60, description="how often offsets are committed")
    partition_stall_secs: float = Field(
        300, gt=0, description="a partition nobody reads for so long no longer holds the clock"
    )
    security_protocol: Annotated[Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"], Lowercase] = (
        Field("plaintext", description="how to talk to the brokers")
    )
    sasl_mechanism: str | None = Field(None, description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, …")
    sasl_username: str | None = Field(None, description="SASL user")
    sasl_password: SecretStr | None = Field(None, description="SASL password")
    ssl_ca_location: str | None = Field(None, description="file with the CA certificate")
    ssl_certificate_location: str | None = Field(None, description="file with the client certificate")
    ssl_key_location: str | None = Field(None, description="file with the client key")
    ssl_key_password: SecretStr | None = Field(None, description="password of the client key")

    @property
    def dlq(self) -> str:
        return self.dead_letter_topic or f"{self.input_topic}.dlq"

    def client_properties(self) -> dict[str, str]:
        """What every librdkafka client needs to reach the brokers and to be let in."""
        given = {
            "bootstrap.servers": self.brokers,
            "security.protocol": self.security_protocol,
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.sasl_username,
            "sasl.password": _reveal(self.sasl_password),
            "ssl.ca.location": self.ssl_ca_location,
            "ssl.certificate.location": self.ssl_certificate_location,
            "ssl.key.location": self.ssl_key_location,
            "ssl.key.password": _reveal(self.ssl_key_password),
        }
        return {name: value for name, value in given.items() if value is not None}


class Redis(Section):
    """Where traces wait."""

    url: str = Field("redis://localhost:6379", description="redis://, rediss://, unix://, or `embedded`")
    password: SecretStr | None = Field(None, description="wins over the one in the URL")
    db: int | None = Field(None, ge=0, description="wins over the one in the URL")
    connection_timeout_secs: float = Field(5, gt=0, le=300, description="for connecting and for each answer")
    trace_ttl_secs: float = Field(
        3600, ge=1, description="how long a verdict is remembered after it landed, for late spans"
    )
    cluster_enabled: bool = Field(False, description="the URL names a node of a Redis Cluster")
    shards: int = Field(
        8, ge=1, le=1024, description="parts the keys are cut into; the same on the whole fleet"
    )
    compression: Annotated[Literal["zstd", "lz4", "none"], Lowercase] = Field(
        "zstd", description="of pending spans; zstd learns a dictionary from them, and uses lz4 until then"
    )
    max_memory_bytes: int = Field(
        0, ge=0, description="Redis memory above which consumers pause; 0 = 80 % of the server's own limit"
    )


class Sampling(Section):
    """What is kept without a rule."""

    always_sample_errors: bool = Field(True, description="keep traces with a span of status ERROR")
    error_sample_rate: Rate = Field(1.0, description="share of the traces with errors that is kept")
    sample_latency: bool = Field(True, description="keep slow traces")
    latency_threshold_ms: float = Field(5000, ge=0, description="a trace longer than this is slow")
    latency_sample_rate: Rate = Field(1.0, description="share of the slow traces that is kept")
    normal_sample_rate: Rate = Field(0.0, description="share of all other traces that is kept")


class ForceSampling(Section):
    """Live rules set through the admin API."""

    enabled: bool = Field(True, description="apply force rules")
    poll_interval_secs: float = Field(5, gt=0, le=3600, description="how often rules are read again")
    use_pubsub: bool = Field(True, description="also listen for changes, so that they act at once")
    pubsub_channel: str = Field("tss:force_rules:updates", min_length=1, description="channel of the changes")


class Iceberg(Section):
    """The production catalog and object store (`storage_type=iceberg`)."""

    catalog_uri: str = Field(
        "http://lakekeeper:8181/catalog", description="Iceberg REST catalog, without /v1"
    )
    catalog_token: SecretStr | None = Field(None, description="bearer token for the catalog")
    warehouse: str = Field("traces", description="warehouse name in the catalog")
    namespace: str = Field("default", min_length=1, description="namespace of both tables")
    table_name: str = Field("spans", min_length=1, description="table of the kept spans")
    decisions_table_name: str = Field("decisions", min_length=1, description="table of all decisions")
    project_id: str | None = Field(None, description="sent as x-project-id when set (Lakekeeper)")
    s3_endpoint: str | None = Field(None, description="wins over the endpoint the catalog sends; unset = AWS")
    s3_access_key_id: str | None = Field(None, description="S3 key id")
    s3_secret_access_key: SecretStr | None = Field(None, description="S3 secret key")
    s3_session_token: SecretStr | None = Field(None, description="S3 session token")
    s3_region: str = Field("us-east-1", min_length=1, description="S3 region")
    s3_path_style: bool = Field(True, description="bucket in the path instead of the host name")

    def catalog_properties(self) -> dict[str, str]:
        """What pyiceberg's REST catalog and its file access need.

        With our own keys the catalog is asked to hand out none: Lakekeeper would otherwise answer with remote
        signing, which forces another file layer and cannot delete. Without keys its credentials are welcome.
        """
        given = {
            "type": "rest",
            "uri": self.catalog_uri,
            "warehouse": self.warehouse,
            "token": _reveal(self.catalog_token),
            "header.x-project-id": self.project_id,
            "header.X-Iceberg-Access-Delegation": "client-managed" if self.s3_access_key_id else None,
            "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
            "s3.endpoint": self.s3_endpoint,
            "s3.access-key-id": self.s3_access_key_id,
            "s3.secret-access-key": _reveal(self.s3_secret_access_key),
            "s3.session-token": _reveal(self.s3_session_token),
            "s3.region": self.s3_region,
            "s3.force-virtual-addressing": None if self.s3_path_style else "true",
        }
        return {name: value for name, value in given.items() if value is not None}


class Local(Section):
    """The embedded catalog (`storage_type=local`)."""

    path: Path = Field(Path("data"), description="folder of the SQLite catalog and the files")


class Storage(Section):
    """Where kept spans and decisions go."""

    storage_type: Annotated[Literal["iceberg", "local"], Lowercase] = Field(
        "local", description="REST catalog + S3, or SQLite + files"
    )
    iceberg: Iceberg = Field(default_factory=Iceberg)
    local: Local = Field(default_factory=Local)
    flush_interval_secs: float = Field(
        5, gt=0, le=300, description="longest wait of a decision for its commit"
    )
    flush_max_spans: int = Field(
        50_000, ge=1, le=5_000_000, description="kept spans after which a worker commits"
    )
    keep_snapshots: int = Field(
        20, ge=2, le=1000, description="snapshots kept; each makes every append slower"
    )
    request_timeout_secs: float = Field(30, gt=0, le=600, description="for one request to the catalog")


class Api(Section):
    """Who may use the admin routes, and how much a query may take."""

    token: SecretStr | None = Field(None, description="bearer token for /admin")
    allow_anonymous: bool = Field(
        False, description="serve /admin without a token although the address is not loopback"
    )
    max_body_bytes: int = Field(1 << 20, ge=1 << 10, le=64 << 20, description="largest request body")
    query_timeout_secs: float = Field(30, gt=0, le=600, description="a query is cancelled after this")
    query_max_rows: int = Field(10_000, ge=1, le=1_000_000, description="rows in one answer")
    query_memory_bytes: int = Field(256 << 20, ge=16 << 20, description="memory pool shared by all queries")
    query_concurrency: int = Field(2, ge=1, le=64, description="queries at once; more wait their turn")


class Observability(Section):
    """Logs, metrics, health."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Lowercase] = Field(
        "info", description="least severe line shown"
    )
    json_logging: bool = Field(False, description="one JSON object a line")
    metrics_addr: str = Field("0.0.0.0", description="address of /metrics")  # noqa: S104
    metrics_port: Port = Field(9090, description="port of /metrics; 0 = any free one")
    health_addr: str = Field("0.0.0.0", description="address of the health and admin API")  # noqa: S104
    health_port: Port = Field(8080, description="port of the health and admin API; 0 = any free one")


class Config(BaseSettings):
    """All settings of one process. Build it with `load`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        case_sensitive=False,
        extra="forbid",
        frozen=True,
    )

    app: App = Field(default_factory=App)
    kafka: Kafka = Field(default_factory=Kafka)
    redis: Redis = Field(default_factory=Redis)
    sampling: Sampling = Field(default_factory=Sampling)
    force_sampling: ForceSampling = Field(default_factory=ForceSampling)
    storage: Storage = Field(default_factory=Storage)
    api: Api = Field(default_factory=Api)
    observability: Observability = Field(default_factory=Observability)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """A Config made by hand reads its arguments only; the process environment comes in through `load`."""
        return (init_settings,)
