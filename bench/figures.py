"""Pictures of results that can be read without the text around them, as SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness import Result, Spread
from bench.part import Json
from bench.ways import OURS

mpl.use("Agg")
mpl.rcParams |= {
    "svg.fonttype": "path",
    "svg.hashsalt": "tensorferry",
    "font.size": 9,
    "axes.spines.top": False,
}
mpl.rcParams |= {"axes.spines.right": False, "axes.titlesize": 10, "figure.dpi": 110}

# Okabe and Ito's colours, which the colour-blind tell apart: ours, others', the floor.
_TITLE_WIDTH = 9.0  # inches; of fewer the title and what stands below lack some
OUR, OTHER, FLOOR = "#0072B2", "#8C8C8C", "#D55E00"

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
    "floor": "floor: one copy, one zmq note",
}


def _color(way: str) -> str:
    return FLOOR if way == "floor" else OUR if way in OURS else OTHER


def bars(
    stem: Path,
    title: str,
    results: Sequence[Result],
    *,
    columns: Mapping[str, object],
    rows: Sequence[str],
    measure: Callable[[Mapping[str, Json]], float],
    unit: str,
    caption: str,
) -> list[Path]:
    """A panel for each layout, a bar for each way with its median and range, in the order of the table."""
    layouts = [layout for layout in columns if any(r.row.arguments["layout"] == layout for r in results)]
    ways = [way for way in rows if any(r.row.arguments["column"] == way for r in results)]
    width = max(_TITLE_WIDTH, 2.2 + 1.75 * len(layouts))
    figure = Figure(figsize=(width, 0.9 + 0.27 * len(ways)), layout="constrained")
    panels = figure.subplots(1, len(layouts), sharey=True, squeeze=False)[0]
    for panel, layout in zip(panels, layouts, strict=True):
        _panel(panel, [r for r in results if r.row.arguments["layout"] == layout], ways, measure)
        panel.set_title(_layout(layout))
        panel.set_xlabel(unit)
    panels[0].set_yticks(range(len(ways)), [NAMES[way] for way in ways])
    panels[0].invert_yaxis()
    for label, way in zip(panels[0].get_yticklabels(), ways, strict=True):
        label.set_color(_color(way) if way in OURS else "black")
    figure.suptitle(f"{title} (bar: median; line: lowest to highest round)", fontsize=11)
    return save(figure, stem, caption)


def _layout(layout: str) -> str:
    prompts, _, images = layout.partition("x")
    return (
        f"{prompts} prompt{'s' if prompts != '1' else ''} x {images} images"
        if images
        else f"{layout}: 128 images"
    )


def _panel(
    panel: Axes,
    results: Sequence[Result],
    ways: Sequence[str],
    measure: Callable[[Mapping[str, Json]], float],
) -> None:
    spreads = {str(result.row.arguments["column"]): result.spread(measure) for result in results}
    most = max(spread.high for spread in spreads.values())
    panel.set_xlim(0, most * 1.3)
    for place, way in enumerate(ways):
        spread = spreads.get(way)
        if spread is None:
            panel.text(0, place, " not measured", va="center", color=OTHER)
            continue
        panel.barh(place, spread.median, height=0.66, color=_color(way))
        panel.plot([spread.low, spread.high], [place, place], color="black", linewidth=0.8)
        panel.text(spread.high + most * 0.03, place, f"{spread.median:.2f}", va="center", fontsize=8)


def latency(stem: Path, lines: Mapping[str, Sequence[tuple[int, float]]], caption: str) -> list[Path]:
    """Round trips by size as multiples of the floor's, or in µs where no floor was measured."""
    floor = dict(lines.get("floor", ()))
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    panel = figure.subplots()
    ends = []
    for way, points in lines.items():
        shown = [(size, time / floor.get(size, 1.0)) for size, time in points]
        ours = way in OURS or way == "floor"
        panel.plot(
            *zip(*shown, strict=True),
            color=_color(way),
            marker="o",
            markersize=3.5,
            linewidth=2 if ours else 1,
            linestyle="--" if way == "floor" else "-",
            zorder=3 if ours else 2,
        )
        ends.append((shown[-1], way))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({size for points in lines.values() for size, _ in points})
    panel.set_xticks(sizes, [_bytes(size) for size in sizes])
    panel.minorticks_off()
    low, high = panel.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.grid(axis="y", color="#E5E5E5")
    panel.set_xlabel("size of the tensor")
    panel.set_ylabel("median round trip, as a multiple of the floor's" if floor else "median round trip, µs")
    _label_ends(panel, ends)
    panel.set_title("Round trip of one tensor between two processes; lower is better", loc="left")
    return save(figure, stem, caption)


def _label_ends(panel: Axes, ends: Sequence[tuple[tuple[int, float], str]]) -> None:
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
        panel.annotate(
            NAMES[way],
            xy=(size, height),
            xytext=(size * 1.5, 10**placed),
            color=_color(way) if way in OURS or way == "floor" else "#444444",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5},
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


def scale(stem: Path, curves: Mapping[str, Sequence[tuple[float, Spread]]], caption: str) -> list[Path]:
    """A panel for each thing that grows; the dashed line is where flat would be."""
    figure = Figure(figsize=(2.6 * len(curves), 3.0), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (axis, curve) in zip(panels, curves.items(), strict=True):
        xs, spreads = zip(*curve, strict=True)
        first, last = spreads[0].median, spreads[-1].median
        panel.fill_between(xs, [s.low for s in spreads], [s.high for s in spreads], color=OUR, alpha=0.18)
        panel.plot(xs, [s.median for s in spreads], color=OUR, marker="o", markersize=4)
        panel.axhline(first, color=FLOOR, linestyle="--", linewidth=1)
        panel.set_xscale("log")
        panel.set_xticks(xs, [f"{x:,.0f}" for x in xs], rotation=45 if max(xs) > 999 else 0)
        panel.minorticks_off()
        panel.set_ylim(0, max(s.high for s in spreads) * 1.25)
        panel.annotate(
            f"{last / first:.2f}x",
            (xs[-1], last),
            textcoords="offset points",
            xytext=(0, 7),
            ha="right",
            color=OUR,
        )
        panel.set_xlabel(SCALES[axis][0])
        panel.set_ylabel(SCALES[axis][1])
    figure.suptitle(
        "Cost of a message as one thing grows: median, range of rounds; dashed: flat", fontsize=11
    )
    return save(figure, stem, caption)


def save(figure: Figure, stem: Path, caption: str) -> list[Path]:
    """Write STEM.svg and STEM.png with the caption in small print."""
    figure.supxlabel(caption, fontsize=7, color="#666666", x=0.01, ha="left")
    files = [stem.with_suffix(f".{kind}") for kind in ("svg", "png")]
    for file in files:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
