"""A payload that changed on its way is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from bench import payload
from bench.part import WrongAnswerError


def made(seed: int, *, words: int = 4096) -> payload.Words:
    """A payload filled from `seed`."""
    made_here: payload.Words = np.empty(words, np.int64)
    payload.fill(made_here, seed)
    return made_here


def test_pages_and_seeds_differ() -> None:
    one, other = made(1), made(2)
    assert not np.array_equal(one, other)
    pages = one.reshape(-1, 512)
    assert len({page.tobytes() for page in pages}) == len(pages)
    assert payload.checksum(one) == payload.checksum(made(1)) != payload.checksum(other)


@pytest.mark.parametrize("place", [0, 1, 100, 4094, 4095])
def test_one_changed_bit_is_a_wrong_checksum(place: int) -> None:
    words = made(3)
    expected = payload.checksum(words)
    payload.check(words, 1, expected)
    words[place] ^= 1
    with pytest.raises(WrongAnswerError, match="message 1: checksum"):
        payload.check(words, 1, expected)


@pytest.mark.parametrize("place", [0, 2048, -1])
def test_stamp_of_another_message_is_noticed(place: int) -> None:
    words = made(4)
    payload.stamp(words, 7)
    payload.check_stamp(words, 7)
    words[place] = 6
    with pytest.raises(WrongAnswerError, match="message 7 carries the stamps"):
        payload.check_stamp(words, 7)


@pytest.mark.parametrize("place", [0, 1, 100, 4094, 4095])
def test_one_changed_bit_is_a_wrong_fold(place: int) -> None:
    words = made(3)
    expected = payload.fold(words)
    payload.check_fold(words, 1, expected)
    words[place] ^= 1
    with pytest.raises(WrongAnswerError, match="message 1: fold"):
        payload.check_fold(words, 1, expected)


def test_pages_that_changed_places_are_a_wrong_fold() -> None:
    words = made(3)
    expected = payload.fold(words)
    pages = words.reshape(-1, 512)
    pages[[0, 1]] = pages[[1, 0]]
    with pytest.raises(WrongAnswerError, match="fold"):
        payload.check_fold(words, 1, expected)
