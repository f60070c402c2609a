"""A sweep's pictures, as PNG files in memory, drawn from plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcnn.reporting.plots import TRAIN, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#57606a"
FAINT = "#d0d7de"

Point = tuple[Mapping[str, Any], bool]
"""A trial's values and its figure by name, and whether it finished."""


def parallel_coordinates(
    points: Sequence[Point], metric: str, *, logs: Sequence[str] = (), maximize: bool = True
) -> bytes:
    """Return a line a trial across an axis a parameter, coloured by its figure; one that was given up is dashed.

    logs: the parameters whose axis is logarithmic.
    """
    names = [*(name for name in points[0][0] if name != metric), metric]
    columns = {name: Axis([values[name] for values, _ in points], log=name in logs) for name in names}
    figures = np.array([values[metric] for values, _ in points], float)
    order = np.argsort(figures if maximize else -figures)  # the best on top
    widest = max(len(label) for axis in columns.values() for _, label in axis.ticks)

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        axes = figure.subplots()
        low, high = float(figures.min()), float(figures.max())
        scale = Normalize(low, high if high > low else low + 1e-9)
        colours = colormaps["viridis" if maximize else "viridis_r"]
        for i in order:
            heights = [columns[name].places[i] for name in names]
            finished = points[i][1]
            axes.plot(
                range(len(names)),
                heights,
                color=colours(scale(figures[i])),
                linewidth=1.8 if finished else 1.0,
                linestyle="-" if finished else (0, (4, 3)),
                alpha=0.9 if finished else 0.6,
                zorder=2,
            )
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        for x, name in enumerate(names):
            axes.axvline(x, color=GREY, linewidth=1, zorder=1)
            for height, label in columns[name].ticks:
                axes.text(
                    x, height, label, fontsize=7.5, ha="center", va="center", bbox=box, zorder=3, parse_math=False
                )
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set_yticks([])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(ScalarMappable(scale, colours), ax=axes, pad=0.01, fraction=0.03, label=metric)
        given_up = sum(not finished for _, finished in points)
        note = f"; dashed: {given_up} given up" if given_up else ""
        axes.set_title(f"{len(points)} trials{note}", loc="left", fontsize=10)

    return png(max(7.0, len(names) * max(1.15, widest * 0.068)), 5.0, draw)


class Axis:
    """Where values stand on an axis from 0 to 1, and what is written there.

    Args:
        values: a trial's each.
        log: whether the axis is logarithmic; numbers only.
    """

    def __init__(self, values: Sequence[Any], *, log: bool = False) -> None:
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            self._numbers([float(value) for value in values], log)
        else:
            self._names([_short(value) for value in values])

    def _numbers(self, numbers: Sequence[float], log: bool) -> None:
        distinct = sorted(set(numbers))
        scaled = [math.log(number) for number in numbers] if log and distinct[0] > 0 else list(numbers)
        low, high = min(scaled), max(scaled)
        span = high - low or 1.0
        self.places = [(number - low) / span if high > low else 0.5 for number in scaled]
        if len(distinct) > 5:
            steps = [low + span * i / 4 for i in range(5)]
            shown = [math.exp(step) for step in steps] if log else steps
            self.ticks = [(i / 4, f"{number:.3g}") for i, number in enumerate(shown)]
        else:
            self.ticks = sorted({(place, f"{number:.4g}") for place, number in zip(self.places, numbers, strict=True)})

    def _names(self, names: Sequence[str]) -> None:
        distinct = sorted(set(names))
        last = max(1, len(distinct) - 1)
        heights = {name: i / last if len(distinct) > 1 else 0.5 for i, name in enumerate(distinct)}
        self.places = [heights[name] for name in names]
        self.ticks = [(height, name) for name, height in heights.items()]


def importance(shares: Mapping[str, float], metric: str, num_trials: int) -> bytes:
    """Return a bar a parameter: its share of what makes a trial a good one, the largest on top."""
    names = list(shares)[::-1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(names, [shares[name] for name in names], color=TRAIN, height=0.6)
        axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=4, fontsize=9)
        axes.set_title(f"importance for {metric}, of {num_trials} trials that finished", loc="left", fontsize=10)
        axes.set_xlim(0, max(shares.values()) * 1.15 or 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=FAINT, alpha=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)

    return png(7.5, 1.2 + 0.38 * len(names), draw)


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…{text[-11:]}"
