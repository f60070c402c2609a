"""The picture of accuracy over wall and processor time, cold and warm: a line a contender, and the target."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.report.intervals import interval
from bench.report.record import Row

AXES = {"seconds": "seconds since the command started", "processor_seconds": "processor-seconds"}
CACHES = {"cold": "cold: nothing decoded or compiled before", "warm": "warm"}
OURS = ("#1f5fa8", "#d9730d", "#1a7f37", "#c62828", "#7b4fb5", "#0097a7")
THEIRS = ("#555555", "#8c8c8c", "#b0b0b0", "#a1887f", "#90a4ae")


def picture(plt: Any, rows: list[Row], title: str) -> Any:
    """Return the figure: the mean over the seeds with its 95% interval, at the mean time of each epoch."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = plt.subplots(2, 2, figsize=(12, 8), sharey=True, sharex="row")
    ours, theirs = iter(OURS * len(rows)), iter(THEIRS * len(rows))
    styles = {row["name"]: {"color": next(theirs if _is_baseline(row) else ours)} for row in rows}
    for (measure, label), line in zip(AXES.items(), panels, strict=True):
        for (cache, heading), axes in zip(CACHES.items(), line, strict=True):
            for row in rows:
                if cache in row["extra_info"]["curves"]:
                    _draw(axes, row, cache, measure, styles[row["name"]])
            for target in {row["extra_info"]["target"] for row in rows if row["extra_info"].get("is_target")}:
                axes.axhline(target, color="k", linestyle="--", linewidth=1, label=f"target, {target:.3f}")
            axes.set(xscale="log", xlabel=label, title=heading)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3, which="both")
        line[0].set_ylabel("accuracy on the photos held out")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    return figure


def _is_baseline(row: Row) -> bool:
    return not row["extra_info"]["is_recipe"]


def _draw(axes: Any, row: Row, cache: str, measure: str, style: dict[str, str]) -> None:
    curves = row["extra_info"]["curves"][cache]
    if None in np.array(curves[measure], object):  # processor time by epoch is known on Linux alone
        return
    times = np.array(curves[measure]).mean(0)  # (epochs,)
    accuracies = np.array(curves["accuracy"])  # (seeds, epochs)
    line = "--" if _is_baseline(row) else "-"
    axes.plot(
        times, accuracies.mean(0), line, marker="o", markersize=3, label=f"{row['name']} (n = {row['n']})", **style
    )
    if len(accuracies) > 1:
        spread = [interval(epoch) for epoch in accuracies.T.tolist()]
        low, high = ([one[name] for one in spread] for name in ("low", "high"))
        axes.fill_between(times, np.clip(low, 0, 1), np.clip(high, 0, 1), alpha=0.15, linewidth=0, **style)
