"""A writer and several readers against a plain model: bytes stay, space comes back, wrong is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from shm import Handle, Record, RingFull, RingWriter, StaleHandle, Stalled
from tests.shm.rings import attach, pattern

CAPACITY, SLOTS, COLUMNS, READERS = 256 << 10, 16, 4, 3
SIZES = st.one_of(st.integers(1, 200), st.integers(1, 40_000), st.sampled_from([4096, 65_536]))
PICK = st.integers(0, 10_000)


@dataclass
class Model:
    """What should be true of one record."""

    record: Record
    number: int
    own: bool = True
    state: str = "reserved"  # published, committed, aborted
    filled: int = 0
    flying: Counter[int] = field(default_factory=Counter)
    loans: list[NDArray[np.uint8]] = field(default_factory=list)
    views: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # by reader

    @property
    def counted(self) -> bool:
        return self.own or bool(self.loans) or self.flying.total() > 0

    @property
    def live(self) -> bool:
        return self.counted or bool(self.views)

    @property
    def span(self) -> tuple[int, int]:
        return self.record.offset, self.record.offset + self.record.nbytes


class RingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.writer = RingWriter(CAPACITY, slots=SLOTS, columns=COLUMNS, growth=32 << 10)
        self.readers = [attach(self.writer, f"reader {n}") for n in range(READERS)]
        self.models: list[Model] = []
        self.old: list[Handle] = []
        self.number = 0

    # ---------------------------------------------------------------- the writer

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=3), readers=st.sets(st.integers(0, READERS - 1)))
    def reserve(self, sizes: list[int], readers: set[int]) -> None:
        columns = [self.readers[n].column for n in readers]
        try:
            records = self.writer.reserve(sizes, columns=columns)
        except RingFull as full:
            self.full(sizes, full)
            return
        assert [r.nbytes for r in records] == sizes
        for record in records:
            self.number += 1
            self.models.append(Model(record, self.number, flying=Counter(columns)))

    def full(self, sizes: list[int], full: RingFull) -> None:
        """A refusal is right: a look found nothing more, and what lives leaves no room for this."""
        live = [model for model in self.models if model.live]
        now = self.writer.statistics()
        assert (now.live, now.used) == (len(live), sum(model.record.nbytes for model in live))
        if full.what == "slots":
            assert len(live) + len(sizes) > SLOTS
        elif len(sizes) == 1:
            edges = [0, *(edge for span in sorted(m.span for m in live) for edge in span), CAPACITY]
            holes = [end - -(-start // 64) * 64 for start, end in zip(edges[::2], edges[1::2], strict=True)]
            assert max(holes) < sizes[0]

    def fill(self, model: Model, upto: int) -> None:
        wanted = pattern(model.number, model.record.nbytes)
        self.writer.buffer(model.record)[model.filled : upto] = wanted[model.filled : upto]
        model.filled = max(model.filled, upto)

    @rule(pick=PICK, keep=st.booleans())
    def commit(self, pick: int, keep: bool) -> None:
        if model := self.choose(pick, lambda m: m.own and m.state in ("reserved", "published")):
            self.fill(model, model.record.nbytes)
            self.writer.commit([model.record], keep=keep)
            model.state, model.own = "committed", keep

    @rule(pick=PICK, part=st.floats(0, 1))
    def publish(self, pick: int, part: float) -> None:
        if model := self.choose(pick, lambda m: m.own and m.state in ("reserved", "published")):
            if model.state == "reserved":
                self.writer.publish(model.record)
                model.state = "published"
                model.filled = 0
            self.fill(model, int(model.record.nbytes * part))
            self.writer.progress(model.record, model.filled)

    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        if model := self.choose(pick, lambda m: m.own and m.state in ("reserved", "published")):
            before = self.writer.statistics()
            self.writer.abort([model.record])
            model.state, model.own = "aborted", False
            model.flying.clear()
            if not model.live:
                assert self.writer.statistics().used == before.used - model.record.nbytes

    @rule(pick=PICK)
    def drop_own(self, pick: int) -> None:
        if model := self.choose(pick, lambda m: m.own and m.state == "committed"):
            self.writer.drop([model.record])
            model.own = False

    @rule(pick=PICK, reader=st.integers(0, READERS - 1))
    def send_again(self, pick: int, reader: int) -> None:
        if model := self.choose(pick, lambda m: m.counted and m.state == "committed"):
            self.writer.hold([model.record], self.readers[reader].column)
            model.flying[self.readers[reader].column] += 1

    @rule(pick=PICK)
    def acknowledge(self, pick: int) -> None:
        if model := self.choose(pick, lambda m: m.flying.total() > 0):
            column = next(iter(model.flying.elements()))
            self.writer.drop([model.record], column)
            model.flying[column] -= 1

    @rule(pick=PICK)
    def lend(self, pick: int) -> None:
        if model := self.choose(pick, lambda m: m.own):
            view = self.writer.lend(model.record)
            found = self.writer.find_loan(view.ctypes.data, view.nbytes)
            assert found is not None
            assert found[0] is model.record
            model.loans.append(view)

    @rule(pick=PICK)
    def end_loan(self, pick: int) -> None:
        if model := self.choose(pick, lambda m: bool(m.loans)):
            model.loans.pop()

    @rule()
    def look(self) -> None:
        self.writer.look()

    # ---------------------------------------------------------------- the readers

    @rule(pick=PICK, reader=st.integers(0, READERS - 1), early=st.booleans())
    def open(self, pick: int, reader: int, early: bool) -> None:
        """Whoever has the handle: sent, handed on, doubled or late makes no difference."""
        model = self.choose(pick, lambda m: m.state != "reserved")
        if model is None:
            return
        readable = model.state == "committed" or (model.state == "published" and early)
        try:
            view = self.readers[reader].open(model.record.handle, timeout=0, early=early)
        except StaleHandle:
            assert not (model.live and readable)
            assert model.state != "published"
        except Stalled:
            assert model.state == "published"
            assert not early
            assert model.filled < model.record.nbytes
        else:
            assert readable or (model.state == "published" and model.filled == model.record.nbytes)
            assert reader not in model.views or view is model.views[reader]
            assert not view.flags.writeable
            model.views[reader] = view

    @rule(pick=PICK)
    def drop_view(self, pick: int) -> None:
        if model := self.choose(pick, lambda m: bool(m.views)):
            model.views.popitem()

    @precondition(lambda self: self.old)
    @rule(pick=PICK, reader=st.integers(0, READERS - 1))
    def open_stale(self, pick: int, reader: int) -> None:
        with pytest.raises(StaleHandle):
            self.readers[reader].open(self.old[pick % len(self.old)])

    @rule(
        pick=PICK,
        reader=st.integers(0, READERS - 1),
        change=st.dictionaries(
            st.sampled_from(Handle._fields),
            st.one_of(st.sampled_from([-64, -1, 1, 64]), st.sampled_from([1 << 62, 1 << 64, -(1 << 70)])),
            min_size=1,
            max_size=2,
        ),
    )
    def open_forged(self, pick: int, reader: int, change: dict[str, int]) -> None:
        if model := self.choose(pick, lambda m: m.state == "committed"):
            honest = model.record.handle
            forged = honest._replace(**{name: getattr(honest, name) + by for name, by in change.items()})
            if any(forged == other.record.handle for other in self.models):
                return
            with pytest.raises(StaleHandle):
                self.readers[reader].open(forged, timeout=0)

    @rule(reader=st.integers(0, READERS - 1), views=st.booleans())
    def leave_and_come_back(self, reader: int, views: bool) -> None:
        """The reader closes; its views may outlive that, and then its column is not given to others."""
        left = self.readers[reader]
        if not views:
            for model in self.models:
                model.views.pop(reader, None)
        held = [model.views[reader] for model in self.models if reader in model.views]
        left.close()
        gone = self.writer.reap()
        assert (f"reader {reader}" in gone) is not bool(held)
        if held:
            for model in self.models:
                model.views.pop(reader, None)
            self.check_bytes()
        del held
        self.writer.reap()
        self.readers[reader] = attach(self.writer, f"reader {reader}")

    # ---------------------------------------------------------------- what always holds

    @invariant()
    def check_bytes(self) -> None:
        for model in self.models:
            wanted = pattern(model.number, model.record.nbytes)[: model.filled]
            for view in model.views.values():
                assert np.array_equal(view[: model.filled], wanted)

    @invariant()
    def no_overlap(self) -> None:
        spans = sorted(model.span for model in self.models if model.live)
        assert all(left[1] <= right[0] for left, right in pairwise(spans))

    @invariant()
    def forget_the_dead(self) -> None:
        """What is not live may be given back by any look; here all are, so that its handle must be stale."""
        dead = [model for model in self.models if not model.live]
        if dead and self.number % 3 == 0:
            while self.writer.look():
                pass
            self.old += [model.record.handle for model in dead]
            self.models = [model for model in self.models if model.live]

    def choose(self, pick: int, which: object) -> Model | None:
        assert callable(which)
        found = [model for model in self.models if which(model)]
        return found[pick % len(found)] if found else None

    def teardown(self) -> None:
        for model in self.models:
            model.views.clear()
            model.loans.clear()
            if model.state in ("reserved", "published"):
                self.writer.abort([model.record])
                continue
            if model.own:
                self.writer.drop([model.record])
            for column in list(model.flying.elements()):
                self.writer.drop([model.record], column)
        now = self.writer.statistics()
        assert (now.live, now.used, now.largest_free) == (0, 0, CAPACITY)
        for reader in self.readers:
            reader.close()
        self.writer.close()


RingMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestRing = RingMachine.TestCase
