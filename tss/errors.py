"""What went wrong, named by what the caller does next.

TssError
├── ConfigError        the operator changes a setting; the process ends with exit code 78
├── Unavailable        an outside part does not answer: wait, then try again
│   ├── LinkLost       a Redis connection or its server's run is gone: forget what was held, start anew
│   └── Outlived       Redis may have forgotten verdicts by their age: it needs a new life before it is read on
├── Fenced             another process owns what we held: drop it, be born again under a new id
│   └── Released       another has finished what we were finishing, too
└── BadRequest         the caller of the API sent something wrong: a 4xx that says what
"""

from __future__ import annotations


class TssError(Exception):
    """Base of every error that tss raises on purpose."""


class ConfigError(TssError):
    """The configuration cannot work; the message names setting, value and fix, one fault per line."""

    exit_code = 78  # EX_CONFIG of sysexits.h


class Unavailable(TssError):
    """An outside part is down or unreachable. `part` is its name, `setting` the one that points at it."""

    def __init__(self, part: str, setting: str, detail: str) -> None:
        super().__init__(f"{part} is not usable ({setting}): {detail}")
        self.part = part
        self.setting = setting
        self.detail = detail


class LinkLost(Unavailable):
    """The connection to Redis broke, or its server is not the run it was: nothing held since can be trusted."""

    def __init__(self, detail: str) -> None:
        super().__init__("Redis", "redis.url", detail)


class Outlived(Unavailable):
    """What a partition delivers next may have been decided so long ago that its verdicts have expired."""

    def __init__(self, detail: str) -> None:
        super().__init__("Redis", "redis.trace_ttl_secs", detail)


class Fenced(TssError):
    """This writer is no longer allowed to write: its lease was taken over or the epoch changed."""


class Released(Fenced):
    """Of a claimed trace nothing is left: whoever released it has landed its sequence before."""


class BadRequest(TssError):
    """A request that cannot be served as it is; `errors` points into the body (RFC 9457 extension)."""

    def __init__(self, detail: str, *, status: int = 400, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.errors = errors or []
