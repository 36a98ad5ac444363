"""Log lines as people and machines read them."""

from __future__ import annotations

import enum
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tss import logs
from tss.config import Observability

Level = Literal["debug", "info", "warning", "error"]
Start = Callable[..., io.StringIO]


@pytest.fixture
def start() -> Iterator[Start]:
    """Sets logging up and gives the stream; afterwards the process logs as it did before."""
    root, own = logging.getLogger(), logging.getLogger("tss")
    before = [*root.handlers], root.level, own.level

    def setup(*, json_logging: bool = False, log_level: Level = "info") -> io.StringIO:
        stream = io.StringIO()
        logs.setup(Observability(json_logging=json_logging, log_level=log_level), "worker-1", stream)
        return stream

    yield setup
    logging.captureWarnings(False)
    root.handlers[:], level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


def test_a_text_line_keeps_the_message_word_for_word(start: Start) -> None:
    """Time in UTC with milliseconds, level, then exactly the message: leading blanks and all."""
    stream = start()
    logging.getLogger("tss").info("  Catalog URI: %s", "http://lakekeeper:8181/catalog")
    logging.getLogger("tss").warning("slow")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    Catalog URI: http://lakekeeper:8181/catalog", first
    )
    assert second.endswith("Z WARNING slow")


def test_a_json_line_carries_the_same_message(start: Start) -> None:
    """One object a line with time, level, message, logger and instance; fields only where there are any."""
    stream = start(json_logging=True)
    logging.getLogger("tss.ingest").info("Consuming from Kafka topic: %s", "größe")
    logging.getLogger("tss").error("two\nlines", extra={"trace_id": b"\x01\xff"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("timestamp"))
    assert first == {
        "level": "INFO",
        "message": "Consuming from Kafka topic: größe",
        "logger": "tss.ingest",
        "instance_id": "worker-1",
    }
    assert second["message"] == "two\nlines"
    assert second["fields"] == {"trace_id": "01ff"}


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "text", "machine"),
    [
        (3, "3", 3),
        (np.uint32(7), "7", 7),
        (0.5, "0.5", 0.5),
        (float("nan"), "nan", "nan"),
        (True, "true", True),
        (None, "null", None),
        ("plain", "plain", "plain"),
        ("http://h:1/x?y", "http://h:1/x?y", "http://h:1/x?y"),
        ("", '""', ""),
        ("two words", '"two words"', "two words"),
        ("a=b", '"a=b"', "a=b"),
        ("x\n2026 INFO forged", r'"x\n2026 INFO forged"', "x\n2026 INFO forged"),
        ("\x1b[31m", r'"\u001b[31m"', "\x1b[31m"),
        (b"\x00\x10", "0010", "0010"),
        (Path("/var/x"), "/var/x", "/var/x"),
        (Colour.RED, "Colour.RED", "Colour.RED"),
        ([1, b"\xff"], '[1, "ff"]', [1, "ff"]),
        ({"a": {2: "x"}}, '{"a": {"2": "x"}}', {"a": {"2": "x"}}),
    ],
)
def test_fields_of_any_type_are_shown(start: Start, value: object, text: str, machine: object) -> None:
    """A field never breaks a line, never forges one, and means the same in both forms."""
    stream = start()
    logging.getLogger("tss").info("done", extra={"field": value})
    assert stream.getvalue().endswith(f" done field={text}\n")
    assert stream.getvalue().count("\n") == 1
    stream = start(json_logging=True)
    logging.getLogger("tss").info("done", extra={"field": value})
    assert json.loads(stream.getvalue())["fields"] == {"field": machine}


@pytest.mark.parametrize("json_logging", [False, True])
def test_an_exception_is_kept(start: Start, json_logging: bool) -> None:
    """The traceback is in the log, in JSON inside the one line."""
    stream = start(json_logging=json_logging)
    try:
        int("the cause")
    except ValueError:
        logging.getLogger("tss").exception("It failed", extra={"part": "Redis"})
    lines = stream.getvalue().splitlines()
    trace = json.loads(lines[0])["exception"] if json_logging else "\n".join(lines[1:])
    assert trace.startswith("Traceback")
    assert trace.endswith(": 'the cause'")
    assert len(lines) == 1 or lines[0].endswith("It failed part=Redis")


@pytest.mark.parametrize(
    ("log_level", "seen"),
    [
        ("debug", ["tss debug", "tss info", "tss warning", "lib warning"]),
        ("info", ["tss info", "tss warning", "lib warning"]),
        ("warning", ["tss warning", "lib warning"]),
        ("error", []),
    ],
)
def test_the_level_is_for_our_own_lines(start: Start, log_level: Level, seen: list[str]) -> None:
    """The level asked for holds for tss; libraries speak from WARNING up and never below."""
    stream = start(log_level=log_level)
    for name, logger in [("tss", logging.getLogger("tss.sink")), ("lib", logging.getLogger("pyiceberg.io"))]:
        logger.debug("%s debug", name)
        logger.info("%s info", name)
        logger.warning("%s warning", name)
    assert [" ".join(line.split()[2:]) for line in stream.getvalue().splitlines()] == seen


def test_setting_up_twice_does_not_double_the_lines(start: Start) -> None:
    """The second call takes the place of the first."""
    first, second = start(), start()
    logging.getLogger("tss").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def run(code: str) -> Mapping[str, Any]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    line: Mapping[str, Any] = json.loads(done.stderr)
    return line


def test_lines_go_to_standard_error() -> None:
    """Standard output stays free for what a command prints, and Python's warnings become log lines."""
    head = (
        "import logging, warnings; from tss import logs; from tss.config import Observability;"
        "logs.setup(Observability(json_logging=True), 'x');"
    )
    assert run(head + "logging.getLogger('tss').info('hello')")["message"] == "hello"
    assert "old habit" in run(head + "warnings.warn('old habit')")["message"]
