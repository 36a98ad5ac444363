"""`python -m tests.chaos [fault ...]`: faults on real processes, and what they cost."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.chaos.faults import BY_NAME, FAULTS, Chaos
from tests.chaos.fleet import Fleet
from tests.chaos.report import Series, heading, run_rows, summary
from tests.chaos.runs import ground_for, series
from tests.chaos.soak import memory_report, soak
from tests.stack import Stack, install


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Starts workers, feeds a stream whose truth is known, breaks something, compares the tables.",
        epilog="Exit code 1 when anything was lost, doubled, split, left behind or never settled. Logs stay in --folder.",
    )
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"default: all. {', '.join(BY_NAME)}")
    parser.add_argument("--runs", type=int, default=10, help="of each fault (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 100_000, help="default: from the clock"
    )
    parser.add_argument("--folder", type=Path, help="for logs and embedded data (default: a new one)")
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="all faults mixed, memory watched, instead"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--stack", action="store_true", help="Kafka, Redis, MinIO, REST catalog (default)")
    place.add_argument("--embedded", action="store_true", help="nothing to install; fewer faults")
    options = parser.parse_args()
    if unknown := set(options.faults) - set(BY_NAME):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    for number in (signal.SIGTERM, signal.SIGINT):  # a background job of a shell ignores the latter
        signal.signal(number, signal.default_int_handler)  # so that workers and parts are ended
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="tss-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, logs in {folder}", flush=True)
    with ExitStack() as ends:
        stack = None
        if not options.embedded:
            install()
            stack = Stack.new(owner=os.getpid())
            ends.callback(stack.down)
            stack.up()
        if options.soak:
            return _soak(options.soak, stack, options.seed, folder)
        chosen = [BY_NAME[name] for name in options.faults] or list(FAULTS)
        return _run(chosen, stack, options.runs, options.seed, folder)


def _run(chosen: list[Chaos], stack: Stack | None, runs: int, seed: int, folder: Path) -> int:
    print(heading(), flush=True)
    done: list[Series] = []
    given_up: list[str] = []
    for number, fault in enumerate(chosen):
        if stack is None and fault.where == "stack":
            print(f"{fault.name}: needs --stack")
            continue
        place = folder / fault.name
        place.mkdir(parents=True, exist_ok=True)
        with ground_for(fault, stack, place) as ground, Fleet(ground, random.Random(seed + number)) as fleet:
            try:
                result = series(fault, fleet, runs, seed + number)
            except AssertionError as broken:
                print(f"{fault.name}: given up: {broken}", flush=True)
                given_up.append(fault.name)
            else:
                print(run_rows(result), flush=True)
                done.append(result)
    print("\n" + summary(done))
    if given_up:
        print(f"given up: {', '.join(given_up)}")
    return 0 if not given_up and all(each.right for each in done) else 1


def _soak(minutes: float, stack: Stack | None, seed: int, folder: Path) -> int:
    with ground_for(BY_NAME["none"], stack, folder) as ground, Fleet(ground, random.Random(seed)) as fleet:
        result, samples, done = soak(fleet, minutes, seed)
    memory, flat = memory_report(samples)
    print(f"{len(done)} faults: " + ", ".join(f"{n}x {name}" for name, n in Counter(done).most_common()))
    print(memory + ("" if flat else "  GROWN"))
    print(summary([result]))
    return 0 if flat and result.right else 1


if __name__ == "__main__":
    sys.exit(main())
