"""`tensorferry top`: the rings in /dev/shm as they change, a few times a second; looks only."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

import shm
from engine.console import console
from engine.segments import all_segments, readable, segments_tables

INTERVAL = 0.5  # seconds
_CTRL_C = b"\x03"
_CONTROL_CHARACTERS = 6  # their place in what tcgetattr returns


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one look as JSON, as `ps --json` does.")
@readable()
def top(as_json: bool) -> None:
    """Watch the segments of this user in /dev/shm; `q` or Ctrl-C quits.

    Where the output is no terminal it looks once.
    """
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(info) for info in all_segments()], indent=2))
    elif not console().is_terminal:
        console().print(_screen(all_segments(), {}))
        click.echo("tensorferry: not a terminal, so this is one look", err=True)
    else:
        _watch()


def _watch() -> None:
    rates = _Rates()
    with _keys() as keys, Live(console=console(), screen=True, auto_refresh=False) as live:
        while True:
            segments = all_segments()
            live.update(_screen(segments, rates.of(segments)), refresh=True)
            if keys.quits(INTERVAL):
                return


class _Rates:
    """Records made per second since the look before, by segment."""

    def __init__(self) -> None:
        self._made: dict[str, int] = {}
        self._looked = time.monotonic()

    def of(self, segments: Sequence[shm.SegmentInfo]) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self._looked, 1e-9)
        rates = {
            info.name: (info.made - self._made[info.name]) / seconds
            for info in segments
            if info.name in self._made
        }
        self._made, self._looked = {info.name: info.made for info in segments}, now
        return rates


def _screen(segments: Sequence[shm.SegmentInfo], rates: Mapping[str, float]) -> RenderableType:
    space = shm.space()
    head = f"{time.strftime('%H:%M:%S')}  {len(segments)} segments  {space}"
    made = f"  {sum(rates.values()):.0f} records/s" if rates else ""
    table = (
        segments_tables(segments, full_names=not console().is_terminal) if segments else Text("no segments")
    )
    return Group(Text(head + made), table)


class _Keys:
    """The keyboard, or Ctrl-C alone where standard input is no terminal."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def quits(self, timeout: float) -> bool:
        """Whether somebody wants to leave within `timeout` seconds."""
        if self._descriptor is None:
            time.sleep(timeout)
            return False
        deadline = time.monotonic() + timeout
        while select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            typed = os.read(self._descriptor, 64)
            if not typed or _CTRL_C in typed or b"q" in typed.lower():  # nothing: the terminal is gone
                return True
        return False


def _ctrl_c_as_a_key(descriptor: int) -> None:
    """A key is never lost; an interrupt is, when it is raised inside a finalizer. Ctrl-Z still stops."""
    settings = termios.tcgetattr(descriptor)
    settings[_CONTROL_CHARACTERS][termios.VINTR] = bytes([os.fpathconf(descriptor, "PC_VDISABLE")])
    termios.tcsetattr(descriptor, termios.TCSANOW, settings)


@contextmanager
def _keys() -> Iterator[_Keys]:
    """Keys one by one and unseen; the terminal is as it was afterwards, and Ctrl-C just ends it."""
    descriptor = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = None if descriptor is None else termios.tcgetattr(descriptor)
    try:
        if descriptor is not None:
            tty.setcbreak(descriptor)
            _ctrl_c_as_a_key(descriptor)
        yield _Keys(descriptor)
    except KeyboardInterrupt:
        pass
    finally:
        if descriptor is not None and before is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
