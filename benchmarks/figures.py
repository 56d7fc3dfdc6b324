"""Results as pictures: prefill over length, decoding beside other models. SVG, small, and told apart by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import KINDS, SIZE, Held
from hymba.files import replacing

COLOURS = {"bf16": "#4f8fb8", "int8": "#6a9f58", "int4": "#c8553d"}
THEIRS, INK, GRID = "#b8b2a7", "#333333", "#e4e4e4"


def figures(held: Held) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each figure that there are results for, what draws it, and the data it shows."""
    curves = {kind: held[name]["curve"] for kind in KINDS if (name := f"prefill-{SIZE}-{kind}") in held}
    if curves:
        points = {kind: [(p["tokens"], p["seconds"]["median"]) for p in curve] for kind, curve in curves.items()}
        yield "prefill", _draw_prefill, points
    if record := held.get(f"peers-{SIZE}"):
        yield "peers", _draw_peers, {name: entry["tokens_per_second"] for name, entry in record["peers"].items()}


def draw(held: Held, directory: Path) -> None:
    """Write every figure into `directory`, with the digest of its data in it; leave alone those that have it."""
    for name, artist, data in figures(held):
        path = directory / f"{name}.svg"
        if not is_current(path, data):
            _write(path, artist, data)


def is_current(path: Path, data: Any) -> bool:
    """Return whether the figure at `path` shows `data`."""
    return path.is_file() and digest(data) in path.read_text(encoding="utf-8")


def digest(data: Any) -> str:
    """Return what a figure is recognised by."""
    return "data " + hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _write(path: Path, artist: Any, data: Any) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hymba", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        artist(axes, data)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        with replacing(path) as partial:
            figure.savefig(
                partial, format="svg", metadata={"Description": digest(data), "Date": None}, facecolor="white"
            )


def _draw_prefill(axes: Any, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Seconds over tokens, both linear: a straight line means that a token costs the same at any length."""
    for kind, points in curves.items():
        axes.plot(*zip(*points, strict=True), color=COLOURS[kind], linewidth=1.8, marker="o", markersize=4, label=kind)
    axes.set_xlabel("tokens of the prompt", color=INK)
    axes.set_ylabel("seconds", color=INK)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title("Hymba-1.5B reads a prompt", color=INK, loc="left")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.legend(frameon=False, labelcolor=INK)


def _draw_peers(axes: Any, speeds: dict[str, float]) -> None:
    """Tokens per second as bars, the fastest on top, ours in colour."""
    ordered = sorted(speeds.items(), key=lambda item: item[1])
    names = [name for name, _ in ordered]
    colours = [COLOURS[name.rpartition("-")[2]] if name.startswith("hymba-") else THEIRS for name in names]
    bars = axes.barh(names, [speed for _, speed in ordered], color=colours, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=4, color=INK)
    axes.set_xlabel("tokens per second, one sequence", color=INK)
    axes.set_title("Decoding on this machine", color=INK, loc="left")
    axes.xaxis.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
