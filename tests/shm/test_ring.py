"""The ring case by case: what is refused, what waits for whom, what is told."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import shm
from shm import (
    AdmissionFailed,
    RecordTooLarge,
    RingClosed,
    RingFull,
    RingReader,
    RingWriter,
    StaleHandle,
    Stalled,
)
from shm import layout as at
from tests.shm.rings import attach, pattern, populated, ring, send

KIB, MIB = 1 << 10, 1 << 20


def test_what_is_aborted_under_an_early_view_stays_closed_and_keeps_its_bytes() -> None:
    with ring() as (writer, reader):
        other = attach(writer, "other")
        (record,) = writer.reserve([1000])
        writer.buffer(record)[:10] = pattern(1, 10)
        writer.publish(record)
        writer.progress(record, 10)
        view = reader.open(record.handle, early=True)
        assert reader.filled(record.handle) == 10
        writer.abort([record])
        for anybody in (reader, other):
            with pytest.raises(StaleHandle):
                anybody.open(record.handle, early=True)
        with pytest.raises(StaleHandle):
            reader.filled(record.handle)
        while writer.look():
            pass
        send(writer, 1000, 2)
        assert np.array_equal(view[:10], pattern(1, 10))
        assert writer.statistics().used == 2000
        with pytest.raises(ValueError, match="given up"):
            writer.commit([record])
        del view
        assert writer.statistics().used == 1000
        other.close()


def test_open_waits_for_the_copy_and_shares_the_view_of_who_came_early() -> None:
    with ring() as (writer, reader):
        (record,) = writer.reserve([1000])
        writer.publish(record)
        early = reader.open(record.handle, early=True)
        writer.progress(record, 400)
        with pytest.raises(
            Stalled, match=rf"\(pid {os.getpid()}\) .* filling slot \d+: it has 400 of 1000 bytes"
        ):
            reader.open(record.handle, timeout=0)
        copier = threading.Timer(0.05, writer.commit, [[record]])
        copier.start()
        assert reader.open(record.handle, timeout=30) is early
        assert reader.filled(record.handle) == 1000
        copier.join()


@pytest.mark.parametrize("field", ["segment", "slot", "generation", "offset", "nbytes"])
@pytest.mark.parametrize("by", [-64, -1, 1, 64, 1 << 20, 1 << 62, -(1 << 64)])
def test_a_forged_handle_opens_nothing_and_leaves_nothing(field: str, by: int) -> None:
    with ring() as (writer, reader):
        record = send(writer, 4096)
        send(writer, 4096, 2)
        forged = record.handle._replace(**{field: getattr(record.handle, field) + by})
        for _ in range(2):
            with pytest.raises(StaleHandle):
                reader.open(forged)
        view = reader.open(record.handle)  # and the same while the honest one is open
        with pytest.raises(StaleHandle):
            reader.open(forged)
        assert np.array_equal(view, pattern(1, 4096))
        assert reader.open(record.handle) is view


def test_a_hazard_that_this_process_did_not_write_is_no_view() -> None:
    """Whoever maps the segment can write into any column."""
    with ring() as (writer, reader):
        record = send(writer, 4096)
        reader._words[at.C_HAZARD + record.slot] = record.generation
        with pytest.raises(StaleHandle, match="nothing opened it"):
            reader.open(record.handle)
        reader._words[at.C_HAZARD + record.slot] = 0
        assert np.array_equal(reader.open(record.handle), pattern(1, 4096))


def test_a_handle_outlives_neither_its_record_nor_its_slot() -> None:
    with ring(slots=8) as (writer, reader):
        old = send(writer, 64)
        writer.drop([old])
        assert writer.look() == 1
        with pytest.raises(StaleHandle):
            reader.open(old.handle)
        new = send(writer, 64)
        assert (new.slot, new.offset) == (old.slot, old.offset)
        with pytest.raises(StaleHandle):
            reader.open(old.handle)
        view = reader.open(new.handle)
        with pytest.raises(StaleHandle):
            reader.open(old.handle)
        assert np.array_equal(view, pattern(1, 64))


def test_the_second_look_sees_who_opened_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[object] = []

    def between(event: str, fields: object) -> None:
        if event == "closing" and not views:
            # What a reader's `open` stores before it looks; the rest of it would wait for us here.
            reader._words[at.C_HAZARD + record.slot] = record.generation
            views.append(record)

    writer = RingWriter(MIB, slots=8, columns=1, trace=between)
    reader = attach(writer)
    record = send(writer, 64)
    writer.drop([record])
    assert writer.look() == 0
    reader._words[at.C_HAZARD + record.slot] = 0
    view = reader.open(record.handle)
    assert np.array_equal(view, pattern(1, 64))
    del view
    assert writer.look() == 1
    reader.close()
    writer.close()


def test_open_waits_out_the_writers_second_look() -> None:
    with ring() as (writer, reader):
        record = send(writer, 64)
        line = writer._header
        line[record.line] = record.generation | at.CLOSING
        with pytest.raises(Stalled, match="reclaiming"):
            reader.open(record.handle, timeout=0)
        mender = threading.Timer(0.05, lambda: line.__setitem__(record.line, record.generation))
        mender.start()
        assert np.array_equal(reader.open(record.handle, timeout=30), pattern(1, 64))
        mender.join()


def test_a_line_seen_before_the_writer_died_is_read_again() -> None:
    """Between a look at the line and a look at the lock the writer may reclaim, reuse the bytes and die."""
    with ring() as (writer, reader):
        record = send(writer, 64)
        header = writer._header
        header[record.line] = record.generation | at.CLOSING
        asked = reader._segment.writer_alive

        def reuse_and_die() -> bool:
            header[record.line] = 0
            writer._segment.lock.release()
            return asked()

        reader._segment.writer_alive = reuse_and_die  # type: ignore[method-assign] # the very moment
        with pytest.raises(StaleHandle):
            reader.open(record.handle)


def test_a_record_that_its_dead_writer_was_about_to_reclaim_is_still_there() -> None:
    with ring() as (writer, reader):
        record = send(writer, 64)
        writer._header[record.line] = record.generation | at.CLOSING
        writer._segment.lock.release()
        assert np.array_equal(reader.open(record.handle), pattern(1, 64))


def test_what_a_dead_writer_only_began_to_fill_is_stale() -> None:
    with ring() as (writer, reader):
        (record,) = writer.reserve([64])
        writer.publish(record)
        writer._segment.lock.release()
        with pytest.raises(StaleHandle, match="died"):
            reader.open(record.handle)


def test_a_failed_open_leaves_no_hazard() -> None:
    def fail(event: str, fields: object) -> None:
        if event == "opening":
            raise KeyboardInterrupt

    with ring() as (writer, _):
        offer = writer.offer()
        reader = RingReader(offer, "interrupted", trace=fail)
        writer.admit(offer, "interrupted")
        record = send(writer, 64)
        with pytest.raises(KeyboardInterrupt):
            reader.open(record.handle)
        writer.drop([record])
        assert writer.look() == 1
        reader.close()


def test_views_of_views_keep_the_record_without_the_reader() -> None:
    writer = RingWriter(MIB, slots=8, columns=1)
    reader = attach(writer)
    record = send(writer, 4096)
    writer.drop([record])
    part = reader.open(record.handle)[100:200].reshape(10, 10)[2:, 3]
    wanted = part.copy()
    reader.close()
    column = reader.column
    del reader
    gc.collect()
    assert writer.look() == 0
    assert writer.reap() == []
    assert writer.reader_alive(column)
    assert np.array_equal(part, wanted)
    del part
    assert not writer.reader_alive(column)
    assert writer.reap() == ["reader"]
    assert writer.statistics().live == 0
    writer.close()


def test_two_columns_of_one_process_are_two_readers() -> None:
    with ring() as (writer, reader):
        twin = attach(writer, "twin")
        record = send(writer, 64)
        one, two = reader.open(record.handle), twin.open(record.handle)
        writer.drop([record])
        del one
        assert writer.look() == 0
        reader.close()
        assert writer.reap() == ["reader"]
        assert np.array_equal(two, pattern(1, 64))
        del two
        assert writer.look() == 1
        twin.close()


def test_a_loan_outlives_abort_and_drop() -> None:
    with ring() as (writer, _):
        (record,) = writer.reserve([4096])
        first = writer.lend(record)
        second = writer.lend(record)
        writer.abort([record])
        assert writer.statistics().used == 4096
        inside = first[64:]
        found = writer.find_loan(inside.ctypes.data, inside.nbytes)
        assert found == (record, 64)
        assert writer.find_loan(inside.ctypes.data, 4096) is None
        assert writer.find_loan(id(writer), 1) is None
        del first, inside
        assert writer.statistics().used == 4096
        del second
        assert writer.statistics().used == 0
        with pytest.raises(ValueError, match="dropped more often"):
            writer.drop([record])
        with pytest.raises(ValueError, match="not live"):
            writer.hold([record])


def test_a_record_never_published_is_never_open() -> None:
    with ring() as (writer, reader):
        (record,) = writer.reserve([64])
        with pytest.raises(StaleHandle):
            reader.open(record.handle)
        writer.drop([record])
        assert writer.look() == 1


def test_counting_wrong_is_refused() -> None:
    with ring() as (writer, reader):
        record = send(writer, 64)
        with pytest.raises(ValueError, match="not in flight"):
            writer.drop([record], reader.column)
        writer.hold([record], reader.column)
        writer.drop([record], reader.column)
        writer.drop([record])
        with pytest.raises(ValueError, match="dropped more often"):
            writer.drop([record])
        assert writer.look() == 1
        with pytest.raises(ValueError, match="dropped more often"):
            writer.abort([record])


# -------------------------------------------------------------------- space


def test_a_message_takes_all_its_space_or_none() -> None:
    with ring(64 * KIB) as (writer, _):
        held = send(writer, 32 * KIB)
        with pytest.raises(RingFull) as full:
            writer.reserve([16 * KIB, 16 * KIB, 64])
        assert full.value.what == "bytes"
        assert writer.statistics().used == 32 * KIB
        records = writer.reserve([16 * KIB, 8 * KIB, 8 * KIB])
        writer.abort(records)
        writer.drop([held])
        assert writer.statistics().largest_free == 64 * KIB


def test_what_fits_by_its_sum_fits_an_empty_ring() -> None:
    """Small records must not break up the pages that the large ones need, whatever their order."""
    with ring(2 * MIB + 8 * KIB) as (writer, _):
        sizes = [2 * KIB, 2 * MIB, 3 * KIB, 3 * KIB]
        assert [r.nbytes for r in writer.reserve(sizes)] == sizes


def test_a_hole_that_is_too_small_is_named() -> None:
    with ring(64 * KIB) as (writer, _):
        records = [send(writer, 16 * KIB) for _ in range(4)]
        writer.drop(records[::2])
        with pytest.raises(RingFull, match="largest free block 16 KiB") as full:
            writer.reserve([32 * KIB])
        assert full.value.what == "hole"


def test_slots_run_out_by_name() -> None:
    with ring(slots=8) as (writer, _):
        for _ in range(8):
            send(writer, 1)
        with pytest.raises(RingFull, match="8 slots") as full:
            writer.reserve([1])
        assert full.value.what == "slots"


@pytest.mark.parametrize("sizes", [[64 * KIB + 1], [32 * KIB, 32 * KIB, 1], [1] * 65])
def test_what_never_fits_is_said_at_once(sizes: list[int]) -> None:
    with ring(64 * KIB) as (writer, _):
        started = time.monotonic()
        with pytest.raises(RecordTooLarge):
            writer.reserve(sizes, timeout=60)
        assert time.monotonic() - started < 60


@pytest.mark.parametrize("sizes", [[0], [-1], [64, 0]])
def test_a_record_has_bytes(sizes: list[int]) -> None:
    with ring() as (writer, _), pytest.raises(ValueError, match="at least one byte"):
        writer.reserve(sizes)


def test_records_lie_at_the_lowest_address_and_large_ones_on_pages() -> None:
    with ring(8 * MIB) as (writer, _):
        small, large = writer.reserve([100]), writer.reserve([MIB + 1])
        assert small[0].offset == 0
        assert large[0].offset == at.PAGE
        (between,) = writer.reserve([64])
        assert between.offset == 128


def test_a_blocked_sender_polls_and_goes_on_when_a_view_is_dropped() -> None:
    with ring(64 * KIB) as (writer, reader):
        record = send(writer, 64 * KIB)
        views = [reader.open(record.handle)]
        writer.drop([record])
        polls = []

        def poll() -> None:
            polls.append(1)
            if len(polls) == 3:
                views.clear()

        assert len(writer.reserve([64], timeout=60, poll=poll)) == 1
        assert len(polls) >= 3


def test_a_blocked_sender_finds_the_space_of_the_dead() -> None:
    with ring(64 * KIB) as (writer, _):
        ghost = attach(writer, "ghost")
        record = send(writer, 64 * KIB)
        view = ghost.open(record.handle)
        writer.drop([record])
        with pytest.raises(
            RingFull, match=r"; ghost holds 1 records \(64 KiB\), the oldest open for \d+\.\d s$"
        ):
            writer.reserve([64])
        ghost._segment.lock.release()  # what the kernel does for a dead process
        assert len(writer.reserve([64], timeout=60)) == 1
        del view
        ghost.close()


def test_no_reader_holds_more_than_its_share_and_others_go_on() -> None:
    writer = RingWriter(64 * KIB, slots=64, columns=2, share=0.5)
    slow, quick = attach(writer, "slow"), attach(writer, "quick")
    held = writer.reserve([30 * KIB], columns=[slow.column])
    with pytest.raises(RingFull, match="slow would hold more than a peer's share") as full:
        writer.reserve([4 * KIB], columns=[quick.column, slow.column])
    assert (full.value.what, full.value.columns) == ("share", (slow.column,))
    assert len(writer.reserve([4 * KIB], columns=[quick.column])) == 1
    with pytest.raises(RecordTooLarge):
        writer.reserve([33 * KIB], columns=[quick.column])
    writer.commit(held)
    view = slow.open(held[0].handle)
    writer.drop(held, slow.column)
    with pytest.raises(RingFull):
        writer.reserve([4 * KIB], columns=[slow.column])
    del view
    assert len(writer.reserve([4 * KIB], columns=[slow.column])) == 1
    slow.close()
    quick.close()
    writer.close()


def test_who_waits_for_its_share_keeps_nobody_else_waiting() -> None:
    writer = RingWriter(64 * KIB, slots=64, columns=2, share=0.5)
    slow, quick = attach(writer, "slow"), attach(writer, "quick")
    writer.reserve([32 * KIB], columns=[slow.column])
    waiting = threading.Event()
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            writer.reserve([64], columns=[slow.column], timeout=0.5, poll=waiting.set)
        except RingFull as full:
            outcome.append(full)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(30)
    while thread.is_alive():
        (record,) = writer.reserve([64], columns=[quick.column])
        writer.abort([record])
    assert len(outcome) == 1
    slow.close()
    quick.close()
    writer.close()


def test_a_large_message_gets_its_turn_among_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody always holds something, and every hole would be filled again, did nobody wait in line."""
    monkeypatch.setattr("shm.writer._PRECEDENCE", (0.05, 60.0))  # a second is short on a busy machine
    with ring(64 * KIB) as (writer, _):
        done = threading.Event()

        def large() -> None:
            writer.abort(writer.reserve([48 * KIB], timeout=60))
            done.set()

        small = [send(writer, 4 * KIB) for _ in range(16)]
        thread = threading.Thread(target=large)
        thread.start()
        refused = 0
        while not done.wait(1e-4):
            if small:
                writer.drop([small.pop(0)])
            try:
                small.append(send(writer, 4 * KIB))
            except RingFull:
                refused += 1
        assert refused  # the others made way
        thread.join()


def test_space_comes_back_whole_after_ten_thousand_records_of_all_sizes() -> None:
    random = np.random.default_rng(5)
    with ring(MIB, slots=256) as (writer, reader):
        held = []
        for number in range(10_000):
            nbytes = int(random.integers(1, 12_000))
            record = send(writer, nbytes, number)
            view = reader.open(record.handle)
            writer.drop([record])
            held.append((number, view))
            del view
            if len(held) > 50:
                old, view = held.pop(int(random.integers(len(held))))
                assert np.array_equal(view, pattern(old, view.nbytes))
                del view
        held.clear()
        now = writer.statistics()
        assert (now.live, now.used, now.largest_free) == (0, 0, MIB)
        assert now.records == 10_000


# -------------------------------------------------------------------- admission, close, statistics


def test_admission_wants_the_challenge_in_the_column_under_a_lock() -> None:
    with ring(columns=4) as (writer, _):
        offer = writer.offer()
        with pytest.raises(AdmissionFailed, match="challenge is not in column"):
            writer.admit(offer, "nobody")
        reader = RingReader(offer, "me")
        with pytest.raises(AdmissionFailed, match="not offered so"):
            writer.admit(offer._replace(challenge=offer.challenge ^ 1), "me")
        with pytest.raises(AdmissionFailed, match="held by another"):
            RingReader(offer, "thief")
        reader.close()
        with pytest.raises(AdmissionFailed, match="nobody holds the lock"):
            writer.admit(offer, "me")


def test_an_offer_is_good_once_and_until_withdrawn() -> None:
    with ring(columns=2) as (writer, _):
        offer = writer.offer()
        with pytest.raises(RingFull) as full:
            writer.offer()
        assert full.value.what == "columns"
        writer.withdraw(offer)
        for wrong in (
            offer,
            offer._replace(challenge=0),
            offer._replace(column=77),
            offer._replace(column=-1),
        ):
            with pytest.raises((AdmissionFailed, shm.LayoutMismatch)):
                RingReader(wrong, "late")
        again = attach(writer, "again")
        assert again.column == offer.column
        again.close()
        with pytest.raises(AdmissionFailed):  # a replay of what was admitted before
            RingReader(offer, "late")


def test_a_new_tenant_starts_with_a_clean_column() -> None:
    with ring(columns=2) as (writer, _):
        first = attach(writer, "first")
        record = send(writer, 64)
        view = first.open(record.handle)
        first._segment.lock.release()  # killed with its hazard standing
        second = attach(writer, "second")
        assert second.column == first.column
        writer.drop([record])
        assert writer.look() == 1
        with pytest.raises(StaleHandle):
            second.open(record.handle)
        second.close()
        del view
        first.close()


def test_after_close_nothing_is_reserved_and_what_is_open_stays() -> None:
    writer = RingWriter(MIB, slots=8, columns=1)
    reader = attach(writer)
    record, waiting = send(writer, 64), send(writer, 64, 2)
    (lent,) = writer.reserve([64])
    loan = writer.lend(lent)
    view = reader.open(record.handle)
    writer.close()
    writer.close()
    for call in (
        lambda: writer.reserve([1]),
        writer.offer,
        lambda: writer.commit([lent]),
        lambda: writer.lend(lent),
    ):
        with pytest.raises(RingClosed):
            call()
    loan[:] = 7
    writer.drop([record, waiting])
    assert writer.look() == 0
    assert writer.reap() == []
    assert not writer.reader_alive(reader.column)
    assert writer.statistics().live == 3
    assert np.array_equal(view, pattern(1, 64))
    assert np.array_equal(reader.open(waiting.handle), pattern(2, 64))  # was in flight
    assert not reader.writer_alive()
    reader.close()
    reader.close()
    with pytest.raises(RingClosed):
        reader.open(record.handle)
    with pytest.raises(RingClosed):
        reader.writer_alive()
    assert np.array_equal(view, pattern(1, 64))


def test_closing_lets_the_memory_go_while_the_objects_stay() -> None:
    writer = RingWriter(MIB, slots=8, columns=1)
    reader = attach(writer)
    maps = [weakref.ref(side._segment.data) for side in (writer, reader)]
    reader.close()
    writer.close()
    gc.collect()
    assert [ref() for ref in maps] == [None, None]


def test_statistics_say_who_holds_what_since_when() -> None:
    with ring(columns=4) as (writer, reader):
        other = attach(writer, "other")
        first, second = send(writer, 1000), send(writer, 3000)
        views = [reader.open(first.handle), other.open(first.handle), other.open(second.handle)]
        writer.hold([second], reader.column)
        now = writer.statistics()
        assert now.readers == {"reader": 4000, "other": 4000}
        assert (now.live, now.used, now.records) == (2, 4000, 2)
        assert now.oldest is not None
        assert (now.oldest.reader, now.oldest.nbytes) == ("reader", 1000)
        assert 0 <= now.oldest.seconds < 1000
        assert writer._header[at.H_LIVE] == 2
        assert writer._header[at.H_USED] == 4000
        writer.drop([second], reader.column)
        del views
        other.close()


def test_every_step_is_traced_by_its_name() -> None:
    events: list[str] = []
    trace = lambda event, fields: events.append(event)  # noqa: E731 - as short as what it stands for
    writer = RingWriter(MIB, slots=8, columns=1, trace=trace)
    offer = writer.offer()
    reader = RingReader(offer, "me", trace=trace)
    writer.admit(offer, "me")
    (record,) = writer.reserve([64])
    writer.publish(record)
    writer.commit([record], keep=True)
    reader.open(record.handle)
    writer.drop([record])
    writer.look()
    wanted = ["admit", "grow", "reserve", "publish", "commit", "opening", "opened", "closing", "freed"]
    assert events == wanted
    reader.close()
    writer.close()


def test_closing_in_another_thread_ends_a_look_at_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    with ring() as (writer, reader):
        handle = send(writer, 1000).handle
        reader.open(handle)
        with ThreadPoolExecutor(1) as pool:
            usable = reader._usable

            def late() -> None:
                pool.submit(reader.close).result()
                usable()

            monkeypatch.setattr(reader, "_usable", late)
            for look in (reader.filled, reader.is_whole, lambda handle: reader.wait_filled(handle, 1)):
                with pytest.raises(RingClosed):
                    look(handle)


def test_closing_in_another_thread_leaves_a_view_that_was_just_opened() -> None:
    class Closing:
        """The lock of `open`, after which another thread closes."""

        def __init__(self, lock: threading.Lock) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *exception: object) -> None:
            self.lock.release()
            if not reader._closed:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(reader.close).result()

    with ring() as (writer, reader):
        handle = send(writer, 1000).handle
        reader._opening = Closing(reader._opening)  # type: ignore[assignment]
        assert np.array_equal(reader.open(handle), pattern(1, 1000))
        assert reader._closed
    populated()
