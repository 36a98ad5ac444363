"""Time, actors and accidents: a scheduler in which every outside call is a switch point.

Actors are greenlets that run the production code. Whenever that code waits for something outside, its actor stops and
the world goes on with whatever comes next by simulated time; so between two outside calls nothing happens, and every
order of outside calls can. All chance comes from named streams of one seed.

A process can be killed (its actors unwind by `Killed`, and every double refuses what they try on the way out) and
stopped (its actors miss their turns until it goes on, while what it sent is still delivered).
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable

from greenlet import getcurrent, greenlet

from tss.model import Now

T0_SECS = 1_800_000_000.0  # when histories begin


class Killed(BaseException):
    """Ends the actors of a killed process; nothing of tss catches it."""


class Process:
    """What dies and stops together: a set of actors with one wall clock. `skew_secs` is how wrong that clock is."""

    def __init__(self, name: str, skew_secs: float = 0.0) -> None:
        self.name = name
        self.skew_secs = skew_secs
        self.alive = True
        self.stopped_until = 0.0
        self.actors: list[Actor] = []


class Actor:
    """One thread of a process. `wait` may be called by itself only, `wake` by anybody."""

    def __init__(self, world: World, process: Process, name: str, main: Callable[[], None]) -> None:
        self.name = name
        self.process = process
        self._world = world
        self._turn = 0
        self._greenlet = greenlet(self._run, world.hub)
        self._main = main
        self.ended = False
        world.at(world.now_secs, self.wake)

    def _run(self) -> None:
        try:
            self._main()
        except Killed:
            pass
        finally:
            self.ended = True

    def wait(self, secs: float) -> None:
        """Returns after `secs`, or earlier when woken."""
        turn = self._turn
        self._world.at(self._world.now_secs + secs, lambda: self._resume(turn))
        self._world.hub.switch()

    def wake(self) -> None:
        turn = self._turn
        self._world.at(self._world.now_secs, lambda: self._resume(turn))

    def _resume(self, turn: int) -> None:
        if self.ended or turn != self._turn:
            return
        if self.process.stopped_until > self._world.now_secs:
            self._world.at(self.process.stopped_until, lambda: self._resume(turn))
            return
        self._turn += 1
        self._world.running = self
        self._greenlet.switch()

    def kill(self) -> None:
        self._turn += 1
        if not self.ended:
            self._greenlet.throw(Killed())
        self.ended = True


class World:
    """Simulated time and its events."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_secs = T0_SECS
        self.hub = getcurrent()
        self.running: Actor | None = None
        self.injected: Counter[str] = Counter()
        self.story: list[str] = []
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def chance(self, name: str) -> random.Random:
        """A stream of its own, so that a fault left out changes little else."""
        return random.Random(f"{self.seed}/{name}")

    def tell(self, text: str) -> None:
        """A line of the history's story."""
        self.story.append(f"{self.now_secs - T0_SECS:8.3f}  {text}")

    def inject(self, kind: str, text: str) -> None:
        self.injected[kind] += 1
        self.tell(f"!! {kind}: {text}")

    def at(self, secs: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (secs, next(self._order), event))

    def after(self, secs: float, event: Callable[[], object]) -> None:
        self.at(self.now_secs + secs, event)

    def run(self, until_secs: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Lets things happen; returns whether `done` became true before the time was over."""
        while self._events and self._events[0][0] <= until_secs:
            secs, _, event = heapq.heappop(self._events)
            self.now_secs = max(self.now_secs, secs)
            event()
            if done():
                return True
        self.now_secs = max(self.now_secs, until_secs)
        return done()

    def spawn(self, process: Process, name: str, main: Callable[[], None]) -> Actor:
        actor = Actor(self, process, name, main)
        process.actors.append(actor)
        return actor

    def kill(self, process: Process) -> None:
        process.alive = False
        for actor in process.actors:
            actor.kill()

    def pause(self, secs: float) -> None:
        """The running actor waits, whatever wakes it meanwhile."""
        assert self.running is not None
        actor, until = self.running, self.now_secs + secs
        while self.now_secs < until:
            actor.wait(until - self.now_secs)

    def outside(self, process: Process) -> None:
        """Every double asks first: a killed process reaches nothing."""
        if not process.alive:
            raise Killed


class SimClock:
    """The clocks of one process; fulfils `tss.clock.Clock`."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    def now(self) -> Now:
        secs = self._world.now_secs
        return Now(int((secs + self._process.skew_secs) * 1000), secs)

    def sleep(self, secs: float) -> None:
        self._world.outside(self._process)
        self._world.pause(secs)

    def wait(self, stop: threading.Event, secs: float) -> bool:
        self._world.outside(self._process)
        if not stop.is_set():
            self._world.pause(secs)
        return stop.is_set()
