"""Step 15: a new life of Redis, from what the tables remember.

Redis is a cache of Kafka and the tables: when its epoch is missing, or differs between shards or from the tables', a
fresh one is agreed on, and the verdicts of everything that may be delivered again are read back before anybody
writes. The order is the guarantee: the tables carry the new epoch *before* they are read, so that no writer of the
old life can land anything after the reading; Redis gets the epoch last, so that nobody claims before that.

Any number of processes may do this at once: every step can be repeated, and whoever finds that the proposal is gone
looks again.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

from tss.buffer import Buffer
from tss.clock import SYSTEM
from tss.errors import LinkLost
from tss.model import Origin, Trigger, Verdict, encode_origins, epoch_born_ms, epoch_name, parse_records
from tss.sink import Kind

log = logging.getLogger("tss")


class Memory(Protocol):
    """What the tables remember: `sink.Sink`."""

    def epochs(self) -> tuple[str | None, str | None]: ...

    def enter_epoch(self, epoch: str) -> None: ...

    def landed(self, kind: Kind) -> dict[str, int]: ...

    def decisions_since(self, log_time_ms: int, decided_ms: int) -> Iterator[pa.RecordBatch]: ...


def is_current(buffer: Buffer, sink: Memory) -> bool:
    """All shards and both tables show one and the same epoch."""
    return buffer.epoch is not None and set(sink.epochs()) == {buffer.epoch}


def restore(
    buffer: Buffer, sink: Memory, low_ms: int | None, ttl_secs: float, fresh: str | None = None
) -> None:
    """Gives Redis a new epoch, by the name `fresh` unless another process has proposed one.

    `low_ms` is the oldest log time that may be delivered again, None = nothing was read.

    Raises LinkLost when another process finished or began a restore meanwhile: connect again and look.
    """
    epoch = buffer.propose_epoch(fresh or epoch_name(SYSTEM.now().wall_ms, uuid.uuid4().hex))
    log.info("Redis begins a new life", extra={"epoch": epoch})
    buffer.forget_epoch(epoch)
    sink.enter_epoch(epoch)
    count = 0
    if low_ms is not None:
        landed = sink.landed("spans")
        # What may be delivered again goes by log time; what late spans may follow, by when it was decided. In a backlog
        # the two are far apart.
        since = (max(0, at_ms - int(ttl_secs * 1000)) for at_ms in (low_ms, epoch_born_ms(epoch) or 0))
        for batch in sink.decisions_since(*since):
            rows = list(_remembered(batch.to_pylist(), landed))
            buffer.remember(rows, ttl_secs)
            count += len(rows)
            log.info("Verdicts read back from the decisions table: %d", count)
    if not buffer.set_epoch(epoch):
        raise LinkLost("another worker began a restore of its own")


def _remembered(
    rows: list[dict[str, object]], landed: dict[str, int]
) -> Iterator[tuple[bytes, Verdict, bytes | None]]:
    """A kept row counts as covered only where its spans landed; a dropped one needs nothing more."""
    for row in rows:
        kept = bool(row["kept"])
        verdict = Verdict(
            kept,
            str(row["reason"]),
            str(row["policy"]),
            float(str(row["probability"])),
            Trigger[str(row["trigger"]).upper()],
            int(str(row["rules_version"]), 16),
        )
        covered = not kept or landed.get(str(row["writer"]), 0) >= int(str(row["sequence"]))
        records = sorted(parse_records(str(row["records"]))) if covered else []
        origins = encode_origins(Origin(p, offset, 0) for p, offset in records)
        yield bytes.fromhex(str(row["trace_id"])), verdict, origins or None
