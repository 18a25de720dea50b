"""Free space against a plain map of lines: the lowest address, nothing twice, nothing lost."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from shm.extents import Extents

LINE = 64
LINES = 96

Step = tuple[str, int, int]  # what, lines or pick, alignment in lines


def lowest(used: list[bool], lines: int, alignment: int) -> int | None:
    """Where the first free run of that many lines begins, by trying every place."""
    for start in range(0, LINES - lines + 1, alignment):
        if not any(used[start : start + lines]):
            return start
    return None


def runs(used: list[bool]) -> list[int]:
    """The lengths of the free runs."""
    return [len(run) for run in "".join("x" if line else "." for line in used).split("x") if run]


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["allocate", "allocate", "release"]),
            st.one_of(st.integers(1, 12), st.integers(1, LINES + 1)),
            st.sampled_from([1, 1, 8]),
        ),
        max_size=60,
    )
)
def test_against_a_map_of_lines(steps: list[Step]) -> None:
    extents, used = Extents(LINES * LINE), [False] * LINES
    live: list[tuple[int, int]] = []
    for what, number, alignment in steps:
        if what == "allocate":
            expected = lowest(used, number, alignment)
            found = extents.allocate(number * LINE, alignment * LINE)
            assert found == (None if expected is None else expected * LINE)
            if expected is not None:
                live.append((expected, number))
                used[expected : expected + number] = [True] * number
        elif live:
            start, lines = live.pop(number % len(live))
            extents.release(start * LINE, lines * LINE)
            used[start : start + lines] = [False] * lines
        assert extents.free == used.count(False) * LINE
        assert extents.largest() == max(runs(used), default=0) * LINE
    for start, lines in live:
        extents.release(start * LINE, lines * LINE)
    assert extents.largest() == extents.free == LINES * LINE


@given(
    st.lists(st.integers(1, 20), max_size=20),
    st.sets(st.integers(0, 19)),
    st.integers(1, LINES),
)
def test_dropping_what_lies_above(sizes: list[int], freed: set[int], wanted: int) -> None:
    """The ring's memory ends earlier than thought: what is free above is gone, the rest as before."""
    extents, live = Extents(LINES * LINE), []
    for lines in sizes:
        start = extents.allocate(lines * LINE, LINE)
        if start is not None:
            live.append((start // LINE, lines))
    for index in sorted(freed, reverse=True):
        if index < len(live):
            start, lines = live.pop(index)
            extents.release(start * LINE, lines * LINE)
    top = max([wanted, *(start + lines for start, lines in live)])
    extents.drop_above(top * LINE)
    assert extents.free == (top - sum(lines for _, lines in live)) * LINE
    for start, lines in live:
        extents.release(start * LINE, lines * LINE)
    assert extents.largest() == extents.free == top * LINE
    assert extents.allocate(top * LINE, LINE) == 0
    assert extents.allocate(LINE, LINE) is None
