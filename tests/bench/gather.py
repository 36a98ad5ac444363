"""What writing kept spans costs: CPU time of the compiled gather, of its slow twin, and of the Parquet file."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from tests.bench.decode import BATCH_SPANS, Cost, batches
from tests.builders import fields_of
from tss import config, rows
from tss.gather import Gatherer
from tss.kernels import Decoder
from tss.metrics import Metrics
from tss.model import Trigger, Verdict
from tss.rows import KeptTrace, cut
from tss.rules import RuleSet
from tss.sink import Sink

TWIN_SPANS = 2000  # enough for so slow a thing
TWIN_RUNS = 3

VERDICT = Verdict(True, "probabilistic", "base_rate", 0.1, Trigger.INACTIVITY, 1)
DECIDED_AT = datetime(2027, 1, 15, 8, tzinfo=UTC)


def traces(layout: str, spans: int) -> list[KeptTrace]:
    """So many spans of a layout: each trace in the chunks in which batches of about 20,000 spans left it."""
    decoder = Decoder()
    held: dict[bytes, dict[bytes, bytes]] = {}
    for batch in batches(layout):
        for trace_id, fields in fields_of(decoder.decode(batch, RuleSet())).items():
            held.setdefault(trace_id, {}).update(fields)
    found, size = [], 0
    for trace_id, fields in held.items():
        found.append((trace_id, VERDICT, False, cut(fields, frozenset())))
        size += found[-1][3].spans
        if size >= spans:
            break
    return found


def cost(one: Callable[[], object], spans: int, runs: int) -> Cost:
    found = []
    one()
    for _ in range(runs):
        started = time.process_time_ns()
        one()
        found.append((time.process_time_ns() - started) / spans)
    return Cost(statistics.median(found), min(found), max(found))


def main(runs: int) -> None:
    gatherer = Gatherer()
    print(
        f"{'':10} {'kernels, ns a span':>24}  {'twin, ns a span':>28}  {'twin/kernels':>12}  {'upload':>24}  B/span"
    )
    with tempfile.TemporaryDirectory() as folder:
        sink = _sink(Path(folder))
        for layout in ("A", "B", "C"):
            kept = traces(layout, BATCH_SPANS)
            few = traces(layout, TWIN_SPANS)
            for given in (few, kept[-len(few) :]):
                assert gatherer.span_table(given, DECIDED_AT)[0].equals(rows.span_table(given, DECIDED_AT)[0])
            table: pa.Table = gatherer.span_table(kept, DECIDED_AT)[0]
            fast = cost(lambda: gatherer.span_table(kept, DECIDED_AT), table.num_rows, runs)  # noqa: B023
            slow = cost(
                lambda: rows.span_table(few, DECIDED_AT),  # noqa: B023
                sum(pieces.spans for *_, pieces in few),
                TWIN_RUNS,
            )
            upload = cost(lambda: sink.upload("spans", [table]), table.num_rows, runs)  # noqa: B023
            [file] = sink.upload("spans", [table]).files
            print(
                f"layout {layout:3} {fast!s:>24}  {slow!s:>28}  {slow.median / fast.median:12.1f}  {upload!s:>24}"
                f"  {file.file_size_in_bytes / table.num_rows:.1f}"
            )
    print("CPU seconds per million spans = ns a span / 1000; some 20,000 spans at once; median (least-most)")


def _sink(folder: Path) -> Sink:
    settings = config.Storage(storage_type="local", local=config.Local(path=str(folder)))
    sink = Sink(settings, "bench", Metrics())
    sink.open()
    return sink
