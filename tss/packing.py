"""Payloads as they lie in Redis: plain, packed by LZ4, or packed by zstd with a dictionary.

A payload holds a few spans of one trace. That is too little to find repetition in, while payloads of a deployment
repeat each other: a dictionary made of them packs three to four times as well as LZ4, for about the same CPU.
Every form says what it is by its first bytes, and the header of a zstd frame says which dictionary it needs; so all
forms, and any number of dictionaries, may lie side by side.

The life of a dictionary, in `tss.buffer` by the keys `packing` and `z:<id>`:

- A reader packs by LZ4 until it has one. It adopts the one that the fleet uses (`packing`); where there is none it
  takes a bounded sample of its payloads, trains, and publishes what comes of it. The first one wins.
- Its id is a hash of its content. So a key `z:<id>` has one content for ever, whoever writes it however often.
- **No payload lies in Redis whose dictionary does not.** Each shard has its own copy, as each shard is complete in
  itself. The transaction that writes payloads fails unless the copy is there at that very moment: the key is watched,
  and a script before the transaction touches it if it is missing. Then the reader puts it there and sends the
  transaction once more. No memory of what was there is trusted, and there is no extra round trip.
- It has no expiry and nobody removes it: payloads wait as long as workers are away. It is small, and made once in a
  life of Redis.

What may happen:

- *The trainer dies* before it publishes: the next one trains. *Two train at once*: the script that publishes gives the
  second one the first one's. Who had packed by another keeps on; each frame names its own.
- *Redis restarts* without its last writes: the log is cut somewhere, and a copy stands before all payloads that need
  it, so what is lost of both is the payloads first.
- *Redis is emptied*, or a copy deleted, at any moment: the next transaction to that shard fails and brings it back.
- *A copy is deleted* while payloads need it: reading them fails with an error that names the key, and is tried again.
  Any reader that still uses the dictionary puts it back with its next batch. No span is passed over.

Rejected: an expiry that use renews (a fleet that is away longer loses spans); asking before each batch whether the
copy is there (a round trip, and Redis may be emptied right after it); the dictionary with every transaction (a
megabyte of it a second for an idle fleet); a dictionary for each process (N of them to hold and to fetch); training
anew as payloads change (old copies would need an owner who knows when the last payload is gone; names, which are
most of what a dictionary holds, change slowly).

Also rejected, in µs of packing a span where a collector's batches are interleaved: all payloads of a batch and shard
in one frame (0.63 for 0.86 and no smaller, but 0.25 more to unpack the frames that hold a kept trace, nearly all of
them); each resource only once in Redis (0.58 for 0.78 and a sixth less memory, but a payload would not be whole, and a
resource would need an owner); equal resources within a payload put together (0.72 for 0.78).
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import zstandard

from tss.model import Chunks

log = logging.getLogger("tss")

Form: TypeAlias = Literal["zstd", "lz4", "none"]

# By LZ4: this byte, the size in four more, the block. A plain payload begins with 0x0A, the tag of its first field.
LZ4_MARK = b"\x01"
LZ4_HEAD = struct.Struct("<cI")
LZ4 = pa.Codec("lz4_raw")
ZSTD_MARK = zstandard.FRAME_HEADER
LEVEL = -1  # level 1 is a tenth slower and gains a twentieth; -3 is no faster, and a third worse

DICTIONARY_HEAD = struct.Struct("<4sI")  # the magic number, and the id
ID_MIN, ID_MAX = 1 << 15, 1 << 31  # between them ids are free for private use
SAMPLE_PAYLOAD_BYTES = 16 << 10  # of a large payload: its beginning, so that it does not stand for all


@dataclass(frozen=True, slots=True)
class Dictionary:
    """What both sides need; equal ids mean equal contents."""

    content: bytes

    @classmethod
    def named(cls, content: bytes) -> Dictionary:
        """A dictionary as zstd makes it, under the id that its content gives it."""
        magic, rest = content[:4], content[DICTIONARY_HEAD.size :]
        hashed = int.from_bytes(hashlib.sha256(rest).digest()[:8], "big")
        return cls(DICTIONARY_HEAD.pack(magic, ID_MIN + hashed % (ID_MAX - ID_MIN)) + rest)

    @property
    def id(self) -> int:
        return int(DICTIONARY_HEAD.unpack_from(self.content)[1])

    @property
    def is_whole(self) -> bool:
        """Whether the id is that of the content."""
        return len(self.content) > DICTIONARY_HEAD.size and self == Dictionary.named(self.content)

    def loaded(self) -> zstandard.ZstdCompressionDict:
        return zstandard.ZstdCompressionDict(self.content, dict_type=zstandard.DICT_TYPE_FULLDICT)


@dataclass(frozen=True, slots=True)
class Training:
    """How a dictionary is made. zstd advises a sample of a hundred times its size; these 2 MB gain as much here, and
    take 0.1 s. So there is no thread for it, and a large first batch is packed with what it taught.
    """

    dictionary_bytes: int = 32 << 10  # 16 KB pack as well here, and would not where services are many
    sample_bytes: int = 2 << 20
    samples_min: int = 100

    def make(self, samples: Sequence[bytes]) -> Dictionary:
        """Raises ZstdError where the samples have nothing in common, or are too few."""
        made = zstandard.train_dictionary(self.dictionary_bytes, list(samples), level=LEVEL)
        return Dictionary.named(made.as_bytes())


class Packing:
    """How one reader packs. Not for use by two threads."""

    def __init__(self, form: Form, training: Training) -> None:
        self.dictionary: Dictionary | None = None
        self.trained: Dictionary | None = None
        """Of our own sample, if that is done."""
        self._form = form
        self._training = training
        self._samples: list[bytes] | None = []
        self._compressor: zstandard.ZstdCompressor | None = None

    @property
    def wants_dictionary(self) -> bool:
        return self._form == "zstd" and self.dictionary is None

    def adopt(self, dictionary: Dictionary) -> None:
        """From now on payloads are packed with it."""
        loaded = dictionary.loaded()
        loaded.precompute_compress(level=LEVEL)
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, dict_data=loaded, write_checksum=False)
        self.dictionary, self.trained, self._samples = dictionary, None, None

    def sample(self, chunks: Chunks) -> None:
        """Takes some of the payloads, spread over the batch, and trains when they are enough."""
        if self._samples is None:
            return
        room = self._training.sample_bytes - sum(map(len, self._samples))
        held = int((chunks.field_at[1:] - chunks.payload_at).sum())
        for payload in list(_payloads(chunks))[:: max(1, held // max(1, room))]:
            self._samples.append(bytes(payload[:SAMPLE_PAYLOAD_BYTES]))
        enough = len(self._samples) >= self._training.samples_min
        if enough and sum(map(len, self._samples)) >= self._training.sample_bytes:
            samples, self._samples = self._samples, None
            self._train(samples)

    def _train(self, samples: Sequence[bytes]) -> None:
        try:
            self.trained = self._training.make(samples)
        except zstandard.ZstdError as fault:
            log.warning("Payloads stay packed by LZ4: no dictionary could be made of them (%s)", fault)

    def pack(self, chunks: Chunks) -> list[bytes]:
        """The payloads of a batch in their order, as they are to be stored."""
        if self._compressor is not None and len(chunks):
            sizes = chunks.field_at[1:] - chunks.payload_at
            segments = np.stack((chunks.payload_at, sizes), axis=1).astype(np.uint64)
            plain = zstandard.BufferWithSegments(chunks.buffer, segments.tobytes())
            packed = self._compressor.multi_compress_to_buffer(plain, threads=0)
            return [packed[row].tobytes() for row in range(len(packed))]
        if self._form == "none":
            return [bytes(payload) for payload in _payloads(chunks)]
        return [_by_lz4(payload) for payload in _payloads(chunks)]


class Unpacking:
    """Payloads of any form, plain again."""

    def __init__(self) -> None:
        self._decompressors = {0: zstandard.ZstdDecompressor()}

    def unpack(self, payload: bytes, find: Callable[[int], Dictionary]) -> bytes:
        """`find` is asked for a dictionary that was not needed before."""
        if payload.startswith(ZSTD_MARK):
            needed = dictionary_of(payload)
            if needed not in self._decompressors:
                self._decompressors[needed] = zstandard.ZstdDecompressor(dict_data=find(needed).loaded())
            return self._decompressors[needed].decompress(payload)
        if payload.startswith(LZ4_MARK):
            size = LZ4_HEAD.unpack_from(payload)[1]
            plain: bytes = LZ4.decompress(memoryview(payload)[LZ4_HEAD.size :], size, asbytes=True)
            return plain
        return payload


def dictionary_of(payload: bytes) -> int:
    """The id of the dictionary that a payload needs, 0 where it needs none."""
    if not payload.startswith(ZSTD_MARK):
        return 0
    return zstandard.get_frame_parameters(payload).dict_id


def _payloads(chunks: Chunks) -> Iterator[memoryview]:
    for at, end in zip(chunks.payload_at.tolist(), chunks.field_at[1:].tolist(), strict=True):
        yield chunks.buffer[at:end]


def _by_lz4(payload: memoryview) -> bytes:
    return LZ4_HEAD.pack(LZ4_MARK, len(payload)) + LZ4.compress(payload, asbytes=True)
