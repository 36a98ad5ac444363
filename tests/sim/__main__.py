"""bin/simulate: plays many histories and says what they came to.

    bin/simulate --seeds 1000              seeds 0 to 999
    bin/simulate --seeds 1 --seed 4711 --story
    bin/simulate --accidents               looks anew for histories that show each rule at work

A failing seed is printed, shortened, and kept in tests/sim/histories, where the test suite plays it again.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from tests.sim import accidents, kept, laws, mutants
from tests.sim.history import Plan, draw, play
from tests.sim.shorten import shorten_failing

PROGRESS_SECS = 5.0
SEEDS_SEARCHED = 500  # for an accident; most show within ten, a few only in a history made by hand


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 when a law was broken."""
    parser = argparse.ArgumentParser(prog="bin/simulate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many histories (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed (0)")
    parser.add_argument("--story", action="store_true", help="tell what happened in each history")
    parser.add_argument(
        "--accidents", action="store_true", help="find and keep histories for accidents and mutants"
    )
    given = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    if given.accidents:
        return _find_accidents(given.seed)
    return _play_seeds(range(given.seed, given.seed + given.seeds), story=given.story)


def _play_seeds(seeds: range, *, story: bool) -> int:
    injected: Counter[str] = Counter()
    failing: list[int] = []
    records = 0
    started = told = time.monotonic()
    for done, seed in enumerate(seeds, start=1):
        try:
            outcome = play(draw(seed))
        except Exception as fault:
            fault.add_note(f"in seed {seed}")
            raise
        injected += outcome.injected
        records += len(outcome.log)
        if story:
            print(*outcome.story, f"seed {seed}: drained in {outcome.drained_after_secs:.0f} s", sep="\n")
        if found := laws.breaches(outcome):
            failing.append(seed)
            print(f"seed {seed} breaks {len(found)} laws:", *found[:5], sep="\n    ", flush=True)
        if time.monotonic() - told > PROGRESS_SECS:
            told = time.monotonic()
            rate = done / (told - started)
            print(
                f"{done} of {len(seeds)} histories, {rate:.1f} a second, {len(failing)} failing", flush=True
            )
    secs = time.monotonic() - started
    print(f"{len(seeds)} histories with {records} records in {secs:.0f} s; faults injected:")
    for kind, count in sorted(injected.items()):
        print(f"    {count:6d}  {kind}")
    for seed in failing[:3]:
        _keep(seed)
    print(f"{len(failing)} histories broke a law" + (f": {failing}" if failing else ""))
    return int(bool(failing))


def _keep(seed: int) -> None:
    print(f"shortening seed {seed} …", flush=True)
    plan = shorten_failing(draw(seed))
    path = kept.save(f"seed-{seed}", plan)
    _tell(plan)
    print(f"    kept as {path}")


def _tell(plan: Plan) -> None:
    outcome = play(plan)
    print(f"    {len(plan.records)} records, {len(plan.faults)} faults", *outcome.story, sep="\n    ")
    print("   ", *laws.breaches(outcome), sep="\n    ", flush=True)


def _find_accidents(first: int) -> int:
    """Of accidents and mutants that have no history yet; one that shows nothing any more is to be deleted before."""
    searches: dict[str, Callable[[Iterable[int]], Plan | None]] = {
        accidents.file_of(name): partial(accidents.find, accident)
        for name, accident in accidents.ACCIDENTS.items()
    }
    for law, broken in mutants.MUTANTS.items():
        searches |= {mutants.file_of(mutant): partial(mutants.find, law, mutant) for mutant in broken}
    missing = 0
    for name in searches.keys() - set(kept.names()):
        plan = searches[name](range(first, first + SEEDS_SEARCHED))
        if plan is None:
            missing += 1
            print(f"{name}: no history found", flush=True)
            continue
        kept.save(name, plan)
        print(f"{name}: {len(plan.records)} records, {len(plan.faults)} faults", flush=True)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
