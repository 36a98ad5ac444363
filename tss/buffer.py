"""Redis: where traces wait. All key names and scripts are here, and what must be atomic is atomic here.

Keys are cut into shards by trace id; all keys of shard n carry the tag `{tss:n}`, so each shard lives on one node of
a Redis Cluster. Every shard is complete in itself: one MULTI or one script on one shard is the unit of atomicity.

    {tss:n}:t:<id>     hash    a pending trace: field = facts + records of a chunk, value = its payload
    {tss:n}:x:<id>     hash    the same hash after it was claimed; at most one open claim a trace
    {tss:n}:seen       zset    pending trace → newest log time (GT)
    {tss:n}:born       zset    trace, pending or claimed → oldest log time (LT); its minimum is `low`
    {tss:n}:root       zset    pending trace whose root span is in → log time; only with a root timer
    {tss:n}:big        zset    pending trace over a size limit → log time; judged at once
    {tss:n}:c:<w>:<s>  hash    claimed by writer w in sequence s: id → trigger; `!` after it: TURN has settled it
    {tss:n}:open       set     <w>:<s> of every claim hash that exists
    {tss:n}:d:<id>     string  verdict, then for each sequence what landed and when (`_JUDGED`)
    {tss:n}:live       zset    writer → lease expiry; who is not in it may not write
    {tss:n}:clock      hash    partition → "<log time> <stamp> <epoch>"
    {tss:n}:spans      string  spans pending or claimed
    {tss:n}:epoch      string  the life of this Redis; absent = wiped
    {tss:n}:z:<id>     string  a dictionary that payloads of this shard are packed with (`tss.packing`)
    {tss:0}:packing    string  id of the dictionary that the fleet packs with

Payload keys have no expiry, ever: they have an owner. Dictionaries have none either, as payloads need them. Verdicts
expire once released; nothing else outlives its use.
Where spans come late for ever, a verdict does not expire, but what landed longer ago than its time is forgotten.

A connection belongs to one run of one server. redis-py's clients reconnect and retry by themselves, which would
publish a clock over spans the server lost; so connections are driven by hand here, and a missing answer ends them
(`LinkLost`). Lua is used where a decision must be atomic with what it reads, and not for bulk writes, where it would
double the server's work. What a script costs is the calls it makes, so it asks and writes for a thousand traces at
once: of each trace alone there is a rename when it is claimed, and a verdict with its expiry when it is released.
Rejected: read-then-delete (a span between the two is lost; claiming renames instead), one key a span (a round trip
each), eviction and TTLs on payloads (they lose silently), a hash a verdict (no command writes many of them).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import hiredis
import numpy as np
from numpy.typing import NDArray
from redis import crc
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.exceptions import AuthenticationError, MovedError, OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry

from tss import config, crashpoints, resp
from tss.clock import SYSTEM, Clock
from tss.errors import ConfigError, Fenced, LinkLost, Unavailable
from tss.model import ROOT, Chunks, Claimed, Trigger, Verdict, decode_origins
from tss.packing import Dictionary, Packing, Training, Unpacking
from tss.resp import ChunkWrites, Command, Placed, Request

log = logging.getLogger("tss")

Node = tuple[str, int]

LAG_SECS = 3.0  # appendfsync everysec: written to disk within 2 s; one more for a busy disk
WAITAOF_TIMEOUT_MS = 10_000
RECEIVE_BYTES = 1 << 18
ID_BYTES = 16
SIZE = struct.Struct("<I")  # these three as the scripts read and write them
LANDING_HEAD = struct.Struct("<qI")
HELD_HEAD = struct.Struct("<II")
NOTHING_LANDED: frozenset[tuple[int, int]] = frozenset()
DICTIONARY_LOOK_SECS = 5.0  # how often a reader without one asks whether the fleet has one
GUARD_COMMANDS = 2  # in front of a transaction that needs a dictionary
DICTIONARY_TRIES = 3  # of a batch; a copy that is gone again so often is being deleted by somebody
# What a server says while it reads its data, waits for its master or runs a long script; anything else is for people.
PASSING_REFUSALS = ("LOADING ", "BUSY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN ", "READONLY ", "MISCONF ")
MEMORY_SHARE_OF_MAXMEMORY = 0.8
MEMORY_SHARE_OF_SYSTEM = 0.5  # without a maxmemory: leave room for the fork of an AOF rewrite
COVERAGE_BYTES_KEPT = 4 << 10  # of a verdict, however old: looking at each sequence each time would not pay
OPEN_CLAIMS_SCANNED = 4  # times the claim limit: how far past claimed traces the duration timer looks


# --- scripts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Script:
    text: str

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


# A script that empties memory must run when memory is full; it also makes every key's shard tag count.
_FULL_MEMORY = "#!lua flags=allow-oom"

_GUARD = """
if not redis.call('ZSCORE', tag .. 'live', ARGV[2]) then return {'fenced', 'lease'} end
if redis.call('GET', tag .. 'epoch') ~= ARGV[3] then return {'fenced', 'epoch'} end
"""

# One command for many, in pieces: what Lua can pass on at once is bounded. A call costs more than what it does, and each
# write goes to the log of the server by itself.
_BULK = """
local function pieces(command, arguments, list, answered)
  local first = #arguments
  for i = 1, #list, 1000 do
    local last = math.min(i + 999, #list)
    for j = i, last do arguments[first + 1 + j - i] = list[j] end
    answered(redis.call(command, unpack(arguments, 1, first + 1 + last - i)))
  end
end

local function bulk(command, arguments, list)
  local sum = 0
  pieces(command, arguments, list, function(answer) sum = sum + answer end)
  return sum
end

-- The answers of a command that gives one to each.
local function each(command, arguments, list)
  local out = {}
  pieces(command, arguments, list, function(answers)
    for _, answer in ipairs(answers) do out[#out + 1] = answer end
  end)
  return out
end

local function named(prefix, ids)
  local keys = {}
  for i = 1, #ids do keys[i] = tag .. prefix .. ids[i] end
  return keys
end
"""

# A verdict's key: the size of its text, the text, and for each sequence when it landed, the size of its coded records,
# and these.
_JUDGED = """
local function judged(value)
  local size = struct.unpack('<I4', value)
  return string.sub(value, 5, 4 + size), string.sub(value, 5 + size)
end

local function joined(verdict, landed) return struct.pack('<I4', #verdict) .. verdict .. landed end

-- Each landing, from the oldest on: when, its records, where it begins and ends.
local function landings(landed)
  local at = 1
  return function()
    if at > #landed then return nil end
    local when, size = struct.unpack('<i8I4', landed, at)
    local first = at
    at = at + 12 + size
    return when, string.sub(landed, first + 12, at - 1), first, at - 1
  end
end

local function landing(when, records)
  if records == '' then return '' end
  return struct.pack('<i8I4', when, #records) .. records
end
"""

# Step 7. The clock is read in the script: a claim between two readers' batches must see both or neither.
CLAIM = Script(
    _FULL_MEMORY
    + """
local tag = ARGV[1]
"""
    + _GUARD
    + _BULK
    + """
local claim, name = ARGV[4], ARGV[5]
local partitions, inactivity, root_wait = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local duration, limit, pressure = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local stall, since, scanned = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local entries = {}
local raw = redis.call('HGETALL', tag .. 'clock')
for i = 1, #raw, 2 do entries[raw[i]] = raw[i + 1] end
local clock, waiting, stalled = now, {}, {}
for p = 0, partitions - 1 do
  local reached, stamp, epoch = string.match(entries[tostring(p)] or '', '^(%d+) (%d+) (.+)$')
  if epoch ~= ARGV[3] then
    waiting[#waiting + 1] = p
  elseif now - math.max(tonumber(stamp), since) > stall then
    stalled[#stalled + 1] = p
  else
    clock = math.min(clock, tonumber(reached))
  end
end
if partitions == 0 or #waiting > 0 or #stalled == partitions then clock = -1 end

local taken, pairs, gone = {}, {}, {}
local function take(id, trigger)
  local claimed = tag .. 'x:' .. id
  local renamed = redis.pcall('RENAMENX', tag .. 't:' .. id, claimed)
  if renamed == 0 then
    if clock >= 0 then redis.call('ZADD', tag .. 'seen', 'XX', 'GT', clock, id) end
  elseif renamed ~= 1 then
    if not string.find(renamed.err, 'no such key', 1, true) then error(renamed.err) end
    gone[#gone + 1] = id
    if redis.call('EXISTS', claimed) == 0 then redis.call('ZREM', tag .. 'born', id) end
  else
    gone[#gone + 1] = id
    for _, list in ipairs({taken, pairs}) do
      list[#list + 1] = id
      list[#list + 1] = trigger
    end
  end
end

-- After each timer, before the next one looks: the claim notes what was taken, no index names it any more.
local function settle()
  bulk('HSET', {claim}, pairs)
  for _, index in ipairs({'seen', 'root', 'big'}) do
    if #gone > 0 and redis.call('EXISTS', tag .. index) == 1 then bulk('ZREM', {tag .. index}, gone) end
  end
  pairs, gone = {}, {}
end

for _, id in ipairs(redis.call('ZRANGE', tag .. 'big', 0, limit - 1)) do take(id, 3) end
settle()
local due = 0
if clock >= 0 then
  due = redis.call('ZCOUNT', tag .. 'seen', '-inf', clock - inactivity)
  for _, id in ipairs(redis.call('ZRANGE', tag .. 'seen', '-inf', clock - inactivity, 'BYSCORE', 'LIMIT', 0, limit)) do
    take(id, 0)
  end
  settle()
  if root_wait >= 0 and #taken < 2 * limit then
    for _, id in ipairs(redis.call('ZRANGE', tag .. 'root', '-inf', clock - root_wait, 'BYSCORE', 'LIMIT', 0, limit)) do
      local seen = redis.call('ZSCORE', tag .. 'seen', id)
      if not seen then
        redis.call('ZREM', tag .. 'root', id)
      elseif tonumber(seen) <= clock - root_wait then
        take(id, 1)
      else
        redis.call('ZADD', tag .. 'root', seen, id)
      end
    end
    settle()
  end
  if #taken < 2 * limit then
    local old = redis.call('ZRANGE', tag .. 'born', '-inf', clock - duration, 'BYSCORE', 'LIMIT', 0, scanned)
    if bulk('EXISTS', {}, named('x:', old)) < #old then
      for _, id in ipairs(old) do
        if #taken >= 2 * limit then break end
        if redis.call('EXISTS', tag .. 'x:' .. id) == 0 then take(id, 2) end
      end
      settle()
    end
  end
end
if pressure > 0 and #taken < 2 * pressure then
  for _, id in ipairs(redis.call('ZRANGE', tag .. 'seen', 0, pressure - 1)) do take(id, 4) end
  settle()
end
if #taken > 0 then redis.call('SADD', tag .. 'open', name) end
return {'ok', clock, table.concat(waiting, ','), table.concat(stalled, ','), due, taken}
"""
)

# Step 9. The first verdict wins. A trace is an id and the number of its candidate among the arguments that follow. The
# answer to each: 0 the claim is gone, 1 the candidate holds and nothing landed before, else what its key holds.
RECORD = Script(
    _FULL_MEMORY
    + """
local tag = ARGV[1]
"""
    + _GUARD
    + _BULK
    + """
local claim, traces, first, ids, chosen, out = ARGV[4], ARGV[5], 6, {}, {}, {}
for at = 1, #traces, 18 do
  local high, low = string.byte(traces, at + 16, at + 17)
  ids[#ids + 1] = string.sub(traces, at, at + 15)
  chosen[#chosen + 1] = ARGV[first + high * 256 + low]
end
local keys, fresh = named('d:', ids), {}
local notes, known = each('HMGET', {claim}, ids), each('MGET', {}, keys)
for i = 1, #ids do
  if not notes[i] then
    out[i] = 0
  elseif known[i] then
    redis.call('PERSIST', keys[i])
    out[i] = known[i]
  else
    fresh[#fresh + 1], fresh[#fresh + 2] = keys[i], chosen[i]
    out[i] = 1
  end
end
pieces('MSET', {}, fresh, function() end)
return {'ok', out}
"""
)

# Step 9, where a trace was dropped and something of it landed: a new error turns it. This is settled once a sequence,
# and noted in its claim: whoever adopts it may know other rules.
TURN = Script(
    _FULL_MEMORY
    + """
local tag = ARGV[1]
"""
    + _GUARD
    + _JUDGED
    + """
local claim, out = ARGV[4], {}
for i = 5, #ARGV, 2 do
  local id, upgrade, key = ARGV[i], ARGV[i + 1], tag .. 'd:' .. ARGV[i]
  local note = redis.call('HGET', claim, id)
  local value, verdict, landed = note and redis.call('GET', key), nil, nil
  if value then
    verdict, landed = judged(value)
    if #note == 1 and string.sub(verdict, 1, 1) == '0' then
      redis.call('HSET', claim, id, note .. '!')
      if upgrade ~= '' then
        verdict = upgrade
        redis.call('SET', key, joined(verdict, landed))
      end
    end
  end
  out[#out + 1] = verdict or false
end
return {'ok', out}
"""
)

# Step 13. Coverage is written where the claim is deleted, so "covered" always means "landed". What a claim holds never
# changes, so the caller, who has read it, says it again: of each trace the id, its spans and its coded records.
RELEASE = Script(
    _FULL_MEMORY
    + """
local tag = ARGV[1]
"""
    + _GUARD
    + _BULK
    + _JUDGED
    + f"""
local claim, name, ttl, traces, ids, counts, records = ARGV[4], ARGV[5], ARGV[6], ARGV[7], {{}}, {{}}, {{}}
local at = 1
while at <= #traces do
  local id, count, size = struct.unpack('<c16I4I4', traces, at)
  ids[#ids + 1], counts[#counts + 1] = id, count
  records[#records + 1] = string.sub(traces, at + 24, at + 23 + size)
  at = at + 24 + size
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function remembered(landed)
  if #landed <= {COVERAGE_BYTES_KEPT} then return landed end
  local kept = {{}}
  for when, _, first, last in landings(landed) do
    if when >= now - ttl then kept[#kept + 1] = string.sub(landed, first, last) end
  end
  return table.concat(kept)
end

local verdicts = named('d:', ids)
local notes, values = each('HMGET', {{claim}}, ids), each('MGET', {{}}, verdicts)
local released, spans, ended = {{}}, 0, {{}}
for i = 1, #ids do
  if notes[i] then
    if values[i] then
      local verdict, landed = judged(values[i])
      local value = joined(verdict, remembered(landed) .. landing(now, records[i]))
      redis.call('SET', verdicts[i], value, 'PX', ttl)
    end
    released[#released + 1] = ids[i]
    spans = spans + counts[i]
  end
end
bulk('HDEL', {{claim}}, released)
bulk('UNLINK', {{}}, named('x:', released))
local pending = named('t:', released)
local waiting = bulk('EXISTS', {{}}, pending) > 0
for i, id in ipairs(released) do
  local oldest = nil
  for _, field in ipairs(waiting and redis.call('HKEYS', pending[i]) or {{}}) do
    local first = struct.unpack('<i8', string.sub(field, 1, 8))
    if not oldest or first < oldest then oldest = first end
  end
  if oldest then redis.call('ZADD', tag .. 'born', oldest, id) else ended[#ended + 1] = id end
end
bulk('ZREM', {{tag .. 'born'}}, ended)
if redis.call('EXISTS', tag .. 'born') == 1 then
  redis.call('DECRBY', tag .. 'spans', spans)
else
  redis.call('DEL', tag .. 'spans') -- a reader that died right after a repeated batch had counted it twice
end
if redis.call('EXISTS', claim) == 0 then redis.call('SREM', tag .. 'open', name) end
return {{'ok', #released}}
"""
)

# While a sequence waits for the table: what was dropped need not be kept in memory. Fields stay, for the release.
FREE = Script(
    _FULL_MEMORY
    + """
local tag = ARGV[1]
"""
    + _GUARD
    + _BULK
    + """
local ids, freed = {}, 0
for at = 1, #ARGV[5], 16 do ids[#ids + 1] = string.sub(ARGV[5], at, at + 15) end
for i, note in ipairs(each('HMGET', {ARGV[4]}, ids)) do
  if note then
    local key = tag .. 'x:' .. ids[i]
    for _, field in ipairs(redis.call('HKEYS', key)) do redis.call('HSET', key, field, '') end
    freed = freed + 1
  end
end
return {'ok', freed}
"""
)

# A lease is extended only for writers that still have one: a lost entry fences.
RENEW = Script(
    _FULL_MEMORY
    + """
local tag, lease = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local expiry, lost = time[1] * 1000 + math.floor(time[2] / 1000) + lease, {}
for i = 3, #ARGV do
  if redis.call('ZSCORE', tag .. 'live', ARGV[i]) then
    redis.call('ZADD', tag .. 'live', expiry, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

# Step 6: a fresh id enters with a lease; refused when the epoch is not the one its tables agreed on.
ENROLL = Script(
    _FULL_MEMORY
    + """
local tag = ARGV[1]
if redis.call('GET', tag .. 'epoch') ~= ARGV[3] then return {'fenced', 'epoch'} end
local time = redis.call('TIME')
redis.call('ZADD', tag .. 'live', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[4], ARGV[2])
return {'ok'}
"""
)

# Step 15: verdicts read back, each with the records that landed, or none. Kept wins.
REMEMBER = Script(
    """#!lua
local tag, ttl = ARGV[1], ARGV[2]
"""
    + _JUDGED
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 3, #ARGV, 3 do
  local key, verdict, records = tag .. 'd:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local before, landed = redis.call('GET', key), ''
  if before then
    local held
    held, landed = judged(before)
    if string.sub(verdict, 1, 1) == '0' then verdict = held end
    for _, known in landings(landed) do
      if known == records then records = '' end -- another restore has read the same row
    end
  end
  redis.call('SET', key, joined(verdict, landed .. landing(now, records)), 'PX', ttl)
end
return {'ok'}
"""
)

# Step 3. Where a dictionary is missing, its key is touched, so that a transaction that watches it fails. It is sent
# whole each time: if the server had forgotten it, the transaction would not fail.
NEED = Script(
    _FULL_MEMORY
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
redis.call('SET', KEYS[1], '')
redis.call('DEL', KEYS[1])
return 0
"""
)

# The dictionary that the fleet packs with: the one that is there, else the one given, if one is.
AGREE = Script(
    """#!lua
local tag = ARGV[1]
local id = redis.call('GET', tag .. 'packing')
local held = id and redis.call('GET', tag .. 'z:' .. id)
if held or ARGV[3] == '' then return held end
redis.call('SET', tag .. 'z:' .. ARGV[2], ARGV[3])
redis.call('SET', tag .. 'packing', ARGV[2])
return ARGV[3]
"""
)

SCRIPTS = (CLAIM, RECORD, TURN, RELEASE, FREE, RENEW, ENROLL, REMEMBER, AGREE)


# --- values ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timers:
    """When a trace is due, in milliseconds of log time; `root_wait_ms` None = no such timer."""

    inactivity_ms: int
    root_wait_ms: int | None
    max_duration_ms: int
    stall_ms: int


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """`waiting` holds partitions never heard of, which hold the clock; `stalled` those left out of it."""

    traces: list[tuple[bytes, Trigger]]
    clock_ms: int | None
    waiting: tuple[int, ...]
    stalled: tuple[int, ...]
    due: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """The verdict that holds, and the records of the trace that landed before."""

    verdict: Verdict
    coverage: frozenset[tuple[int, int]]


class Held(NamedTuple):
    """Of a claimed trace: its spans, and the records they came in, coded."""

    spans: int
    records: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """What the fleet holds in Redis now."""

    memory_bytes: int
    budget_bytes: int
    pending_traces: int
    pending_spans: int
    oldest_ms: int | None


def shard_of(trace_ids: NDArray[np.uint8], shards: int) -> NDArray[np.int64]:
    """Shard of each row of (n, 16) ids, which may vary in any of their bytes: the product's high bits see them all."""
    halves = np.ascontiguousarray(trace_ids).view("<u8").reshape(-1, 2)
    mixed = (halves[:, 0] ^ (halves[:, 1] << np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
    rows: NDArray[np.int64] = ((mixed >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)).astype(np.int64)
    return rows


# --- one connection ----------------------------------------------------------------------------------------------


class Link:
    """One connection to one run of one server. Any fault ends it; it never reconnects.

    redis-py opens the socket (address, TLS, password, database); requests and answers are then ours, in one buffer
    each way, for less than half of the CPU that its command path takes.
    """

    def __init__(self, connection: Any, answer_secs: float) -> None:
        self._connection = connection
        self._answer_secs = answer_secs
        self._lost: str | None = None
        self._reader = hiredis.Reader(replyError=_error)
        try:
            connection.connect()
            self._socket: socket.socket = connection._sock
        except (AuthenticationError, ResponseError) as fault:
            raise self._refused(fault) from fault
        except (RedisError, OSError) as fault:
            raise self._ended(fault) from fault
        about, *replies = self.send([("INFO", "server"), *(("SCRIPT", "LOAD", s.text) for s in SCRIPTS)])
        for reply in (about, *replies):
            if isinstance(reply, Exception):
                passing = str(reply).startswith(PASSING_REFUSALS)
                raise (self._ended if passing else self._refused)(reply) from reply
        self.run_id = _fields(about)["run_id"]

    def _refused(self, fault: Exception) -> ConfigError:
        self.close()
        return ConfigError(f"redis.url / redis.password: the server refused us: {fault}")

    def _ended(self, fault: Exception) -> LinkLost:
        self.close()
        self._lost = f"{type(fault).__name__}: {fault}"
        return LinkLost(self._lost)

    def send(self, commands: Sequence[Command], *, wait_secs: float = 0) -> list[Any]:
        """One round trip; error replies come back as values. Raises LinkLost when any answer is missing.

        `wait_secs` is how long the server is asked to wait before it answers.
        """
        return self.exchange(resp.pack(commands), len(commands), wait_secs=wait_secs)

    def exchange(self, request: bytes, commands: int, *, wait_secs: float = 0) -> list[Any]:
        """`send` of what is packed already."""
        if self._lost is not None:
            raise LinkLost(self._lost)
        try:
            self._socket.settimeout(self._answer_secs + wait_secs)
            self._socket.sendall(request)
            return [self._answer() for _ in range(commands)]
        except (hiredis.HiredisError, OSError) as fault:
            raise self._ended(fault) from fault

    def _answer(self) -> Any:
        while (reply := self._reader.gets()) is False:
            received = self._socket.recv(RECEIVE_BYTES)
            if not received:
                raise ConnectionError("the server closed the connection")
            self._reader.feed(received)
        return reply

    def call(self, *command: Any, wait_secs: float = 0) -> Any:
        """Raises Unavailable when the answer is an error."""
        (reply,) = self.send([command], wait_secs=wait_secs)
        _raise_first([reply])
        return reply

    def info(self, section: str) -> dict[str, str]:
        return _fields(self.call("INFO", section))

    def now_ms(self) -> int:
        seconds, micros = self.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def close(self) -> None:
        self._lost = self._lost or "the connection was closed"
        self._connection.disconnect()


def _error(text: str) -> Exception:
    """An error reply as redis-py would name it."""
    if text.startswith("OOM "):
        return OutOfMemoryError(text)
    if text.startswith("MOVED "):
        return MovedError(text.removeprefix("MOVED "))
    return ResponseError(text)


def _fields(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode().splitlines() if ":" in line)
    return {key: value for key, _, value in lines}


def _raise_first(replies: Iterable[Any]) -> None:
    """Raises what the first error among them means to the caller."""
    for reply in replies:
        if isinstance(reply, OutOfMemoryError):
            raise Unavailable("Redis", "redis.max_memory_bytes", f"it refused a write: {reply}") from reply
        if isinstance(reply, Exception):
            # Moved to another node, demoted to a replica, scripts flushed: only a new connection can tell.
            raise LinkLost(f"the server refused a command: {reply}") from reply


# --- the buffer --------------------------------------------------------------------------------------------------


class Buffer:
    """One loop's view of all shards, over connections of its own. Not for use by two threads.

    Every method raises LinkLost when an answer is missing, and Unavailable when Redis refuses a write for want of
    memory; then nothing of that shard's transaction was applied.
    """

    def __init__(
        self,
        settings: config.Redis,
        clock: Clock = SYSTEM,
        link: Callable[[config.Redis, Node | None], Link] | None = None,
        training: Training = Training(),  # noqa: B008
    ) -> None:
        """Step 1: connects, and reads the run of every node and the epoch. `link` replaces how one connects."""
        self._shards = settings.shards
        self._clock = clock
        self._links, self._home = _connect(settings, link or open_link)
        self.epoch = self.read_epoch()
        self._since_ms = max(link.now_ms() for link in self._links)
        self.persistence = [_persistence(link) for link in self._links]
        self._budget = settings.max_memory_bytes or sum(_server_budget(link) for link in self._links)
        self._repeated = [0] * self._shards
        self._packing = Packing(settings.compression, training)
        self._unpacking = Unpacking()
        self._next_look_secs = 0.0

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _all(self, commands: Mapping[int, list[Command]]) -> dict[int, list[Any]]:
        """Commands by shard, one round trip a node; replies by shard in the same order, none of them an error."""
        replies = self._replies(commands)
        for answers in replies.values():
            _raise_first(answers)
        return replies

    def _replies(self, commands: Mapping[int, list[Command]]) -> dict[int, list[Any]]:
        return self._exchanged(
            {shard: Request(resp.pack(mine), len(mine)) for shard, mine in commands.items()}
        )

    def _exchanged(self, requests: Mapping[int, Request]) -> dict[int, list[Any]]:
        replies: dict[int, list[Any]] = {}
        for at, link in enumerate(self._links):
            mine = [shard for shard in requests if self._home[shard] == at]
            if not mine:
                continue
            packed = b"".join(requests[shard].packed for shard in mine)
            answers = iter(link.exchange(packed, sum(requests[shard].commands for shard in mine)))
            for shard in mine:
                replies[shard] = list(itertools.islice(answers, requests[shard].commands))
        return replies

    def _scripted(self, script: Script, arguments: Mapping[int, Sequence[Any]]) -> dict[int, list[Any]]:
        """One script on several shards. Raises Fenced where it refused."""
        commands = {
            shard: [("EVALSHA", script.sha, 1, _tag(shard), _tag(shard), *rest)]
            for shard, rest in arguments.items()
        }
        out = {}
        for shard, (reply,) in self._all(commands).items():
            if reply and reply[0] == b"fenced":
                raise Fenced(f"shard {shard} refused the writer: its {reply[1].decode()} is gone")
            out[shard] = reply
        return out

    # --- epoch and round trips (steps 1, 4, 5, 10) ---

    def read_epoch(self) -> str | None:
        """The epoch all shards agree on, or None when one lacks it or they differ."""
        epochs = self._epochs()
        (epoch,) = epochs if len(epochs) == 1 else (None,)
        return epoch.decode() if epoch else None

    def _epochs(self) -> set[bytes | None]:
        replies = self._all({shard: [("GET", _tag(shard) + b"epoch")] for shard in range(self._shards)})
        return {reply[0] for reply in replies.values()}

    def confirm(self) -> int | None:
        """One round trip a node that shows run and epoch unchanged; returns `low`, the oldest log time held."""
        for link in self._links:
            if link.info("server")["run_id"] != link.run_id:
                link.close()
                raise LinkLost("the server was restarted")
        commands: dict[int, list[Command]] = {
            shard: [("GET", _tag(shard) + b"epoch"), ("ZRANGE", _tag(shard) + b"born", 0, 0, "WITHSCORES")]
            for shard in range(self._shards)
        }
        lows = []
        for epoch, oldest in self._all(commands).values():
            if (epoch or b"").decode() != (self.epoch or ""):
                now = epoch.decode() if epoch else "none"
                raise LinkLost(f"the epoch changed from {self.epoch} to {now}")
            if oldest:
                lows.append(int(float(oldest[1])))
        return min(lows, default=None)

    def wait_durable(self) -> None:
        """Step 10: what this connection wrote is on disk, as far as the server's settings allow, and it still runs."""
        timed = not all(p.waits for p in self.persistence)
        for link, persistence in zip(self._links, self.persistence, strict=True):
            if not persistence.waits:
                continue
            synced, _ = link.call("WAITAOF", 1, 0, WAITAOF_TIMEOUT_MS, wait_secs=WAITAOF_TIMEOUT_MS / 1000)
            if not synced:
                raise Unavailable("Redis", "redis.url", f"no fsync of the AOF within {WAITAOF_TIMEOUT_MS} ms")
        if timed:
            self._clock.sleep(LAG_SECS)
        self.confirm()

    # --- ingest (step 3) ---

    def append(
        self,
        chunks: Chunks,
        clocks: Mapping[int, int],
        now_ms: int,
        *,
        root_timer: bool,
        big: AbstractSet[int] = frozenset(),
        write: ChunkWrites = resp.chunk_writes,
    ) -> int:
        """One MULTI a shard: chunks, indexes and the partitions' clocks together. All shards get the clocks.

        `big` holds the rows of traces that are over a size limit: they are due at once. `write` is the twin or kernel.

        Returns how many spans the server held already in an identical chunk.
        """
        if len(chunks) and self._packing.wants_dictionary:
            self._look_for_dictionary(chunks)
        entries = [part for p, at in clocks.items() for part in (str(p), f"{at} {now_ms} {self.epoch}")]
        shards = shard_of(chunks.trace_ids, self._shards)
        order = np.argsort(shards, kind="stable")
        placed = Placed(
            chunks,
            self._packing.pack(chunks),
            order,
            np.searchsorted(shards[order], np.arange(self._shards + 1)),
            [_tag(shard) for shard in range(self._shards)],
        )
        requests = {
            shard: self._transaction(shard, placed, writes, entries, root_timer=root_timer, big=big)
            for shard, writes in enumerate(write(placed))
            if writes.commands or entries
        }
        repeated = 0
        refusals: list[Any] = []
        for shard, replies in self._written(requests, placed).items():
            result = replies[-1]
            if isinstance(result, Exception):
                refusals += replies
                continue
            rows = placed.rows(shard)
            known = np.array(result[: len(rows)], np.int64) == 0
            again = int(chunks.facts["spans"][rows[known]].sum())
            self._repeated[shard] = again
            repeated += again
        _raise_first(refusals)
        return repeated

    def _written(self, requests: dict[int, Request], placed: Placed) -> dict[int, list[Any]]:
        """Sends transactions; where payloads need a dictionary, they are written only while its copy is there."""
        dictionary = self._packing.dictionary
        if dictionary is None:
            return self._exchanged(requests)
        guarded = {
            shard: self._needing(dictionary, shard, request)
            for shard, request in requests.items()
            if len(placed.rows(shard))
        }
        replies: dict[int, list[Any]] = {}
        sending = requests | guarded
        for _ in range(DICTIONARY_TRIES):
            replies |= self._exchanged(sending)
            _raise_first(itertools.chain(*(replies[shard][:GUARD_COMMANDS] for shard in guarded)))
            sending = {shard: guarded[shard] for shard in guarded if replies[shard][-1] is None}
            if not sending:
                return replies
            key = functools.partial(_dictionary_key, number=dictionary.id)
            self._all({shard: [("SET", key(shard), dictionary.content, "NX")] for shard in sending})
        raise LinkLost(
            f"somebody deletes {_dictionary_key(min(sending), dictionary.id).decode()} again and again"
        )

    @staticmethod
    def _needing(dictionary: Dictionary, shard: int, request: Request) -> Request:
        key = _dictionary_key(shard, dictionary.id)
        guard = resp.pack([("WATCH", key), ("EVAL", NEED.text, 1, key)])
        return Request(guard + request.packed, GUARD_COMMANDS + request.commands)

    def _look_for_dictionary(self, chunks: Chunks) -> None:
        """Adopts the fleet's; while it has none, takes part in making one."""
        self._packing.sample(chunks)
        made, now_secs = self._packing.trained, self._clock.now().mono_secs
        if made is None and now_secs < self._next_look_secs:
            return
        self._next_look_secs = now_secs + DICTIONARY_LOOK_SECS
        given = (str(made.id), made.content) if made else ("", b"")
        command = ("EVALSHA", AGREE.sha, 1, _tag(0), _tag(0), *given)
        ((content,),) = self._all({0: [command]}).values()
        if content and (found := Dictionary(content)).is_whole:
            self._packing.adopt(found)
            log.info("Payloads are packed with dictionary %d of %d bytes", found.id, len(content))

    def _transaction(
        self,
        shard: int,
        placed: Placed,
        writes: Request,
        entries: Sequence[str],
        *,
        root_timer: bool,
        big: AbstractSet[int],
    ) -> Request:
        tag, rows, facts = _tag(shard), placed.rows(shard), placed.chunks.facts
        commands: list[Command] = []
        if spans := int(facts["spans"][rows].sum()) - self._repeated[shard]:
            commands.append(("INCRBY", tag + b"spans", spans))
        roots = rows[facts["bits"][rows] & ROOT != 0].tolist() if root_timer else []
        large = [row for row in rows.tolist() if row in big] if big else []
        for name, found in ((b"root", roots), (b"big", large)):
            if found:
                members = ((int(placed.newest_ms[row]), placed.chunks.trace_id(row)) for row in found)
                commands.append(("ZADD", tag + name, *itertools.chain(*members)))
        if entries:
            commands.append(("HSET", tag + b"clock", *entries))
        commands.append(("EXEC",))
        packed = b"".join([resp.pack([("MULTI",)]), writes.packed, resp.pack(commands)])
        return Request(packed, 1 + writes.commands + len(commands))

    # --- writers (steps 6, 14, 16) ---

    def enroll(self, writer: str, lease_secs: float) -> None:
        """Step 6. Raises Fenced when a shard shows another epoch."""
        rest = (writer, self.epoch or "", int(lease_secs * 1000))
        self._scripted(ENROLL, dict.fromkeys(range(self._shards), rest))

    def renew(self, writers: Sequence[str], lease_secs: float) -> set[str]:
        """Extends leases; returns the writers that lost theirs on some shard."""
        if not writers:
            return set()
        rest = (int(lease_secs * 1000), *writers)
        replies = self._scripted(RENEW, dict.fromkeys(range(self._shards), rest))
        return {name.decode() for lost in replies.values() for name in lost}

    def resign(self, writer: str) -> None:
        """Takes a writer out of `live` on every shard: from then on it cannot write."""
        self._all({shard: [("ZREM", _tag(shard) + b"live", writer)] for shard in range(self._shards)})

    def abandoned(self) -> list[tuple[str, int]]:
        """(writer, sequence) of claims without a live owner, lowest sequence first (step 14)."""
        now = max(link.now_ms() for link in self._links)
        commands: dict[int, list[Command]] = {
            shard: [
                ("SMEMBERS", _tag(shard) + b"open"),
                ("ZRANGE", _tag(shard) + b"live", now, "+inf", "BYSCORE"),
                ("ZRANGE", _tag(shard) + b"live", "-inf", f"({now}", "BYSCORE"),
            ]
            for shard in range(self._shards)
        }
        found: set[tuple[str, int]] = set()
        expired: set[str] = set()
        for open_claims, live, late in self._all(commands).values():
            expired.update(name.decode() for name in late)
            for name in open_claims:
                writer, _, sequence = name.decode().rpartition(":")
                if writer.encode() not in live:
                    found.add((writer, int(sequence)))
        for writer in sorted(expired):
            self.resign(writer)
        return sorted(found, key=lambda claim: (claim[1], claim[0]))

    # --- a sequence (steps 7, 8, 9, 13) ---

    def claim(
        self, writer: str, sequence: int, timers: Timers, partitions: int, limit: int, *, pressure: int
    ) -> ClaimResult:
        """Step 7 on every shard; `limit` and `pressure` are numbers of traces for all shards together."""
        each = -(-limit // self._shards)
        root_wait = -1 if timers.root_wait_ms is None else timers.root_wait_ms
        arguments = {
            shard: (
                *(writer, self.epoch or "", _claim_key(shard, writer, sequence), f"{writer}:{sequence}"),
                *(partitions, timers.inactivity_ms, root_wait, timers.max_duration_ms, each),
                *(-(-pressure // self._shards), timers.stall_ms, self._since_ms, each * OPEN_CLAIMS_SCANNED),
            )
            for shard in range(self._shards)
        }
        traces: list[tuple[bytes, Trigger]] = []
        clocks: list[int] = []
        waiting: set[int] = set()
        stalled: set[int] = set()
        due = 0
        for reply in self._scripted(CLAIM, arguments).values():
            _, clock, unheard, silent, backlog, taken = reply
            clocks.append(clock)
            waiting.update(map(int, filter(None, unheard.split(b","))))
            stalled.update(map(int, filter(None, silent.split(b","))))
            due += backlog
            traces += [(taken[i], Trigger(int(taken[i + 1]))) for i in range(0, len(taken), 2)]
        clock = min(clocks)
        return ClaimResult(
            traces, clock if clock >= 0 else None, tuple(sorted(waiting)), tuple(sorted(stalled)), due
        )

    def claimed_by(self, writer: str, sequence: int) -> list[tuple[bytes, Trigger]]:
        """What a sequence holds on all shards: how an adopter learns of it."""
        commands: dict[int, list[Command]] = {
            shard: [("HGETALL", _claim_key(shard, writer, sequence))] for shard in range(self._shards)
        }
        out = []
        for (pairs,) in self._all(commands).values():
            out += [(pairs[i], Trigger(int(pairs[i + 1][:1]))) for i in range(0, len(pairs), 2)]
        return out

    def facts(self, traces: Sequence[tuple[bytes, Trigger]]) -> list[Claimed]:
        """Step 8: field names of claimed traces, no payload moved. A trace released meanwhile is left out."""
        replies = self._each([trace_id for trace_id, _ in traces], b"HKEYS")
        return [
            Claimed(i, trigger, tuple(names))
            for (i, trigger), names in zip(traces, replies, strict=True)
            if names
        ]

    def payloads(self, trace_ids: Sequence[bytes]) -> list[dict[bytes, bytes]]:
        """Field → payload of claimed traces. Raises Unavailable where the dictionary of one is gone."""
        found = []
        unpack = self._unpacking.unpack
        finds = [functools.partial(self._find_dictionary, shard) for shard in range(self._shards)]
        replies = zip(self._shards_of(trace_ids), self._each(trace_ids, b"HGETALL"), strict=True)
        for shard, pairs in replies:
            plain = (unpack(payload, finds[shard]) for payload in pairs[1::2])
            found.append(dict(zip(pairs[::2], plain, strict=True)))
        return found

    def _find_dictionary(self, shard: int, number: int) -> Dictionary:
        key = _dictionary_key(shard, number)
        ((content,),) = self._all({shard: [("GET", key)]}).values()
        if content is None or not (found := Dictionary(content)).is_whole or found.id != number:
            raise Unavailable(
                "Redis",
                "redis.compression",
                f"pending spans are packed with the dictionary {key.decode()}, which was deleted or overwritten. A "
                "worker that still packs with it brings it back; else empty this Redis, and Kafka is read again",
            )
        return found

    def _each(self, trace_ids: Sequence[bytes], command: bytes) -> list[Any]:
        """One read of each claimed trace, in the order given."""
        shards = self._shards_of(trace_ids)
        requests = {}
        for shard, ids in _by_shard(shards, trace_ids).items():
            key = _tag(shard) + b"x:"
            head = b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b" % (len(command), command, len(key) + ID_BYTES, key)
            requests[shard] = Request(head + (b"\r\n" + head).join(ids) + b"\r\n", len(ids))
        replies = self._exchanged(requests)
        for answers in replies.values():
            _raise_first(answers)
        in_turn = {shard: iter(answers) for shard, answers in replies.items()}
        return [next(in_turn[shard]) for shard in shards]

    def _shards_of(self, trace_ids: Sequence[bytes]) -> list[int]:
        table = np.frombuffer(b"".join(trace_ids), np.uint8).reshape(-1, ID_BYTES)
        shards: list[int] = shard_of(table, self._shards).tolist()
        return shards

    def record(
        self, me: str, owner: str, sequence: int, candidates: Sequence[tuple[bytes, Verdict]]
    ) -> list[Recorded | None]:
        """Step 9: (trace, candidate) to the verdict that holds; None where the claim is gone."""
        # By identity: the verdicts of a claim are few objects, and hashing them costs.
        different = list({id(verdict): verdict for _, verdict in candidates}.values())
        numbers = {id(verdict): number for number, verdict in enumerate(different)}
        packed = [
            b"%b%b" % (trace_id, numbers[id(candidate)].to_bytes(2, "big"))
            for trace_id, candidate in candidates
        ]
        shards = self._shards_of([trace_id for trace_id, _ in candidates])
        encoded = [_sized(verdict.encode()) for verdict in different]
        arguments = {
            shard: [me, self.epoch or "", _claim_key(shard, owner, sequence), b"".join(mine), *encoded]
            for shard, mine in _by_shard(shards, packed).items()
        }
        in_turn = {shard: iter(reply[1]) for shard, reply in self._scripted(RECORD, arguments).items()}
        holds = [Recorded(verdict, NOTHING_LANDED) for verdict in different]
        return [
            _recorded(next(in_turn[shard]), holds[numbers[id(candidate)]])
            for shard, (_, candidate) in zip(shards, candidates, strict=True)
        ]

    def turn(
        self, me: str, owner: str, sequence: int, upgrades: Sequence[tuple[bytes, Verdict | None]]
    ) -> list[Verdict | None]:
        """Step 9 of dropped traces with late spans: (trace, upgrade) to the verdict that holds, as `record` does it.

        An upgrade is given for a new error; without one, the drop is settled for this sequence.
        """
        shards = self._shards_of([trace_id for trace_id, _ in upgrades])
        arguments: dict[int, list[Any]] = {}
        for shard, (trace_id, upgrade) in zip(shards, upgrades, strict=True):
            mine = arguments.setdefault(shard, [me, self.epoch or "", _claim_key(shard, owner, sequence)])
            mine += (trace_id, upgrade.encode() if upgrade else b"")
        replies = {shard: iter(reply[1]) for shard, reply in self._scripted(TURN, arguments).items()}
        verdicts = (next(replies[shard]) for shard in shards)
        return [None if verdict is None else Verdict.decode(verdict) for verdict in verdicts]

    def free(self, me: str, owner: str, sequence: int, trace_ids: Sequence[bytes]) -> None:
        """Empties the payloads of dropped traces of an open sequence."""
        self._scripted(FREE, self._naming(me, owner, sequence, trace_ids, trace_ids))

    def release(
        self, me: str, owner: str, sequence: int, traces: Mapping[bytes, Held], ttl_secs: float
    ) -> int:
        """Step 13 with what `facts` told of each trace; returns how many were still claimed by that sequence."""
        packed = [
            b"%b%b%b" % (trace_id, HELD_HEAD.pack(spans, len(records)), records)
            for trace_id, (spans, records) in traces.items()
        ]
        arguments = self._naming(
            *(me, owner, sequence, list(traces), packed, f"{owner}:{sequence}", int(ttl_secs * 1000))
        )
        released = 0
        for shard, mine in arguments.items():
            crashpoints.passed("within-release")
            released += self._scripted(RELEASE, {shard: mine})[shard][1]
        return released

    def _naming(
        self,
        me: str,
        owner: str,
        sequence: int,
        trace_ids: Sequence[bytes],
        packed: Sequence[bytes],
        *more: Any,
    ) -> dict[int, list[Any]]:
        """Arguments of a script on some traces of a sequence, of each what it is told."""
        return {
            shard: [me, self.epoch or "", _claim_key(shard, owner, sequence), *more, b"".join(mine)]
            for shard, mine in _by_shard(self._shards_of(trace_ids), packed).items()
        }

    # --- what there is ---

    def usage(self) -> Usage:
        """Memory, pending traces and spans of the whole fleet."""
        commands: dict[int, list[Command]] = {
            shard: [
                ("ZCARD", _tag(shard) + b"born"),
                ("GET", _tag(shard) + b"spans"),
                ("ZRANGE", _tag(shard) + b"born", 0, 0, "WITHSCORES"),
            ]
            for shard in range(self._shards)
        }
        traces = spans = 0
        oldest: list[int] = []
        for pending, count, first in self._all(commands).values():
            traces += pending
            spans += int(count or 0)
            oldest += [int(float(first[1]))] if first else []
        memory = sum(int(link.info("memory")["used_memory"]) for link in self._links)
        return Usage(memory, self._budget, traces, max(0, spans), min(oldest, default=None))

    # --- a new life of Redis (step 15) ---

    def propose_epoch(self, epoch: str) -> str:
        """The fleet agrees on one fresh epoch: the first to propose wins. The proposal expires if nobody ends it.

        Raises LinkLost where a proposal has had its life already and a restart forgot that it was ended: two lives of
        one name would be one to whoever reads on.
        """
        key, home = _tag(0) + b"next-epoch", self._links[self._home[0]]
        before: bytes | None = home.call("SET", key, epoch, "NX", "GET", "EX", 600)
        if before is None:
            return epoch
        if before in self._epochs():
            home.call("DEL", key)
            raise LinkLost("a proposal was left over from the life before")
        return before.decode()

    def end_life(self) -> None:
        """The epoch that this connection was made in counts no more: the next writer gives Redis a new one.

        One shard without an epoch is enough. Whoever comes late takes away a newer one: one restore for nothing.
        """
        if self.epoch is not None and self.read_epoch() == self.epoch:
            self._all({0: [("DEL", _tag(0) + b"epoch", _tag(0) + b"next-epoch")]})

    def forget_epoch(self, proposed: str) -> None:
        """Nobody may write and no clock counts until the new epoch is set. Raises LinkLost without the proposal."""
        if self._links[self._home[0]].call("GET", _tag(0) + b"next-epoch") != proposed.encode():
            raise LinkLost("another worker finished a restore meanwhile")
        names = (b"epoch", b"live", b"clock")
        self._all({s: [("DEL", *(_tag(s) + name for name in names))] for s in range(self._shards)})

    def remember(self, verdicts: Sequence[tuple[bytes, Verdict, bytes | None]], ttl_secs: float) -> None:
        """Verdicts read back from the tables: (trace, verdict, coded records that landed or None). Kept wins.

        One script a shard: who dies in the middle would leave a verdict without an expiry.
        """
        arguments: dict[int, list[Any]] = {}
        shards = self._shards_of([trace_id for trace_id, _, _ in verdicts])
        for shard, (trace_id, verdict, origins) in zip(shards, verdicts, strict=True):
            mine = arguments.setdefault(shard, [int(ttl_secs * 1000)])
            mine += (trace_id, verdict.encode(), origins or b"")
        self._scripted(REMEMBER, arguments)

    def set_epoch(self, epoch: str) -> bool:
        """Sets it on every shard, if the proposal still stands."""
        key = _tag(0) + b"next-epoch"
        if self._links[self._home[0]].call("GET", key) != epoch.encode():
            return False
        self._all({s: [("SET", _tag(s) + b"epoch", epoch)] for s in range(self._shards)})
        self._links[self._home[0]].call("DEL", key)
        self.epoch = epoch
        return True


def _by_shard(shards: Sequence[int], values: Sequence[bytes]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for shard, value in zip(shards, values, strict=True):
        found.setdefault(shard, []).append(value)
    return found


def _recorded(reply: Any, candidate: Recorded) -> Recorded | None:
    """What `RECORD` answers to one trace."""
    if isinstance(reply, int):
        return candidate if reply else None
    at = SIZE.size + SIZE.unpack_from(reply)[0]
    verdict = Verdict.decode(reply[SIZE.size : at])
    coverage: set[tuple[int, int]] = set()
    while at < len(reply):
        _, size = LANDING_HEAD.unpack_from(reply, at)
        at += LANDING_HEAD.size + size
        coverage.update((o.partition, o.offset) for o in decode_origins(reply[at - size : at]))
    return Recorded(verdict, frozenset(coverage))


def _sized(verdict: bytes) -> bytes:
    return SIZE.pack(len(verdict)) + verdict


def _tag(shard: int) -> bytes:
    return b"{tss:%d}:" % shard


def _dictionary_key(shard: int, number: int) -> bytes:
    return _tag(shard) + b"z:%d" % number


def _claim_key(shard: int, writer: str, sequence: int) -> bytes:
    return _tag(shard) + f"c:{writer}:{sequence}".encode()


# --- connecting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Persistence:
    """What a server promises about its disk. `waits`: WAITAOF tells when a write is there."""

    waits: bool
    warnings: tuple[str, ...]


def _persistence(link: Link) -> Persistence:
    settings: dict[str, str] = {}
    for name in ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory-policy"):
        (reply,) = link.send([("CONFIG", "GET", name)])
        if isinstance(reply, Exception):  # managed services forbid CONFIG
            return Persistence(False, ("its persistence settings cannot be read; appendonly yes is assumed",))
        settings[name] = reply[1].decode() if reply else ""
    wanted = {
        "appendonly": ("yes",),
        "appendfsync": ("everysec", "always"),
        "no-appendfsync-on-rewrite": ("no",),
        "maxmemory-policy": ("noeviction",),
    }
    warnings = tuple(
        f"{name} is {settings[name] or 'unset'}; set it to {values[0]}, or a restart of Redis can lose spans"
        for name, values in wanted.items()
        if settings[name] not in values
    )
    (probe,) = link.send([("WAITAOF", 0, 0, 1)])
    return Persistence(settings["appendonly"] == "yes" and not isinstance(probe, Exception), warnings)


def _server_budget(link: Link) -> int:
    memory = link.info("memory")
    limit = int(memory.get("maxmemory", 0))
    if limit:
        return int(limit * MEMORY_SHARE_OF_MAXMEMORY)
    return int(int(memory.get("total_system_memory", 0) or 8 << 30) * MEMORY_SHARE_OF_SYSTEM)


def _connect(
    settings: config.Redis, link: Callable[[config.Redis, Node | None], Link]
) -> tuple[list[Link], list[int]]:
    """Links, and for each shard which link is its home."""
    first = link(settings, None)
    if not settings.cluster_enabled:
        looks = first.send([("EXISTS", _tag(shard) + b"epoch") for shard in range(settings.shards)])
        if any(isinstance(look, MovedError) for look in looks):
            first.close()
            raise ConfigError("redis.url is a node of a cluster. Set TSS__REDIS__CLUSTER_ENABLED=true")
        return [first], [0] * settings.shards
    (ranges,) = first.send([("CLUSTER", "SLOTS")])
    first.close()
    if isinstance(ranges, Exception):
        raise ConfigError(
            f"redis.cluster_enabled=true, but the server says: {ranges}. Set TSS__REDIS__CLUSTER_ENABLED=false"
        )
    links: dict[Node, Link] = {}
    homes = []
    for shard in range(settings.shards):
        slot = crc.key_slot(_tag(shard))
        nodes = [(r[2][0].decode(), int(r[2][1])) for r in ranges if r[0] <= slot <= r[1]]
        if not nodes:
            raise LinkLost(f"no node of the cluster serves slot {slot} of shard {shard}")
        if nodes[0] not in links:
            links[nodes[0]] = link(settings, nodes[0])
        homes.append(list(links).index(nodes[0]))
    return list(links.values()), homes


def open_link(settings: config.Redis, node: Node | None) -> Link:
    """A connection to the server that the settings name, or to one node of its cluster."""
    timeout = settings.connection_timeout_secs
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if node is not None:
        options["host"], options["port"] = node
    if settings.db is not None:
        options["db"] = settings.db
    if settings.password is not None:
        options["password"] = settings.password.get_secret_value()
    try:
        pool = ConnectionPool.from_url(settings.url)
    except ValueError:
        raise ConfigError(
            f"redis.url is {_without_secrets(settings.url)!r}, which is no address of a Redis: write "
            "redis://host:port/db, rediss://… or unix:///path, with / : @ in a password percent-encoded"
        ) from None
    pool.connection_kwargs.update(options)  # what the URL says comes second
    return Link(pool.make_connection(), timeout)


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("?")[0].rpartition("://")
    return f"{scheme}://…@{rest.rpartition('@')[2]}" if "@" in rest else url.partition("?")[0]
