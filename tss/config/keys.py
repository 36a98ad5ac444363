"""Every setting by its key, and what became of the keys of the system before this one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from tss.config.models import PREFIX, Config, Section

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One key that may be set."""

    key: Key
    field: FieldInfo

    @property
    def name(self) -> str:
        return ".".join(self.key)

    @property
    def variable(self) -> str:
        return PREFIX + "__".join(self.key).upper()

    @property
    def secret(self) -> bool:
        return SecretStr in (self.field.annotation, *get_args(self.field.annotation))

    def value(self, config: Config) -> object:
        value: Any = config
        for name in self.key:
            value = getattr(value, name)
        return value

    def shown(self, value: object) -> str:
        """`value` for people: secrets and passwords inside URLs are never in it."""
        if value is None:
            return ""
        if self.secret:
            return "***"
        return _PASSWORD_IN_URL.sub("***", str(value).lower() if isinstance(value, bool) else str(value))


_PASSWORD_IN_URL = re.compile(r"(?<=://)\S*(?=@)|(?<=[?&]password=)[^&\s]*")


def _settings(model: type[BaseModel], above: Key = ()) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _settings(field.annotation, (*above, name))
        else:
            yield Setting((*above, name), field)


SETTINGS = {setting.key: setting for setting in _settings(Config)}
SECTIONS = {key[:depth] for key in SETTINGS for depth in range(len(key))}

# Names under which the system before this one knew a setting that is still here.
RENAMED: dict[Key, Key] = {
    ("kafka", "ssl_ca_path"): ("kafka", "ssl_ca_location"),
    ("kafka", "ssl_cert_path"): ("kafka", "ssl_certificate_location"),
    ("kafka", "ssl_key_path"): ("kafka", "ssl_key_location"),
}

# Settings of that system, and whole sections, that mean nothing here: what took their place.
REPLACED: dict[Key, str] = {
    ("app", "graceful_shutdown"): "a shutdown is always graceful, for at most app.shutdown_timeout_secs",
    ("kafka", "consumer_threads"): "start more `tss run` processes, they share kafka.consumer_group",
    (
        "kafka",
        "enable_auto_commit",
    ): "offsets are committed every kafka.commit_interval_secs, once Redis has the spans",
    ("redis", "pool_size"): "connections are opened as they are needed",
    ("redis", "cluster_nodes"): "let redis.url name one node, the others are found through it",
    ("datadog",): "kept spans go to the Iceberg table, see storage.storage_type",
    ("span_compression",): "spans are stored as they came; the table itself is compressed",
    ("storage", "iceberg", "inactivity_threshold_ms"): "app.inactivity_timeout_secs",
    ("observability", "enable_prometheus"): "metrics are always served, on observability.metrics_port",
    ("observability", "enable_health_check"): "health is always served, on observability.health_port",
    ("observability", "service_name"): "log lines carry app.instance_id",
    (
        "oidc",
    ): "the admin routes ask for the bearer token api.token; put a proxy before them for single sign-on",
}
