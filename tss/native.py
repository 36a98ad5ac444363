"""What the compiled kernels of `kernels` and `gather` are written with: checked access to memory, protobuf, keys.

Numbers that address memory are unsigned 64-bit throughout: numba then drops the code for negative indices, a third
of the time; but an unsigned and a plain integer make a float, so constants are `U(…)` too. Each reader returns the
next position, or BAD, which lies behind any end; whoever reads checks once. Loads, stores and copies, which numba
cannot check, are checked in `load_word`, `store_word` and `copy_bytes`.

A function that is no kernel of its own becomes a part of its caller. One that is handed whole tables is `pasted`, or
called seldom: passing them by value costs more than what most of these do.

numba's cache on disk looks at the one file that a kernel stands in. So `compiler` gives every state of these three
files together a folder of its own, and kernels take from other modules no constant that may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numba
import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

# --- numba -----------------------------------------------------------------------------------------------------------

Compiled = TypeVar("Compiled", bound=Callable[..., Any])
Bytes = NDArray[np.uint8]
Table = NDArray[Any]
U: Any = np.uint64
UInt: TypeAlias = Any  # an np.uint64


# Kernels allocate nothing, so references need no counting: `_nrt` off leaves that out, half of the time.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
# What only kernels call has no way in from Python, which would be a fifth of all compiling: Python that calls it crashes.
WITHIN = OPTIONS | {"no_cpython_wrapper": True}


def kernel(function: Compiled) -> Compiled:
    """Compiled at the first call on this machine, kept on disk, runs without the lock of the interpreter."""
    compiled = numba.njit(cache=True, **OPTIONS)(function)
    KERNELS.append(compiled)
    return cast("Compiled", compiled)


def inner(function: Compiled) -> Compiled:
    """Called by kernels only, compiled as a part of each."""
    return cast("Compiled", numba.njit(**WITHIN)(function))


def merged(function: Compiled) -> Compiled:
    """The same as source: a level less at which all is optimised."""
    return cast("Compiled", numba.njit(inline="always", **WITHIN)(function))


def pasted(function: Compiled) -> Compiled:
    """The same, written into its caller: a call that hands on whole tables costs more than what it does."""
    return cast("Compiled", numba.njit(forceinline=True, **WITHIN)(function))


KERNELS: list[Any] = []


def compilations() -> int:
    """How often this process had to compile a kernel, as the cache did not have it."""
    return sum(sum(one.stats.cache_misses.values()) for one in KERNELS)


U0, U1, U2, U3, U4, U5, U7, U8 = (U(n) for n in (0, 1, 2, 3, 4, 5, 7, 8))
BAD = U(2**64 - 1)
NONE = np.uint32(2**32 - 1)


def _build_load(_: Any, data: Any, at: Any) -> Any:
    """Eight bytes, wherever they begin."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        word = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(word, align=1)

    return types.uint64(data, types.uint64), build


_load: Any = intrinsic(_build_load)


def _build_store(_: Any, to: Any, at: Any, word: Any) -> Any:
    """Eight bytes, wherever they begin."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        where = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(64).as_pointer())
        builder.store(args[2], where, align=1)
        return context.get_dummy_value()

    return types.void(to, types.uint64, types.uint64), build


_store: Any = intrinsic(_build_store)


raw_memcpy: Any = cgutils.raw_memcpy  # type: ignore[no-untyped-call,unused-ignore]


def _build_memcpy(_: Any, to: Any, to_at: Any, data: Any, at: Any, size: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = context.make_array(signature.args[0])(context, builder, args[0])
        source = context.make_array(signature.args[2])(context, builder, args[2])
        where = builder.gep(target.data, [args[1]])
        raw_memcpy(builder, where, builder.gep(source.data, [args[3]]), args[4], 1, align=1)
        return context.get_dummy_value()

    return types.void(to, types.uint64, data, types.uint64, types.uint64), build


_memcpy: Any = intrinsic(_build_memcpy)


@inner
def load_word(data: Bytes, at: UInt) -> Any:
    if at + U8 > U(data.size) or at > U(data.size):
        raise IndexError("load outside of the buffer")
    return _load(data, at)


@inner
def store_word(to: Bytes, at: UInt, word: UInt) -> None:
    if at + U8 > U(to.size) or at > U(to.size):
        raise IndexError("store outside of the buffer")
    _store(to, at, word)


@inner
def copy_bytes(to: Bytes, to_at: UInt, data: Bytes, at: UInt, size: UInt) -> UInt:
    """Returns where the copy ends."""
    if size > U(data.size) or at > U(data.size) - size or size > U(to.size) or to_at > U(to.size) - size:
        raise IndexError("copy outside of the buffer")
    _memcpy(to, to_at, data, at, size)
    return to_at + size


@inner
def is_equal(one: Bytes, at: UInt, other: Bytes, start: UInt, size: UInt) -> bool:
    """Whether `size` bytes are the same; eight more must be there behind both."""
    done = U0
    while done + U8 <= size:
        if load_word(one, at + done) != load_word(other, start + done):
            return False
        done += U8
    if done == size:
        return True
    rest = (U1 << ((size - done) << U3)) - U1
    return bool((load_word(one, at + done) ^ load_word(other, start + done)) & rest == U0)


@inner
def mix(state: UInt, word: UInt) -> UInt:
    state = (state ^ word) * U(0x9E3779B97F4A7C15)
    return state ^ (state >> U(32))


@inner
def hash_bytes(data: Bytes, at: UInt, size: UInt, state: UInt) -> UInt:
    end = at + size
    while end - at >= U8:
        state = mix(state, load_word(data, at))
        at += U8
    if at < end:
        state = mix(state, load_word(data, at) & ((U1 << ((end - at) << U3)) - U1))
    return mix(state, size)


def padded(parts: Sequence[bytes]) -> Bytes:
    """The parts end to end, and room to read a word that begins at the last byte."""
    return np.frombuffer(b"".join([*parts, bytes(8)]), np.uint8)


# --- reading protobuf ------------------------------------------------------------------------------------------------

DEPTH_MAX = 64  # nested messages below a span; the official class allows 100 from the outermost on


class Schema(NamedTuple):
    """The official messages: a code for each field of each kind, and a stack to walk them."""

    fields: NDArray[np.uint16]
    ends: NDArray[np.uint64]
    kinds: NDArray[np.uint64]


# A field's code: wire type | TEXT | (kind of the message in it + 1) << 4.
TEXT = 8
UNKNOWN = 7  # no wire type has this number
FIELDS_MAX = 64  # field numbers the table knows; official ones beyond are deprecated and skipped as unknown


# These come first, so that their numbers are the same for every version of the official package.
SPAN_KIND, RESOURCE_KIND, SCOPE_KIND, VALUE_KIND = (U(n) for n in range(4))
FIRST_KINDS: tuple[Any, ...] = (Span, Resource, InstrumentationScope, AnyValue)


def _field_codes() -> NDArray[np.uint16]:
    """The code of each field (column) of each kind of message (row)."""
    kinds = {message.DESCRIPTOR.full_name: n for n, message in enumerate(FIRST_KINDS)}
    messages: list[Descriptor] = [message.DESCRIPTOR for message in FIRST_KINDS]
    codes: list[NDArray[np.uint16]] = []
    for message in messages:  # grows on the way
        row = np.full(FIELDS_MAX, UNKNOWN, np.uint16)
        for field in message.fields:
            row[field.number] = _code(field)
            inner = field.message_type
            if inner is not None:
                if inner.full_name not in kinds:
                    kinds[inner.full_name] = len(messages)
                    messages.append(inner)
                row[field.number] |= kinds[inner.full_name] + 1 << 4
        codes.append(row)
    return np.stack(codes)


def _code(field: FieldDescriptor) -> int:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return 2 | TEXT
        case FieldDescriptor.TYPE_BYTES | FieldDescriptor.TYPE_MESSAGE:
            return 2
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FIXED64 | FieldDescriptor.TYPE_SFIXED64:
            return 1
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_FIXED32 | FieldDescriptor.TYPE_SFIXED32:
            return 5
        case _:
            return 0


FIELD_CODES = _field_codes()


@inner
def read_varint(data: Bytes, at: UInt, end: UInt) -> tuple[UInt, UInt]:
    """(value, next); BAD where it is cut off or beyond 64 bits."""
    value = U0
    shift = U0
    while at < end and shift < U(64):
        byte = U(data[at])
        at += U1
        value |= (byte & U(0x7F)) << shift
        if byte < U(0x80):
            if shift == U(63) and byte > U1:
                return U0, BAD
            return value, at
        shift += U7
    return U0, BAD


@inner
def read_tag(data: Bytes, at: UInt, end: UInt) -> tuple[UInt, UInt]:
    """(tag, next) of a field below 2048, in its shortest form; anything else is BAD."""
    if at >= end:
        return U0, BAD
    tag = U(data[at])
    at += U1
    if tag >= U(0x80):
        if at >= end:
            return U0, BAD
        byte = U(data[at])
        at += U1
        if byte == U0 or byte >= U(0x80):
            return U0, BAD
        tag = tag & U(0x7F) | byte << U7
    if tag < U8:
        return U0, BAD
    return tag, at


@inner
def read_length(data: Bytes, at: UInt, end: UInt) -> tuple[UInt, UInt]:
    """(size, next) of a delimited field that ends within `end` and states its size in four bytes, else BAD."""
    if at >= end:
        return U0, BAD
    size = U(data[at])
    at += U1
    if size >= U(0x80):
        more, after = read_varint(data, at, end)
        if after > end or after - at > U3:
            return U0, BAD
        size = size & U(0x7F) | more << U7
        at = after
    if size > end - at:
        return U0, BAD
    return size, at


@inner
def skip(data: Bytes, at: UInt, end: UInt, wire_type: UInt) -> UInt:
    """The end of a field's value; BAD for groups, too."""
    if wire_type == U0:
        _, at = read_varint(data, at, end)
        return at
    if wire_type == U2:
        size, at = read_length(data, at, end)
        return BAD if at > end else at + size
    if wire_type == U1:
        return BAD if end - at < U8 else at + U8
    if wire_type == U5:
        return BAD if end - at < U4 else at + U4
    return BAD


@inner
def is_utf8(data: Bytes, at: UInt, end: UInt) -> bool:
    """Whether these bytes are strict UTF-8, as proto3 demands of texts."""
    while at < end:
        left = end - at
        word = load_word(data, at)
        if left < U8:
            word &= (U1 << (left << U3)) - U1
        if word & U(0x8080808080808080) == U0:
            at += min(left, U8)
            continue
        first = data[at]
        if first < 0x80:
            at += U1
            continue
        more = U1 if first < 0xE0 else U2 if first < 0xF0 else U3
        if first < 0xC2 or first > 0xF4 or left <= more:
            return False
        second = data[at + U1]
        low, high = 0x80, 0xBF
        if first == 0xE0:
            low = 0xA0
        elif first == 0xED:
            high = 0x9F
        elif first == 0xF0:
            low = 0x90
        elif first == 0xF4:
            high = 0x8F
        if second < low or second > high:
            return False
        for i in range(U2, more + U1):
            if data[at + i] & 0xC0 != 0x80:
                return False
        at += more + U1
    return True


@inner
def is_valid(data: Bytes, at: UInt, end: UInt, kind: UInt, schema: Schema) -> bool:
    """Whether a message of this kind is plain and whole: known fields have their wire type, texts are UTF-8."""
    depth = U0
    while True:
        while at == end:
            if depth == U0:
                return True
            depth -= U1
            end = schema.ends[depth]
            kind = schema.kinds[depth]
        tag, at = read_tag(data, at, end)
        if at > end:
            return False
        code = U(UNKNOWN)
        if tag >> U3 < U(FIELDS_MAX):
            code = U(schema.fields[kind, tag >> U3])
        if code & U7 != U7 and code & U7 != tag & U7:
            return False
        if code < U8:
            at = skip(data, at, end, tag & U7)
            if at > end:
                return False
            continue
        size, at = read_length(data, at, end)
        if at > end:
            return False
        if code < U(16):
            if not is_utf8(data, at, at + size):
                return False
            at += size
            continue
        if depth == U(DEPTH_MAX):
            return False
        schema.ends[depth] = end
        schema.kinds[depth] = kind
        depth += U1
        end = at + size
        kind = (code >> U4) - U1


# --- keys ------------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """The keys that rules ask for: chained by a small hash, texts end to end."""

    heads: NDArray[np.uint32]
    links: NDArray[np.uint32]
    at: NDArray[np.uint64]
    text: Bytes
    seen: NDArray[np.uint64]  # last span in which a key was found: only its first value counts


KEY_HEADS = 256


def make_keys(names: Sequence[str]) -> Keys:
    # A lone surrogate is no UTF-8: such a key is never found, here as in the twin.
    texts = [name.encode("utf-8", "surrogatepass") for name in names]
    keys = Keys(
        heads=np.full(KEY_HEADS, NONE, np.uint32),
        links=np.full(len(texts), NONE, np.uint32),
        at=np.cumsum([0, *map(len, texts)]).astype(np.uint64),
        text=padded(texts),
        seen=np.zeros(len(texts), np.uint64),
    )
    _chain(keys)
    return keys


@kernel
def _chain(keys: Keys) -> None:
    for key in range(U(keys.links.size)):
        hashed = _key_hash(keys.text, keys.at[key], keys.at[key + U1] - keys.at[key])
        keys.links[key] = keys.heads[hashed]
        keys.heads[hashed] = np.uint32(key)


@pasted
def find_key(data: Bytes, at: UInt, size: UInt, keys: Keys) -> UInt:
    """The number of a wanted key, or NONE."""
    if size == U0:
        return U(NONE)
    key = keys.heads[_key_hash(data, at, size)]
    while key != NONE:
        start = keys.at[key]
        if keys.at[key + U1] - start == size and is_equal(data, at, keys.text, start, size):
            break
        key = keys.links[key]
    return U(key)


@inner
def _key_hash(data: Bytes, at: UInt, size: UInt) -> UInt:
    middle, last = U(data[at + (size >> U1)]), U(data[at + size - U1])
    return (size * U(31) + U(data[at]) * U7 + middle * U(13) + last * U3) % U(KEY_HEADS)
