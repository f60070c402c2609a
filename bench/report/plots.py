"""Pictures of a record: throughput, stages, roofline, growth, accuracy. Left out is one that has no results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import learning_curves
from bench.report.record import GROWING, Record, Row
from bench.report.tables import STAGES, machine, rate

OURS, THEIRS = "#1f5fa8", "#b4b4b4"
MOST_BARS = 24  # in one panel: more are drawn as lines over the batch

Figure = Any
Axes = Any


def draw(record: Record, folder: Path) -> dict[str, str]:
    """Draw the pictures that there are results for; return name -> why one was left out ("" where it was drawn)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    left_out = {}
    for name, picture in PICTURES.items():
        try:
            figure = picture(plt, record)
        except NothingToDraw as error:
            left_out[name] = str(error)
            (folder / name).unlink(missing_ok=True)  # an older run's would pass for this one's
            continue
        left_out[name] = ""
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        plt.close(figure)
    return left_out


class NothingToDraw(Exception):
    """The benchmarks that a picture shows were not run; the message says which."""


def _rows(record: Record, group: str, figure: str = "images_per_second") -> list[Row]:
    """Return a group's rows that have a figure. Raises NothingToDraw where there are none."""
    if rows := [row for row in record.of(group) if row["extra_info"].get(figure)]:
        return rows
    raise NothingToDraw(f"{group} was not run")


def throughput(plt: Any, record: Record) -> Figure:
    """Draw images/s of every contender and its baselines, a panel a group."""
    # Title, height, what draws it, and from what.
    panels: list[tuple[str, float, Callable[[Axes, Any], None], Any]] = []
    for group in record.groups:
        rows = record.of(group)
        if group in ("growth", "accuracy"):
            continue
        bars = _bars(rows)
        if len(bars) <= MOST_BARS or not all("batch" in row["extra_info"] for row in rows):
            panels.append((group, 0.5 + 0.3 * len(bars), _draw_bars, bars))
            continue
        for network in dict.fromkeys(map(_network, rows)):
            panels.append((f"{group}: {network}", 3.0, _lines, [row for row in rows if _network(row) == network]))
    if not panels:
        raise NothingToDraw("nothing that handles images at a rate was run")
    heights = [height for _, height, _, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 0.5 * len(panels)), height_ratios=heights, squeeze=False
    )
    for axis, (title, _, draw_panel, shown) in zip(axes.flat, panels, strict=True):
        draw_panel(axis, shown)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.suptitle(f"Throughput: {machine(record)}", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def _network(row: Row) -> str:
    info = row["extra_info"]
    return f"{info.get('precision', '')} {','.join(map(str, info.get('filters', [])))}".strip()


def _bars(rows: list[Row]) -> list[tuple[str, float, str]]:
    """Return name, images/s and colour. Baselines stand once, below the contenders in a row that raced them."""
    bars: list[tuple[str, float, str]] = []
    for _, together in itertools.groupby(rows, key=_race):
        mine = list(together)
        for row in mine:
            info = row["extra_info"]
            bars.append((row["name"], info["images_per_second"], THEIRS if info.get("peer") else OURS))
        theirs = mine[-1]["extra_info"]["baseline_images_per_second"]
        bars += [(_wrapped(name), value, THEIRS) for name, value in theirs.items()]
    return bars


def _race(row: Row) -> tuple[list[str], Any, str]:
    """Return a key that contenders have in common which raced the same baselines at the same work."""
    return list(row["extra_info"]["over"]), row["extra_info"].get("batch"), _network(row)


def _draw_bars(axes: Axes, bars: list[tuple[str, float, str]]) -> None:
    names, values, colours = zip(*bars, strict=True)
    places = np.arange(len(bars))
    axes.barh(places, values, color=colours, height=0.7)
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axes.text(value, place, f" {rate(value)}", va="center", fontsize=9)
    axes.set(xlabel="images/s (blue: fastcnn, grey: baselines)", xlim=(0, 1.12 * max(values)))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _lines(axes: Axes, rows: list[Row]) -> None:
    ours: dict[str, list[tuple[int, float]]] = {}
    theirs: dict[str, dict[int, float]] = {}
    for row in rows:
        info = row["extra_info"]
        ours.setdefault(info.get("engine", row["name"]), []).append((info["batch"], info["images_per_second"]))
        for name, value in info["baseline_images_per_second"].items():
            theirs.setdefault(name, {})[info["batch"]] = value
    for name, points in ours.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    for name, values in theirs.items():
        axes.plot(*zip(*sorted(values.items()), strict=True), marker="x", linestyle="--", color="0.5", label=name)
    _batch_axis(axes, sorted({row["extra_info"]["batch"] for row in rows}))
    axes.set(yscale="log", ylabel="images/s")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _batch_axis(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batch size")
    axes.grid(alpha=0.3)


def training_rate(plt: Any, record: Record) -> Figure:
    """Draw images/s from the second epoch on: fastcnn and the scripts that it was raced against."""
    info = _rows(record, "train", "steady_images_per_second")[0]["extra_info"]
    steady = info["steady_images_per_second"]
    figure, axes = plt.subplots(figsize=(8, 2.2))
    ours = (f"fastcnn\n{info['engine']} {info['precision']}", steady["fastcnn"], OURS)
    theirs = [(_wrapped(name), steady[name.partition(".py")[0]], THEIRS) for name in info["steady_over"]]
    _draw_bars(axes, [ours, *theirs])
    axes.set_title(f"Training, images/s from the second epoch on: {machine(record)}", fontsize=10)
    return figure


def busy(plt: Any, record: Record) -> Figure:
    """Draw images/s from the second epoch on, ours and the baseline's, by the processes that compute beside them."""
    rows = _rows(record, "busy", "steady_over")
    figure, axes = plt.subplots(figsize=(8, 4))
    places, width = np.arange(len(rows)), 0.38
    scripts = dict.fromkeys(name for row in rows for name in row["extra_info"]["steady_images_per_second"])
    for number, (script, colour) in enumerate(zip(scripts, (OURS, THEIRS), strict=True)):
        values = [row["extra_info"]["steady_images_per_second"][script] for row in rows]
        label = script if script == "fastcnn" else f"{script}.py"
        axes.bar(places + (number - 0.5) * width, values, width, color=colour, label=label)
    for place, row in zip(places, rows, strict=True):
        info = row["extra_info"]
        (over,) = info["steady_over"].values()
        text = "{median:.1f} times\n({low:.1f} to {high:.1f})".format_map(over)
        axes.text(place, max(info["steady_images_per_second"].values()), text, ha="center", va="bottom", fontsize=9)
    axes.set_xticks(places, [str(row["extra_info"]["computing"]) for row in rows])
    axes.margins(y=0.2)
    axes.set(xlabel="processes that compute beside it, one thread each", ylabel="images/s")
    axes.set_title(f"Training from the second epoch on: {machine(record)}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=9)
    return figure


def stages(plt: Any, record: Record) -> Figure:
    """Draw the seconds of a cold and a warm run by stage, and the baselines' in all."""
    info = _rows(record, "train", "stages")[0]["extra_info"]
    names = [f"fastcnn, {cache} cache" for cache in info["stages"]]
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.5 * (len(names) + len(info["baseline_seconds"]))))
    left = np.zeros(len(names))
    for stage, colour in zip((*STAGES, "other"), plt.get_cmap("Paired").colors, strict=False):
        widths = np.array([_seconds(seconds, stage) for seconds in info["stages"].values()])
        axes.barh(names, widths, left=left, label=stage, color=colour)
        left += widths
    totals = dict(zip(names, left, strict=True))
    for name, seconds in info["baseline_seconds"].items():
        axes.barh(_wrapped(name), seconds, color=THEIRS)
        totals[_wrapped(name)] = seconds
    for place, seconds in enumerate(totals.values()):
        axes.text(seconds, place, f" {seconds:.1f} s", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds from the start of the command to its end (grey: baselines, in all)",
        xlim=(0, 1.1 * max(totals.values())),
        title=f"{info['num_photos']:,} photos, {info['epochs']} epochs: {machine(record)}",
    )
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="stage")
    return figure


def _seconds(stages: dict[str, float], stage: str) -> float:
    if stage != "other":
        return stages[stage]
    return stages["total"] + stages["start"] - sum(stages[name] for name in STAGES)  # between the stages


def _wrapped(name: str) -> str:
    script, *settings = name.split(" ")
    return f"{script}\n{' '.join(settings).replace('--', '')}" if script.endswith(".py") else name


def roofline(plt: Any, record: Record) -> Figure:
    """Draw steps' FLOP/s over FLOP a byte, beneath what the machine copies and multiplies, and their counted floors."""
    rows = _rows(record, "step", "flops")
    figure, axes = plt.subplots(figsize=(9, 5.5))
    bandwidth = record.rates["copy_bytes_per_second"]
    intensities = [row["extra_info"]["flops"] / row["extra_info"]["bytes"] for row in rows]
    knees = [value / bandwidth for name, value in record.rates.items() if name != "copy_bytes_per_second"]
    x = np.geomspace(min([*intensities, *knees]) / 4, max([*intensities, *knees]) * 4, 200)
    _limits(axes, record.rates, x)
    kinds = list(dict.fromkeys((row["extra_info"]["engine"], row["extra_info"]["precision"]) for row in rows))
    colours = dict(zip(kinds, plt.get_cmap("tab20").colors[::2] * len(kinds), strict=False))
    for row, intensity in zip(rows, intensities, strict=True):
        info = row["extra_info"]
        colour = colours[info["engine"], info["precision"]]
        measured = info["flops"] / info["step_seconds"]
        floor = measured / info["share_of_floor"]
        axes.plot([intensity] * 2, [measured / 1e9, floor / 1e9], color=colour, linewidth=0.8, alpha=0.5)
        kind = f"{info['engine']}, {info['precision']}: measured"
        axes.plot(intensity, measured / 1e9, "o", color=colour, label=kind)
        axes.plot(intensity, floor / 1e9, "_", color="k", markersize=12, label="at the counted floor")
        for name, images in info["baseline_images_per_second"].items():
            axes.plot(intensity, info["flops"] / info["batch"] * images / 1e9, "x", color=THEIRS, label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP a byte moved, counted (bench/harness/roofline.py)",
        ylabel="GFLOP/s",
        title=f"The training step beneath the machine's own rates: {machine(record)}",
    )
    axes.grid(alpha=0.3, which="both")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="lower right")
    return figure


def _limits(axes: Axes, rates: dict[str, float], x: Any) -> None:
    """Draw the FLOP/s that the machine's bandwidth and its matrix rates allow, over FLOP a byte."""
    bandwidth = rates["copy_bytes_per_second"]
    for name, value in rates.items():
        if name != "copy_bytes_per_second":
            kind, end = name.partition("_")[0], (x[-1], value / 1e9)
            colour = "0.3" if kind == "bf16" else "0.6"
            axes.plot(x, np.minimum(value, x * bandwidth) / 1e9, color=colour)
            text = f"{kind} matrix products, {value / 1e9:,.0f} GFLOP/s"
            axes.annotate(text, end, ha="right", va="bottom", fontsize=9, color=colour)
    near = x[len(x) // 12]
    place = {"textcoords": "offset points", "xytext": (6, -6), "va": "top"}
    axes.annotate(
        f"copying, {bandwidth / 1e9:,.0f} GB/s", (near, near * bandwidth / 1e9), fontsize=9, color="0.3", **place
    )


def growth(plt: Any, record: Record) -> Figure:
    """Draw seconds a photo and peak memory over photos, and images/s over the batch."""
    photos, batches = (
        sorted((row["extra_info"] for row in record.grown(by)), key=lambda info: info[key])
        for by, key in (("photos", "num_photos"), ("batch", "batch"))
    )
    if not photos and not batches:
        raise NothingToDraw("growth was not run")
    figure, (seconds, memory, rates) = plt.subplots(1, 3, figsize=(15, 4.4))
    names = [f"{info['num_photos']:,}" for info in photos]
    below = np.zeros(len(photos))
    for stage in GROWING if photos else ():
        heights = np.array([info["photo_seconds"][stage] * 1e3 for info in photos])
        seconds.bar(names, heights, bottom=below, label=stage, width=0.6)
        below += heights
    for place, height in enumerate(below):
        seconds.text(place, height, f"{height:.2f}", ha="center", va="bottom", fontsize=9)
    seconds.margins(y=0.1)
    seconds.set(xlabel="photos", ylabel="milliseconds a photo", title="What grows: an epoch, nothing decoded before")
    if photos:
        seconds.legend(fontsize=8, loc="lower center", ncols=5, bbox_to_anchor=(0.5, -0.32))
        counts = np.array([info["num_photos"] for info in photos])
        peaks = np.array([info["peak_memory_bytes"] for info in photos]) / 2**20
        sizes = peaks[0] + (counts - counts[0]) * photos[0]["bytes_per_photo"] / 2**20
        memory.plot(counts, peaks, marker="o", color=OURS, label="peak memory")
        memory.plot(counts, sizes, marker="x", color="0.5", linestyle="--", label="the fewest's + the photos' sizes")
        memory.set_ylim(0, 1.1 * max(*peaks, *sizes))
        memory.ticklabel_format(style="plain")
        memory.legend(fontsize=8)
    memory.set(xlabel="photos", ylabel="MiB", title="Peak memory")
    memory.grid(alpha=0.3)
    if batches:
        values = [info["steady_images_per_second"] for info in batches]
        rates.plot([info["batch"] for info in batches], values, marker="o", color=OURS)
        _batch_axis(rates, [info["batch"] for info in batches])
        rates.set_ylim(0, 1.1 * max(values))
    rates.set(ylabel="images/s, second epoch", title="Training rate")
    figure.suptitle(machine(record))
    figure.tight_layout()
    return figure


def accuracy(plt: Any, record: Record) -> Figure:
    """Draw accuracy over wall and processor time."""
    rows = _rows(record, "accuracy")
    info = rows[0]["extra_info"]
    photos = f"{info['data']}, {info['image_size']} px, {info['num_train']:,} photos, {info['num_held_out']:,} held out"
    return learning_curves.picture(plt, rows, f"{photos}: {machine(record)}")


PICTURES: dict[str, Callable[[Any, Record], Figure]] = {
    "training_rate.png": training_rate,
    "busy.png": busy,
    "throughput.png": throughput,
    "stages.png": stages,
    "roofline.png": roofline,
    "growth.png": growth,
    "accuracy.png": accuracy,
}
