"""The record protocol holds in every reachable state, and each of its guards is needed."""

from __future__ import annotations

import dataclasses

import pytest

from tests.protocol.config import Config, Guards, parse
from tests.protocol.explore import endless, explore
from tests.protocol.model import Model, main
from tests.protocol.words import CORRUPT, LEAK, REFUSED, STUCK

# What is explored completely: the configuration, a floor for the number of states (about four fifths of what
# was counted: an exploration that lost a part of the protocol falls below), words of steps it must take.
COMPLETE = [
    (
        "generations=2 hand_ons=2 kills=1 restarts=1",
        30_000,
        "hands|SIGKILL|starts|prepares|admits|notices|dropped",
    ),
    (
        "generations=2 hand_ons=1 kills=1 restarts=1 broadcast=1",
        22_000,
        "commits|hands|SIGKILL|admits|shares",
    ),
    (
        "hand_ons=2 broadcast=1 losses=1 doubles=1",
        75_000,
        "LOST|DOUBLED|empty|shares|refuses|waits for its finalizer",
    ),
    ("kills=1 restarts=1 broadcast=1 losses=1 doubles=1", 25_000, "LOST|DOUBLED|SIGKILL|starts|dropped"),
    ("hand_ons=1 kills=1 restarts=1 losses=1 doubles=1", 40_000, "LOST|DOUBLED|SIGKILL|starts|ends its link"),
    (
        "generations=2 hand_ons=1 kills=1 doubles=1 tso=1",
        26_000,
        "W's oldest store|p{}'s oldest store|in the opening",
    ),
    ("hand_ons=2 kills=1 restarts=1 broadcast=1 tso=1", 42_000, "p{}'s oldest store|hands|SIGKILL|starts"),
    ("slots=2 hand_ons=1 kills=1 restarts=1", 78_000, "hands|SIGKILL|starts|stays"),
    ("slots=2 generations=2 hand_ons=1", 38_000, "commits|hands|gives the bytes"),
    ("slots=2 columns=3 readers=2 hand_ons=1 kills=1 restarts=1", 198_000, "hands|SIGKILL|starts|dropped"),
    ("columns=3 hand_ons=3", 15_000, "hands|stays|shares"),
    ("columns=3 hand_ons=2 kills=1 restarts=1", 70_000, "hands|SIGKILL|starts|dropped"),
    (
        "columns=3 readers=2 hand_ons=1 replacements=1 goodbyes=1",
        23_000,
        "starts|goodbye|lets its lock go|dropped",
    ),
    ("hand_ons=1 reconnects=1 goodbyes=1 losses=1", 18_000, "asks for a new link|goodbye|empty"),
    ("hand_ons=1 kills=1 reconnects=1 doubles=1", 24_000, "asks for a new link|SIGKILL|DOUBLED"),
    (
        "generations=2 hand_ons=1 broadcast=1 loans=1 resends=1",
        9_000,
        "of its own|sends s{} again|drops its own",
    ),
    ("generations=2 hand_ons=1 forgeries=1 tso=1", 19_000, "FORGED|refuses"),
    ("hand_ons=1 kills=1 doubles=1 writer_kills=1 broadcast=1 tso=1", 43_000, "SIGKILL W|SIGKILL p{}"),
    ("hand_ons=2 kills=1 broadcast=1 first_look=1", 9_000, "looks at|a candidate|the lock of column"),
]

# A guard, an exploration without which all is well, and what happens without the guard.
NEEDED = [
    ("open_fence", "tso=1", CORRUPT),
    ("reclaim_fence", "doubles=1 tso=1", CORRUPT),
    ("second_look", "doubles=1", CORRUPT),
    ("reread", "doubles=1", CORRUPT),
    ("closing_mark", "hand_ons=2", REFUSED),
    ("restore", "doubles=1", STUCK),
    ("ask_lock", "kills=1", LEAK),
    ("link_check", "slots=2 kills=1 restarts=1", REFUSED),
    ("keep_view", "hand_ons=1", REFUSED),
    ("scan_until_free", "goodbyes=1", CORRUPT),
    ("scan_before_answer", "kills=1 restarts=1 doubles=1", CORRUPT),
    ("zeroing", "kills=1 restarts=1", LEAK),
    ("reconnect_keeps_column", "reconnects=1", CORRUPT),
    ("new_generation", "generations=2 doubles=1", CORRUPT),
    ("in_flight_count", "", REFUSED),
    ("own_count", "loans=1", CORRUPT),
    ("ack_after_open", "", REFUSED),
    ("clear_on_refusal", "generations=2 doubles=1", REFUSED),
    ("wait_for_finalizer", "doubles=1", CORRUPT),
    ("compare_extent", "forgeries=1", CORRUPT),
    ("end_clears_queue", "kills=1", LEAK),
    ("send_lock", "kills=1", LEAK),
    ("ask_writer_lock", "doubles=1 writer_kills=1", STUCK),
    ("ping", "losses=1", LEAK),
]

LARGE = [
    ("slots=2 columns=3 hand_ons=1 kills=1 restarts=1", 500_000),
    ("columns=3 hand_ons=3 kills=1 restarts=1", 570_000),
    ("generations=2 hand_ons=2 kills=2 restarts=2", 370_000),
    ("slots=2 hand_ons=1 kills=1 restarts=1 losses=1 doubles=1", 2_900_000),
    ("slots=2 columns=3 readers=2 kills=1 restarts=1 losses=1 doubles=1", 560_000),
    ("slots=2 columns=3 readers=2 hand_ons=1 kills=1 restarts=1 losses=1 doubles=1", 7_900_000),
]


def _uncovered(kinds: set[object], wanted: str) -> list[str]:
    return [words for words in wanted.split("|") if not any(words in str(kind) for kind in kinds)]


@pytest.mark.timeout(600)  # some seconds of one processor, of which a busy machine may give a tenth
@pytest.mark.parametrize(("options", "floor", "covered"), COMPLETE, ids=[row[0] for row in COMPLETE])
def test_every_reachable_state_is_right(options: str, floor: int, covered: str) -> None:
    result = explore(Model(parse(options.split())))
    assert not result.violation, f"\n{result}"
    assert result.complete
    assert result.states > floor
    assert result.rests > 0
    assert not _uncovered(result.kinds, covered)


@pytest.mark.parametrize(("guard", "options", "violation"), NEEDED, ids=[row[0] for row in NEEDED])
def test_without_this_guard_a_violation_is_found(guard: str, options: str, violation: str) -> None:
    """The first look is taken in its steps, so that nothing but the missing guard can be at fault."""
    config = dataclasses.replace(parse(options.split()), first_look=True)
    whole = explore(Model(config))
    assert whole.complete, f"\n{whole}"
    broken = explore(Model(config.without(guard)))
    assert broken.violation == violation, f"\n{broken}"


def test_each_guard_has_its_row() -> None:
    assert sorted(row[0] for row in NEEDED) == sorted(guard.name for guard in dataclasses.fields(Guards))


@pytest.mark.parametrize(("guard", "options", "violation"), NEEDED, ids=[row[0] for row in NEEDED])
def test_symmetry_hides_nothing(guard: str, options: str, violation: str) -> None:
    """What stands for other states stands for their violations: the shortest way into one stays as long."""
    reduced = parse(options.split()).without(guard)
    full = dataclasses.replace(reduced, symmetry=False)
    first, second = explore(Model(reduced)), explore(Model(full))
    assert first.violation == second.violation == violation
    assert len(first.trace) == len(second.trace)


def test_symmetry_saves_states() -> None:
    reduced = Config(hand_ons=1, kills=1)
    full = dataclasses.replace(reduced, symmetry=False)
    assert explore(Model(reduced)).states < explore(Model(full)).states


@pytest.mark.parametrize(
    "options",
    [
        "generations=2 hand_ons=2 first_look=1",
        "hand_ons=1 broadcast=1 losses=1 doubles=1",
        "hand_ons=1 kills=1 restarts=1 first_look=1",
        "columns=2 readers=1 hand_ons=1 replacements=1 goodbyes=1 kills=1 losses=1",
        "hand_ons=1 reconnects=1 losses=1",
        "hand_ons=1 doubles=1 broadcast=1 writer_kills=1 tso=1",
    ],
)
def test_whoever_waits_waits_for_a_bounded_number_of_steps(options: str) -> None:
    model = Model(parse(options.split()))
    result = explore(model)
    assert result.complete
    assert not endless(model, result.parents)


class _Round:
    """Three states in a round; the way back is owed, or is not."""

    def __init__(self, *, owed: bool) -> None:
        self._owed = owed

    def initial(self) -> bytes:
        return b"a"

    def successors(self, s: bytes) -> list[tuple[bytes, bool, str, tuple[object, ...]]]:
        after = {b"a": b"b", b"b": b"c", b"c": b"b"}[s]
        return [(after, self._owed or s != b"c", "", ("{} to {}", s, after))]

    def at_rest(self, s: bytes) -> str:
        return "" if s != b"c" else "a violation"


def test_an_endless_round_is_found() -> None:
    assert endless(_Round(owed=True), [b"a"]) == [b"b", b"c"]
    assert not endless(_Round(owed=False), [b"a"])


def test_a_trace_reads_from_the_start_to_the_violation() -> None:
    result = explore(_Round(owed=False))
    assert result.trace == ["b'a' to b'b'", "b'b' to b'c'", "=> a violation"]
    assert str(result).splitlines()[0] == "3 states, 3 steps, 1 at rest, not complete: a violation"


def test_a_limit_is_not_called_complete() -> None:
    result = explore(Model(Config(hand_ons=2)), limit=50)
    assert not result.complete
    assert not result.violation


def test_the_command_line_prints_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hand_ons=1", "without=keep_view", "limit=1000"]) == 1
    printed = capsys.readouterr().out
    assert "p0 hands s0 g1 on to p1" in printed
    assert f"=> {REFUSED}" in printed
    assert main(["hand_ons=1"]) == 0


@pytest.mark.parametrize(
    "words", [["kill=1"], ["without=fence"], ["readers=3", "columns=2"], ["reconnects=2"]]
)
def test_the_command_line_refuses_what_it_does_not_know(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"no such option|no such guard|readers need|reconnects is"):
        main(words)


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("options", "floor"), LARGE, ids=[row[0] for row in LARGE])
def test_every_reachable_state_of_a_large_model_is_right(options: str, floor: int) -> None:
    result = explore(Model(parse(options.split())), limit=20_000_000)
    assert not result.violation, f"\n{result}"
    assert result.complete
    assert result.states > floor
    seen = {"hand_ons": "hands", "losses": "LOST", "doubles": "DOUBLED", "restarts": "starts|reaches another"}
    wanted = "|".join(["SIGKILL", *(words for option, words in seen.items() if option in options)])
    assert not _uncovered(result.kinds, wanted)
