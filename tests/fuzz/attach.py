"""What a planted segment can do to who looks at it, attaches to it or opens records of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import shm
from shm import layout as at
from shm.liveness import LivenessLock
from shm.segment import open_checked
from tests.fuzz.draw import Draw

_SLOTS, _COLUMNS = 8, 2
_CAPACITY = 1 << 16
_LARGEST = 64 << 20  # of a planted file: what is beyond says more about this machine than about the code
_CHALLENGE = 77
_RECORDS = ((1, 0, 200), (3, 4096, 64))  # generation, offset, nbytes


class Attach:
    """A file under a segment's name, right or wrong in places, is refused or read within its bounds."""

    def __init__(self, folder: Path) -> None:  # it needs no address
        self._name = f"tensorferry.{os.getuid()}.{os.urandom(16).hex()}"
        self._path = shm.DIRECTORY / self._name
        self._layout = at.Layout(_CAPACITY, _SLOTS, _COLUMNS)
        self._template = self._control_pages()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)

    def seeds(self) -> list[bytes]:
        """Inputs to begin with: nothing wrong, and one wrong word of each kind."""
        right = bytes(24)
        value = bytes((200, *range(1, 9)))
        patches = [bytes((1, region, word)) + value for region in range(3) for word in range(17)]
        return [right, b"\1" + right, *(patch + right for patch in patches)]

    def __call__(self, data: bytes) -> None:
        draw = Draw(data)
        words = memoryview(bytearray(self._template)).cast("Q")
        for _ in range(draw.byte() % 8):
            words[self._word(draw)] = draw.word()
        size = self._size(draw, words)
        self._path.unlink(missing_ok=True)
        owned = draw.chance(2)
        with self._planted(bytes(words)[: max(0, size)], size, owned=owned) as fd:
            self._look(draw, owned=owned)
            self._read(draw, fd)

    def _look(self, draw: Draw, *, owned: bool) -> None:
        with suppress(shm.ShmError):
            info = shm.describe(self._name)
            assert 0 <= info.largest_free <= max(info.capacity, 0)
            assert 0 <= info.unpublished <= info.live
            assert 0 <= info.unpublished_nbytes <= info.used
        with suppress(shm.ShmError):
            for record in shm.records(self._name):
                assert record.age >= 0
        if draw.chance(4):
            would_go = self._name in shm.sweep(dry_run=True)  # and goes, when somebody beside us sweeps
            assert not (owned and would_go)

    def _read(self, draw: Draw, fd: int) -> None:
        """Attach, and open what was asked for, while more of it changes."""
        column = draw.pick((0, 0, 0, draw.number()))
        challenge = draw.pick((_CHALLENGE, _CHALLENGE, draw.word()))
        try:
            checked, layout = open_checked(self._name)
            os.close(checked)
            reader = shm.RingReader(shm.Offer(self._name, column, challenge), "reader")
        except shm.ShmError:
            return
        assert os.fstat(fd).st_size == layout.total
        try:
            for _ in range(1 + draw.byte() % 4):
                self._open(draw, reader)
                os.pwrite(fd, draw.word().to_bytes(8, "little"), self._word(draw) * at.WORD)
        finally:
            reader.close()

    def _open(self, draw: Draw, reader: shm.RingReader) -> None:
        slot = draw.byte() % 3
        generation, offset, nbytes = _RECORDS[slot % 2]
        fields = [reader.identity, slot, generation, offset, nbytes]
        if draw.chance(3):
            fields[draw.byte() % 5] = draw.number()
        handle = shm.Handle(*fields)
        with suppress(shm.ShmError):
            array = reader.open(handle, timeout=0.0, early=draw.chance(4))
            assert array.nbytes == handle.nbytes
            assert not array.flags.writeable
            int(array[0]) + int(array[-1])
        with suppress(shm.ShmError):
            reader.filled(handle)

    def _word(self, draw: Draw) -> int:
        """A place where something stands: in the header, a slot line or a column, by word."""
        region, word = draw.byte() % 3, draw.byte()
        if region == 0:
            return word % 32
        if region == 1:
            return self._layout.slot_word(0) + word % (2 * at.SLOT_WORDS)
        return self._layout.columns_offset // at.WORD + word % (at.C_HAZARD + 2 * _SLOTS)

    def _size(self, draw: Draw, words: memoryview) -> int:
        """What the header asks for, as far as that is bearable; or another one."""
        try:
            honest = at.Layout(words[at.H_CAPACITY], words[at.H_SLOTS], words[at.H_COLUMNS]).total
        except ValueError:
            honest = self._layout.total
        size = draw.pick((honest, honest, honest, self._layout.total, draw.word(), honest - draw.byte()))
        return min(size, _LARGEST)

    @contextmanager
    def _planted(self, control: bytes, size: int, *, owned: bool) -> Iterator[int]:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        lock = LivenessLock(fd, 0) if owned else None
        try:
            os.write(fd, control)
            os.ftruncate(fd, size)
            yield fd
        finally:
            if lock is not None:
                lock.release()
            os.close(fd)

    def _control_pages(self) -> bytes:
        """The pages in front of the data, of a ring with two records and a challenge for the first column."""
        words = memoryview(bytearray(self._layout.data_offset)).cast("Q")
        header = {
            at.H_MAGIC: at.MAGIC,
            at.H_VERSION: at.VERSION,
            at.H_PAGE: at.PAGE,
            at.H_CAPACITY: _CAPACITY,
            at.H_SLOTS: _SLOTS,
            at.H_COLUMNS: _COLUMNS,
            at.H_IDENTITY: 5,
            at.H_MARK: _CAPACITY,
            at.H_PID: os.getpid(),
            at.H_CHALLENGE: _CHALLENGE,
        }
        for word, value in header.items():
            words[word] = value
        for slot, (generation, offset, nbytes) in enumerate(_RECORDS):
            first = self._layout.slot_word(slot)
            words[first : first + 4] = memoryview(
                b"".join(number.to_bytes(8, "little") for number in (generation, offset, nbytes, nbytes))
            ).cast("Q")
        return bytes(words)[: self._layout.column_offset(_COLUMNS)]
