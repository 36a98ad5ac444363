"""`tss demo`: a shop, a broker, a Redis, a table and a worker in one command, and an account of what was kept.

Everything is real but small: the shop's spans go through the embedded Kafka and Redis into an Iceberg table of
SQLite and files, and the account is asked of the worker's own HTTP API, as anybody would. All of it lives in one
folder, which is removed at the end unless `--keep` names it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from tss import config, logs, shop
from tss.errors import ConfigError, TssError
from tss.service import EMBEDDED_PARTITIONS as PARTITIONS
from tss.service import Service

TRACES_PER_SEC = 60.0
SLOW_SECS = 1.0
"""What the demo calls slow. Twice that, the spread and the inactivity timeout are what a viewer waits for."""

SPREAD_SECS = 1.0
INACTIVITY_SECS = 3.0
"""Longer than any pause within a trace here: at most half of SLOW_SECS more than it, and the spread."""

BASE_RATE = 0.05

UNREAD_RECORDS_MAX = 150
"""In a partition, where the embedded broker keeps 5 MiB: so many of the largest records are 3 MB."""

READY_SECS = 60.0
STALLED_SECS = 60.0
"""When neither the shop nor the worker got further for so long, something is broken."""

TRACES_MAX = 5000
"""The examples ask for the spans of every failed and slow trace in one query, which ends at 10 000 rows."""

STATUS_SECS = 10.0
EXAMPLES = {"error": 3, "latency": 3, "probabilistic": 1}

IN_WORDS = {
    "error": "a span failed",
    "latency": f"took longer than {SLOW_SECS:g} s",
    "probabilistic": f"ordinary; one of {1 / BASE_RATE:.0f} is kept to know what normal looks like",
    "force": "a force rule asked for it",
    "force_drop": "a force rule asked for that",
    "not_sampled": "ordinary: fast and without errors",
    "late_error": "an error came in late",
}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo until Ctrl-C, or once; 0 unless something did not work."""
    options = _options(argv)
    # SIGTERM ends it as Ctrl-C does: by unwinding through everything that was opened. Both are set, because a
    # shell that starts a command in the background has it ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with ExitStack() as opened:
            folder = _folder(options.keep, opened)
            _run(options, folder, opened)
    except KeyboardInterrupt:
        print("\nStopped.")
    except ConfigError as e:
        print(f"tss demo: {e}", file=sys.stderr)
        return e.exit_code
    except TssError as e:
        print(f"tss demo: {e}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, folder: Path, opened: ExitStack) -> None:
    log = opened.enter_context((folder / "tss.log").open("w", encoding="utf-8"))
    settings = config.Observability(
        metrics_addr="127.0.0.1",
        metrics_port=_port(options.metrics_port, 9090, "--metrics-port", "metrics"),
        health_addr="127.0.0.1",
        health_port=_port(options.port, 8080, "--port", "the API"),
    )
    logs.setup(settings, "demo", stream=log)
    print("Starting Kafka, Redis and a table, all inside this command ...", flush=True)
    service = Service(
        config.Config(
            app=config.App(
                evaluation_workers=1,
                evaluation_interval_secs=0.5,
                inactivity_timeout_secs=INACTIVITY_SECS,
                shutdown_timeout_secs=5,
            ),
            kafka=config.Kafka(
                brokers=config.EMBEDDED,
                auto_offset_reset="earliest",
                commit_interval_secs=0.5,
            ),
            redis=config.Redis(url=config.EMBEDDED),
            sampling=config.Sampling(latency_threshold_ms=SLOW_SECS * 1000, normal_sample_rate=BASE_RATE),
            storage=config.Storage(flush_interval_secs=1, local=config.Local(path=folder / "table")),
            observability=settings,
        )
    )
    service.start()
    opened.callback(service.stop)
    api = Api(service.api_port)
    api.wait_until_ready()

    rng = random.Random(options.seed)
    feed = Feed(service.settings.kafka)
    truth: list[shop.Visit] = []
    customers = shop.visits(
        rng,
        time.time_ns(),
        traces_per_sec=TRACES_PER_SEC,
        error_share=0.03,
        slow_share=0.02,
        slow_secs=SLOW_SECS,
        spread_secs=SPREAD_SECS,
    )
    secs = options.traces / TRACES_PER_SEC
    print(
        f"A shop of {len(shop.SERVICES)} services is open: {options.traces:,} visits in about {secs:.0f} s, each a trace,\n"
        f"its spans out of order and spread over {PARTITIONS} partitions. A trace is judged once it was quiet for "
        f"{INACTIVITY_SECS:g} s."
    )
    first = feed.start(_noted(islice(customers, options.traces), truth), rng)
    opened.callback(feed.stop)
    _watch(first, api, options.traces, truth, folder / "tss.log")
    print(account(api, truth, feed.bytes_sent, _stored_bytes(folder / "table")))
    if options.once:
        if options.keep:
            print(f"The table is in {folder / 'table'}, the log in {folder / 'tss.log'}.")
        return
    print(invitation(service.api_port, service.metrics_port))
    later = shop.visits(
        rng,
        time.time_ns(),
        traces_per_sec=TRACES_PER_SEC / 3,
        slow_secs=SLOW_SECS,
        spread_secs=SPREAD_SECS,
    )
    _go_on(feed.start(later, rng), api)


def _folder(keep: Path | None, opened: ExitStack) -> Path:
    """Where everything of this run lives; a folder of our own is removed at the end."""
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="tss-demo-"))
        opened.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise ConfigError(f"--keep {keep}: the folder is not empty; name a new one")
    return keep.resolve()


def _port(asked: int | None, usual: int, option: str, what: str) -> int:
    """The port asked for, which must be free; else the usual one, or any (0) where that is taken."""
    if _is_free(asked or usual):
        return asked or usual
    if asked:
        raise ConfigError(f"{option} {asked}: another program listens there; choose another port")
    print(f"Port {usual} is taken, so {what} gets another one ({option} chooses).")
    return 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# --- the shop's spans into the broker ----------------------------------------------------------------------------


class Feed:
    """Sends visits to the broker as they happen, and waits when the worker falls behind: the broker would forget."""

    def __init__(self, kafka: config.Kafka) -> None:
        self._topic = kafka.input_topic
        brokers = kafka.brokers
        self._producer = Producer({"bootstrap.servers": brokers, "linger.ms": 5, "log_level": 0})
        # Never subscribes: it only looks at what the worker's group has committed.
        self._group = Consumer(
            {"bootstrap.servers": brokers, "group.id": kafka.consumer_group, "log_level": 0}
        )
        self._sent = [0] * PARTITIONS
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.bytes_sent = 0

    def start(self, visits: Iterable[shop.Visit], rng: random.Random) -> threading.Thread:
        """The thread that sends them; one at a time."""
        traces = (visit.spans for visit in visits)
        records = shop.records(rng, traces, partitions=PARTITIONS)
        self._thread = threading.Thread(target=self._send, args=(records,), name="shop", daemon=True)
        self._thread.start()
        return self._thread

    def stop(self) -> None:
        self._stopping.set()
        if self._thread:
            self._thread.join()
        self._producer.flush(1)
        self._group.close()

    def _send(self, records: Iterator[shop.TimedRecord]) -> None:
        looked_at = 0.0
        for record in records:
            while (wait_secs := (record.emit_at_ns - time.time_ns()) / 1e9) > 0:
                if self._stopping.wait(wait_secs):
                    return
            while time.monotonic() > looked_at + 1:
                if self._unread() < UNREAD_RECORDS_MAX:
                    looked_at = time.monotonic()
                elif self._stopping.wait(0.2):
                    return
            self._producer.produce(self._topic, record.value, partition=record.partition)
            self._producer.poll(0)
            self._sent[record.partition] += 1
            self.bytes_sent += len(record.value)
            if self._stopping.is_set():
                return
        self._producer.flush(5)

    def _unread(self) -> int:
        """Records of the fullest partition that the worker has not confirmed."""
        partitions = [TopicPartition(self._topic, p) for p in range(PARTITIONS)]
        try:
            committed = self._group.committed(partitions, timeout=5)
        except KafkaException:
            return UNREAD_RECORDS_MAX
        return max(self._sent[p.partition] - max(p.offset, 0) for p in committed)


def _noted(visits: Iterable[shop.Visit], into: list[shop.Visit]) -> Iterator[shop.Visit]:
    for visit in visits:
        into.append(visit)
        yield visit


# --- the worker, asked over HTTP ---------------------------------------------------------------------------------


class Api:
    """The worker's HTTP API."""

    def __init__(self, port: int) -> None:
        self.port = port

    def query(self, sql: str) -> list[Row]:
        """Rows of a query, by column name."""
        try:
            status, body = self._request("POST", "/admin/query", {"sql": sql})
        except OSError as e:
            raise TssError(f"the worker does not answer any more: {e}") from None
        if status != 200:
            raise TssError(f"the query API answered {status}: {body}")
        rows: list[Row] = body["data"]["rows"]
        return rows

    def wait_until_ready(self) -> None:
        """Return when the worker says it is ready; TssError with its own reason when it does not come to that."""
        deadline = time.monotonic() + READY_SECS
        while True:
            try:
                status, body = self._request("GET", "/health/ready")
            except OSError as e:
                status, body = 0, str(e)
            if status == 200:
                return
            if time.monotonic() > deadline:
                raise TssError(f"the worker was not ready after {READY_SECS:g} s: {body}")
            time.sleep(0.1)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=40)
        try:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            try:
                return answer.status, json.loads(text)
            except json.JSONDecodeError:
                return answer.status, text
        finally:
            connection.close()


def _totals(api: Api) -> tuple[int, int]:
    """Traces decided and kept so far."""
    rows = api.query("SELECT kept, count(DISTINCT trace_id) AS traces FROM decisions GROUP BY kept")
    by_kept = {bool(row["kept"]): int(row["traces"]) for row in rows}
    return sum(by_kept.values()), by_kept.get(True, 0)


def _watch(sender: threading.Thread, api: Api, wanted: int, made: Sequence[shop.Visit], log: Path) -> None:
    """Show how far it is, until every trace has been decided."""
    progress = Progress()
    seen, seen_at = (-1, -1), 0.0
    while True:
        decided, kept = _totals(api)
        progress.show(f"sent {len(made):,} of {wanted:,} traces, decided {decided:,}, kept {kept:,}")
        if decided >= wanted and not sender.is_alive():
            progress.end()
            return
        if seen != (len(made), decided):
            seen, seen_at = (len(made), decided), time.monotonic()
        elif time.monotonic() - seen_at > STALLED_SECS:
            progress.end()
            lines = log.read_text(encoding="utf-8").splitlines()
            raise TssError(
                f"nothing moved for {STALLED_SECS:g} s, with {decided:,} of {wanted:,} traces decided; the worker's "
                "last words:\n  " + "\n  ".join(lines[-5:])
            )
        time.sleep(0.5)


def _go_on(sender: threading.Thread, api: Api) -> None:
    """Until somebody ends it: the shop stays open, and now and then a line tells how it stands."""
    progress = Progress()
    while sender.is_alive():
        decided, kept = _totals(api)
        progress.show(f"{decided:,} traces decided, {kept:,} kept; Ctrl-C ends the demo")
        sender.join(2 if progress.is_terminal else STATUS_SECS)
    raise TssError("the shop closed by itself")


class Progress:
    """One line that changes on a terminal; elsewhere a line every STATUS_SECS."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._started = time.monotonic()
        self._shown_at = -STATUS_SECS

    def show(self, text: str) -> None:
        now = time.monotonic()
        line = f"  {now - self._started:3.0f} s  {text}"
        if self.is_terminal:
            print(f"\r\033[K{line}", end="", flush=True)
        elif now - self._shown_at >= STATUS_SECS:
            print(line, flush=True)
            self._shown_at = now

    def end(self) -> None:
        if self.is_terminal:
            print("\r\033[K", end="", flush=True)


# --- the account -------------------------------------------------------------------------------------------------


def account(api: Api, truth: Sequence[shop.Visit], bytes_sent: int, bytes_stored: int) -> str:
    """What was kept, why, and what it saved, for somebody who has never heard of tail sampling."""
    reasons = api.query(
        "SELECT kept, reason, count(DISTINCT trace_id) AS traces, sum(span_count) AS spans "
        "FROM decisions GROUP BY kept, reason ORDER BY kept DESC, traces DESC"
    )
    spans_in = sum(len(visit.spans) for visit in truth)
    spans_kept = int(api.query("SELECT count(*) AS spans FROM spans")[0]["spans"])
    saved = 1 - spans_kept / spans_in
    return "\n".join(
        [
            "",
            f"What became of {len(truth):,} traces, each judged as a whole, once it had ended",
            "",
            *_reason_table(reasons),
            "",
            *_proof(api, truth),
            f"{spans_in:,} spans came in and {spans_kept:,} are stored: {saved:.0%} fewer.",
            f"{_size(bytes_sent)} of OTLP came in; the table takes {_size(bytes_stored)} on disk, with one row for",
            "every decision, so that you can also ask why a trace is not there.",
            "",
            *_examples(api),
        ]
    )


def _reason_table(reasons: Iterable[Row]) -> Iterator[str]:
    yield f"  {'':8}{'reason':16}{'traces':>8}{'spans':>9}   in words"
    for row in reasons:
        verdict = "kept" if row["kept"] else "dropped"
        words = IN_WORDS.get(row["reason"], "")
        yield f"  {verdict:8}{row['reason']:16}{int(row['traces']):>8,}{int(row['spans']):>9,}   {words}"


def _proof(api: Api, truth: Sequence[shop.Visit]) -> Iterator[str]:
    """The shop knows which of its visits failed or hung: are exactly those there, and whole?"""
    stored = {
        row["trace_id"]: int(row["spans"])
        for row in api.query("SELECT trace_id, count(*) AS spans FROM spans GROUP BY trace_id")
    }
    matter = [visit for visit in truth if visit.error or visit.slow]
    whole = sum(stored.get(visit.spans[0].span.trace_id.hex()) == len(visit.spans) for visit in matter)
    errors, slow = sum(v.error for v in matter), sum(v.slow for v in matter)
    found = f"all {whole}" if whole == len(matter) else f"only {whole}"
    yield f"The shop itself knows of {errors} that failed and {slow} that were slow, {len(matter)} in all:"
    yield f"{found} are in the table, with every one of their spans."


def _examples(api: Api) -> Iterator[str]:
    kept = api.query(
        "SELECT d.reason, d.trace_id, d.duration_ms, d.span_count, s.service_name, s.operation_name "
        "FROM decisions d JOIN spans s ON s.trace_id = d.trace_id AND s.parent_span_id IS NULL "
        "WHERE d.kept ORDER BY d.duration_ms DESC"
    )
    causes = _causes(api)
    yield "Some of the kept ones"
    for reason, count in EXAMPLES.items():
        for row in [row for row in kept if row["reason"] == reason][:count]:
            yield (
                f"  {row['trace_id']}  {row['duration_ms'] / 1000:6.3f} s {row['span_count']:>3} spans  "
                f"{row['service_name']} {row['operation_name']}"
            )
            if row["trace_id"] in causes:
                yield f"      {reason}: {causes[row['trace_id']]}"
            else:
                yield f"      {reason}: {IN_WORDS[reason]}"


def _causes(api: Api) -> dict[str, str]:
    """What went wrong in each failed or slow trace: its innermost failed, else its innermost slow step."""
    causes: dict[str, str] = {}
    # Innermost first: a step that began later is inside of one that began earlier, where both failed or hung.
    for row in api.query(
        "SELECT trace_id, sampling_reason, service_name, operation_name, status_code, status_message, duration_ms "
        "FROM spans WHERE sampling_reason IN ('error', 'latency') ORDER BY start_time DESC"
    ):
        where = f"{row['operation_name']} in {row['service_name']}"
        if row["sampling_reason"] == "error" and row["status_code"] == 2:
            causes.setdefault(row["trace_id"], f"{where} failed: {row['status_message']}")
        elif row["sampling_reason"] == "latency" and row["duration_ms"] > SLOW_SECS * 1000:
            causes.setdefault(row["trace_id"], f"{where} took {row['duration_ms'] / 1000:.3f} s")
    return causes


def _stored_bytes(table: Path) -> int:
    return sum(file.stat().st_size for file in table.rglob("*.parquet"))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def invitation(api_port: int, metrics_port: int) -> str:
    """What to try while it runs; every line can be pasted into another terminal."""
    api, metrics = f"http://localhost:{api_port}", f"http://localhost:{metrics_port}"
    json_body = '-H "Content-Type: application/json"'
    sql = "SELECT service_name, count(*) AS spans, max(duration_ms) AS slowest_ms FROM spans GROUP BY service_name"
    why = "SELECT reason, count(*) AS traces FROM decisions GROUP BY reason"
    rule = {
        "description": "Keep every trace that touches payment",
        "duration_secs": 300,
        "priority": 100,
        "match": {"resource": [{"key": "service.name", "op": "eq", "value": "payment"}]},
        "action": "force_keep",
    }
    return f"""
The shop stays open. In another terminal:

  Ask the table, in SQL
    curl -s -X POST {api}/admin/query {json_body} \\
      -d '{{"sql": "{sql}"}}'
  Keep everything of one service for five minutes, and a little later see the reason `force` appear
    curl -s -X POST {api}/admin/force-rules {json_body} \\
      -d '{json.dumps(rule)}'
    curl -s -X POST {api}/admin/query {json_body} \\
      -d '{{"sql": "{why}"}}'
  Health, and what Prometheus would scrape
    curl -s {api}/health
    curl -s {metrics}/metrics | grep ^tail_sampling_traces
"""


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tss demo", description="A shop, a broker, a Redis, a table and a worker in one command."
    )
    parser.add_argument("--once", action="store_true", help="end after the account instead of at Ctrl-C")
    parser.add_argument(
        "--traces",
        type=_traces,
        default=600,
        metavar="N",
        help="before the account (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, metavar="PORT", help="of the API (default: 8080, or any free one)"
    )
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="default: 9090, or any free one")
    parser.add_argument(
        "--seed", type=int, default=1, help="another shop day for another number (default: 1)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put everything there and leave it there")
    return parser.parse_args(argv)


def _traces(text: str) -> int:
    value = int(text)
    if not 1 <= value <= TRACES_MAX:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and {TRACES_MAX}")
    return value


if __name__ == "__main__":
    sys.exit(main())
