"""Results as tables: a title, a head and lines, from one record; Markdown around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.record import Record, Row

Lines = list[list[str]]

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, make: Callable[[str], str]) -> str:
    """Return a text with what `make` gives for NAME between each <!-- table: NAME --> and <!-- end -->."""
    return MARKED.sub(lambda match: f"{match[1]}{make(match[2])}{match[3]}", text)


@dataclass(frozen=True)
class Table:
    """Columns, and what gives a record's lines: none where the record lacks what they are made of."""

    title: str
    head: Sequence[str]
    lines: Callable[[Record], Lines]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def machine(record: Record) -> str:
    """Return the machine in a few words."""
    hardware = record.hardware
    return hardware.get("gpu") or f"{hardware.get('cpu') or hardware['machine']}, {hardware['cores']} cores"


def versions(record: Record) -> str:
    """Return the versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


def ratio(over: dict[str, float]) -> str:
    """Return a ratio with the lowest and the highest of its pairs."""
    return f"{over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f})"


def rate(images_per_second: float) -> str:
    """Return images a second, to three figures or more."""
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def _over(row: Row) -> str:
    return "<br>".join(f"{ratio(over)} {name}" for name, over in row["extra_info"]["over"].items())


# Columns of a group besides the rates, by their heads.
EXTRAS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "decode": {"mean difference from Pillow, levels": lambda info: f"{info['mean_difference_levels']:.2f}"},
    "step": {
        "of the matrix rate": lambda info: f"{info['share_of_matrix_rate']:.2f}",
        "of the copy bandwidth": lambda info: f"{info['share_of_copy_bandwidth']:.2f}",
        "of the counted floor": lambda info: f"{info['share_of_floor']:.2f}",
        "seconds to be ready": lambda info: f"{info['build_seconds']:.2f}",
    },
    "infer": {
        "median ms": lambda info: f"{info['median_milliseconds']:.2f}",
        "p99 ms": lambda info: f"{info['p99_milliseconds']:.2f}",
    },
}


def rates(group: str, title: str = "") -> Table:
    """Return the table of a group: a line a benchmark, with what the group notes besides."""
    extras = EXTRAS.get(group, {})

    def lines(record: Record) -> Lines:
        return [
            [
                row["name"],
                rate(row["extra_info"]["images_per_second"]),
                _over(row) or "-",
                *(shown(row["extra_info"]) for shown in extras.values()),
                str(row["n"]),
            ]
            for row in record.of(group)
        ]

    return Table(title or group, ["what", "images/s", "times as fast as (low to high)", *extras, "n"], lines)


def _runs(record: Record) -> list[Row]:
    return [row for row in record.of("train") if "stages" in row["extra_info"]]


def _steady(record: Record) -> Lines:
    lines = []
    for row in _runs(record):
        info = row["extra_info"]
        steady, accuracy = info["steady_images_per_second"], info["val_accuracy"]
        ours = f"fastcnn ({info['engine']}, {info['precision']})"
        lines.append([ours, rate(steady["fastcnn"]), "-", f"{accuracy['fastcnn']:.3f}", str(row["n"])])
        for name, over in info["steady_over"].items():
            short = name.partition(".py")[0]
            lines.append([name, rate(steady[short]), ratio(over), f"{accuracy[short]:.3f}", str(over["n"])])
    return lines


def _cold(record: Record) -> Lines:
    lines = []
    for row in _runs(record):
        info = row["extra_info"]
        what = f"{info['num_photos']:,} photos, {info['epochs']} epochs"
        lines.append([f"fastcnn, {what}", f"{row['median_seconds']:.1f}", "-", str(row["n"])])
        for name, over in info["over"].items():
            lines.append([name, f"{info['baseline_seconds'][name]:.1f}", ratio(over), str(over["n"])])
    return lines


STAGES = ("start", "import", "scan", "decode", "upload", "compile", "train", "eval", "checkpoint", "report")


def _stages(record: Record) -> Lines:
    return [
        [
            f"{cache} cache",
            *(f"{seconds[stage]:.2f}" for stage in STAGES),
            f"{seconds['total'] + seconds['start']:.1f}",
            f"{row['extra_info']['seconds_to_first_step'][cache]:.2f}",
            str(row["n"]),
        ]
        for row in _runs(record)
        for cache, seconds in row["extra_info"]["stages"].items()
    ]


def _growth(record: Record) -> Lines:
    by_photos = {row["extra_info"]["num_photos"]: row for row in grown(record, "photos")}
    lines = []
    for point in (record.growth or {"points": []})["points"]:
        row = by_photos[point["num_photos"]]
        stages = row["extra_info"]["photo_seconds"]
        beyond = "-"
        if "memory_over_sizes" in point:
            beyond = f"{point['more_bytes'] / 2**20:,.0f} / {point['more_bytes_by_size'] / 2**20:,.0f} MiB"
            beyond += f" = {point['memory_over_sizes']:.2f}"
        lines.append(
            [
                f"{point['num_photos']:,}",
                *(f"{stages[stage] * 1e3:.2f}" for stage in ("decode", "train", "eval")),
                f"{point['photo_seconds'] * 1e3:.2f}",
                f"{point['over_fewest']:.2f}",
                f"{point['peak_memory_bytes'] / 2**20:,.0f}",
                beyond,
                str(row["n"]),
            ]
        )
    return lines


def grown(record: Record, by: str) -> list[Row]:
    """Return the rows of runs that grow by "photos" or "batch"."""
    return [row for row in record.rows if row["extra_info"].get("grows") == by]


def _batches(record: Record) -> Lines:
    return [
        [
            f"{row['extra_info']['batch']:,}",
            f"{row['extra_info']['num_photos']:,}",
            rate(row["extra_info"]["steady_images_per_second"]),
            f"{row['extra_info']['peak_memory_bytes'] / 2**20:,.0f}",
            str(row["n"]),
        ]
        for row in grown(record, "batch")
    ]


def _profile(record: Record) -> Lines:
    return [
        [
            row["name"],
            f"{profile['kernels_per_step']:.1f}",
            f"{profile['idle_share']:.2f}",
            f"{profile['synchronisations']:.0f}",
        ]
        for row in record.rows
        if (profile := row["extra_info"].get("profile"))
    ]


def recipe(row: Row) -> list[str]:
    """Return a recipe's line: on which photos, its name, accuracy, what it has over the first, speed, n."""
    info = row["extra_info"]
    accuracy = f"{info['mean_accuracy']:.4f} ({info['standard_deviation']:.4f})"
    difference, speed = "-", "-"
    if "difference" in info:
        points = {name: 100 * value for name, value in info["difference"].items()}
        difference = f"{points['mean']:+.1f} ({points['low']:+.1f} to {points['high']:+.1f})"
        speed = f"{info['speed']:.2f}"
    return [f"{info['data']}, {info['num_held_out']} held out", row["name"], accuracy, difference, speed, str(row["n"])]


def _recipes(record: Record) -> Lines:
    return [recipe(row) for row in record.of("recipes")]


MEASURES = {"accuracy": "accuracy", "held_out_losses": "held-out loss", "train_losses": "training loss"}


def points(comparison: dict[str, float]) -> str:
    """Return a difference with its 90% interval, in hundredths."""
    return "{mean:+.2f} ({low:+.2f} to {high:+.2f})".format(
        **{name: 100 * comparison[name] for name in ("mean", "low", "high")}
    )


def spread(row: Row) -> str:
    """Return the mean accuracy with the standard deviation over seeds."""
    return f"{row['extra_info']['mean_accuracy']:.4f} ({row['extra_info']['standard_deviation']:.4f})"


def _differences(row: Row) -> list[str]:
    measures = row["extra_info"].get("measures")
    return [points(measures[name]) for name in MEASURES] if measures else ["-"] * len(MEASURES)


def _parity(record: Record) -> Lines:
    rows, settings = record.of("parity"), record.settings
    if len(rows) < 2:
        return []
    what = f"{settings['data']}, {settings['image_size']} px, {settings['epochs']} epochs, {settings['schedule']}"
    verdict = rows[1]["extra_info"].get("verdict", "undecided")
    return [
        [
            f"{what}, {settings['num_held_out']:,} held out",
            *(spread(row) for row in rows),
            *_differences(rows[1]),
            f"{settings['margin']:g}",
            verdict,
            str(rows[1]["n"]),
        ]
    ]


def _ingredients(record: Record) -> Lines:
    lines = [[row["name"], spread(row), *_differences(row), str(row["n"])] for row in record.of("ingredients")]
    return lines + [
        [one["name"], f"not measured: {one['reason']}", *[""] * len(MEASURES), "0"] for one in record.skipped if lines
    ]


RECIPES_HEAD = (
    "photos | recipe | accuracy (standard deviation) | points over the first (95% interval) | "
    "images/s over the first | seeds"
)
PARITY_HEAD = (
    "photos | seed.py: accuracy (standard deviation) | fastcnn | difference, points (90% interval) | "
    "held-out loss, % | training loss, % | margin, points | verdict | seeds"
)
INGREDIENTS_HEAD = (
    "what | accuracy (standard deviation) | over seed.py, points (90% interval) | held-out loss, % | "
    "training loss, % | seeds"
)
GROWTH_HEAD = (
    "photos | decode, ms a photo | train | eval | all that grows | over the fewest | peak memory, MiB | "
    "more than the fewest / by the photos' sizes | n"
)
TABLES = {
    "steady": Table(
        "Training, from the second epoch on",
        ["what", "images/s", "fastcnn is times as fast (low to high)", "val accuracy", "n"],
        _steady,
    ),
    "cold": Table(
        "From the start of the command, nothing decoded, to the trained model",
        ["what", "seconds", "fastcnn is times as fast (low to high)", "n"],
        _cold,
    ),
    "stages": Table(
        "Where the seconds of a run go", ["seconds", *STAGES, "command", "to the first step", "n"], _stages
    ),
    "step": rates("step", "The training step, photos resident"),
    "profile": Table(
        "A step on a GPU, profiled over 20",
        ["what", "kernels a step", "share of time that the GPU waits", "synchronisations in 20"],
        _profile,
    ),
    "decode": rates("decode", "Decoding JPEGs"),
    "loader": rates("loader", "Loading"),
    "augment": rates("augment", "Augmentation"),
    "recipes": Table("Recipes at equal epochs, after the last", RECIPES_HEAD.split(" | "), _recipes),
    "parity": Table("Accuracy against seed.py's", PARITY_HEAD.split(" | "), _parity),
    "ingredients": Table("One change at a time", INGREDIENTS_HEAD.split(" | "), _ingredients),
    "growth": Table("As photos grow (batch 32, one epoch, nothing decoded)", GROWTH_HEAD.split(" | "), _growth),
    "batch": Table("As the batch grows", ["batch", "photos", "images/s", "peak memory, MiB", "n"], _batches),
    "infer": rates("infer", "The exported model on the CPU"),
}
