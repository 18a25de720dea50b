"""The pool on a GPU as arithmetic, and what is said to a process that uses no GPU."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transport.sharing import Exporter, Importer, Pool, Region


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60))
def test_pieces_of_a_pool_do_not_overlap_and_come_back(steps: list[tuple[bool, int]]) -> None:
    pool = Pool(0, 16384, "GPU", b"h")
    held: list[Region] = []
    for takes, number in steps:
        if takes:
            region = pool.take(number)
            if region is not None:
                assert not region.offset % 512
                assert region.offset + region.nbytes <= 16384
                assert all(
                    region.offset + region.nbytes <= other.offset
                    or other.offset + other.nbytes <= region.offset
                    for other in held
                )
                held.append(region)
            else:
                assert sum(other.nbytes + 511 for other in held) + number > 16384 or held
        elif held:
            pool.give(held.pop(number % len(held)))
    for region in held:
        pool.give(region)
    whole = pool.take(16384)
    assert whole is not None
    assert whole.offset == 0


def test_the_lowest_place_that_fits_is_taken() -> None:
    pool = Pool(0, 4096, "GPU", b"h")
    pieces = [pool.take(512) for _ in range(8)]
    assert [piece.offset for piece in pieces if piece] == list(range(0, 4096, 512))
    assert pool.take(1) is None
    assert pieces[2] is not None
    assert pieces[5] is not None
    pool.give(pieces[5])
    pool.give(pieces[2])
    again = pool.take(100)
    assert again is not None
    assert again.offset == 1024


def test_a_process_without_a_gpu_challenges_nobody_and_answers_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this one has a GPU")
    exporter, importer = Exporter(1 << 20), Importer()
    assert exporter.challenge() is None
    for offer in (b"", b"junk", msgspec.msgpack.encode(["GPU-0", bytes(64)])):
        assert importer.answer(1, offer) == b""
    importer.close()
    exporter.close()
