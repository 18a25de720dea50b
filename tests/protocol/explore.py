"""Breadth-first exploration of a state graph: every state once, and the shortest way into a violation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from tests.protocol.words import Step


class Graph(Protocol):
    """What is explored."""

    def initial(self) -> bytes: ...

    def successors(self, s: bytes) -> list[Step]: ...

    def at_rest(self, s: bytes) -> str:
        """The violation in a state from which the protocol owes no step, or ""."""
        ...


@dataclass(slots=True)
class Result:
    """What an exploration saw.

    `complete` says that every reachable state was seen: neither the limit nor a violation cut it short.
    `kinds` are the trace lines, unformatted, of all steps that were taken: they show what was really covered.
    `parents` holds for each state the one that it was first reached from.
    """

    steps: int = 0
    rests: int = 0
    complete: bool = True
    violation: str = ""
    trace: list[str] = field(default_factory=list)
    kinds: set[object] = field(default_factory=set)
    parents: dict[bytes, bytes | None] = field(default_factory=dict)

    @property
    def states(self) -> int:
        return len(self.parents)

    def __str__(self) -> str:
        cut = "" if self.complete else ", not complete"
        seen = f"{self.states} states, {self.steps} steps, {self.rests} at rest{cut}"
        lines = [f"  {number:3d}  {line}" for number, line in enumerate(self.trace, 1)]
        return "\n".join([f"{seen}: {self.violation or 'no violation'}", *lines])


def explore(graph: Graph, *, limit: int = 5_000_000) -> Result:
    """Explore until everything is seen, a violation is found, or more than `limit` states are known."""
    start = graph.initial()
    result = Result(parents={start: None})
    level = [start]
    while level and not result.violation:
        if result.states > limit:
            result.complete = False
            break
        level = _next_level(graph, level, result)
    return result


def _next_level(graph: Graph, level: list[bytes], result: Result) -> list[bytes]:
    following: list[bytes] = []
    parents, kinds = result.parents, result.kinds
    for state in level:
        rests = True
        for after, owed, violation, words in graph.successors(state):
            result.steps += 1
            rests = rests and not owed
            kinds.add(words[0])
            if violation:
                _found(graph, state, result, violation, _line(words))
                return []
            if after not in parents:
                parents[after] = state
                following.append(after)
        if rests:
            result.rests += 1
            violation = graph.at_rest(state)
            if violation:
                _found(graph, state, result, violation)
                return []
    return following


def _found(graph: Graph, state: bytes, result: Result, violation: str, *last: str) -> None:
    result.violation, result.complete = violation, False
    result.trace = [*_way_to(graph, state, result.parents), *last, f"=> {violation}"]


def _way_to(graph: Graph, state: bytes, parents: dict[bytes, bytes | None]) -> list[str]:
    """The trace lines from the start to this state; they are found again by taking the same steps."""
    lines: list[str] = []
    before = parents[state]
    while before is not None:
        lines.append(next(_line(words) for after, _, _, words in graph.successors(before) if after == state))
        state, before = before, parents[before]
    return lines[::-1]


def _line(words: tuple[object, ...]) -> str:
    return str(words[0]).format(*words[1:])


def endless(graph: Graph, states: Iterable[bytes]) -> list[bytes]:
    """A round of owed steps that could go on for ever, or [].

    Without one, whoever waits does so for a bounded number of steps once the world lets the protocol go on,
    and at the end of them is a state of rest, which `explore` has looked at.
    """
    done: set[bytes] = set()
    for state in states:
        way: dict[bytes, Iterator[bytes]] = {} if state in done else {state: _owed(graph, state)}
        while way:
            last = next(reversed(way))
            after = next(way[last], None)
            if after is None:
                done.add(last)
                del way[last]
            elif after in way:
                return list(way)[list(way).index(after) :]
            elif after not in done:
                way[after] = _owed(graph, after)
    return []


def _owed(graph: Graph, state: bytes) -> Iterator[bytes]:
    return iter([after for after, owed, _, _ in graph.successors(state) if owed])
