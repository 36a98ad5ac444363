"""Faults on real processes: a fleet of workers, a stream whose truth is known, one fault at a time, the tables compared.

`python -m tests.chaos --help`. In reading order: `truth` (what is sent, what must come of it), `fleet` (the workers
and what they depend on), `gate` (a line to the object store that can be cut), `faults` (what is done to them),
`report` (the tables that are printed).
"""
