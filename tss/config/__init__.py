"""Settings: environment over an optional YAML file, all faults reported together.

`TSS__SECTION__KEY` in the environment wins over `section: {key: …}` in the file that `TSS_CONFIG` names, which
wins over the default in `models`. Any secret can come from a file instead, by the same key with `_FILE` at its
end: `TSS__REDIS__PASSWORD_FILE=/run/secrets/redis`. An empty value counts as not given, so that a compose file
may pass on a variable nobody has set. A key nobody knows is a fault, never ignored: a typo in a sampling rate
must not become a default.
"""

from tss.config.models import (
    EMBEDDED,
    Api,
    App,
    Config,
    ForceSampling,
    Iceberg,
    Kafka,
    Local,
    Observability,
    Redis,
    Sampling,
    Storage,
)
from tss.config.reading import FILE_VARIABLE, child_environment, load
from tss.config.showing import describe, table

__all__ = [
    "EMBEDDED",
    "FILE_VARIABLE",
    "Api",
    "App",
    "Config",
    "ForceSampling",
    "Iceberg",
    "Kafka",
    "Local",
    "Observability",
    "Redis",
    "Sampling",
    "Storage",
    "child_environment",
    "describe",
    "load",
    "table",
]
