"""Redis in memory: the commands that tss uses, its real scripts run by Lua 5.1, and a disk that lags behind.

Runs the same suite as the real servers (tests/test_buffer.py), over `tests.sim.resp`.

The append-only file is a list of units, each of which Redis writes whole: a command, a transaction, or the writes of
one script. What is younger than the last fsync may be gone after a restart, from any unit on.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lupa import lua51
from redis.exceptions import ResponseError

from tss.packing import dictionary_of

FSYNC_SECS = 2.0  # appendfsync everysec: what is older is on disk
USED_MEMORY_BASE = 1 << 20
OUT_OF_MEMORY = "OOM command not allowed when used memory > 'maxmemory'."

Value = Any  # bytes, a hash, a set, or a sorted set
Reply = Any


class Ok(bytes):
    """A status reply; Lua sees it as a table."""


OK = Ok(b"OK")
QUEUED = Ok(b"QUEUED")


@dataclass(frozen=True, slots=True)
class Unit:
    """Writes that reach the disk together, and when they were made."""

    at_secs: float
    writes: tuple[tuple[bytes, ...], ...]


# --- data --------------------------------------------------------------------------------------------------------


def _bytes(part: Any) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return part.encode()
    return repr(part).encode()


def _score(text: bytes) -> float:
    return float(text)


def _shown(score: float) -> bytes:
    return b"%d" % score if score == int(score) else repr(score).encode()


class Store:
    """Keys and commands, without a clock of its own. Every command is a method of its name in lower case."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.keys: dict[bytes, Value] = {}
        self.expiries: dict[bytes, int] = {}
        self._now_ms = now_ms
        self.touched: Counter[bytes] = Counter()  # strings, which are all that is ever watched
        self.written: list[tuple[bytes, ...]] = []

    # Writes with their arguments are kept for the disk; a relative expiry is kept as an absolute one, as Redis does.
    def run(self, command: Sequence[bytes]) -> Reply:
        """Raises ResponseError as the server would answer it."""
        name = command[0].upper()
        method = METHODS.get(name)
        if method is None:
            raise ResponseError(f"ERR unknown command '{name.decode()}'")
        if self.expiries:
            self._expire()
        if name in WRITES:
            if name == b"PEXPIRE":
                command = (b"PEXPIREAT", command[1], b"%d" % (self._now_ms() + int(command[2])))
                method = Store.pexpireat
            if name == b"SET" and b"PX" in command[3:]:
                command = (*command[:3], b"PXAT", b"%d" % (self._now_ms() + int(command[4])))
            self.written.append(tuple(command))
        return method(self, *command[1:])

    def _expire(self) -> None:
        now = self._now_ms()
        for key in [key for key, at in self.expiries.items() if at <= now]:
            del self.expiries[key]
            self.keys.pop(key, None)

    def _changed(self, key: bytes) -> None:
        """An empty collection is no key."""
        if not self.keys[key]:
            del self.keys[key]
            self.expiries.pop(key, None)

    # keys

    def exists(self, *keys: bytes) -> int:
        return sum(key in self.keys for key in keys)

    def delete(self, *keys: bytes) -> int:
        for key in keys:
            self.expiries.pop(key, None)
            self.touched[key] += key in self.keys
        return sum(self.keys.pop(key, None) is not None for key in keys)

    def renamenx(self, old: bytes, new: bytes) -> int:
        if old not in self.keys:
            raise ResponseError("ERR no such key")
        if new in self.keys:
            return 0
        self.keys[new] = self.keys.pop(old)
        return 1

    def pexpireat(self, key: bytes, at_ms: bytes) -> int:
        if key not in self.keys:
            return 0
        self.expiries[key] = int(at_ms)
        return 1

    def rename(self, old: bytes, new: bytes) -> Ok:
        self.keys[new] = self.keys.pop(old)
        return OK

    def persist(self, key: bytes) -> int:
        return int(self.expiries.pop(key, None) is not None)

    def pttl(self, key: bytes) -> int:
        if key not in self.keys:
            return -2
        return self.expiries[key] - self._now_ms() if key in self.expiries else -1

    def flushall(self, *_: bytes) -> Ok:
        self.touched.update(self.keys.keys())
        self.keys.clear()
        self.expiries.clear()
        return OK

    def scan(self, _: bytes, *options: bytes) -> list[Any]:
        from fnmatch import fnmatchcase

        given = dict(zip((o.upper() for o in options[::2]), options[1::2], strict=True))
        pattern = _glob(given.get(b"MATCH", b"*"))
        return [b"0", [key for key in self.keys if fnmatchcase(key.decode("latin-1"), pattern)]]

    # strings

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self.keys.get(key)
        return value

    def set(self, key: bytes, value: bytes, *options: bytes) -> Any:
        words = [option.upper() for option in options]
        before = self.keys.get(key)
        if b"NX" not in words or before is None:
            self.keys[key] = value
            self.touched[key] += 1
            self.expiries.pop(key, None)
            if b"EX" in words:
                self.expiries[key] = self._now_ms() + 1000 * int(options[words.index(b"EX") + 1])
            if b"PXAT" in words:
                self.expiries[key] = int(options[words.index(b"PXAT") + 1])
        if b"GET" in words:
            return before
        return OK if b"NX" not in words or before is None else None

    def mget(self, *keys: bytes) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def mset(self, *pairs: bytes) -> Ok:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self.set(key, value)
        return OK

    def incrby(self, key: bytes, by: bytes) -> int:
        value = int(self.keys.get(key, b"0")) + int(by)
        self.keys[key] = b"%d" % value
        return value

    def decrby(self, key: bytes, by: bytes) -> int:
        return self.incrby(key, b"%d" % -int(by))

    # hashes

    def hset(self, key: bytes, *pairs: bytes) -> int:
        fields = self.keys.setdefault(key, {})
        before = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - before

    def hsetnx(self, key: bytes, name: bytes, value: bytes) -> int:
        fields = self.keys.setdefault(key, {})
        if name in fields:
            return 0
        fields[name] = value
        return 1

    def hget(self, key: bytes, name: bytes) -> bytes | None:
        value: bytes | None = self.keys.get(key, {}).get(name)
        return value

    def hmget(self, key: bytes, *names: bytes) -> list[bytes | None]:
        return [self.hget(key, name) for name in names]

    def hgetall(self, key: bytes) -> list[bytes]:
        return [part for pair in self.keys.get(key, {}).items() for part in pair]

    def hkeys(self, key: bytes) -> list[bytes]:
        return list(self.keys.get(key, ()))

    def hlen(self, key: bytes) -> int:
        return len(self.keys.get(key, ()))

    def hexists(self, key: bytes, name: bytes) -> int:
        return int(name in self.keys.get(key, ()))

    def hdel(self, key: bytes, *names: bytes) -> int:
        fields = self.keys.get(key)
        if fields is None:
            return 0
        removed = sum(fields.pop(name, None) is not None for name in names)
        self._changed(key)
        return removed

    # sets

    def sadd(self, key: bytes, *members: bytes) -> int:
        held = self.keys.setdefault(key, {})  # a dict, for its order
        before = len(held)
        held.update(dict.fromkeys(members, True))
        return len(held) - before

    def srem(self, key: bytes, *members: bytes) -> int:
        return self.hdel(key, *members)

    def smembers(self, key: bytes) -> list[bytes]:
        return list(self.keys.get(key, ()))

    # sorted sets

    def zadd(self, key: bytes, *arguments: bytes) -> int:
        at = 0
        while arguments[at].upper() in (b"GT", b"LT", b"XX", b"NX"):
            at += 1
        flags = {flag.upper() for flag in arguments[:at]}
        scores = self.keys.get(key, {})
        added = 0
        for text, member in zip(arguments[at::2], arguments[at + 1 :: 2], strict=True):
            score, held = _score(text), scores.get(member)
            if held is None:
                if b"XX" not in flags:
                    scores[member] = score
                    added += 1
            elif not (
                b"NX" in flags or (b"GT" in flags and score <= held) or (b"LT" in flags and score >= held)
            ):
                scores[member] = score
        if scores:
            self.keys[key] = scores
        return added

    def zrem(self, key: bytes, *members: bytes) -> int:
        return self.hdel(key, *members)

    def zscore(self, key: bytes, member: bytes) -> bytes | None:
        score = self.keys.get(key, {}).get(member)
        return None if score is None else _shown(score)

    def zcard(self, key: bytes) -> int:
        return len(self.keys.get(key, ()))

    def zcount(self, key: bytes, low: bytes, high: bytes) -> int:
        return len(self._between(key, low, high))

    def zrange(self, key: bytes, start: bytes, stop: bytes, *options: bytes) -> list[bytes]:
        words = [option.upper() for option in options]
        if b"BYSCORE" in words:
            found = self._between(key, start, stop)
            if b"LIMIT" in words:
                at = words.index(b"LIMIT")
                skip, count = int(options[at + 1]), int(options[at + 2])
                found = found[skip : skip + count] if count >= 0 else found[skip:]
        else:
            first, last = int(start), int(stop)
            ordered = self._ordered(key)
            last += len(ordered) if last < 0 else 0
            found = ordered[first : last + 1]
        if b"WITHSCORES" in words:
            return [part for score, member in found for part in (member, _shown(score))]
        return [member for _, member in found]

    def _ordered(self, key: bytes) -> list[tuple[float, bytes]]:
        return sorted((score, member) for member, score in self.keys.get(key, {}).items())

    def _between(self, key: bytes, low: bytes, high: bytes) -> list[tuple[float, bytes]]:
        first, last = _score(low.lstrip(b"(")), _score(high.lstrip(b"("))
        return [
            (score, member)
            for score, member in self._ordered(key)
            if first <= score <= last
            and not (low[:1] == b"(" and score == first)
            and not (high[:1] == b"(" and score == last)
        ]


def _glob(pattern: bytes) -> str:
    """Redis escapes with a backslash, fnmatch with brackets."""
    text, out, at = pattern.decode("latin-1"), "", 0
    while at < len(text):
        if text[at] == "\\":
            at += 1
            out += f"[{text[at]}]" if text[at] != "!" else "!"
        else:
            out += text[at]
        at += 1
    return out


METHODS: dict[bytes, Callable[..., Reply]] = {
    name.upper().encode(): getattr(Store, name)
    for name in (
        *(
            "exists",
            "renamenx",
            "rename",
            "pexpireat",
            "persist",
            "pttl",
            "flushall",
            "scan",
            "get",
            "set",
            "mget",
            "mset",
            "incrby",
        ),
        *(
            "decrby",
            "hset",
            "hsetnx",
            "hget",
            "hmget",
            "hgetall",
            "hkeys",
            "hlen",
            "hexists",
            "hdel",
            "sadd",
            "srem",
        ),
        *("smembers", "zadd", "zrem", "zscore", "zcard", "zcount", "zrange"),
    )
}
METHODS |= {b"DEL": Store.delete, b"UNLINK": Store.delete, b"PEXPIRE": Store.pexpireat}
WRITES = frozenset(
    (
        *(
            b"RENAMENX",
            b"RENAME",
            b"PEXPIREAT",
            b"PEXPIRE",
            b"PERSIST",
            b"FLUSHALL",
            b"SET",
            b"MSET",
            b"INCRBY",
            b"DECRBY",
            b"HSET",
        ),
        *(b"HSETNX", b"HDEL", b"SADD", b"SREM", b"ZADD", b"ZREM", b"DEL", b"UNLINK"),
    )
)
GROWING = frozenset(
    (b"SET", b"MSET", b"INCRBY", b"HSET", b"HSETNX", b"SADD", b"ZADD")
)  # refused when memory is full


# --- scripts -----------------------------------------------------------------------------------------------------


class Scripts:
    """Redis' Lua. One interpreter serves all servers of this process: `call` is set for the time of a script."""

    def __init__(self) -> None:
        self._lua = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self._functions: dict[str, Any] = {}
        self._call: Callable[[Sequence[bytes]], Reply] | None = None
        lua: Any = self._lua
        self._table: Any = lua.table
        make: Any = lua.eval(
            b"function(call, pcall, pack, unpack)"
            b" redis = {call = function(...) return call(...) end, pcall = function(...) return pcall(...) end}"
            b" struct = {pack = function(...) return pack(...) end, unpack = function(...) return unpack(...) end}"
            b" end"
        )
        make(self._from_lua_call, self._from_lua_pcall, _pack, _unpack)

    def load(self, sha: str, text: str) -> None:
        if sha not in self._functions:
            body = text.partition("\n")[2] if text.startswith("#!") else text
            self._functions[sha] = self._lua.eval(f"function(KEYS, ARGV) {body}\nend".encode())

    def run(self, sha: str, keys: Sequence[bytes], arguments: Sequence[bytes], call: Any) -> Reply:
        function = self._functions[sha]
        self._call = call
        try:
            return self._reply(function(self._table(*keys), self._table(*arguments)))
        finally:
            self._call = None

    def _from_lua_call(self, *parts: Any) -> Any:
        assert self._call is not None
        return self._to_lua(self._call([_bytes(part) for part in parts]))

    def _from_lua_pcall(self, *parts: Any) -> Any:
        try:
            return self._from_lua_call(*parts)
        except ResponseError as error:
            return self._lua.table_from({b"err": str(error).encode()})

    def _to_lua(self, reply: Reply) -> Any:
        if reply is None:
            return False
        if isinstance(reply, list):
            return self._table(*(self._to_lua(part) for part in reply))
        if isinstance(reply, Ok):
            return self._lua.table_from({b"ok": bytes(reply)})
        return reply

    def _reply(self, value: Any) -> Reply:
        """A table ends at its first hole; false is null; fractions are cut off."""
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, float):
            return int(value)
        if isinstance(value, int | bytes):
            return value
        out = []
        at = 1
        while (part := value[at]) is not None:
            out.append(self._reply(part))
            at += 1
        return out


_FORMATS = {
    form: struct.Struct(ours)
    for form, ours in {b"<I4": "<I", b"<i8": "<q", b"<i8I4": "<qI", b"<c16I4I4": "<16sII"}.items()
}


def _pack(form: bytes, *values: Any) -> bytes:
    return _FORMATS[form].pack(*(value if isinstance(value, bytes) else int(value) for value in values))


def _unpack(form: bytes, data: bytes, at: int = 1) -> tuple[Any, ...]:
    """The values, and where they end."""
    found = _FORMATS[form]
    return (*found.unpack_from(data, int(at) - 1), int(at) + found.size)


SCRIPTS = Scripts()


# --- the server --------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """What the server keeps of one connection."""

    queued: list[Sequence[bytes]] | None = None
    refused: bool = False
    watched: dict[bytes, int] = field(default_factory=dict)


@dataclass
class Server:
    """One node. `now_secs` is its clock; connections call `execute` with a command after the other."""

    now_secs: Callable[[], float]
    number: int = 0
    waits: bool = False
    slots: Callable[[], list[Any]] | None = None
    run: int = 0
    full: bool = False
    budget_bytes: int = 1 << 30
    scripts: set[str] = field(default_factory=set)
    transactions: int = 0

    def __post_init__(self) -> None:
        self.store = Store(self.now_ms)
        self.disk: list[Unit] = []
        self.synced = 0  # units that WAITAOF vouched for

    def now_ms(self) -> int:
        return int(self.now_secs() * 1000)

    @property
    def run_id(self) -> str:
        return f"{self.number:x}{self.run:039x}"

    # --- crash and loss ---

    def restart(self, lost_share: float) -> int:
        """A new run, from what is on disk; `lost_share` of the units that may be lost are. Returns how many."""
        sure_until = self.now_secs() - FSYNC_SECS
        sure = max(self.synced, sum(unit.at_secs <= sure_until for unit in self.disk))
        kept = len(self.disk) - round((len(self.disk) - sure) * lost_share)
        lost = len(self.disk) - kept
        del self.disk[kept:]
        self.synced = min(self.synced, kept)
        self.store = Store(self.now_ms)
        for unit in self.disk:
            for write in unit.writes:
                METHODS[write[0].upper()](self.store, *write[1:])
        self.scripts.clear()
        self.run += 1
        return lost

    def wipe(self) -> None:
        """Somebody emptied it; the run goes on."""
        self.store.flushall()
        self.disk.clear()
        self.synced = 0

    # --- commands ---

    def execute(self, session: Session, parts: Sequence[bytes]) -> Reply:
        """One command of a connection; errors come back as values, as on the wire."""
        name = parts[0].upper()
        try:
            if name == b"MULTI":
                session.queued, session.refused = [], False
                return OK
            if name == b"EXEC":
                return self._exec(session)
            if name == b"WATCH":
                session.watched |= {key: self.store.touched[key] for key in parts[1:]}
                return OK
            if session.queued is not None:
                if self.full and name in GROWING:
                    session.refused = True
                    return ResponseError(OUT_OF_MEMORY)
                session.queued.append(parts)
                return QUEUED
            return self._unit(lambda: self._one(name, parts))
        except ResponseError as error:
            return error

    def _exec(self, session: Session) -> Reply:
        queued, session.queued = session.queued, None
        watched, session.watched = session.watched, {}
        if queued is None:
            return ResponseError("ERR EXEC without MULTI")
        if session.refused:
            return ResponseError("EXECABORT Transaction discarded because of previous errors.")
        if any(self.store.touched[key] != times for key, times in watched.items()):
            return None
        self.transactions += 1
        return self._unit(lambda: [self.store.run(parts) for parts in queued])

    def _unit(self, work: Callable[[], Reply]) -> Reply:
        try:
            return work()
        finally:
            if self.store.written:
                self.disk.append(Unit(self.now_secs(), tuple(self.store.written)))
                self.store.written.clear()

    def _one(self, name: bytes, parts: Sequence[bytes]) -> Reply:
        match name:
            case b"EVALSHA":
                return self._script(parts)
            case b"EVAL":
                return self._script((name, self._load(parts[1].decode()), *parts[2:]))
            case b"TIME":
                millis = self.now_ms()
                return [b"%d" % (millis // 1000), b"%d" % (millis % 1000 * 1000)]
            case b"INFO":
                return self._info(parts[1] if len(parts) > 1 else b"")
            case b"SCRIPT":
                return self._load(parts[2].decode())
            case b"CONFIG":
                return [parts[2], CONFIG[parts[2]]]
            case b"WAITAOF":
                if not self.waits:
                    raise ResponseError("ERR unknown command 'WAITAOF'")
                self.synced = len(self.disk)
                return [1, 0]
            case b"CLUSTER":
                if self.slots is None:
                    raise ResponseError("ERR This instance has cluster support disabled")
                return self.slots()
            case b"PING":
                return Ok(b"PONG")
        if self.full and name in GROWING:
            raise ResponseError(OUT_OF_MEMORY)
        return self.store.run(parts)

    def _script(self, parts: Sequence[bytes]) -> Reply:
        sha, count = parts[1].decode(), int(parts[2])
        if sha not in self.scripts:
            raise ResponseError("NOSCRIPT No matching script. Please use EVAL.")
        keys, arguments = parts[3 : 3 + count], parts[3 + count :]
        return SCRIPTS.run(sha, keys, arguments, self._called)

    def _called(self, parts: Sequence[bytes]) -> Reply:
        if parts[0] == b"TIME":
            return self._one(b"TIME", parts)
        return self.store.run(parts)

    def _load(self, text: str) -> bytes:
        import hashlib

        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        SCRIPTS.load(sha, text)
        self.scripts.add(sha)
        return sha.encode()

    def _info(self, section: bytes) -> bytes:
        lines: dict[str, object] = {
            "run_id": self.run_id,
            "used_memory": self.used_memory if section == b"memory" else 0,
            "maxmemory": self.budget_bytes,
            "total_system_memory": 8 << 30,
            "cmdstat_exec": f"calls={self.transactions}",
        }
        return "\r\n".join(f"{name}:{value}" for name, value in lines.items()).encode()

    @property
    def used_memory(self) -> int:
        return USED_MEMORY_BASE + sum(
            len(key) + sum(map(_size, value.items() if isinstance(value, dict) else (value,)))
            for key, value in self.store.keys.items()
        )


def _size(part: Any) -> int:
    if isinstance(part, tuple):
        return sum(map(_size, part))
    return len(part) if isinstance(part, bytes) else 8


CONFIG = {
    b"appendonly": b"yes",
    b"appendfsync": b"everysec",
    b"no-appendfsync-on-rewrite": b"no",
    b"maxmemory-policy": b"noeviction",
}


# --- the law of this store ---------------------------------------------------------------------------------------


def faults(servers: Iterable[Server], shards: int) -> list[str]:
    """Every key has an owner, or expires, or is one of a fixed few; no index points nowhere."""
    keys = {key: (server, value) for server in servers for key, value in server.store.keys.items()}
    found: list[str] = []
    for shard in range(shards):
        tag = b"{tss:%d}:" % shard
        mine = {key[len(tag) :]: key for key in keys if key.startswith(tag)}

        def members(name: bytes, tag: bytes = tag) -> set[bytes]:
            return set(keys[tag + name][1]) if tag + name in keys else set()

        seen, born, root, opened = (members(name) for name in (b"seen", b"born", b"root", b"open"))
        claimed = {i for name in opened for i in members(b"c:" + name)}
        pending = {name[2:] for name in mine if name[:2] == b"t:"}
        renamed = {name[2:] for name in mine if name[:2] == b"x:"}
        where = f"shard {shard}: "
        found += [f"{where}pending, in no index: {i.hex()}" for i in pending - (seen & born)]
        found += [f"{where}claimed by nobody: {i.hex()}" for i in renamed - (claimed & born)]
        found += [
            f"{where}index points nowhere: {i.hex()}"
            for i in (seen | root) - pending | born - pending - renamed
        ]
        found += [f"{where}open without a claim: {name!r}" for name in opened if b"c:" + name not in mine]
        for name, key in mine.items():
            expires = key in keys[key][0].store.expiries
            match name[:2]:
                case b"t:" | b"x:":
                    fine = not expires
                    needed = {dictionary_of(payload) for payload in keys[key][1].values()} - {0}
                    found += [
                        f"{where}no dictionary {i} for {name!r}" for i in needed if b"z:%d" % i not in mine
                    ]
                case b"z:":
                    fine = not expires
                case b"c:":
                    fine = name[2:] in opened and not expires
                case b"d:":
                    fine = expires or name[2:] in claimed
                case _:
                    fine = expires == (name == b"next-epoch") and name in FIXED
            if not fine:
                found.append(f"{where}neither owned nor expiring: {name!r}")
    return found


FIXED = frozenset(
    (b"seen", b"born", b"root", b"open", b"live", b"clock", b"spans", b"epoch", b"next-epoch", b"packing")
)
