"""The real parts as processes on loopback: started, killed and started again, on the same ports and data.

A `Part` is one process; a `Stack` is one of each in a run folder of its own. All that is known of a stack is in
that folder (its ports, a pid file per part), so that another process can find it and end it. A pid is only
signalled while the process behind it still carries the part's marker in its command line: pids are reused.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from pyarrow.fs import S3FileSystem

from tests.ports import LOOPBACK, free_port
from tests.stack.install import HERE, Installed, cache_dir, locate, say

READY_SECS = 60  # Kafka takes 4 s on an idle machine with two cores
STOP_SECS = 20  # Kafka flushes its log; all others are gone in a second
JOIN_SECS = 60  # the nodes of a cluster take 2 s to hear of each other
POLL_SECS = 0.05  # between two looks: a part does not tell by itself that it serves, joined or ended
ANSWER_SECS = 5

S3_KEY_ID, S3_SECRET, S3_REGION = "minioadmin", "minioadmin123", "us-east-1"
BUCKET = "iceberg-warehouse"
KAFKA_CLUSTER_ID = "dHNzLXRlc3Qtc3RhY2stMQ"  # any 16 bytes in base64
METRICS_ADDRESS = "127.0.0.1:9090"  # where a worker serves its metrics by default

SMALL_JAVA = ["-XX:+UseSerialGC", "-XX:MaxMetaspaceSize=96m", "-XX:ReservedCodeCacheSize=48m"]


class StackError(Exception):
    """A part did not start or did not end; the message shows its last words."""


@dataclass
class Part:
    """One process. `start` and `kill` may be called again and again: port and data stay."""

    name: str
    port: int
    url: str
    folder: Path
    command: list[str | Path]
    ready: Callable[[], bool]
    """Whether it serves; an error means not yet."""
    marker: str
    """Part of its command line as `ps` shows it, and of no other process's."""
    env: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    """Runs before every start: what the process finds in its folder."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def pid(self) -> int | None:
        """Of the running process, whoever started it; None when it is down."""
        if self._process is not None:
            return self._process.pid if self._process.poll() is None else None
        try:
            pid = int(self._pid_file.read_text())
        except FileNotFoundError:
            return None
        # -ww: ps otherwise cuts the line at 80 characters under some terminals, and the marker with it.
        shown = subprocess.run(
            ["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True
        ).stdout
        return pid if self.marker in shown else None

    def start(self) -> None:
        """Returns when the part serves; does nothing when it is up."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """`start` without the wait."""
        if self.pid is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prepare()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is not for the parts
            )
        self._pid_file.write_text(str(self._process.pid))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECS
        while not self.serves():
            if self.pid is None:
                raise StackError(f"{self.name} ended while starting. {self._last_words()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} does not serve after {READY_SECS} s. {self._last_words()}")
            time.sleep(POLL_SECS)

    def serves(self) -> bool:
        try:
            return self.pid is not None and self.ready()
        except (OSError, KafkaException, redis.RedisError):
            return False

    def kill(self) -> None:
        """kill -9; returns when the process is gone and its port is free."""
        self._signal(signal.SIGKILL)
        self._wait_gone()

    def stop(self) -> None:
        """SIGTERM, after `STOP_SECS` SIGKILL; returns when the process is gone and its port is free."""
        self.ask_to_stop()
        try:
            self._wait_gone()
        except StackError:
            self.kill()

    def ask_to_stop(self) -> None:
        """SIGTERM without the wait."""
        self._signal(signal.SIGTERM)

    def restart(self) -> None:
        self.stop()
        self.start()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Killed for the length of the block, serving again after it, whatever happens in it."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    def _signal(self, number: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            os.kill(pid, number)

    def _wait_gone(self) -> None:
        if not self._pid_file.exists():
            return  # never started, or ended before
        deadline = time.monotonic() + STOP_SECS
        while self.pid is not None or not _port_is_free(self.port):
            if time.monotonic() > deadline:
                raise StackError(
                    f"{self.name} does not end, or port {self.port} is taken after {STOP_SECS} s"
                )
            time.sleep(POLL_SECS)
        self._process = None
        self._pid_file.unlink(missing_ok=True)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"The end of {self.log}:", *lines[-15:]])


class Stack:
    """One of each part. `Stack.new()` and then `up()`; from another process `Stack.known()`."""

    def __init__(self, folder: Path) -> None:
        """The stack whose state is in `folder`."""
        installed = locate()
        state = json.loads((folder / "state.json").read_text())
        ports: dict[str, int] = state["ports"]
        self.folder = folder
        self.checkout: str = state["checkout"]
        self.owner: int | None = state["owner"]
        self.telemetrygen = installed.telemetrygen
        self._scrape_file = folder / "prometheus" / "targets.json"
        self.redis = redis_part(folder / "redis", ports["redis"])
        self.minio = _minio_part(folder / "minio", ports["minio"], installed.minio)
        self.catalog = _catalog_part(folder / "catalog", ports["catalog"], installed, self.minio.url)
        self.prometheus = _prometheus_part(folder / "prometheus", ports["prometheus"])
        self.kafka = _kafka_part(folder / "kafka", ports["kafka"], ports["kafka_controller"], installed)
        # Kafka last: it is the only one whose preparation takes time, and the others start meanwhile.
        self.parts = (self.redis, self.minio, self.catalog, self.prometheus, self.kafka)

    @classmethod
    def new(cls, *, owner: int | None = None) -> Stack:
        """A stack on free ports in a fresh folder. One with an `owner` is abandoned when that process is gone."""
        runs = cache_dir() / "stack" / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-", dir=runs))
        names = ("redis", "minio", "catalog", "prometheus", "kafka", "kafka_controller")
        state = {"checkout": _checkout(), "owner": owner, "ports": {name: free_port() for name in names}}
        (folder / "state.json").write_text(json.dumps(state, indent=2))
        return cls(folder)

    @classmethod
    def known(cls) -> list[Stack]:
        """The stacks of this checkout, oldest first, but for those of test runs that still go on."""
        states = sorted((cache_dir() / "stack" / "runs").glob("*/state.json"))
        stacks = [cls(state.parent) for state in states]
        return [s for s in stacks if s.checkout == _checkout() and not (s.owner and _exists(s.owner))]

    def up(self) -> None:
        """Starts all that is down; on a failure everything is ended again."""
        started = time.monotonic()
        say(f"starting {', '.join(part.name for part in self.parts)}")
        try:
            for part in self.parts:
                part.launch()
            for part in self.parts:
                part.wait_ready()
                say(f"  {part.name} serves after {time.monotonic() - started:.1f} s")
            _create_bucket(self.minio)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Ends every process and removes the folder."""
        for part in self.parts:
            part.ask_to_stop()
        for part in self.parts:
            part.stop()
        shutil.rmtree(self.folder)

    def scrape(self, *addresses: str) -> None:
        """Makes Prometheus scrape these (`host:port`) instead of the ones before; it takes them up by itself."""
        fresh = self._scrape_file.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": list(addresses)}]))
        fresh.replace(self._scrape_file)

    def environment(self) -> dict[str, str]:
        """What a worker needs to use these parts."""
        return {
            "TSS__KAFKA__BROKERS": self.kafka.url,
            "TSS__REDIS__URL": self.redis.url,
            "TSS__STORAGE__STORAGE_TYPE": "iceberg",
            "TSS__STORAGE__ICEBERG__CATALOG_URI": self.catalog.url,
            "TSS__STORAGE__ICEBERG__WAREHOUSE": "traces",
            "TSS__STORAGE__ICEBERG__NAMESPACE": "default",
            "TSS__STORAGE__ICEBERG__S3_ENDPOINT": self.minio.url,
            "TSS__STORAGE__ICEBERG__S3_ACCESS_KEY_ID": S3_KEY_ID,
            "TSS__STORAGE__ICEBERG__S3_SECRET_ACCESS_KEY": S3_SECRET,
            "TSS__STORAGE__ICEBERG__S3_REGION": S3_REGION,
            "TSS__STORAGE__ICEBERG__S3_PATH_STYLE": "true",
        }


def redis_part(folder: Path, port: int, binary: str | Path = "redis-server") -> Part:
    """A Redis or Valkey server that keeps its data as production should: append-only file, synced every second."""
    url = f"redis://{LOOPBACK}:{port}/0"

    def ready() -> bool:
        with redis.Redis.from_url(url, socket_timeout=ANSWER_SECS) as client:
            return bool(client.ping())

    options = {
        "bind": LOOPBACK,
        "port": str(port),
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "no-appendfsync-on-rewrite": "no",
        "maxmemory": "256mb",
        "maxmemory-policy": "noeviction",
    }
    command: list[str | Path] = [binary]
    for name, value in options.items():
        command += [f"--{name}", value]
    return Part("redis", port, url, folder, command, ready, marker=f"{LOOPBACK}:{port}")


CLUSTER_SLOTS = 16384


def cluster_options() -> list[str]:
    """What makes a Redis part one that can join a cluster; the last is the port that nodes talk on."""
    return ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]


def join_cluster(parts: Sequence[Part]) -> None:
    """Masters that were started with `cluster_options` last share the slots; returns when all of them say so."""
    nodes: list[Any] = [redis.Redis.from_url(part.url, socket_timeout=ANSWER_SECS) for part in parts]
    try:
        for i, node in enumerate(nodes):
            first, end = (CLUSTER_SLOTS * n // len(nodes) for n in (i, i + 1))
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            node.execute_command("CLUSTER", "MEET", LOOPBACK, parts[0].port, parts[0].command[-1])
        deadline = time.monotonic() + JOIN_SECS
        while apart := [
            part.url
            for part, node in zip(parts, nodes, strict=True)
            if b"cluster_state:ok" not in node.execute_command("CLUSTER", "INFO")
        ]:
            if time.monotonic() > deadline:
                raise StackError(f"no cluster after {JOIN_SECS} s, as {' and '.join(apart)} say")
            time.sleep(POLL_SECS)
    finally:
        for node in nodes:
            node.close()


def _minio_part(folder: Path, port: int, binary: Path) -> Part:
    url = f"http://{LOOPBACK}:{port}"
    return Part(
        "minio",
        port,
        url,
        folder,
        [binary, "server", "--address", f"{LOOPBACK}:{port}", folder / "data"],
        ready=lambda: _answers(f"{url}/minio/health/ready"),
        marker=str(folder),
        env={
            "MINIO_ROOT_USER": S3_KEY_ID,
            "MINIO_ROOT_PASSWORD": S3_SECRET,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        },
    )


def _catalog_part(folder: Path, port: int, installed: Installed, s3_endpoint: str) -> Part:
    url = f"http://{LOOPBACK}:{port}"
    properties = {
        "catalog-impl": "org.apache.iceberg.jdbc.JdbcCatalog",
        "uri": f"jdbc:sqlite:{folder / 'catalog.db'}",
        "jdbc.schema-version": "V1",
        "jdbc.strict-mode": "true",  # a table needs its namespace, as with any real catalog
        "clients": "1",  # SQLite has one writer
        "warehouse": f"s3://{BUCKET}/warehouse",
        "io-impl": "org.apache.iceberg.aws.s3.S3FileIO",
        "http-client.type": "urlconnection",
        "client.region": S3_REGION,
        "s3.endpoint": s3_endpoint,
        "s3.path-style-access": "true",
        "s3.access-key-id": S3_KEY_ID,
        "s3.secret-access-key": S3_SECRET,
    }
    return Part(
        "catalog",
        port,
        url,
        folder,
        [
            "java", "-Xms32m", "-Xmx192m", *SMALL_JAVA, "-XX:TieredStopAtLevel=1",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp", f"{installed.catalog}/classes:{installed.catalog}/libs/*",
            "CatalogServer", str(port), *(f"{key}={value}" for key, value in properties.items()),
        ],
        ready=lambda: _answers(f"{url}/v1/config"),
        marker=str(folder),
        env={"AWS_REGION": S3_REGION},
    )  # fmt: skip


def _prometheus_part(folder: Path, port: int) -> Part:
    url = f"http://{LOOPBACK}:{port}"

    def prepare() -> None:
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\n"
            "scrape_configs:\n"
            "  - job_name: tss\n"
            "    file_sd_configs: [{files: [targets.json]}]\n"
        )
        targets = folder / "targets.json"
        if not targets.exists():
            targets.write_text(json.dumps([{"targets": [METRICS_ADDRESS]}]))

    return Part(
        "prometheus",
        port,
        url,
        folder,
        [
            "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={LOOPBACK}:{port}", "--log.level=warn",
        ],
        ready=lambda: _answers(f"{url}/-/ready"),
        marker=str(folder),
        prepare=prepare,
    )  # fmt: skip


def _kafka_part(folder: Path, port: int, controller_port: int, installed: Installed) -> Part:
    address = f"{LOOPBACK}:{port}"
    properties, data = folder / "server.properties", folder / "data"
    java: list[str | Path] = [
        "java",
        f"-Dkafka.logs.dir={folder}",
        f"-Dlog4j2.configurationFile=file:{HERE / 'kafka' / 'log4j2.properties'}",
        *SMALL_JAVA,
        "-XX:MaxDirectMemorySize=96m",
        "-Xss512k",
        "-cp",
        f"{installed.kafka}/libs/*",
    ]

    def prepare() -> None:
        text = (HERE / "kafka" / "server.properties").read_text()
        filled = {"@PORT@": str(port), "@CONTROLLER_PORT@": str(controller_port), "@DATA@": str(data)}
        for name, value in filled.items():
            text = text.replace(name, value)
        properties.write_text(text)
        if not (data / "meta.properties").exists():
            done = subprocess.run(
                [*java, "kafka.tools.StorageTool", "format", "-t", KAFKA_CLUSTER_ID, "-c", properties],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise StackError(f"Kafka's data folder cannot be formatted: {done.stdout}{done.stderr}")

    def ready() -> bool:
        # The port first: librdkafka complains on stderr about every connection that is refused.
        socket.create_connection((LOOPBACK, port), ANSWER_SECS).close()
        return bool(AdminClient({"bootstrap.servers": address}).list_topics(timeout=ANSWER_SECS).brokers)

    return Part(
        "kafka",
        port,
        address,
        folder,
        [*java, "-Xms128m", "-Xmx320m", "kafka.Kafka", properties],
        ready,
        marker=str(folder),
        env={"MALLOC_ARENA_MAX": "2"},
        prepare=prepare,
    )


def s3_filesystem(minio: Part, *, key_id: str = S3_KEY_ID, secret: str = S3_SECRET) -> S3FileSystem:
    """MinIO as files: `bucket/key`."""
    return S3FileSystem(
        endpoint_override=minio.url,
        access_key=key_id,
        secret_key=secret,
        region=S3_REGION,
        allow_bucket_creation=True,
    )


def prometheus_value(prometheus: Part, query: str) -> float | None:
    """The value of the first series that the query finds; None when it finds none (yet)."""
    with urllib.request.urlopen(
        f"{prometheus.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=ANSWER_SECS
    ) as answer:
        found = json.load(answer)["data"]["result"]
    return float(found[0]["value"][1]) if found else None


def _create_bucket(minio: Part) -> None:
    s3_filesystem(minio).create_dir(BUCKET)


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=ANSWER_SECS) as answer:
        return int(answer.status) == 200


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _checkout() -> str:
    return str(HERE.parent.parent.resolve())
