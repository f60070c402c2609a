"""Pictures of a record: throughput, stages, roofline, growth, accuracy. Left out is one that has no results."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.report.intervals import interval
from bench.report.record import GROWING, Record, Row
from bench.report.tables import STAGES, machine, rate

OURS, THEIRS = "#1f5fa8", "#b4b4b4"
MOST_BARS = 24  # of the step, in one panel
COLOURS = (OURS, "#d9730d", "#1a7f37", "#c62828", "#7b4fb5", "#0097a7")
GREYS = ("#555555", "#8c8c8c", "#b0b0b0", "#a1887f", "#90a4ae")
TIMES = {"seconds": "seconds since the command started", "processor_seconds": "processor-seconds"}
CACHES = {"cold": "cold: nothing decoded or compiled before", "warm": "warm"}
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
}
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}

Figure = Any
Axes = Any
Bars = list[tuple[str, float, str]]
"""Name, value and colour of each bar."""


class NothingToDraw(Exception):
    """The benchmarks that a picture shows were not run; the message says which."""


def draw(record: Record, folder: Path, names: Iterable[str] = ()) -> dict[str, str]:
    """Draw pictures that there are results for; return name -> why one was left out ("" where it was drawn).

    names: keys of PICTURES; left out, all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    left_out = {}
    for name in names or PICTURES:
        try:
            with plt.rc_context(STYLE):
                figure = PICTURES[name](plt, record)
                figure.savefig(folder / name, dpi=110, bbox_inches="tight")
            left_out[name] = ""
        except NothingToDraw as error:
            left_out[name] = str(error)
            (folder / name).unlink(missing_ok=True)  # an older run's would pass for this one's
        plt.close("all")
    return left_out


def _rows(record: Record, group: str, figure: str = "images_per_second") -> list[Row]:
    """Return a group's rows that have a figure. Raises NothingToDraw where there are none."""
    if rows := [row for row in record.of(group) if row["extra_info"].get(figure)]:
        return rows
    raise NothingToDraw(f"{group} was not run")


def throughput(plt: Any, record: Record) -> Figure:
    """Draw images/s of every contender and its baselines: bars, but many shapes of the step as lines over the batch."""
    panels: list[tuple[str, float, Callable[[Axes, Any], None], Any]] = []  # title, height, what draws it, from what
    for group in record.groups:
        if group in ("growth", "accuracy"):
            continue
        rows, bars = record.of(group), _bars(record.of(group))
        if group != "step" or len(bars) <= MOST_BARS:
            panels.append((group, 0.5 + 0.3 * len(bars), _draw_bars, bars))
            continue
        for network, found in itertools.groupby(sorted(rows, key=_network), _network):
            panels.append((f"step: {network}", 3.0, _draw_over_batch, list(found)))
    if not panels:
        raise NothingToDraw("nothing that handles images at a rate was run")
    heights = [height for _, height, _, _ in panels]
    size = (9, sum(heights) + 0.5 * len(panels))
    figure, axes = plt.subplots(len(panels), figsize=size, height_ratios=heights, squeeze=False)
    for axis, (title, _, draw_panel, shown) in zip(axes.flat, panels, strict=True):
        draw_panel(axis, shown)
        axis.set_title(title, loc="left", fontweight="bold")
    figure.suptitle(f"Throughput: {machine(record)}")
    return figure


def _network(row: Row) -> str:
    return "{precision} {filters}".format_map(row["extra_info"])


def _bars(rows: list[Row]) -> Bars:
    """Return images/s of all. Baselines stand once, below the contenders in a row that raced them at the same work."""
    bars: Bars = []
    infos = [row["extra_info"] | {"name": row["name"]} for row in rows]
    for _, raced in itertools.groupby(infos, lambda info: (list(info["over"]), info.get("batch"), info.get("filters"))):
        mine = list(raced)
        bars += [(info["name"], info["images_per_second"], THEIRS if info.get("peer") else OURS) for info in mine]
        bars += [(_wrapped(name), value, THEIRS) for name, value in mine[-1]["baseline_images_per_second"].items()]
    return bars


def _draw_bars(axes: Axes, bars: Bars) -> None:
    names, values, colours = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colours, height=0.7)
    axes.bar_label(drawn, [f" {rate(value)}" for value in values])
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.set(xlabel="images/s (blue: fastcnn, grey: baselines)", xlim=(0, 1.12 * max(values)))
    axes.grid(visible=False, axis="y")


def _draw_over_batch(axes: Axes, rows: list[Row]) -> None:
    ours: dict[str, dict[int, float]] = defaultdict(dict)
    theirs: dict[str, dict[int, float]] = defaultdict(dict)
    for info in (row["extra_info"] for row in rows):
        ours[info["engine"]][info["batch"]] = info["images_per_second"]
        for name, value in info["baseline_images_per_second"].items():
            theirs[name][info["batch"]] = value
    for name, points in ours.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
    for name, points in theirs.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), "x--", color="0.5", label=name)
    _batch_axis(axes, sorted({row["extra_info"]["batch"] for row in rows}))
    axes.set(yscale="log", ylabel="images/s")
    axes.legend(**BESIDE)


def _batch_axis(axes: Axes, batches: list[int]) -> None:
    axes.set(xscale="log", xlabel="batch size")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.set_xticks([], minor=True)


def training_rate(plt: Any, record: Record) -> Figure:
    """Draw images/s from the second epoch on: fastcnn and the scripts that it was raced against."""
    info = _rows(record, "train", "steady_images_per_second")[0]["extra_info"]
    steady = info["steady_images_per_second"]
    figure, axes = plt.subplots(figsize=(8, 2.2))
    ours = (f"fastcnn\n{info['engine']} {info['precision']}", steady["fastcnn"], OURS)
    theirs = [(_wrapped(name), steady[name.partition(".py")[0]], THEIRS) for name in info["steady_over"]]
    _draw_bars(axes, [ours, *theirs])
    axes.set_title(f"Training, images/s from the second epoch on: {machine(record)}")
    return figure


def _wrapped(name: str) -> str:
    script, *settings = name.split(" ")
    return f"{script}\n{' '.join(settings).replace('--', '')}" if script.endswith(".py") else name


def busy(plt: Any, record: Record) -> Figure:
    """Draw images/s from the second epoch on, ours and the baseline's, by the processes that compute beside them."""
    rows = [row["extra_info"] for row in _rows(record, "busy", "steady_over")]
    figure, axes = plt.subplots(figsize=(8, 4))
    places = np.arange(len(rows))
    for shift, colour, script in zip((-0.2, 0.2), (OURS, THEIRS), rows[0]["steady_images_per_second"], strict=True):
        values = [info["steady_images_per_second"][script] for info in rows]
        drawn = axes.bar(places + shift, values, 0.38, color=colour, label=script)
        if script == "fastcnn":
            ratios = [next(iter(info["steady_over"].values())) for info in rows]
            axes.bar_label(drawn, ["{median:.1f} times\n({low:.1f} to {high:.1f})".format_map(one) for one in ratios])
    axes.set_xticks(places, [str(info["computing"]) for info in rows])
    axes.margins(y=0.2)
    axes.set(xlabel="processes that compute beside it, one thread each", ylabel="images/s")
    axes.set_title(f"Training from the second epoch on: {machine(record)}")
    axes.legend()
    return figure


def stages(plt: Any, record: Record) -> Figure:
    """Draw the seconds of a cold and a warm run by stage, and the baselines' in all."""
    info = _rows(record, "train", "stages")[0]["extra_info"]
    runs = {f"fastcnn, {cache} cache": seconds for cache, seconds in info["stages"].items()}
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.5 * (len(runs) + len(info["baseline_seconds"]))))
    left = np.zeros(len(runs))
    for stage, colour in zip((*STAGES, "other"), plt.get_cmap("Paired").colors, strict=False):
        seconds = np.array([_seconds(one, stage) for one in runs.values()])
        axes.barh(list(runs), seconds, left=left, label=stage, color=colour)
        left += seconds
    axes.bar_label(axes.barh(list(runs), left, alpha=0), fmt=" {:.1f} s")
    for name, seconds in info["baseline_seconds"].items():
        axes.bar_label(axes.barh(_wrapped(name), seconds, color=THEIRS), fmt=" {:.1f} s")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(
        xlabel="seconds from the start of the command to its end (grey: baselines, in all)",
        title=f"{info['num_photos']:,} photos, {info['epochs']} epochs: {machine(record)}",
    )
    axes.legend(title="stage", **BESIDE)
    return figure


def _seconds(stages: dict[str, float], stage: str) -> float:
    if stage != "other":
        return stages[stage]
    return stages["total"] + stages["start"] - sum(stages[name] for name in STAGES)  # between the stages


def roofline(plt: Any, record: Record) -> Figure:
    """Draw steps' FLOP/s over FLOP a byte, beneath what the machine copies and multiplies, and their counted floors."""
    rows = [row["extra_info"] for row in _rows(record, "step", "flops")]
    figure, axes = plt.subplots(figsize=(12, 5.5))
    limits = {name.partition("_")[0]: limit for name, limit in record.rates.items()}
    bandwidth = limits.pop("copy")
    knees = [limit / bandwidth for limit in limits.values()] + [info["flops"] / info["bytes"] for info in rows]
    x = np.geomspace(min(knees) / 4, max(knees) * 4, 200)
    for kind, limit in limits.items():
        label = f"{kind} matrix products at {limit / 1e9:,.0f} GFLOP/s, copying at {bandwidth / 1e9:,.0f} GB/s"
        axes.plot(x, np.minimum(limit, x * bandwidth) / 1e9, color="0.3" if kind == "bf16" else "0.6", label=label)
    colours: dict[str, Any] = defaultdict(itertools.cycle(plt.get_cmap("tab20").colors[::2]).__next__)
    for info in rows:
        name = f"{info['engine']}, {info['precision']}: measured"
        intensity, measured = info["flops"] / info["bytes"], info["flops"] / info["step_seconds"] / 1e9
        axes.plot(intensity, measured, "o", color=colours[name], label=name)
        axes.plot(intensity, measured / info["share_of_floor"], "k_", markersize=12, label="at the counted floor")
        for rival, images in info["baseline_images_per_second"].items():
            axes.plot(intensity, info["flops"] / info["batch"] * images / 1e9, "x", color=THEIRS, label=rival)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP a byte moved, counted (bench/harness/roofline.py)",
        ylabel="GFLOP/s",
        title=f"The training step beneath the machine's own rates: {machine(record)}",
    )
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), **BESIDE)
    return figure


def growth(plt: Any, record: Record) -> Figure:
    """Draw seconds a photo and peak memory over photos, and images/s over the batch."""
    photos, batches = ([row["extra_info"] for row in record.grown(by)] for by in ("photos", "batch"))
    if not photos or not batches:
        raise NothingToDraw("growth was not run")
    figure, (seconds, memory, rates) = plt.subplots(1, 3, figsize=(15, 4.4))
    names = [f"{info['num_photos']:,}" for info in photos]
    below = np.zeros(len(photos))
    for stage in GROWING:
        heights = np.array([info["photo_seconds"][stage] * 1e3 for info in photos])
        drawn = seconds.bar(names, heights, bottom=below, label=stage, width=0.6)
        below += heights
    seconds.bar_label(drawn, [f"{height:.2f}" for height in below])
    seconds.set(xlabel="photos", ylabel="milliseconds a photo", title="What grows: an epoch, nothing decoded before")
    seconds.legend()
    counts = np.array([info["num_photos"] for info in photos])
    peaks = np.array([info["peak_memory_bytes"] for info in photos]) / 2**20
    sizes = peaks[0] + (counts - counts[0]) * photos[0]["bytes_per_photo"] / 2**20
    memory.plot(counts, peaks, "o-", color=OURS, label="peak memory")
    memory.plot(counts, sizes, "x--", color="0.5", label="the fewest's + the photos' sizes")
    memory.set(xlabel="photos", ylabel="MiB", title="Peak memory", ylim=(0, 1.1 * max(*peaks, *sizes)))
    memory.legend()
    rates.plot([info["batch"] for info in batches], [info["steady_images_per_second"] for info in batches], "o-")
    _batch_axis(rates, [info["batch"] for info in batches])
    rates.set(ylabel="images/s, second epoch", title="Training rate")
    rates.set_ylim(bottom=0)
    figure.suptitle(machine(record))
    return figure


def accuracy(plt: Any, record: Record) -> Figure:
    """Draw accuracy over wall and processor time, cold and warm: a line a contender, and the target."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = _rows(record, "accuracy")
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), sharey=True, sharex="row")
    colours = {False: itertools.cycle(GREYS), True: itertools.cycle(COLOURS)}
    styles = [{"color": next(colours[info["is_recipe"]])} for info in (row["extra_info"] for row in rows)]
    for axes, (measure, cache) in zip(panels.flat, itertools.product(TIMES, CACHES), strict=True):
        for row, style in zip(rows, styles, strict=True):
            if curves := row["extra_info"]["curves"].get(cache):
                line = "o-" if row["extra_info"]["is_recipe"] else "o--"
                _draw_curve(axes, curves, measure, line, {**style, "label": f"{row['name']} (n = {row['n']})"})
        for target in {row["extra_info"]["target"] for row in rows if row["extra_info"].get("is_target")}:
            axes.axhline(target, color="k", linestyle="--", linewidth=1, label=f"target, {target:.3f}")
        axes.set(xscale="log", xlabel=TIMES[measure], title=CACHES[cache])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.supylabel("accuracy on the photos held out")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    info = rows[0]["extra_info"]
    photos = f"{info['data']}, {info['image_size']} px, {info['num_train']:,} photos, {info['num_held_out']:,} held out"
    figure.suptitle(f"{photos}: {machine(record)}")
    return figure


def _draw_curve(axes: Axes, curves: dict[str, Any], measure: str, line: str, style: dict[str, Any]) -> None:
    """Draw the mean over the seeds with its 95% interval, at the mean time of each epoch."""
    if None in np.array(curves[measure], object):  # processor time by epoch is known on Linux alone
        return
    times = np.array(curves[measure]).mean(0)  # (epochs,)
    spread = [interval(epoch) for epoch in zip(*curves["accuracy"], strict=True)]  # of (seeds, epochs)
    axes.plot(times, [one["mean"] for one in spread], line, markersize=3, **style)
    if len(curves["accuracy"]) > 1:
        low, high = ([one[end] for one in spread] for end in ("low", "high"))
        axes.fill_between(times, np.clip(low, 0, 1), np.clip(high, 0, 1), alpha=0.15, linewidth=0, color=style["color"])


PICTURES: dict[str, Callable[[Any, Record], Figure]] = {
    "training_rate.png": training_rate,
    "busy.png": busy,
    "throughput.png": throughput,
    "stages.png": stages,
    "roofline.png": roofline,
    "growth.png": growth,
    "accuracy.png": accuracy,
}
