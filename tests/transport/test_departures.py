"""When a dead peer's connection is silent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

import transport
from tests.crash.harness import config
from transport import departures
from transport.link import Link


def test_who_could_not_look_has_seen_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped goes on where it was, and zmq's thread reads on only then."""
    clock = [0.0]
    monkeypatch.setattr(departures, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with transport.listen("tcp://127.0.0.1:0", config=config()) as endpoint:
        looks = endpoint._exchange.departures
        link = cast(Link, SimpleNamespace(peer=SimpleNamespace(link=1), arrived=7, ended=False))

        def looks_until_silent(seconds: float) -> int:
            for looked in range(100):
                if looks.is_silent(link):
                    return looked
                clock[0] += seconds
            raise AssertionError("never silent")

        assert looks_until_silent(0.05) in (7, 8)
        link.arrived += 1
        assert looks_until_silent(60.0) >= 3
