"""python -m tests.bench: what tss costs on this machine, from Kafka to the table; `scale`: the same with much pending,
and several workers or servers; `steady`: memory and lag over time; `decode`, `gather`: what its kernels cost."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tests.bench import decode, gather, path, report, scale, steady
from tests.bench.generate import LAYOUTS
from tests.bench.outside import real
from tests.bench.path import Case, Plan
from tests.bench.report import BASELINE, README, Report
from tests.bench.scale import Size
from tests.bench.worker import SELF

KERNEL_RUNS = 7
PATH_RUNS = 3
SPANS = 1_000_000
KEPT_PERCENTS = (0, 10, 100)
RULES = (0, 5)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    whole = parts.add_parser("path", help="Kafka to table, the default")
    whole.add_argument("--runs", type=int, default=PATH_RUNS, help=f"of each case (default: {PATH_RUNS})")
    whole.add_argument("--spans", type=int, default=SPANS, help=f"in a topic (default: {SPANS})")
    whole.add_argument("--layouts", default="".join(LAYOUTS), help="of A, B, C (default: ABC)")
    whole.add_argument("--kept", type=int, choices=KEPT_PERCENTS, default=10, help="percent (default: 10)")
    whole.add_argument("--rules", type=int, choices=RULES, default=5, help="force rules (default: 5)")
    whole.add_argument("--all", action="store_true", help="0, 10 and 100 %% kept, without and with rules")
    whole.add_argument("--quick", action="store_true", help="no start, no pending memory")
    whole.add_argument(
        "--catalog", choices=["rest", "local"], default="rest", help="REST and MinIO, or SQLite and files"
    )
    whole.add_argument(
        "--collector", type=Path, metavar="PATH", help="also run this Collector on the same topics"
    )
    whole.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    whole.add_argument("--compare", type=Path, metavar="FILE", help="print ratios to an earlier --json")
    whole.add_argument(
        "--baseline", action="store_true", help="write tests/bench/baseline.json and README's table"
    )
    larger = parts.add_parser(
        "scale", help="CPU a span with much pending, several workers, several Redis servers"
    )
    larger.add_argument("--layout", choices=LAYOUTS, default="B", help="default: B")
    larger.add_argument("--spans", type=int, default=SPANS, help=f"in the topic (default: {SPANS})")
    larger.add_argument("--runs", type=int, default=1, help="of each (default: 1)")
    larger.add_argument(
        "--pending", type=int, nargs="+", default=[0], metavar="N", help="traces that wait in Redis all along"
    )
    larger.add_argument("--workers", type=int, nargs="+", default=[1], metavar="N", help="in one group")
    larger.add_argument(
        "--nodes", type=int, nargs="+", default=[1], metavar="N", help="of Redis; a cluster if several"
    )
    longer = parts.add_parser("steady", help="memory and lag of a worker under a steady stream")
    longer.add_argument("--layout", choices=LAYOUTS, default="B", help="default: B")
    longer.add_argument(
        "--rate", type=int, default=20_000, metavar="SPANS", help="a second (default: 20,000)"
    )
    longer.add_argument("--minutes", type=float, default=30, help="default: 30")
    for name, what in (("decode", "records to chunks"), ("gather", "chunks to the table of spans")):
        kernels = parts.add_parser(name, help=f"kernels against their slow twin: {what}")
        kernels.add_argument(
            "--runs", type=int, default=KERNEL_RUNS, help=f"of each figure (default: {KERNEL_RUNS})"
        )
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["path", *arguments]
    options = parser.parse_args(arguments)
    whole_paths = {"path": _path, "scale": _scale, "steady": _steady}
    if options.part in whole_paths:
        if not SELF.exists():
            parser.error(f"{options.part} reads CPU times from /proc, which Linux alone has")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the parts are ended
        whole_paths[options.part](options)
        return
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("numba", "llvmlite", "numpy", "protobuf", "pyarrow")
    )
    print(f"{report.machine()}; Python {platform.python_version()}; {versions}")
    (decode if options.part == "decode" else gather).main(options.runs)


def _path(options: argparse.Namespace) -> None:
    earlier = Report.read(options.compare) if options.compare else None
    grid = [(kept, rules) for kept in KEPT_PERCENTS for rules in RULES]
    groups = grid if options.all else [(options.kept, options.rules)]
    plan = Plan(
        cases=[Case(layout, *group) for layout in options.layouts for group in groups],
        spans=options.spans,
        runs=options.runs,
        collector=options.collector,
        starts=not options.quick,
        pending=not options.quick,
    )
    with real(options.catalog) as outside:
        found = path.measure(outside, plan)
    print(report.text(found))
    if options.json:
        found.write(options.json)
    if options.baseline:
        found.write(BASELINE)
        README.write_text(report.readme_with(report.markdown(found), README.read_text("utf-8")), "utf-8")
    if earlier:
        print(report.comparison(found, earlier))


def _scale(options: argparse.Namespace) -> None:
    """One kind of growth at a time: each list starts from the first of the others."""
    base = Size(options.pending[0], options.workers[0], options.nodes[0])
    sizes = [
        *(replace(base, pending=n) for n in options.pending),
        *(replace(base, workers=n) for n in options.workers),
        *(replace(base, nodes=n) for n in options.nodes),
    ]
    with real("rest") as outside:
        found = scale.measure(
            outside, options.layout, options.spans, list(dict.fromkeys(sizes)), options.runs
        )
        print(scale.markdown(found, outside.versions))


def _steady(options: argparse.Namespace) -> None:
    with real("rest") as outside:
        print(steady.markdown(steady.measure(outside, options.layout, options.rate, options.minutes * 60)))


if __name__ == "__main__":
    main(sys.argv[1:])
