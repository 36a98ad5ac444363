"""The two tables in memory: what `tss.sink.Sink` promises, one compare-and-set at a time.

Runs a suite with the real sink (tests/test_simulation.py). A commit can meet a conflict, can land with its answer
lost, can be lost with its answer, and can land late, when its sender has given up or died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tests.sim.world import Process, World
from tss.errors import Fenced, Unavailable
from tss.rows import from_millis
from tss.sink import Kind, Upload

LATENCY_SECS = (0.005, 0.08)
CONFLICT_ATTEMPTS_MAX = 20


@dataclass(frozen=True, slots=True)
class Trouble:
    """Of one commit to come: `conflict`, `unheard` (landed, not told), `lost` (neither), `late` (lands after `secs`)."""

    kind: str
    secs: float = 0.0


@dataclass(frozen=True)
class SimUpload(Upload):
    """Rows instead of files."""

    table: pa.Table | None = None


@dataclass
class SimTable:
    """Its properties, its rows by append, and the version that a commit compares."""

    version: int = 0
    epochs: list[str] = field(default_factory=list)
    committed: dict[str, int] = field(default_factory=dict)
    appends: list[pa.Table] = field(default_factory=list)

    def column(self, name: str) -> list[Any]:
        return [value for rows in self.appends for value in rows[name].to_pylist()]


@dataclass
class Catalog:
    """What all processes see."""

    world: World
    tables: dict[Kind, SimTable] = field(
        default_factory=lambda: {"spans": SimTable(), "decisions": SimTable()}
    )
    down_until: float = 0.0
    slow_secs: float = 0.0
    troubles: deque[Trouble] = field(default_factory=deque)


class SimTables:
    """One process's way to them; fulfils `tss.decide.Tables`."""

    def __init__(self, catalog: Catalog, process: Process) -> None:
        self._catalog = catalog
        self._world = catalog.world
        self._process = process
        self._chance = self._world.chance(f"tables {process.name} {self._world.now_secs}")

    def _ask(self) -> None:
        self._world.outside(self._process)
        self._world.pause(self._chance.uniform(*LATENCY_SECS) + self._catalog.slow_secs)
        self._world.outside(self._process)
        if self._world.now_secs < self._catalog.down_until:
            raise Unavailable("storage", "storage.iceberg.catalog_uri", "the catalog is away")

    def _answer(self) -> None:
        self._world.pause(self._chance.uniform(*LATENCY_SECS))
        self._world.outside(self._process)

    def upload(self, kind: Kind, parts: Iterable[pa.Table]) -> SimUpload:
        self._ask()
        rows = pa.concat_tables(parts)
        self._answer()
        return SimUpload(kind, (), rows.num_rows, rows)

    def commit(self, upload: Upload, writer: str, sequence: int, epoch: str) -> bool:
        assert isinstance(upload, SimUpload)
        table, rows = self._catalog.tables[upload.kind], upload.table
        assert rows is not None
        for _ in range(CONFLICT_ATTEMPTS_MAX):
            base, epochs, committed = self._refresh(upload.kind)
            if not epochs or epochs[-1] != epoch:
                raise Fenced(f"{upload.kind} is of epoch {epochs[-1:]}, this writer of {epoch}")
            if committed.get(writer, 0) >= sequence:
                return False

            def append() -> None:
                table.committed[writer] = sequence
                table.appends.append(rows)

            if self._swap(upload.kind, base, append):
                return True
        raise Unavailable("catalog", "storage.iceberg.catalog_uri", "too many conflicts")

    def _refresh(self, kind: Kind) -> tuple[int, list[str], dict[str, int]]:
        self._ask()
        table = self._catalog.tables[kind]
        seen = (table.version, list(table.epochs), dict(table.committed))
        self._answer()
        return seen

    def _swap(self, kind: Kind, base: int, change: Callable[[], None]) -> bool:
        """Compare and set: False on a conflict; raises Unavailable where nobody knows."""
        table = self._catalog.tables[kind]
        troubles = self._catalog.troubles
        trouble = troubles.popleft() if troubles else Trouble("")
        if trouble.kind:
            self._world.inject(f"commit_{trouble.kind}", f"{self._process.name}: {kind}")
        if trouble.kind == "conflict":
            table.version += 1

        def arrive() -> bool:
            if table.version != base:
                return False
            table.version += 1
            change()
            return True

        if trouble.kind == "late":
            self._world.after(trouble.secs, arrive)
        self._ask()
        if trouble.kind in ("late", "lost"):
            raise Unavailable("storage", "storage.iceberg.catalog_uri", "no answer to the commit")
        landed = arrive()
        if trouble.kind == "unheard":
            raise Unavailable("storage", "storage.iceberg.catalog_uri", "the answer to the commit was lost")
        self._answer()
        return landed

    def epochs(self) -> tuple[str | None, str | None]:
        _, spans, _ = self._refresh("spans")
        _, decisions, _ = self._refresh("decisions")
        return (spans[-1] if spans else None), (decisions[-1] if decisions else None)

    def enter_epoch(self, epoch: str) -> None:
        for kind, table in self._catalog.tables.items():
            for _ in range(CONFLICT_ATTEMPTS_MAX):
                base, epochs, _ = self._refresh(kind)
                if epochs[-1:] == [epoch] or self._swap(kind, base, lambda t=table: t.epochs.append(epoch)):  # type: ignore[misc]
                    break
            else:
                raise Unavailable("catalog", "storage.iceberg.catalog_uri", "too many conflicts")

    def landed(self, kind: Kind) -> dict[str, int]:
        return self._refresh(kind)[2]

    def decisions_since(self, log_time_ms: int, decided_ms: int) -> Iterator[pa.RecordBatch]:
        self._ask()
        since = {"last_log_time": log_time_ms, "decided_at": decided_ms}
        for rows in list(self._catalog.tables["decisions"].appends):
            either: list[Any] = [
                pc.greater_equal(rows[name], pa.scalar(from_millis(at_ms), pa.timestamp("us", "UTC")))
                for name, at_ms in since.items()
            ]
            yield from rows.filter(pc.or_(*either)).to_batches()
            self._answer()
