"""The part of `bench vllm-turns`: one vLLM that is asked by the ring and by vLLM's own way in turns.

What differs between two vLLMs, or between now and a minute ago, is the same for both ways here. Each way is
asked twice in a row and the second time counts, since a prompt meets what the one before it left behind: on
two cores hop 1 of 32 images took 0.6 s by vLLM's own way after one by the ring, and 2.1 s after its own kind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

from bench.hops import events
from bench.hops.asking import distinct, prompts
from bench.hops.measure import (
    FRONT,
    PAUSE,
    WARM,
    Ask,
    Repeat,
    explained,
    images_in,
    running,
    shape,
    surround,
    through,
    ways_after,
)
from bench.hops.model import write_model
from bench.part import Json, Report, WrongAnswerError
from engine.vllm.roles import Front

RING, OWN = "tensorferry", "direct_rpc"
FIGURES = ("whole", "made", "hop 1", "rest")

Pair = Mapping[str, Repeat]


def measure(
    folder: Path, *, column: str, layouts: Sequence[str], side: int, pairs: int, device: str
) -> Report:
    """Each layout `pairs` times both ways, after one pair that is not counted. Milliseconds."""
    noted = folder / "noted"
    noted.mkdir()
    surround(noted)
    write_model(folder / "model")
    with explained(folder), running(column, str(folder / "model"), device) as ask:
        ask(prompts(WARM, 1, side))
        taken = {layout: _pairs(ask, layout, side, pairs) for layout in layouts}
        expected = 2 * sum(map(images_in, layouts)) * (pairs + 1)
        went = ways_after(column, expected)
    if not expected <= through(went, FRONT) <= expected + WARM:
        raise WrongAnswerError(f"{expected} images were to take the ring: {went}")
    found = events.read(noted)
    values = {layout: _figures(found, each) for layout, each in taken.items()}
    asked = 2 * sum(shape(layout)[0] for layout in layouts) * pairs  # those that count
    answered = sum(len(repeat.said) for each in taken.values() for pair in each for repeat in pair.values())
    return Report(values={"layouts": values}, expected=asked, verified=answered)


def _pairs(ask: Ask, layout: str, side: int, pairs: int) -> list[Pair]:
    """`WrongAnswerError`: different images were answered alike."""
    count, images = shape(layout)
    taken: list[Pair] = []
    for number in range(pairs + 1):
        order = (RING, OWN) if number % 2 == 0 else (OWN, RING)  # neither is always the second
        pair = {}
        for turn, way in enumerate((order[0], order[0], order[1], order[1])):
            # Fresh ones each time: vLLM keeps what it made of those it has seen.
            batch = prompts(count, images, side, first=100_000 * images + 1000 * (4 * number + turn))
            pair[way] = _ask(ask, batch, way)
        if not distinct([answer for repeat in pair.values() for answer in repeat.said]):
            raise WrongAnswerError(f"{layout}: different images were answered alike")
        taken.append(pair)
    return taken[1:]


def _ask(ask: Ask, batch: list[dict[str, object]], way: str) -> Repeat:
    no_tensor_suits = mock.patch.object(Front, "suits", return_value=False)  # the front end is this process
    with contextlib.nullcontext() if way == RING else no_tensor_suits:
        time.sleep(PAUSE)
        start = time.monotonic()
        said = ask(batch)
        return Repeat(start, time.monotonic(), said)


def _figures(found: Sequence[events.Event], pairs: Sequence[Pair]) -> dict[str, Json]:
    return {
        way: _of([events.first_hop(found, p[way].start, p[way].end) for p in pairs]) for way in (OWN, RING)
    }


def _of(hops: Sequence[events.FirstHop]) -> dict[str, Json]:
    return {
        "whole": [hop.made + hop.span + hop.rest for hop in hops],
        "made": [hop.made for hop in hops],
        "hop 1": [hop.total for hop in hops],
        "rest": [hop.rest for hop in hops],
    }
