"""Tail-Sampling Selector: spans from Kafka in, the traces worth keeping out as an Iceberg table.

Two halves meet in Redis. *Ingest* takes records from Kafka, cuts them into one chunk per trace, and puts the
chunks into Redis before it commits an offset. *Decide* claims traces that have gone quiet, judges each once,
writes the kept ones to Iceberg with a row for every decision, and releases the claim.

Where to read first: `model` (the values), `ingest` and `decide` (the two stories), `buffer` (Redis: keys,
scripts, what is atomic), `sink` (Iceberg: what makes a commit land once), then `judge` (pure: facts to verdicts)
and `wire` (pure: bytes to chunks).
"""

import os

# Before anything loads Arrow, which looks once: `tss.memory` says why.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"
