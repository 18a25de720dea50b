"""How segments are found by a few letters of their name and shown as tables, by `ps` and `top`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import click
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import shm

# Has what stands in a ring and not in its slot table, so that no reader can open it.
_OWNER = "(owner)"
_OWNER_HAS = (
    f"{_OWNER} is no reader: loans not sent yet, tensors just being written,"
    " on their way to another host or received from one"
)


@contextmanager
def readable() -> Iterator[None]:
    """Makes a line for the user of a /dev/shm that is not there, or not this user's to read."""
    try:
        yield
    except OSError as error:
        if error.filename != str(shm.DIRECTORY):
            raise
        raise click.ClickException(
            f"{shm.DIRECTORY} can't be read: {error.strerror}; `tensorferry doctor` says what to change"
        ) from error


def all_segments() -> list[shm.SegmentInfo]:
    """What there is to say about every segment of this user; `OSError` as `shm.names`."""
    found = []
    for name in shm.names():
        with suppress(shm.SegmentMissing):  # gone since the listing
            found.append(shm.describe(name))
    return found


def find(beginning: str) -> str:
    """The one segment whose name, or the hexadecimal end of it, begins so; `click.UsageError` else."""
    known = shm.names()
    fits = [name for name in known if name.startswith(beginning) or name.split(".")[2].startswith(beginning)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise click.UsageError(f"{beginning!r} may be any of {', '.join(fits)}")
    raise click.UsageError(f"no segment begins with {beginning!r}; there are: {', '.join(known) or 'none'}")


def segments_tables(segments: Sequence[shm.SegmentInfo], *, full_names: bool) -> RenderableType:
    """The segments and who reads them, named in full or by eight letters, which fits 80 columns."""
    names = [info.name if full_names else info.name.split(".")[2][:8] for info in segments]
    parts: list[RenderableType] = [_owners(names, segments)]
    kept = any(info.unpublished for info in segments)
    if kept or any(info.readers for info in segments):
        parts.append(_readers(names, segments))
    if kept:
        parts.append(Text(_OWNER_HAS))
    return Group(*parts)


def _owners(names: Sequence[str], segments: Sequence[shm.SegmentInfo]) -> Table:
    table = _table("segment", "owner", right=("used", "of", "largest\nfree", "in memory", "records"))
    for name, info in zip(names, segments, strict=True):
        free = ("≤ " if info.unpublished else "") + shm.human(info.largest_free)
        sizes = shm.human(info.used), shm.human(info.capacity), free, shm.human(info.nbytes)
        table.add_row(name, _owner(info), *sizes, str(info.live))
    return table


def _readers(names: Sequence[str], segments: Sequence[shm.SegmentInfo]) -> Table:
    right = ("pid", "open", "size", "oldest", "not\nopened", "size", "oldest")
    table = _table("segment", "reader", right=right)
    for name, info in zip(names, segments, strict=True):
        for reader in info.readers:
            figures = (
                str(reader.opened),
                shm.human(reader.nbytes),
                _seconds(reader.oldest),
                str(reader.pending),
                shm.human(reader.pending_nbytes),
                _seconds(reader.pending_oldest),
            )
            table.add_row(name, escape(reader.name), str(reader.pid), *figures)
        if info.unpublished:
            kept = str(info.unpublished), shm.human(info.unpublished_nbytes)
            table.add_row(name, _OWNER, str(info.pid), *kept, *[_seconds(None)] * 4)
    return table


def records_table(records: Sequence[shm.RecordInfo]) -> Table:
    """A row for each record, by address."""
    table = _table(right=("slot", "generation", "offset", "size", "age"))
    table.add_column("readers", overflow="fold")
    for record in records:
        part = "" if record.filled == record.nbytes else f" ({shm.human(record.filled)} filled)"
        table.add_row(
            str(record.slot),
            str(record.generation),
            f"{record.offset:#x}",
            shm.human(record.nbytes) + part,
            _seconds(record.age),
            "\n".join(map(_state, record.readers)) or "none has opened it",
        )
    return table


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, no_wrap=True, justify="right")
    return table


def _owner(info: shm.SegmentInfo) -> Text:
    if not info.alive:
        return Text(f"{info.pid} dead", style="red")
    return Text(f"{info.pid} {info.program}".rstrip())


def _state(reader: shm.RecordReader) -> str:
    since = f" for {_seconds(reader.seconds)}" if reader.state == "open" else ""
    return escape(f"{reader.name} (pid {reader.pid}): {reader.state}{since}")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if hours < 10 else f"{hours:.0f} h"
