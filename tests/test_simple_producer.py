"""The producer's command line: its output is a contract with its users."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData

from tss.embedded import EmbeddedKafka
from tss.simple_producer import SLOW_MS, main

pytestmark = pytest.mark.embedded

TOPIC = "otel-traces-raw"


@pytest.fixture
def brokers() -> Iterator[str]:
    with EmbeddedKafka({TOPIC: 1, "many": 8}) as kafka:
        yield kafka.brokers


def sent(brokers: str, count: int) -> list[tuple[bytes | None, str, list[Span]]]:
    """Key, service and spans of the first `count` records of the topic."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "reader", "auto.offset.reset": "error"})
    consumer.assign([TopicPartition(TOPIC, 0, OFFSET_BEGINNING)])
    records = []
    for message in consumer.consume(count, timeout=10):
        assert message.error() is None
        (resource,) = TracesData.FromString(message.value() or b"").resource_spans
        service = resource.resource.attributes[0].value.string_value
        records.append((message.key(), service, list(resource.scope_spans[0].spans)))
    consumer.close()
    return records


def has_error(spans: list[Span]) -> bool:
    return any(s.status.code == Status.STATUS_CODE_ERROR for s in spans)


def test_default_run_prints_the_promised_lines(brokers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without options the output is the documented one, and what was sent is what it says."""
    assert main(["--brokers", brokers]) == 0
    lines = [
        f"  [{'ERROR' if i in {0, 3, 6, 9} else 'OK'}] Trace {i} -> partition 0, offset {i}"
        for i in range(10)
    ]
    assert capsys.readouterr().out.splitlines() == [
        "=== Simple Trace Producer ===",
        "Sending traces...",
        *lines,
        "Done! Sent 10 traces (4 with errors)",
    ]
    records = sent(brokers, 10)
    assert [has_error(spans) for _, _, spans in records] == [i % 3 == 0 for i in range(10)]
    assert {(key, service, len(spans)) for key, service, spans in records} == {(None, "demo-service", 3)}
    assert len({span.trace_id for _, _, spans in records for span in spans}) == 10


def test_options_shape_the_traces(brokers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Number of traces and spans, service, errors and slow traces follow the options."""
    options = [
        "--traces",
        "4",
        "--spans",
        "5",
        "--errors-every",
        "0",
        "--slow-every",
        "2",
        "--service",
        "cart",
    ]
    assert main(["--brokers", brokers, *options]) == 0
    assert "[SLOW] Trace 2" in capsys.readouterr().out
    records = sent(brokers, 4)
    assert [(service, len(spans), has_error(spans)) for _, service, spans in records] == [
        ("cart", 5, False)
    ] * 4
    durations_ms = [
        (max(s.end_time_unix_nano for s in spans) - min(s.start_time_unix_nano for s in spans)) / 1e6
        for _, _, spans in records
    ]
    assert [d > SLOW_MS for d in durations_ms] == [True, False, True, False]


def test_a_trace_of_one_span_can_have_an_error(brokers: str) -> None:
    """The smallest trace is still a whole one."""
    assert main(["--brokers", brokers, "--traces", "1", "--spans", "1"]) == 0
    ((_, _, (span,)),) = sent(brokers, 1)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert not span.parent_span_id


def test_lines_come_in_the_order_of_the_traces(brokers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With many partitions reports arrive in any order; the lines do not."""
    assert main(["--brokers", brokers, "--topic", "many", "--traces", "300", "--rate", "1000"]) == 0
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"Trace (\d+) -> partition \d, offset \d+", out)] == list(range(300))


def test_defaults_come_from_the_environment(brokers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers and topic are those of tss itself unless an option says otherwise."""
    monkeypatch.setenv("TSS__KAFKA__BROKERS", brokers)
    monkeypatch.setenv("TSS__KAFKA__INPUT_TOPIC", TOPIC)
    assert main(["--traces", "2"]) == 0
    assert len(sent(brokers, 2)) == 2


def test_a_seed_repeats_the_traces(brokers: str) -> None:
    """The same seed gives the same ids."""
    for _ in range(2):
        assert main(["--brokers", brokers, "--traces", "2", "--seed", "7"]) == 0
    ids = [[s.span_id for s in spans] for _, _, spans in sent(brokers, 4)]
    assert ids[:2] == ids[2:]


def test_no_broker_ends_with_the_option_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no broker answers, the message names the address and the option, and the exit code is 1."""
    assert main(["--brokers", "127.0.0.1:1", "--timeout", "1"]) == 1
    captured = capsys.readouterr()
    assert "no Kafka broker answered at 127.0.0.1:1 within 1 s" in captured.err
    assert "--brokers" in captured.err
    assert "Done!" not in captured.out


def test_a_trace_too_large_names_the_option(brokers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace that does not fit into one record ends the run with the way out."""
    assert main(["--brokers", brokers, "--traces", "1", "--spans", "30000"]) == 1
    assert "use fewer --spans" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--traces", "0"], "0 is below 1"),
        (["--errors-every", "-1"], "-1 is below 0"),
        (["--rate", "0"], "0 is not a positive number"),
        (["--brokers", "embedded"], "use `tss demo`"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that cannot work is refused before anything is sent, with the value seen."""
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
