"""What may be held while a history runs: by Redis, by a reader, by a writer. `laws.memory_is_bounded` reports it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.sim.fleet import Fleet
from tss.buffer import LAG_SECS
from tss.decide import OpenSequence
from tss.ingest import USAGE_SECS

# The longest that a fault keeps a process from what it would do: stopped, and then no answer for as long.
AWAY_SECS = 20.0
BATCHES_UNNOTICED = 3  # of one reader: in hand, and until it looks at Redis' memory again


@dataclass
class Bounds:
    """Looks again and again; what grows beyond a bound from one look to another is an excess.

    - A sequence that is full takes no more traces.
    - What a reader keeps until it may commit goes when the lag is over.
    - A reader does not go on while the fleet holds more than its budget.
    """

    fleet: Fleet
    flush_spans: int
    buffer_traces: int
    _full: dict[int, tuple[OpenSequence, int]] = field(default_factory=dict)
    _waiting: dict[str, int] = field(default_factory=dict)
    _over_since: float | None = None
    _batches: dict[str, int] = field(default_factory=dict)

    def look(self) -> list[str]:
        return [*self._sequences(), *self._commits(), *self._budget()]

    def _sequences(self) -> list[str]:
        found = []
        full, self._full = self._full, {}
        for worker in self.fleet.running():
            for writer in worker.writers:
                sequence = writer._open
                if sequence is None or sequence.spans < self.flush_spans:
                    continue
                before = full.get(id(writer))
                if before and before[0] is sequence and len(sequence.traces) > before[1]:
                    found.append(
                        f"{worker.process.name}: a full sequence grew to {len(sequence.traces)} traces"
                    )
                self._full[id(writer)] = (sequence, len(sequence.traces))
        return found

    def _commits(self) -> list[str]:
        found = []
        counts, self._waiting = self._waiting, {}
        for worker in self.fleet.running():
            waiting, name = worker.ingest._waiting, worker.process.name
            wanted_secs = LAG_SECS + self.fleet.settings.kafka.commit_interval_secs + AWAY_SECS
            if waiting and self.fleet.world.now_secs - waiting[0].mono_secs > wanted_secs:
                self._waiting[name] = len(waiting)
                if len(waiting) > counts.get(name, len(waiting)):
                    found.append(f"{name}: {len(waiting)} batches wait for a commit")
        return found

    def _budget(self) -> list[str]:
        now = self.fleet.world.now_secs
        if not self._over():
            self._over_since = None
            return []
        if self._over_since is None:
            self._over_since, self._batches = now, {}
        return [
            f"{name}: {count} batches although Redis was full for {now - self._over_since:.0f} s"
            for name, count in self._batches.items()
            if count > BATCHES_UNNOTICED
        ]

    def _over(self) -> bool:
        held = sum(
            len(value)
            for server in self.fleet.nodes.servers
            for key, value in server.store.keys.items()
            if key.endswith(b":born")
        )
        return held >= self.buffer_traces

    def read(self, name: str) -> None:
        """A process has just got a batch."""
        if self._over_since is not None and not self._over():
            self._over_since = None
        if (
            self._over_since is not None
            and self.fleet.world.now_secs - self._over_since > USAGE_SECS + AWAY_SECS
        ):
            self._batches[name] = self._batches.get(name, 0) + 1
