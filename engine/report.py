"""The tables of `tensorferry run`: a row for each image, the figures of the run, the ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.results import RankStatus, Result, Statistics


def tables(results: Sequence[Result], statistics: Statistics, ranks: Sequence[RankStatus]) -> RenderableType:
    """Everything that a run shows when it is over."""
    folder, names = shortened([result.name for result in results])
    images = f"images in {folder}" if folder else "images"
    parts = {images: _images(names, results), "ranks": _ranks(ranks), "run": _figures(statistics)}
    return Group(*(part for title, table in parts.items() for part in (Text(title, style="bold"), table)))


def _images(names: Sequence[str], results: Sequence[Result]) -> Table:
    table = _table()
    table.add_column("file", overflow="fold")  # the only one to give way in a narrow terminal
    table.add_column("shape", no_wrap=True, justify="right")
    table.add_column("norm", no_wrap=True, justify="right")
    table.add_column("rank", no_wrap=True)
    texts = any(result.text for result in results)
    if texts:
        table.add_column("text", overflow="fold")
    for name, result in zip(names, results, strict=True):
        shape, norm = " × ".join(map(str, result.shape or ())), Text(f"{result.norm or 0:.4f}")
        if result.error:
            shape, norm = "", Text("failed", style="red")
        table.add_row(escape(name), shape, norm, result.rank, *([Text(result.text)] if texts else []))
    return table


def _ranks(ranks: Sequence[RankStatus]) -> Table:
    table = _table()
    hosts = {rank.host for rank in ranks}  # one is not worth a column
    for name in ("rank", *(["host"] if len(hosts) > 1 else []), "pid", "device", "requests"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("pid", "requests") else "left")
    table.add_column("backend, and why")
    for rank in ranks:
        for worker in rank.workers:
            answers = worker is rank.workers[0]
            backend = Text(_brief(worker.backend))
            if rank.error:
                backend = Text(rank.error if answers else "", style="red")
            requests = str(rank.requests) if answers else ""
            host = [worker.host] if len(hosts) > 1 else []
            table.add_row(worker.name, *host, str(worker.pid), worker.device, requests, backend)
    return table


def _figures(figures: Statistics) -> Table:
    table = _table()
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("requests", str(figures.requests))
    if figures.late:
        table.add_row("late answers", f"{figures.late}, dropped")
    failed = f", {figures.failed} failed" if figures.failed else ""
    table.add_row("images", f"{figures.images}{failed}")
    table.add_row("image bytes", human(figures.image_bytes))
    ways = ", ".join(f"{name} {human(n)}" for name, n in figures.bytes_by_backend.items() if n)
    table.add_row("bytes by backend", ways or "none")
    table.add_row("copies per tensor", "–" if figures.copies is None else f"{figures.copies:.2f}")
    table.add_row("detours", "\n".join(_detours(figures)) or "none")
    table.add_row("images/s", f"{figures.images_per_second:.2f}")
    table.add_row(
        "hop latency", f"p50 {_milliseconds(figures.hop_p50)}, p99 {_milliseconds(figures.hop_p99)}"
    )
    ring = f"{human(figures.ring_peak)} of {human(figures.ring_bytes)}" if figures.ring_bytes else "no ring"
    table.add_row("ring peak", ring)
    return table


def _detours(figures: Statistics) -> list[str]:
    return [
        f"{escape(_brief(reason))}: {counts['messages']} messages, {human(counts['nbytes'])}"
        for reason, counts in figures.detours.items()
    ]


def _brief(reason: str) -> str:
    """What is wrong, without what to do about it, which was said when it was found out."""
    return reason.partition(". ")[0]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.2f} ms"


def human(nbytes: float) -> str:
    """A number of bytes as people read it: 1536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all absolute names have in common, and the names without it; "" where there is none."""
    if not names or not all(map(os.path.isabs, names)):
        return "", list(names)
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    return folder, [os.path.relpath(name, folder) for name in names]
