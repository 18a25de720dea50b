"""The conformance suite: what every backend must do, for our own and for those of third parties.

Derive a class in a test file of your own and run pytest, which is all that this needs beside tensorferry:

    from transport.conformance import BackendConformance

    class TestMine(BackendConformance):
        backend = "mine"

The peers are real: processes of their own, started by a fork server that has imported tensorferry and
nothing else, so that each costs milliseconds. Nothing of the package itself imports this one.
"""

from __future__ import annotations

from transport.conformance.pair import Both, repeated
from transport.conformance.peers import (
    WAIT,
    Pumped,
    acknowledged,
    joined,
    left,
    prepare,
    running,
    serve,
    serving,
    warm_up,
)
from transport.conformance.samples import (
    Note,
    Request,
    digest,
    mutated,
    noise,
    raw,
    raw_tensor,
    same,
    tensors,
)
from transport.conformance.suite import BackendConformance

__all__ = [
    "WAIT",
    "BackendConformance",
    "Both",
    "Note",
    "Pumped",
    "Request",
    "acknowledged",
    "digest",
    "joined",
    "left",
    "mutated",
    "noise",
    "prepare",
    "raw",
    "raw_tensor",
    "repeated",
    "running",
    "same",
    "serve",
    "serving",
    "tensors",
    "warm_up",
]
