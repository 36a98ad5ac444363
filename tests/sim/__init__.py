"""A deterministic simulation: the production code of ingest, decide and takeover in a world made from one seed.

`world` passes time and switches between actors; `redis`, `kafka` and `iceberg` stand for the outside; `fleet` is what
runs in it; `history` draws a workload and faults from a seed; `laws` says what must hold whatever happened;
`accidents` are the ways in which each rule of docs/protocol.md was paid for.
"""
