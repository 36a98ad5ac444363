"""What an end-to-end test runs on: outside parts, workers as real processes, and what a user has: curl and a producer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from tests.ports import LOOPBACK, free_port

START_SECS = 120  # on a busy machine kernels may have to be compiled first
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Parts:
    """Where Kafka, Redis, catalog and object store are, as the environment of a worker."""

    name: str
    brokers: str
    topic: str
    env: dict[str, str]
    folder: Path
    workers: list[Worker] = field(default_factory=list)

    def worker(self, **settings: object) -> Worker:
        """Starts one; `app__inactivity_timeout_secs=4` sets TSS__APP__INACTIVITY_TIMEOUT_SECS."""
        number = len(self.workers)
        env = self.env | {f"TSS__{key.upper()}": str(value) for key, value in settings.items()}
        worker = Worker(env, self.folder / f"worker-{number}.log")
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()

    def produce(self, records: Sequence[tuple[int, bytes, int | None]]) -> None:
        """(partition, value, timestamp in ms or None) in this order; returns when all are acknowledged."""
        producer = Producer({"bootstrap.servers": self.brokers, "linger.ms": 5, "log_level": 2})
        failed: list[Any] = []
        for partition, value, at_ms in records:
            stamp: dict[str, Any] = {} if at_ms is None else {"timestamp": at_ms}
            producer.produce(
                self.topic,
                value,
                partition=partition,
                on_delivery=lambda error, _: failed.append(error) if error else None,
                **stamp,
            )
            producer.poll(0)
        assert producer.flush(30) == 0
        assert not failed, failed[0]

    def dead_letters(self, wanted: int) -> list[tuple[dict[str, str], bytes]]:
        """(headers, value) of the dead-letter topic, once so many are there."""
        consumer = Consumer({"bootstrap.servers": self.brokers, "group.id": "look", "log_level": 2})
        try:
            consumer.assign([TopicPartition(f"{self.topic}.dlq", 0, 0)])
            letters: list[tuple[dict[str, str], bytes]] = []
            deadline = time.monotonic() + 20
            while len(letters) < wanted and time.monotonic() < deadline:
                message = consumer.poll(0.5)
                if message is not None and message.error() is None:
                    headers: Any = message.headers() or []
                    letters.append(({k: v.decode() for k, v in headers}, message.value() or b""))
            return letters
        finally:
            consumer.close()


class Worker:
    """`tss run` as its users run it: a process, its log, its ports."""

    def __init__(self, env: Mapping[str, str], log: Path) -> None:
        self.api_port, self.metrics_port = free_port(), free_port()
        self.log_file = log
        env = environment_with(
            {
                "TSS__OBSERVABILITY__HEALTH_ADDR": LOOPBACK,
                "TSS__OBSERVABILITY__HEALTH_PORT": str(self.api_port),
                "TSS__OBSERVABILITY__METRICS_ADDR": LOOPBACK,
                "TSS__OBSERVABILITY__METRICS_PORT": str(self.metrics_port),
                **env,
            }
        )
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tss", "run"], env=env, cwd=ROOT, stdout=out, stderr=out
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def ready(self) -> Worker:
        """Returns when /health/ready says so."""
        wait_for(lambda: self.request("GET", "/health/ready")[0] == 200, START_SECS, self._state)
        return self

    def _state(self) -> str:
        return f"exit code {self.process.poll()}, log:\n{self.log[-4000:]}"

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON body; status 0 while nothing listens."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self.api_port}{path}",
            data,
            {"Content-Type": "application/json", **(headers or {})},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, None

    def pipeline(self) -> dict[str, Any]:
        """How far it is, as /health tells it."""
        status, body = self.request("GET", "/health")
        assert status, self._state()
        found: dict[str, Any] = body["pipeline"]
        return found

    def query(self, sql: str) -> list[dict[str, Any]]:
        status, body = self.request("POST", "/admin/query", {"sql": sql})
        assert status == 200, body
        rows: list[dict[str, Any]] = body["data"]["rows"]
        return rows

    def metrics(self) -> dict[str, float]:
        """`name{labels}` → value."""
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        pairs = re.findall(r"^(tail_sampling[^ ]*) ([0-9.e+-]+|NaN)$", text, re.MULTILINE)
        return {name: float(value) for name, value in pairs}

    def kill(self) -> None:
        """kill -9."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def terminate(self, timeout_secs: float = 60) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_secs)


def environment_with(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, with these settings in place of those that it has itself."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TSS")} | dict(settings)


def total(workers: Sequence[Worker], name: str) -> float:
    """A metric summed over workers and labels."""
    return sum(v for w in workers for k, v in w.metrics().items() if k == name or k.startswith(name + "{"))


def wait_for(condition: Callable[[], bool], secs: float, state: Callable[[], object]) -> None:
    """Returns when the condition holds; after `secs` fails with what `state` says."""
    deadline = time.monotonic() + secs
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {secs} s: {state()}")
        time.sleep(0.2)


@contextmanager
def ended(parts: Parts) -> Iterator[Parts]:
    try:
        yield parts
    finally:
        parts.close()
