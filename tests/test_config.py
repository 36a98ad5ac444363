"""What operators write, and what they are told when it cannot work."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from tss.config import Config, Kafka, child_environment, describe, load, table
from tss.config.keys import RENAMED, REPLACED, SECTIONS, SETTINGS
from tss.errors import ConfigError

WriteYaml = Callable[[str], dict[str, str]]


@pytest.fixture
def yaml_file(tmp_path: Path) -> WriteYaml:
    """Writes the text to a file and gives the environment that names it."""

    def write(text: str) -> dict[str, str]:
        (tmp_path / "tss.yaml").write_text(text, encoding="utf-8")
        return {"TSS_CONFIG": str(tmp_path / "tss.yaml")}

    return write


def refusal(environ: dict[str, str]) -> list[str]:
    """One line per fault, without the head line."""
    with pytest.raises(ConfigError) as caught:
        load(environ)
    assert caught.value.exit_code == 78
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_nothing_set_means_the_defaults() -> None:
    """An empty environment is a working configuration."""
    assert load({}) == Config()


def test_only_the_given_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process environment says reaches neither `load` nor a Config made by hand."""
    monkeypatch.setenv("TSS__KAFKA__BROKERS", "elsewhere:1")
    assert load({}).kafka.brokers == Config().kafka.brokers == "localhost:9092"


def test_a_child_process_is_told_no_settings() -> None:
    """They hold secrets, in whatever case they are written; it still finds this package, and all else is passed on."""
    given = {"TSS__REDIS__PASSWORD": "a", "tss__redis__username": "b", "PYTHONPATH": "/else", "HOME": "/root"}
    package = Path(__file__).parent.parent
    assert child_environment(given) == {"HOME": "/root", "PYTHONPATH": str(package)}


PLAN = {
    "TSS__KAFKA__BROKERS": "kafka:29092",
    "TSS__REDIS__URL": "redis://redis:6379",
    "TSS__STORAGE__STORAGE_TYPE": "iceberg",
    "TSS__STORAGE__ICEBERG__CATALOG_URI": "http://lakekeeper:8181/catalog",
    "TSS__STORAGE__ICEBERG__WAREHOUSE": "traces",
    "TSS__STORAGE__ICEBERG__NAMESPACE": "default",
    "TSS__STORAGE__ICEBERG__TABLE_NAME": "spans",
    "TSS__STORAGE__ICEBERG__PROJECT_ID": "00000000-0000-0000-0000-000000000000",
    "TSS__STORAGE__ICEBERG__S3_ENDPOINT": "http://minio:9000",
    "TSS__STORAGE__ICEBERG__S3_ACCESS_KEY_ID": "minioadmin",
    "TSS__STORAGE__ICEBERG__S3_SECRET_ACCESS_KEY": "minioadmin123",
    "TSS__STORAGE__ICEBERG__S3_REGION": "us-east-1",
    "TSS__STORAGE__ICEBERG__S3_PATH_STYLE": "true",
}


def test_environment_of_the_compose_deployment_is_honoured() -> None:
    """Every variable that deployments of the demo plan set arrives where it is used."""
    config = load(PLAN)
    iceberg = config.storage.iceberg
    assert (config.kafka.brokers, config.redis.url) == ("kafka:29092", "redis://redis:6379")
    assert config.storage.storage_type == "iceberg"
    assert iceberg.s3_secret_access_key == SecretStr("minioadmin123")
    properties = iceberg.catalog_properties()
    assert properties["uri"] == "http://lakekeeper:8181/catalog"
    assert properties["header.x-project-id"] == "00000000-0000-0000-0000-000000000000"
    assert properties["header.X-Iceberg-Access-Delegation"] == "client-managed"
    assert properties["s3.secret-access-key"] == "minioadmin123"
    assert "token" not in properties
    assert "s3.force-virtual-addressing" not in properties


def test_environment_wins_over_file_wins_over_default(yaml_file: WriteYaml) -> None:
    """Each setting comes from the strongest place that has it, not section by section."""
    environ = yaml_file(
        "app: {evaluation_workers: 2, lease_secs: 20}\nstorage: {iceberg: {namespace: a, warehouse: w}}\n"
    )
    config = load({**environ, "TSS__APP__LEASE_SECS": "30", "TSS__STORAGE__ICEBERG__NAMESPACE": "b"})
    assert (config.app.evaluation_workers, config.app.lease_secs, config.app.inactivity_timeout_secs) == (
        2,
        30,
        60,
    )
    assert (config.storage.iceberg.namespace, config.storage.iceberg.warehouse) == ("b", "w")


@pytest.mark.parametrize(
    ("variable", "text", "read"),
    [
        ("tss__app__evaluation_workers", "8", lambda c: c.app.evaluation_workers == 8),
        ("TSS__APP__MAX_BUFFER_SPANS", "1_000", lambda c: c.app.max_buffer_spans == 1000),
        ("TSS__APP__ROOT_WAIT_SECS", "2.5", lambda c: c.app.root_wait_secs == 2.5),
        ("TSS__APP__ROOT_WAIT_SECS", "", lambda c: c.app.root_wait_secs is None),
        ("TSS__REDIS__PASSWORD", "", lambda c: c.redis.password is None),
        ("TSS__REDIS__PASSWORD", "0123", lambda c: c.redis.password == SecretStr("0123")),
        ("TSS__OBSERVABILITY__LOG_LEVEL", "WARNING", lambda c: c.observability.log_level == "warning"),
        ("TSS__OBSERVABILITY__JSON_LOGGING", "yes", lambda c: c.observability.json_logging is True),
        ("TSS__KAFKA__SSL_CA_PATH", "", lambda c: c.kafka.ssl_ca_location is None),
        ("TSS__STORAGE__LOCAL__PATH", "/var/tss", lambda c: c.storage.local.path == Path("/var/tss")),
    ],
)
def test_variables_are_read_as_people_write_them(
    variable: str, text: str, read: Callable[[Config], bool]
) -> None:
    """Case of names and of choices does not matter, and an empty variable is one that is not set."""
    assert read(load({variable: text}))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", lambda c: c == Config()),
        ("# nothing yet\n", lambda c: c == Config()),
        ("kafka:\n", lambda c: c == Config()),
        ("app: {root_wait_secs: null}\n", lambda c: c.app.root_wait_secs is None),
        ("redis: {password: 0123}\n", lambda c: c.redis.password == SecretStr("0123")),
        ("observability: {json_logging: on}\n", lambda c: c.observability.json_logging is True),
        ("x: &a\n", None),
    ],
)
def test_files_are_read_as_people_write_them(
    yaml_file: WriteYaml, text: str, read: Callable[[Config], bool] | None
) -> None:
    """Empty files and sections are fine, and a value is the text one sees."""
    if read is None:
        assert len(refusal(yaml_file(text))) == 1
    else:
        assert read(load(yaml_file(text)))


def test_all_faults_are_told_together(yaml_file: WriteYaml) -> None:
    """One attempt shows every fault of file, environment, values and combinations, each on its line."""
    environ = yaml_file("sampling:\n  error_sample_rate: 1.5\nredis:\n  pasword: hunter2\n")
    lines = refusal(
        {
            **environ,
            "TSS__APP__EVALUATION_WORKERS": "many",
            "TSS__KAFKA__SASL_USERNAME": "reader",
            "TSS__KAFKA__INPUT_TOPCI": "spans",
        }
    )
    file = environ["TSS_CONFIG"]
    assert lines == [
        f"redis.pasword ({file}:4): is unknown; the nearest known setting is redis.password (TSS__REDIS__PASSWORD)",
        "kafka.input_topci (TSS__KAFKA__INPUT_TOPCI): is unknown; the nearest known setting is kafka.input_topic (TSS__KAFKA__INPUT_TOPIC)",
        "app.evaluation_workers (TSS__APP__EVALUATION_WORKERS): saw 'many'; must be a whole number (default: 4)",
        f"sampling.error_sample_rate ({file}:2): saw '1.5'; must be at most 1 (default: 1.0)",
        "kafka.sasl_mechanism (TSS__KAFKA__SASL_MECHANISM): must be set for kafka.sasl_username to be used, such as SCRAM-SHA-512",
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("APP__EVALUATION_WORKERS", "0", "at least 1"),
        ("APP__EVALUATION_WORKERS", "65", "at most 64"),
        ("APP__EVALUATION_WORKERS", "1.5", "a whole number"),
        ("APP__INACTIVITY_TIMEOUT_SECS", "0", "more than 0"),
        ("APP__INACTIVITY_TIMEOUT_SECS", "nan", "a number"),
        ("APP__INACTIVITY_TIMEOUT_SECS", "inf", "a number"),
        ("APP__INSTANCE_ID", "x" * 201, "at most 200 characters long"),
        ("KAFKA__AUTO_OFFSET_RESET", "none", "'latest' or 'earliest'"),
        ("KAFKA__BATCH_MAX_BYTES", str(1 << 40), "at most 1073741824"),
        ("OBSERVABILITY__JSON_LOGGING", "maybe", "true or false"),
        ("STORAGE__STORAGE_TYPE", "memory", "'iceberg' or 'local'"),
    ],
)
def test_a_refused_value_is_shown_with_what_would_do(name: str, text: str, told: str) -> None:
    """A fault names the variable, the value seen and the values that would be taken."""
    (line,) = refusal({f"TSS__{name}": text})
    assert f"(TSS__{name})" in line
    assert f"saw {text!r}" in line
    assert f"must be {told} (default: " in line


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("TSS__FOO", "is unknown; the nearest known setting is"),
        ("TSS__", "is unknown; the nearest known setting is"),
        ("TSS__REDIS__URI", "redis.url (TSS__REDIS__URL)"),
        (
            "TSS__SAMPLING__LATENCY_TRESHOLD_MS",
            "sampling.latency_threshold_ms (TSS__SAMPLING__LATENCY_THRESHOLD_MS)",
        ),
        ("TSS__STORAGE__ICEBERG__S3_ACCES_KEY", "storage.iceberg.s3_access_key_id"),
        ("TSS__APP__LEASE_SECS__X", "app.lease_secs"),
        ("TSS__KAFKA__BROKERS_FILE", "kafka.brokers (TSS__KAFKA__BROKERS)"),
        (
            "TSS__STORAGE__ICEBERG",
            "is a section and takes no value; set its keys, such as storage.iceberg.catalog_uri",
        ),
        ("TSS_KAFKA__BROKERS", "write it with two underscores: TSS__KAFKA__BROKERS"),
        ("TSS__DATADOG__API_KEY", "has no meaning here; instead: kept spans go to the Iceberg table"),
        ("TSS__KAFKA__CONSUMER_THREADS", "start more `tss run` processes"),
    ],
)
def test_unknown_variables_are_refused_with_a_way_out(variable: str, told: str) -> None:
    """No variable is ignored: the nearest setting, or what took its place, is named; its value is not shown."""
    (line,) = refusal({variable: "s3cr3t"})
    assert told in line
    assert f"({variable})" in line
    assert "s3cr3t" not in line


@pytest.mark.parametrize("variable", ["TSS_CONFIG_DIR", "TSS_TEST_STACK", "TSSX", "PATH", "OTEL_TSS__X"])
def test_other_variables_are_left_alone(variable: str) -> None:
    """Only names under the prefix are ours to refuse."""
    assert load({variable: "1"}) == Config()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("app: {lease_secs: [1]}", "app.lease_secs ({file}:1): takes one value, not a list or a section"),
        ("redis:\n  url: {a: b}", "redis.url ({file}:2): takes one value, not a list or a section"),
        ("kafka: 3", "kafka ({file}:1): is a section and takes no value"),
        ("kafka: [a]", "kafka ({file}:1): is a section and takes no value"),
        ("datadog:\n  api_key: x\n  batch_size: 1\n", "datadog ({file}:1): has no meaning here"),
        ("x: &loop\n  y: *loop\n", "x ({file}:1): is unknown"),
        ("app:\n  lease_secs: 5\n  lease_secs: 6\n", "app.lease_secs ({file}:3): is also given by {file}:2"),
        ("- a\n", "TSS_CONFIG ({file}:1): must hold sections"),
        ("kafka: {brokers: a\n", "TSS_CONFIG ({file}:2): is not YAML"),
        ("a: b\n---\nc: d\n", "TSS_CONFIG ({file}:2): is not YAML"),
        ("\tapp: 1\n", "TSS_CONFIG ({file}:1): is not YAML"),
        ("app: \x07\n", "TSS_CONFIG ({file}): is not YAML"),
    ],
)
def test_faults_in_a_file_name_its_line(yaml_file: WriteYaml, text: str, told: str) -> None:
    """Whatever a file holds, the answer is a line of it and what is wrong there."""
    environ = yaml_file(text)
    (line,) = refusal(environ)
    assert line.startswith(told.replace("{file}", environ["TSS_CONFIG"]))


def test_a_file_that_cannot_be_read_is_a_fault_beside_others(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no text are named, and variables are still checked."""
    (tmp_path / "bytes").write_bytes(b"app: \xff")
    for name, told in [
        ("missing", "cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("bytes", "not UTF-8"),
    ]:
        file = str(tmp_path / name)
        first, second = refusal({"TSS_CONFIG": file, "TSS__APP__LEASE_SECS": "x"})
        assert first.startswith(f"TSS_CONFIG ({file})")
        assert told in first
        assert second.startswith("app.lease_secs")


def test_a_secret_can_come_from_a_file(tmp_path: Path, yaml_file: WriteYaml) -> None:
    """`…_FILE` works for every secret, in the environment and in the file, without the final line break."""
    (tmp_path / "secret").write_text(" hush\n", encoding="utf-8")
    secrets = [setting for setting in SETTINGS.values() if setting.secret]
    assert len(secrets) == 7
    for setting in secrets:
        name = f"{setting.variable}_FILE"
        config = load({name: str(tmp_path / "secret"), "TSS__STORAGE__ICEBERG__S3_ACCESS_KEY_ID": ""})
        assert setting.value(config) == SecretStr(" hush")
    config = load(yaml_file(f"redis:\n  password_file: {tmp_path / 'secret'}\n"))
    assert config.redis.password == SecretStr(" hush")


def test_secret_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """A missing or empty secret file, or a secret given twice, is a fault that does not show the secret."""
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    (missing,) = refusal({"TSS__API__TOKEN_FILE": str(tmp_path / "none")})
    assert missing.startswith(
        f"api.token_file (TSS__API__TOKEN_FILE): saw '{tmp_path / 'none'}'; cannot be read"
    )
    (empty,) = refusal({"TSS__API__TOKEN_FILE": str(tmp_path / "empty")})
    assert "is empty; put the secret into it" in empty
    (tmp_path / "full").write_text("hush", encoding="utf-8")
    (twice,) = refusal({"TSS__API__TOKEN": "hush", "TSS__API__TOKEN_FILE": str(tmp_path / "full")})
    assert twice == "api.token (TSS__API__TOKEN_FILE): is also given by TSS__API__TOKEN; keep one of them"


SASL = {"KAFKA__SECURITY_PROTOCOL": "sasl_ssl", "KAFKA__SASL_MECHANISM": "PLAIN"}


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"APP__ROOT_WAIT_SECS": "61"}, "app.root_wait_secs"),
        ({"APP__MAX_TRACE_DURATION_SECS": "59"}, "app.max_trace_duration_secs"),
        ({"KAFKA__SESSION_TIMEOUT_MS": "300001"}, "kafka.session_timeout_ms"),
        ({"KAFKA__SESSION_TIMEOUT_MS": "1000"}, "kafka.commit_interval_secs"),
        ({"KAFKA__DEAD_LETTER_TOPIC": "otel-traces-raw"}, "kafka.dead_letter_topic"),
        ({"KAFKA__BROKERS": "embedded", "KAFKA__SECURITY_PROTOCOL": "ssl"}, "kafka.security_protocol"),
        ({"KAFKA__SECURITY_PROTOCOL": "sasl_ssl"}, "kafka.sasl_mechanism"),
        ({"KAFKA__SASL_MECHANISM": "OAUTHBEARER"}, "kafka.security_protocol"),
        ({**SASL, "KAFKA__SASL_PASSWORD": "x"}, "kafka.sasl_username"),
        ({**SASL, "KAFKA__SASL_USERNAME": "x"}, "kafka.sasl_password"),
        ({"KAFKA__SASL_USERNAME": "x"}, "kafka.sasl_mechanism"),
        ({"KAFKA__SSL_CA_LOCATION": __file__}, "kafka.security_protocol"),
        ({"KAFKA__SECURITY_PROTOCOL": "ssl", "KAFKA__SSL_CA_LOCATION": "/none"}, "kafka.ssl_ca_location"),
        (
            {"KAFKA__SECURITY_PROTOCOL": "ssl", "KAFKA__SSL_CERTIFICATE_LOCATION": __file__},
            "kafka.ssl_key_location",
        ),
        (
            {"KAFKA__SECURITY_PROTOCOL": "ssl", "KAFKA__SSL_KEY_PATH": __file__},
            "kafka.ssl_certificate_location",
        ),
        ({"REDIS__URL": "localhost:6379"}, "redis.url"),
        ({"REDIS__URL": "redis://u:se/cret@h"}, "redis.url"),
        ({"REDIS__URL": "redis://h:port"}, "redis.url"),
        ({"REDIS__URL": "redis://h/traces"}, "redis.url"),
        ({"REDIS__URL": "embedded", "REDIS__CLUSTER_ENABLED": "true"}, "redis.cluster_enabled"),
        ({"REDIS__DB": "1", "REDIS__CLUSTER_ENABLED": "true"}, "redis.db"),
        ({"STORAGE__ICEBERG__TABLE_NAME": "decisions"}, "storage.iceberg.decisions_table_name"),
        (
            {"STORAGE__STORAGE_TYPE": "iceberg", "STORAGE__ICEBERG__CATALOG_URI": "lakekeeper:8181"},
            "storage.iceberg.catalog_uri",
        ),
        (
            {"STORAGE__STORAGE_TYPE": "iceberg", "STORAGE__ICEBERG__CATALOG_URI": "http://h/catalog/v1/"},
            "storage.iceberg.catalog_uri",
        ),
        (
            {"STORAGE__STORAGE_TYPE": "iceberg", "STORAGE__ICEBERG__S3_ENDPOINT": "minio:9000"},
            "storage.iceberg.s3_endpoint",
        ),
        (
            {"STORAGE__STORAGE_TYPE": "iceberg", "STORAGE__ICEBERG__S3_ACCESS_KEY_ID": "k"},
            "storage.iceberg.s3_secret_access_key",
        ),
        (
            {"STORAGE__STORAGE_TYPE": "iceberg", "STORAGE__ICEBERG__S3_SECRET_ACCESS_KEY": "s"},
            "storage.iceberg.s3_access_key_id",
        ),
        (
            {"STORAGE__STORAGE_TYPE": "iceberg", "STORAGE__ICEBERG__S3_SESSION_TOKEN": "s"},
            "storage.iceberg.s3_session_token",
        ),
        ({"OBSERVABILITY__METRICS_PORT": "8080"}, "observability.metrics_port"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(given: dict[str, str], setting: str) -> None:
    """Each clash is one fault at the setting to change."""
    (line,) = refusal({f"TSS__{name}": text for name, text in given.items()})
    assert line.startswith(f"{setting} (")


def test_advice_on_old_settings_names_settings_there_are() -> None:
    """Old names are not in use for anything else, and what is said of them leads somewhere."""
    names = {setting.name for setting in SETTINGS.values()}
    assert not (set(RENAMED) | set(REPLACED)) & (set(SETTINGS) | SECTIONS)
    assert set(RENAMED.values()) <= set(SETTINGS)
    for advice in REPLACED.values():
        assert set(re.findall(r"[a-z]+(?:\.[a-z_]+)+", advice)) <= names


@pytest.mark.parametrize(
    "environ",
    [
        {
            **{f"TSS__{k}": v for k, v in SASL.items()},
            "TSS__KAFKA__SASL_USERNAME": "u",
            "TSS__KAFKA__SASL_PASSWORD": "p",
        },
        {"TSS__OBSERVABILITY__METRICS_PORT": "0", "TSS__OBSERVABILITY__HEALTH_PORT": "0"},
        {
            "TSS__OBSERVABILITY__METRICS_PORT": "8080",
            "TSS__OBSERVABILITY__METRICS_ADDR": "127.0.0.1",
            "TSS__OBSERVABILITY__HEALTH_ADDR": "127.0.0.2",
        },
        {"TSS__KAFKA__BROKERS": "embedded", "TSS__REDIS__URL": "embedded"},
        {"TSS__STORAGE__ICEBERG__S3_ACCESS_KEY_ID": "unused with local storage"},
    ],
)
def test_settings_that_work_together_are_taken(environ: dict[str, str]) -> None:
    """The rules stop nothing that works."""
    load(environ)


def test_secrets_are_in_no_text(yaml_file: WriteYaml) -> None:
    """Neither a description, nor a repr, nor a refusal shows a secret or a password inside a URL."""
    environ = {
        **PLAN,
        "TSS__REDIS__URL": "redis://user:hunter2@host:6379/0?password=hunter2",
        "TSS__REDIS__PASSWORD": "hunter2",
        "TSS__API__TOKEN": "hunter2",
        "TSS__STORAGE__ICEBERG__S3_SECRET_ACCESS_KEY": "hunter2",
    }
    config = load(environ)
    shown = describe(config)
    assert "hunter2" not in shown
    assert "redis://***@host:6379/0?password=***" in shown
    assert "hunter2" not in repr(config.storage) + repr(config.api)
    for url in ("http://user:hunter2@host", "redis://user:/hunter2@host"):
        lines = refusal({**environ, "TSS__REDIS__URL": url, "TSS__APP__LEASE_SECS": "0"})
        assert len(lines) == 2
        assert "hunter2" not in "".join(lines)


def test_description_shows_every_setting_in_force() -> None:
    """The dump has a line per setting, and the default beside what was changed."""
    lines = describe(load({"TSS__APP__LEASE_SECS": "20"})).splitlines()
    assert [line.split()[0] for line in lines] == [setting.name for setting in SETTINGS.values()]
    assert [line for line in lines if "(default: " in line] == [f"{'app.lease_secs':<40} 20.0  (default: 15)"]


def test_kafka_clients_get_only_what_was_set() -> None:
    """An unset credential is not passed on as an empty one."""
    assert Kafka(brokers="a:1").client_properties() == {
        "bootstrap.servers": "a:1",
        "security.protocol": "plaintext",
    }
    kafka = Kafka(sasl_mechanism="PLAIN", sasl_username="u", sasl_password=SecretStr("p"))
    assert kafka.client_properties()["sasl.password"] == "p"


def test_the_table_has_every_setting() -> None:
    """Each setting has one row of four cells with a meaning; `python -m tss.config` prints the same."""
    rows = [line.strip("| ").split(" | ") for line in table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{setting.name}`" for setting in SETTINGS.values()]
    assert all(len(row) == 4 and row[3].strip() for row in rows)
    printed = subprocess.run([sys.executable, "-m", "tss.config"], capture_output=True, text=True, check=True)
    assert printed.stdout == table() + "\n"


def test_the_readme_shows_the_table() -> None:
    """What the README says of settings is what the code does."""
    readme = Path(__file__).parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- settings -->", "<!-- /settings -->"
    assert text.count(start) == text.count(end) == 1, f"README.md needs one table between {start} and {end}"
    between = text[text.index(start) + len(start) : text.index(end)].strip()
    assert between == table(), "put the output of `python -m tss.config` between the markers"
