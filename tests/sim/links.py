"""The way to Redis: connections on which requests and answers take time, get lost, or arrive late.

`Link` and `Buffer` run unchanged above `Connection`, which stands for redis-py's and for its socket. What was
sent is delivered even when the sender has died or given up meanwhile, unless the server restarted in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from redis import crc

from tests.sim import resp
from tests.sim.redis import FSYNC_SECS, Server, Session
from tests.sim.world import Actor, Process, World
from tss import config
from tss.buffer import Link, Node

SHARDS = 2
LATENCY_SECS = (0.0001, 0.004)
RESTART_SECS = 0.5
SPLIT_SHARE = 0.1  # of the requests of several commands: others are served in between


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to one request to come: `cut` (a part of it arrives, then the connection breaks), `deaf` (done,
    but the answer is lost) or `late` (the sender gives up, and only then it arrives)."""

    kind: str
    share: float = 1.0
    secs: float = 0.0


@dataclass
class Nodes:
    """All servers of Redis, and the network before them."""

    world: World
    servers: list[Server]
    slow_until: float = 0.0
    down_until: dict[int, float] = field(default_factory=dict)
    troubles: deque[Trouble] = field(default_factory=deque)
    link: ClassVar[type[Link]] = Link

    @classmethod
    def new(cls, world: World, count: int, *, waits: bool) -> Nodes:
        chance = world.chance("redis clocks")
        servers = []
        for number in range(count):
            skew = chance.uniform(-0.2, 0.2) if count > 1 else 0.0
            server = Server(lambda skew=skew: world.now_secs + skew, number, waits)  # type: ignore[misc]
            servers.append(server)
        if count > 1:
            for server in servers:
                server.slots = lambda: _slots(count)
        return cls(world, servers)

    def opener(self, process: Process) -> Callable[[config.Redis, Node | None], Link]:
        """What `Buffer` takes for `link`."""

        def open_link(settings: config.Redis, node: Node | None) -> Link:
            number = node[1] if node else 0
            return self.link(Connection(self, number, process), settings.connection_timeout_secs)

        return open_link

    def is_down(self, number: int) -> bool:
        return self.world.now_secs < self.down_until.get(number, 0.0)

    def restart(self, number: int, lost_share: float, down_secs: float) -> int:
        lost = self.servers[number].restart(lost_share)
        self.down_until[number] = self.world.now_secs + down_secs
        return lost


def _slots(count: int) -> list[Any]:
    """A node serves every other shard."""
    slots = [crc.key_slot(b"{tss:%d}:" % shard) for shard in range(SHARDS)]
    return [[slot, slot, [b"node", i % count, b"id%d" % (i % count)]] for i, slot in enumerate(slots)]


class Connection:
    """What redis-py's connection is to `Link`: it opens a socket, and is that socket here."""

    def __init__(self, nodes: Nodes, number: int, process: Process) -> None:
        self._nodes = nodes
        self._world = nodes.world
        self._number = number
        self._process = process
        self._chance = self._world.chance(f"connection {process.name} {self._world.now_secs}")
        self._session = Session()
        self._inbox = b""
        self._fault: Exception | None = None
        self._sent_secs = self._heard_secs = 0.0  # neither way overtakes itself
        self._timeout_secs = 0.0
        self._run = 0
        self._reader: Actor | None = None
        self._sock = self

    @property
    def _server(self) -> Server:
        return self._nodes.servers[self._number]

    def connect(self) -> None:
        self._world.outside(self._process)
        self._world.pause(self._latency())
        self._world.outside(self._process)
        if self._nodes.is_down(self._number):
            raise ConnectionRefusedError("connection refused")
        self._run = self._server.run

    def another(self) -> Connection:
        """A new one to the same server."""
        return Connection(self._nodes, self._number, self._process)

    def disconnect(self) -> None:
        self._fault = self._fault or ConnectionError("closed")

    def settimeout(self, secs: float) -> None:
        self._timeout_secs = secs

    def sendall(self, data: bytes) -> None:
        self._world.outside(self._process)
        commands = resp.parsed(data)
        troubles = self._nodes.troubles
        trouble = troubles.popleft() if troubles else Trouble("")
        delay = self._latency()
        if trouble.kind:
            name = commands[0][0].decode()
            self._world.inject(f"redis_{trouble.kind}", f"{self._process.name}: {name} …")
            self._world.after(delay + self._latency(), lambda: self._broken("the answer was lost"))
        if trouble.kind == "cut":
            commands = commands[: round(len(commands) * trouble.share)]
        if trouble.kind == "late":
            delay += trouble.secs
        self._sent_secs = max(self._sent_secs, self._world.now_secs + delay)
        self._world.at(self._sent_secs, lambda: self._deliver(deque(commands)))

    def _latency(self) -> float:
        return self._chance.uniform(*LATENCY_SECS) + max(0.0, self._nodes.slow_until - self._world.now_secs)

    def _broken(self, why: str) -> None:
        self._fault = self._fault or ConnectionResetError(why)
        if self._reader is not None:
            self._reader.wake()

    def _deliver(self, commands: deque[list[bytes]]) -> None:
        """The server serves them; a wait for its disk, or other connections' requests, may come in between."""
        if self._nodes.is_down(self._number) or self._server.run != self._run:
            self._broken("connection reset")
            return
        split = self._chance.random() < SPLIT_SHARE
        replies = []
        while commands:
            replies.append(self._server.execute(self._session, commands.popleft()))
            following = commands[0][0] if commands else b""
            if following == b"WAITAOF" or (split and following and self._chance.random() < 0.2):
                delay = self._chance.uniform(0, FSYNC_SECS) if following == b"WAITAOF" else self._latency()
                self._world.after(delay, lambda: self._deliver(commands))
                break
        answer = b"".join(map(resp.encoded, replies))
        self._heard_secs = max(self._heard_secs, self._world.now_secs + self._latency())
        self._world.at(self._heard_secs, lambda: self._arrive(answer))

    def _arrive(self, answer: bytes) -> None:
        if self._fault is not None or self._nodes.is_down(self._number) or self._server.run != self._run:
            self._broken("connection reset")
            return
        self._inbox += answer
        if self._reader is not None:
            self._reader.wake()

    def recv(self, _: int) -> bytes:
        self._world.outside(self._process)
        until = self._world.now_secs + self._timeout_secs
        while not self._inbox:
            if self._fault is not None:
                raise self._fault
            if self._world.now_secs >= until:
                raise TimeoutError("timed out")
            self._reader = self._world.running
            assert self._reader is not None
            self._reader.wait(until - self._world.now_secs)
            self._reader = None
            self._world.outside(self._process)
        received, self._inbox = self._inbox, b""
        return received
