"""Consistent probability sampling: one 56-bit random value a trace, one threshold a probability.

OpenTelemetry's tracestate-probability-sampling: R is the `rv` of the `ot` tracestate member, else the low 56 bits of
the trace id; a trace is kept with probability p when R ≥ T, T = (1 − p)·2^56. So every worker, every retry and every
other sampler that follows the specification agrees, and a trace kept at 10 % is also kept at 50 %.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RANDOMNESS_BITS = 56
TWO_56 = 1 << RANDOMNESS_BITS

_RV = re.compile(r"[0-9a-f]{14}")
_TH = re.compile(r"[0-9a-f]{1,14}")


@dataclass(frozen=True, slots=True)
class OtState:
    """The `ot` member of a tracestate: `rv` and `th` as numbers, None where absent or malformed."""

    rv: int | None = None
    th: int | None = None


NO_OT_STATE = OtState()


def parse_ot_state(trace_state: str) -> OtState:
    """Reads `rv` and `th`; anything malformed counts as absent, as the specification asks."""
    if "ot=" not in trace_state:
        return NO_OT_STATE
    for member in trace_state.split(","):
        key, separator, value = member.strip(" \t").partition("=")
        if key != "ot" or not separator:
            continue
        pairs = dict(pair.split(":", 1) for pair in value.split(";") if ":" in pair)
        rv, th = pairs.get("rv", ""), pairs.get("th", "")
        return OtState(
            rv=int(rv, 16) if _RV.fullmatch(rv) else None,
            th=int(th.ljust(14, "0"), 16) if _TH.fullmatch(th) else None,
        )
    return NO_OT_STATE


def trace_randomness(trace_id: bytes) -> int:
    """The low 56 bits of a 16-byte trace id."""
    return int.from_bytes(trace_id[-7:], "big")


def threshold(probability: float) -> int:
    """T of a probability in [0, 1]; 2^56 (nothing is kept) for 0."""
    return TWO_56 - round(probability * TWO_56)


def adjusted_count(incoming_th: int | None, probability: float) -> float | None:
    """How many spans one kept span stands for: 2^56 / (2^56 − max(T in, T own)); None when nothing can be kept."""
    rejected = max(incoming_th or 0, threshold(probability))
    return TWO_56 / (TWO_56 - rejected) if rejected < TWO_56 else None
