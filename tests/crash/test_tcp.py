"""SIGKILL at every step of bulk connections, on either side: the other goes on, and nothing is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import shm
import transport
from tests.crash import harness
from tests.crash.harness import Kill, Stage, Steps, digest, pattern, segments_of
from transport import PeerGone, ProtocolError, Timeout

STEPS = {
    "front": ("bulk.attached", "bulk.sending"),
    "worker": ("bulk.attached", "bulk.granted", "bulk.chunk", "bulk.landed"),
}
SIZES = (400_000, 300_000, 150_000)  # bytes; the first in parts
_TURN = 0.05


def config(steps: Steps) -> transport.TransportConfig:
    return harness.config(steps, backend="tcp", tcp_timeout=2.0, handshake_timeout=5.0)


def play_front(stage: Stage, kill: Kill | None) -> None:
    """Send every size until it was answered right, whoever goes and comes meanwhile."""
    steps = Steps(kill)
    with transport.listen(stage.address("front"), config=config(steps)) as endpoint:
        for number, nbytes in enumerate(SIZES, 1):
            while not ask(endpoint, steps, number, pattern(number, nbytes)):
                pass
    stage.end()
    stage.report("front", {"events": steps.events})


def ask(endpoint: transport.Endpoint, steps: Steps, number: int, data: harness.Bytes) -> bool:
    """Send one and take its answer; False when the worker went meanwhile."""
    endpoint.wait_for_peers({"worker"}, timeout=harness.WAIT)
    before = steps.begun["worker"]
    try:
        endpoint.send({"id": number, "bytes": data}, to="worker")
    except PeerGone:
        return False
    while endpoint.peers and steps.begun["worker"] == before:
        try:
            answer = endpoint.receive(timeout=_TURN).body
        except (Timeout, PeerGone, ProtocolError):
            continue
        if answer["id"] == number:
            assert answer["digest"] == digest(data)
            return True
    return False


def play_worker(stage: Stage, kill: Kill | None) -> None:
    """Answer what comes; join the next front when one is gone."""
    steps = Steps(kill)
    while not stage.done:
        with transport.Endpoint("worker", config(steps)) as endpoint:
            try:
                endpoint.connect(stage.address("front"), timeout=0.5)
                serve(endpoint, stage)
            except (Timeout, PeerGone):
                continue
    stage.report("worker", {"events": steps.events})


def serve(endpoint: transport.Endpoint, stage: Stage) -> None:
    while not stage.done:
        try:
            body: Mapping[str, Any] = endpoint.receive(timeout=_TURN).body
        except Timeout:
            continue
        except ProtocolError:
            continue
        endpoint.send({"id": body["id"], "digest": digest(body["bytes"])}, to="front")
        del body


PLAYS = {"front": play_front, "worker": play_worker}


def test_the_steps_are_those_we_know() -> None:
    """A renamed event would take its kill point away in silence."""
    with harness.folder() as path:
        _, stage, pids = harness.act(PLAYS, path)
        for role, steps in STEPS.items():
            (report,) = stage.reports(role)
            assert set(steps) <= set(report["events"])
        assert segments_of(pids) == []


@pytest.mark.parametrize(
    ("role", "event"), [(role, event) for role, events in STEPS.items() for event in events]
)
def test_killed_at_every_step_of_a_transfer(role: str, event: str) -> None:
    with harness.folder() as path:
        killed, _, pids = harness.act(PLAYS, path, role, Kill(event, 1 if event == "bulk.attached" else 2))
        assert killed, f"{role} lives in spite of {event}"
        shm.sweep()
        assert segments_of(pids) == []
