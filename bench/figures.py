"""Pictures of results that can be read without the text around them, as SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from bench.harness import Result, Spread
from bench.part import Json
from bench.report import FAILED, spread_or_word
from bench.ways import OURS

mpl.use("Agg")
mpl.rcParams |= {
    "svg.fonttype": "path",
    "svg.hashsalt": "tensorferry",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}

# Inches: shown 830 pixels wide, as in a README, its type has the size of the text around it.
_WIDTH = 9.0
_HEAD, _FOOT = 0.72, 0.28
_ACROSS = 3  # panels in a row

# Okabe and Ito's colours, which the colour-blind tell apart: ours, others', the floor, what failed.
OUR, OTHER, FLOOR, BAD = "#0072B2", "#8C8C8C", "#D55E00", "#CC0000"
# Lines that are others' differ by grey, marker and dashes.
_GREYS, _MARKERS, _DASHES = ("#222222", "#666666", "#9A9A9A"), "s^vD<>pPX*h", ("-", "--", ":")

NAMES = {
    "shm": "tensorferry shm",
    "loan": "tensorferry shm, loan",
    "frames": "tensorferry frames (copy on write)",
    "inline": "tensorferry inline (msgpack)",
    "pickle": "pickle over zmq",
    "zmq ipc": "zmq frames, zero-copy",
    "zmq tcp": "zmq tcp, zero-copy",
    "segment": "a segment per tensor (as SGLang)",
    "torch fd": "torch queue, file_descriptor",
    "torch fs": "torch queue, file_system",
    "vllm rpc": "vLLM direct_rpc",
    "vllm torch_shm": "vLLM torch_shm",
    "vllm shm store": "vLLM shm object store",
    "iceoryx2": "iceoryx2, blocking",
    "iceoryx2 spin": "iceoryx2, spinning",
    "ray": "Ray object store",
    "zenoh": "zenoh shared memory",
    "floor": "floor: one copy, one zmq message",
}


def _color(way: str) -> str:
    return FLOOR if way == "floor" else OUR if way in OURS else OTHER


def bars(
    stem: Path,
    title: str,
    what: str,
    results: Sequence[Result],
    *,
    columns: Mapping[str, str],
    sort_by: str,
    measure: Callable[[Mapping[str, Json]], float],
    unit: str,
    caption: str,
) -> list[Path]:
    """A panel for each layout, a bar for each way with median and range, the least of `sort_by` on top."""
    layouts = [layout for layout in columns if any(r.row.arguments["layout"] == layout for r in results)]
    cells = {
        (str(r.row.arguments["layout"]), str(r.row.arguments["column"])): spread_or_word(r, measure)
        for r in results
    }
    sort_by = sort_by if sort_by in layouts else layouts[-1]
    ways = sorted({way for _, way in cells}, key=lambda way: _height(cells.get((sort_by, way))))
    lines = math.ceil(len(layouts) / _ACROSS)
    figure = _figure(_HEAD + _FOOT + lines * (0.55 + 0.175 * len(ways)))
    panels = _panels(figure, lines, len(layouts), sharey=True)
    for panel, layout in zip(panels, layouts, strict=True):
        _panel(panel, [cells.get((layout, way), "not measured") for way in ways], ways)
        panel.set_title(columns[layout], loc="left")
        panel.set_yticks(range(len(ways)), [NAMES[way] for way in ways])
        for label, way in zip(panel.get_yticklabels(), ways, strict=False):  # those of the left panels
            label.set_color(OUR if way in OURS else "black")
    panels[0].invert_yaxis()  # they share it
    said = f"Bar: median, line: lowest to highest round. Sorted by: {columns[sort_by]}.\n{what}"
    _head(figure, f"{title}, {unit}; lower is better", said, {"tensorferry": OUR, "others": OTHER})
    return save(figure, stem, caption)


def _height(cell: Spread | str | None) -> float:
    """Where a way stands among others; what has no figure comes last."""
    return cell.median if isinstance(cell, Spread) else math.inf


def _panel(panel: Axes, cells: Sequence[Spread | str], ways: Sequence[str]) -> None:
    most = max((cell.high for cell in cells if isinstance(cell, Spread)), default=1.0)
    panel.set_xlim(0, most * 1.25)
    for place, (cell, way) in enumerate(zip(cells, ways, strict=True)):
        if isinstance(cell, str):
            panel.text(0, place, f" {cell}", va="center", color=BAD if cell == FAILED else OTHER)
            continue
        panel.barh(place, cell.median, height=0.7, color=_color(way))
        panel.plot([cell.low, cell.high], [place, place], color="black", linewidth=0.8)
        panel.text(cell.high + most * 0.03, place, f"{cell.median:.2f}", va="center", fontsize=8)


def _figure(height: float) -> Figure:
    """A figure of the common width whose panels leave room for `_head` and the caption."""
    room = (0, _FOOT / height, 1, 1 - (_HEAD + _FOOT) / height)
    return Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(rect=room))


def _panels(figure: Figure, lines: int, count: int, *, sharey: bool = False) -> list[Axes]:
    """`count` panels in lines; what is left over of the last line stays empty."""
    panels = list(figure.subplots(lines, _ACROSS, sharey=sharey, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return panels[:count]


def _head(figure: Figure, title: str, said: str, key: Mapping[str, str]) -> None:
    """Title, what it shows, and what the colours mean, above the panels."""
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 - 0.08 / height, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.01, 1 - 0.36 / height, said, va="top", color="#333333", fontsize=8.5)
    patches = [Patch(color=color, label=name) for name, color in key.items()]
    figure.legend(
        handles=patches,
        loc="upper right",
        bbox_to_anchor=(1, 1),
        ncols=len(patches),
        frameon=False,
        handlelength=1.0,
    ).set_in_layout(False)


Line: TypeAlias = "Sequence[tuple[int, float]] | str"
"""Medians by size in bytes, µs; or the word for a row without figures."""


def latency(stem: Path, lines: Mapping[str, Line], caption: str) -> list[Path]:
    """Round trips by size as multiples of the floor's, or in µs where no floor was measured."""
    measured = lines.get("floor", "")
    floor = {} if isinstance(measured, str) else dict(measured)
    lines = {way: _at_sizes(points, floor) for way, points in lines.items()}
    drawn = {way: points for way, points in lines.items() if not isinstance(points, str)}
    figure = _figure(6.4)
    panel = figure.subplots()
    ends = []
    others = (way for way in drawn if way not in OURS and way != "floor")
    styles = {way: _style(number) for number, way in enumerate(others)}
    for way, points in drawn.items():
        shown = [(size, time / floor.get(size, 1.0)) for size, time in points]  # all of them, or no floor
        panel.plot(*zip(*shown, strict=True), **(styles.get(way) or _own_style(way)))
        ends.append((shown[-1], way))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({size for points in drawn.values() for size, _ in points})
    panel.set_xticks(sizes, [_size_tick(size, floor) for size in sizes])
    panel.minorticks_off()
    low, high = panel.get_ylim()
    steps = [step * 10**power for power in range(-2, 7) for step in (1, 2, 5)]
    ticks = [tick for tick in steps if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:,g}x" if floor else f"{tick:,g}" for tick in ticks])
    panel.grid(axis="y", color="#E5E5E5")
    panel.set_xlabel("size of the tensor" + (", and the floor's round trip" if floor else ""))
    panel.set_ylabel("median round trip, as a multiple of the floor's" if floor else "median round trip, µs")
    if ends:
        _label_ends(panel, ends, {way: str(style["color"]) for way, style in styles.items()})
    said = (
        "The floor: the bytes copied once, by one thread, into warm shared memory, and zmq to tell of it. Its"
        " line is 1x;\nits µs stand under the sizes, so that 2x at 16 MiB are twice the µs there."
        if floor
        else "No floor was measured."
    )
    without = "; ".join(f"{NAMES[way]} {word}" for way, word in lines.items() if isinstance(word, str))
    if without:
        panel.text(0.01, 0.01, f"no line: {without}", transform=panel.transAxes, color=BAD, fontsize=8)
    key = {"tensorferry": OUR, "others": OTHER, "floor": FLOOR}
    _head(figure, "Round trip of one tensor between two processes; lower is better", said, key)
    return save(figure, stem, caption)


def _at_sizes(points: Line, floor: Mapping[int, float]) -> Line:
    """What is a multiple of the floor's, where there is a floor."""
    if isinstance(points, str) or not floor:
        return points
    return [(size, time) for size, time in points if size in floor] or "not at a size of the floor"


def _style(number: int) -> dict[str, Any]:
    """How the line of another's way looks that is the `number`th."""
    return {
        "color": _GREYS[number % len(_GREYS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_GREYS) % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1,
        "zorder": 2,
    }


def _own_style(way: str) -> dict[str, Any]:
    """How ours and the floor look."""
    dash = "--" if way == "floor" else ":" if way in ("frames", "inline") else "-"
    style = {"color": _color(way), "marker": "o", "linestyle": dash, "markersize": 4, "linewidth": 2}
    return {**style, "zorder": 3}


def _size_tick(size: int, floor: Mapping[int, float]) -> str:
    return _bytes(size) + (f"\n{floor[size]:,.0f} µs" if size in floor else "")


def _label_ends(
    panel: Axes, ends: Sequence[tuple[tuple[int, float], str]], colors: Mapping[str, str]
) -> None:
    """Names at the right ends of the lines, moved apart where they would cover each other."""
    low, high = (math.log10(limit) for limit in panel.get_ylim())
    gap = (high - low) / 26
    ends = sorted(ends, key=lambda end: end[0][1])
    places: list[float] = []
    for (_, height), _ in ends:
        places.append(max(math.log10(height), places[-1] + gap if places else low))
    for number in reversed(range(len(places))):  # down again from the top, where there was no room
        places[number] = min(places[number], high - gap * (len(places) - 1 - number))
    for ((size, height), way), placed in zip(ends, places, strict=True):
        color = colors.get(way, _color(way))
        panel.annotate(
            NAMES[way],
            xy=(size, height),
            xytext=(size * 1.7, 10**placed),
            color=color,
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6},
            annotation_clip=False,
        )
    panel.set_xlim(right=max(size for (size, _), _ in ends) * 1.2)


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


SCALES = {
    "leases": ("leases held by the reader", "µs a message of 16 KiB"),
    "readers": ("readers of one message", "µs a message of 1 MiB"),
    "ring MiB": ("size of the ring, MiB", "µs a message of 1 MiB"),
    "peers": ("peers of the sender", "µs a message of 64 KiB"),
    "tensors": ("tensors of 1 KiB in a message", "µs a tensor"),
}


def scale(stem: Path, curves: Mapping[str, Sequence[tuple[float, Spread | str]]], caption: str) -> list[Path]:
    """A panel for each thing that grows; the dashed line is where flat would be."""
    lines = math.ceil(len(curves) / _ACROSS)
    figure = _figure(_HEAD + _FOOT + 2.5 * lines)
    panels = _panels(figure, lines, len(curves))
    for panel, (axis, curve) in zip(panels, curves.items(), strict=True):
        _curve(panel, curve)
        panel.set_xlabel(SCALES[axis][0])
        panel.set_ylabel(SCALES[axis][1])
    said = "Line: median, shade: lowest to highest round; the number: the last as a multiple of the first."
    _head(figure, "Cost of a message as one thing grows", said, {"tensorferry": OUR, "flat": FLOOR})
    return save(figure, stem, caption)


def _curve(panel: Axes, curve: Sequence[tuple[float, Spread | str]]) -> None:
    xs = [x for x, _ in curve]
    good = [(x, spread) for x, spread in curve if isinstance(spread, Spread)]
    top = max((spread.high for _, spread in good), default=1.0) * 1.25
    if good:
        there, spreads = zip(*good, strict=True)
        panel.fill_between(there, [s.low for s in spreads], [s.high for s in spreads], color=OUR, alpha=0.18)
        panel.plot(there, [s.median for s in spreads], color=OUR, marker="o", markersize=4)
    for x, word in curve:
        if isinstance(word, str):
            panel.text(x, top * 0.02, word, rotation=90, ha="center", color=BAD if word == FAILED else OTHER)
    first, last = curve[0][1], curve[-1][1]
    if isinstance(first, Spread):
        panel.axhline(first.median, color=FLOOR, linestyle="--", linewidth=1)
    if isinstance(first, Spread) and isinstance(last, Spread):
        panel.annotate(
            f"{last.median / first.median:.2f}x",
            (xs[-1], last.median),
            textcoords="offset points",
            xytext=(0, 7),
            ha="right",
            color=OUR,
        )
    panel.set_xscale("log")
    panel.set_xticks(xs, [f"{x:,.0f}" for x in xs], rotation=45 if max(xs) > 999 else 0)
    panel.minorticks_off()
    panel.set_ylim(0, top)
    panel.yaxis.set_major_formatter("{x:,.0f}")


def save(figure: Figure, stem: Path, caption: str) -> list[Path]:
    """Write STEM.svg and STEM.png with the caption in small print."""
    height = figure.get_size_inches()[1]
    figure.text(0.01, 0.06 / height, caption, fontsize=8, color="#666666")
    files = [stem.with_suffix(f".{kind}") for kind in ("svg", "png")]
    for file in files:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
