"""Log lines: one of text for people, or one JSON object for machines.

What a line is about goes into `extra`, never into the message:

    log.info("Restarting worker", extra={"worker": 3, "after_secs": 1.5})

The level asked for is that of our own lines; libraries are never heard below WARNING.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from numbers import Integral
from typing import Any, TextIO

from tss.config import Observability

STANDARD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def setup(observability: Observability, instance_id: str, stream: TextIO | None = None) -> None:
    """Every log line of this process goes to `stream` (standard error). Calling it again replaces the last call."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLine(instance_id) if observability.json_logging else TextLine())
    root = logging.getLogger()
    for earlier in [h for h in root.handlers if isinstance(h.formatter, JsonLine | TextLine)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    level = logging.getLevelNamesMapping()[observability.log_level.upper()]
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("tss").setLevel(level)
    logging.captureWarnings(True)


class TextLine(logging.Formatter):
    """`2026-11-21T10:00:00.123Z INFO  message key=value`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = (f"{key}={_bare(value)}" for key, value in _fields(record).items())
        line = " ".join([_timestamp(record), f"{record.levelname:<5}", record.getMessage(), *fields])
        trace = _trace(self, record)
        return f"{line}\n{trace}" if trace else line


class JsonLine(logging.Formatter):
    """One object: timestamp, level, message, logger, instance_id, and where there are any fields and exception."""

    def __init__(self, instance_id: str) -> None:
        super().__init__()
        self.instance_id = instance_id

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "timestamp": _timestamp(record),
            "level": record.levelname,
            "message": record.getMessage(),
            "logger": record.name,
            "instance_id": self.instance_id,
        }
        if fields := _fields(record):
            line["fields"] = fields
        if trace := _trace(self, record):
            line["exception"] = trace
        return json.dumps(line, ensure_ascii=False)


def _timestamp(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: _plain(value) for key, value in vars(record).items() if key not in STANDARD_FIELDS}


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _plain(value: object) -> Any:
    """`value` as JSON can hold it; ids are bytes and read as hex."""
    match value:
        case bool() | int() | str() | None:
            return value
        case Integral():  # of numpy
            return int(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            return value.hex()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def _bare(value: Any) -> str:
    """A field for people: quoted only where it would not read as one word."""
    if isinstance(value, str) and value and value.isprintable() and not set(value) & set(" =\"'"):
        return value
    return json.dumps(value, ensure_ascii=False)
