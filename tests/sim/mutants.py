"""Broken programs for each law: that law must see them. So no law stands there for show.

Where `accidents` takes out rules of the protocol, these break what the laws are about, as plainly as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from tests.sim import accidents, history
from tests.sim.accidents import Removal, changed_script, seen_by
from tests.sim.history import Plan
from tests.sim.iceberg import SimTables
from tests.sim.shorten import broken_laws, shorten
from tss import decide, ingest
from tss.decide import Writer
from tss.sink import Upload
from tss.source import Source


def _rows_landed(change: Callable[[pa.Table], pa.Table]) -> AbstractContextManager[object]:
    """Tables that land something else than what they were given as spans."""
    upload = SimTables.upload

    def altered(self: SimTables, kind: Any, parts: Iterable[pa.Table]) -> Upload:
        return upload(self, kind, [change(pa.concat_tables(parts))] if kind == "spans" else parts)

    return patch.object(SimTables, "upload", altered)


def stands_still() -> AbstractContextManager[object]:
    """progress: nobody looks for what the dead have left."""
    return patch.object(Writer, "_adopt", lambda *_: None)


def decides_again() -> AbstractContextManager[object]:
    """conservation: what landed is not remembered, so what is delivered again is decided again."""
    return changed_script("RELEASE", ("landing(now, records[i])", "''"))


def loses_spans() -> AbstractContextManager[object]:
    """nothing_lost: the last span of each upload is missing."""
    return _rows_landed(lambda rows: rows.slice(0, rows.num_rows - 1))


def doubles_spans() -> AbstractContextManager[object]:
    """nothing_doubled: each upload holds its spans twice."""
    return _rows_landed(lambda rows: pa.concat_tables([rows, rows]))


def drops_letters() -> AbstractContextManager[object]:
    """letters_arrive: what cannot be read is thrown away."""
    return patch.object(Source, "dead_letter", lambda *_: None)


def changes_its_mind() -> AbstractContextManager[object]:
    """one_verdict: late spans are judged alone, whatever was said before."""
    return accidents.last_verdict_wins()


def overlooks_late_errors() -> AbstractContextManager[object]:
    """errors_are_kept: an error that comes late does not turn a drop."""
    return patch.object(decide, "late_upgrade", lambda *_: None)


def judges_early() -> AbstractContextManager[object]:
    """not_early: a trace is due in half the time."""
    return changed_script("CLAIM", ("tonumber(ARGV[7])", "tonumber(ARGV[7]) / 2"))


def leaves_keys() -> AbstractContextManager[object]:
    """keys_are_owned: a released verdict never expires."""
    return changed_script("RELEASE", ("value, 'PX', ttl)", "value)"))


def counts_wrong() -> AbstractContextManager[object]:
    """memory_is_given_back: what is released is still counted."""
    return changed_script(
        "RELEASE",
        ("redis.call('DECRBY', tag .. 'spans', spans)", ""),
        ("'DEL', tag .. 'spans'", "'EXISTS', tag"),
    )


def _with(**changes: Any) -> AbstractContextManager[object]:
    """Programs that run with other limits than the laws know of."""
    made = history.settings_of
    return patch.object(history, "settings_of", lambda plan: made(replace(plan, **changes)))


def never_full() -> AbstractContextManager[object]:
    """memory_is_bounded: a writer does not see that its sequence is full."""
    return _with(flush_spans=50_000)


def reads_on() -> AbstractContextManager[object]:
    """memory_is_bounded: readers do not see that Redis is full, and nothing is decided early."""
    return _with(buffer_traces=5_000_000)


def never_commits() -> AbstractContextManager[object]:
    """memory_is_bounded: what waits for the lag waits for ever."""
    return patch.object(ingest, "LAG_SECS", 1e9)


# By the name of the law. The first of each is seen by no other law.
MUTANTS: dict[str, tuple[Removal, ...]] = {
    "progress": (stands_still,),
    "conservation": (decides_again,),
    "nothing_lost": (loses_spans,),
    "nothing_doubled": (doubles_spans,),
    "letters_arrive": (drops_letters,),
    "one_verdict": (changes_its_mind,),
    "errors_are_kept": (overlooks_late_errors,),
    "not_early": (judges_early,),
    "keys_are_owned": (leaves_keys,),
    "memory_is_given_back": (counts_wrong,),
    "memory_is_bounded": (never_full, reads_on, never_commits),
}


def file_of(mutant: Removal) -> str:
    """Where the history that shows a mutant is kept."""
    return f"mutant-{mutant.__name__.replace('_', '-')}"


def find(law: str, mutant: Removal, seeds: Iterable[int]) -> Plan | None:
    """The shortest plan found that the mutant fails by this law, if possible by no other, and that is fine else."""
    alone = mutant is MUTANTS[law][0]

    def shows(plan: Plan) -> bool:
        seen = seen_by(mutant, plan)
        return law in seen and (not alone or len(seen) == 1) and not broken_laws(plan)

    for plan in map(history.draw, seeds):
        if shows(plan):
            return shorten(plan, shows)
    return None
