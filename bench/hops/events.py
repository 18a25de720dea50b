"""What `bench.hops.hooks` noted, put together: what the images of some requests cost on each hop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.part import WrongAnswerError

Event = dict[str, Any]


class FirstHop(NamedTuple):
    """Front end to EngineCore, milliseconds.

    `made`: from the start given until the first request is sent. `total`: from entering `_send_input` to
    decoded, summed over the requests. `span`: from the first request's to the last one's. `blocked`: in
    `_send_input`, summed. `rest`: from the last one decoded until the end given.
    """

    made: float
    total: float
    span: float
    blocked: float
    rest: float
    requests: int
    images: int


class SecondHop(NamedTuple):
    """EngineCore to its workers: milliseconds from put until the last worker has it unpickled, summed."""

    total: float
    images: int


def read(folder: Path) -> list[Event]:
    """All events of all processes."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def first_hop(events: Sequence[Event], start: float, end: float) -> FirstHop:
    """Of the requests sent between those times. `WrongAnswerError`: one did not come, or not whole."""
    sent = [event for event in _of("sent", events) if start <= event["start"] <= end]
    decoded = {event["id"]: event for event in _of("decoded", events)}
    if not sent:
        raise WrongAnswerError("no request with images was sent")
    for event in sent:
        if decoded.get(event["id"], {}).get("images") != event["images"]:
            raise WrongAnswerError(f"request {event['id']} was sent, and not decoded with all its images")
    came = [decoded[event["id"]]["end"] for event in sent]
    first, last = min(event["start"] for event in sent), max(came)
    return FirstHop(
        made=1e3 * (first - start),
        total=1e3 * sum(after - event["start"] for event, after in zip(sent, came, strict=True)),
        span=1e3 * (last - first),
        blocked=1e3 * sum(event["end"] - event["start"] for event in sent),
        rest=1e3 * (end - last),
        requests=len(sent),
        images=sum(event["images"] for event in sent),
    )


def second_hop(events: Sequence[Event], start: float, end: float, *, readers: int) -> SecondHop:
    """Of the messages put between those times; each has so many readers.

    While a worker is still at its last step, the next message waits for it: from when it lies in the queue
    until the worker asks for it is not counted. `WrongAnswerError`: a message did not come to all.
    """
    put = [event for event in _of("put", events) if start <= event["start"] <= end]
    taken: dict[tuple[str, int], list[Event]] = {}
    for event in _of("taken", events):
        taken.setdefault((event["queue"], event["number"]), []).append(event)
    total = 0.0
    for event in put:
        came = taken.get((event["queue"], event["number"]), [])
        if [each["images"] for each in came] != [event["images"]] * readers:
            raise WrongAnswerError(f"message {event['number']} to {readers} workers came to {len(came)}")
        total += max(_until(event, each) for each in came)
    return SecondHop(total=1e3 * total, images=sum(event["images"] for event in put))


def _until(put: Event, taken: Event) -> float:
    busy = max(0.0, taken["start"] - put["end"])
    return float(taken["end"] - put["start"] - busy)


def _of(what: str, events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event["what"] == what]
