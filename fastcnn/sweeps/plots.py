"""A sweep's plots, as PNG files in memory."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcnn.errors import ignoring_warnings
from fastcnn.reporting.plots import png, short

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

Point = tuple[Mapping[str, Any], bool]
"""A trial's parameters and metric by name, and whether it finished."""


def parallel_coordinates(
    points: Sequence[Point], metric: str, *, logs: Sequence[str] = (), maximize: bool = True
) -> bytes:
    """Return a line for each trial across an axis for each parameter, coloured by its metric; a pruned one is dashed.

    By hand, as Optuna's has no place for pruned trials and prints lists of filters over the next axis.

    Args:
        points: the trials.
        metric: name of the metric, which becomes the last axis.
        logs: parameters with a logarithmic axis.
        maximize: whether a high metric is good; the best trials are drawn on top.
    """
    names = [*(name for name in points[0][0] if name != metric), metric]
    axes_of = {name: axis([values[name] for values, _ in points], log=name in logs) for name in names}
    metrics = np.array([values[metric] for values, _ in points], float)
    longest = max(len(label) for _, ticks in axes_of.values() for _, label in ticks)

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        axes = figure.subplots()
        low, high = float(metrics.min()), float(metrics.max())
        scale = Normalize(low, high if high > low else low + 1e-9)
        colours = colormaps["viridis" if maximize else "viridis_r"]
        for i in np.argsort(metrics if maximize else -metrics):
            heights = [axes_of[name][0][i] for name in names]
            style = {"lw": 1.8, "alpha": 0.9} if points[i][1] else {"lw": 1.0, "alpha": 0.6, "ls": (0, (4, 3))}
            axes.plot(heights, color=colours(scale(metrics[i])), zorder=2, **style)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        style_of_labels: dict[str, Any] = {
            "fontsize": 7.5,
            "ha": "center",
            "va": "center",
            "bbox": box,
            "zorder": 3,
            "parse_math": False,
        }
        for x, name in enumerate(names):
            axes.axvline(x, color="#57606a", linewidth=1, zorder=1)
            for height, label in axes_of[name][1]:
                axes.text(x, height, label, **style_of_labels)
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set_yticks([])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(ScalarMappable(scale, colours), ax=axes, pad=0.01, fraction=0.03, label=metric)
        pruned = sum(not finished for _, finished in points)
        note = f"; dashed: {pruned} pruned" if pruned else ""
        axes.set_title(f"{len(points)} trials{note}", loc="left", fontsize=10)

    return png(max(7.0, len(names) * max(1.15, longest * 0.068)), 5.0, draw)


def axis(values: Sequence[Any], *, log: bool = False) -> tuple[list[float], list[tuple[float, str]]]:
    """Return where values lie on an axis from 0 to 1, and its ticks with their labels.

    log: whether the axis is logarithmic; for numbers above 0.
    """
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        labels = [_short(value) for value in values]
        distinct = sorted(set(labels))
        heights = dict(zip(distinct, np.linspace(0, 1, len(distinct)) if len(distinct) > 1 else [0.5], strict=True))
        return [heights[label] for label in labels], [(height, label) for label, height in heights.items()]
    log = log and min(values) > 0
    scaled = [math.log(value) if log else float(value) for value in values]
    low, high = min(scaled), max(scaled)
    places = [(number - low) / (high - low) if high > low else 0.5 for number in scaled]
    if len(set(values)) <= 5:
        return places, sorted({(place, f"{value:.4g}") for place, value in zip(places, values, strict=True)})
    shown = np.linspace(low, high, 5)
    return places, [(i / 4, f"{math.exp(number) if log else number:.3g}") for i, number in enumerate(shown)]


def importance(study: optuna.Study, metric: str) -> bytes:
    """Return Optuna's bar chart of each parameter's importance (PED-ANOVA) over the finished trials."""
    import matplotlib.pyplot as plt
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_param_importances

    file = io.BytesIO()
    with ignoring_warnings(), plt.style.context("default"):  # Optuna sets pyplot's style
        plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target_name=metric)
        plt.savefig(file, format="png", dpi=110, bbox_inches="tight")
        plt.close()
    return file.getvalue()


def _short(value: Any) -> str:
    return short(",".join(map(str, value)) if isinstance(value, list) else str(value), 24)
