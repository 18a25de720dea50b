"""Roles of a play in which a front asks workers until each has answered right, whoever comes and goes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import transport
from tests.crash.harness import WAIT, Bytes, Report, Stage, config, digest
from transport import PeerGone, ProtocolError, Timeout

_TURN = 0.05


def ask(
    endpoint: transport.Endpoint, report: Report, number: int, data: Bytes, to: Collection[str]
) -> set[str]:
    """Send one message to all; who answered. Who was sent it, and did not go, must answer."""
    endpoint.wait_for_peers(to, timeout=WAIT)
    before = dict(report.steps.begun)
    try:
        endpoint.send({"id": number, "bytes": data}, to=list(to))
        sent = set(to)
    except PeerGone as error:
        sent = set(error.delivered)
    answered: set[str] = set()
    deadline = time.monotonic() + WAIT
    while sent - answered:
        assert time.monotonic() < deadline, f"message {number} was never answered by {sent - answered}"
        there = {peer.name for peer in endpoint.peers}
        sent &= {name for name in there if report.steps.begun[name] == before[name]} | answered
        try:
            message = endpoint.receive(timeout=_TURN)
        except (Timeout, PeerGone, ProtocolError):
            continue
        if message.body["id"] == number:
            answered.add(message.sender)
            if message.body["digest"] != digest(data):
                report.wrong.append(f"message {number}: {message.sender} has other bytes than were sent")
    report.answered += len(answered)
    return answered


def play_worker(name: str, stage: Stage, report: Report, **changes: Any) -> None:
    """Answer what comes; join the next front when one is gone."""
    while not stage.done:
        with transport.Endpoint(name, config(report.steps, **changes)) as endpoint:
            try:
                endpoint.connect(stage.address("front"), timeout=0.5)
                _serve(endpoint, stage, report)
            except (Timeout, PeerGone):
                continue


def _serve(endpoint: transport.Endpoint, stage: Stage, report: Report) -> None:
    while not stage.done:
        try:
            body: Mapping[str, Any] = endpoint.receive(timeout=_TURN).body
        except Timeout:
            continue
        except ProtocolError as error:
            report.refused.append(str(error))
            continue
        endpoint.send({"id": body["id"], "digest": digest(body["bytes"])}, to="front")
        report.answered += 1
        del body
