"""The learning curve of a run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba.files import replacing
from hymba.training.journal import read_log

TRAIN, HELD_OUT, INK, GRID = "#4f8fb8", "#c8553d", "#333333", "#e4e4e4"
SHADE = "#f5f2ec"


def draw_curve(log: Path, picture: Path) -> None:
    """Draw a run's log as a PNG: bits per byte over tokens, in training (raw and smoothed) and held out.

    Draws nothing while the log has fewer than two training lines.
    """
    lines = read_log(log)
    train, held_out = (
        [(line["tokens"], line[key]) for line in lines if key in line]
        for key in ("bits_per_byte", "held_out_bits_per_byte")
    )
    if len(train) < 2:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens, rates = zip(*train, strict=True)
    _shade_decay(axes, [(line["tokens"], line["learning_rate"]) for line in lines if "learning_rate" in line])
    axes.plot(tokens, rates, color=TRAIN, alpha=0.35, linewidth=0.8)
    axes.plot(tokens, smooth(rates), color=TRAIN, linewidth=1.8, label=f"training  {smooth(rates)[-1]:.2f}")
    if held_out:
        style: dict[str, Any] = {"color": HELD_OUT, "linewidth": 1.8, "marker": "o", "markersize": 3}
        axes.plot(*zip(*held_out, strict=True), **style, label=f"held out  {held_out[-1][1]:.2f}")
    settled = [rate for _, rate in [*train[len(train) // 20 :], *held_out]]
    axes.set_ylim(min(settled) - 0.08 * (max(settled) - min(settled)), max(settled) * 1.03)
    axes.set_xlim(0, tokens[-1] * 1.01)
    axes.set_xlabel("tokens", color=INK)
    axes.set_ylabel("bits per byte", color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    with replacing(picture) as partial:
        figure.savefig(partial, format="png")


def _shade_decay(axes: Any, rates: list[tuple[float, float]]) -> None:
    """Mark where the learning rate falls."""
    peak, end = max(rate for _, rate in rates), rates[-1][0]
    start = max(tokens for tokens, rate in rates if rate == peak)
    if start < end:
        axes.axvspan(start, end, color=SHADE, linewidth=0)
        at_the_foot = axes.get_xaxis_transform()
        axes.text((start + end) / 2, 0.03, "learning rate decays", color=INK, ha="center", transform=at_the_foot)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours, a fiftieth of all of them to either side."""
    reach = len(values) // 50
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
