"""Results as tables: columns and the figures that fill them, from one record; Markdown around them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bench.report.record import Record, Row

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
STAGES = ("start", "import", "scan", "decode", "upload", "compile", "train", "eval", "checkpoint", "report")
MEASURES = {"accuracy": "accuracy", "held_out_losses": "held-out loss", "train_losses": "training loss"}

Figures = dict[str, Any]
"""What a line of a table shows, by names that the columns' formats use."""


def fill(text: str, make: Callable[[str], str]) -> str:
    """Return a text with what `make` gives for NAME between each <!-- table: NAME --> and <!-- end -->."""
    return MARKED.sub(lambda match: f"{match[1]}{make(match[2])}{match[3]}", text)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


@dataclass(frozen=True)
class Table:
    """A title, what gives the figures of each line, and columns: heads, and formats that a line's figures fill."""

    title: str
    figures: Callable[[Record], Iterable[Figures]]
    head: list[str]
    cells: list[str]

    def lines(self, record: Record) -> list[list[str]]:
        """Return a record's lines: none where the record lacks what they are made of."""
        return [[cell.format_map(line) for cell in self.cells] for line in self.figures(record)]


def machine(record: Record) -> str:
    """Return the machine in a few words."""
    hardware = record.hardware
    return hardware.get("gpu") or f"{hardware.get('cpu') or hardware['machine']}, {hardware['cores']} cores"


def listed(facts: dict[str, Any]) -> str:
    """Return names and values in a line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def ratio(over: dict[str, float]) -> str:
    """Return a ratio with the lowest and the highest of its pairs."""
    return "{median:.2f} ({low:.2f} to {high:.2f})".format_map(over)


def rate(images_per_second: float) -> str:
    """Return images a second, to three figures or more."""
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def points(difference: dict[str, float], digits: int = 2) -> str:
    """Return a difference with its interval, in hundredths."""
    mean, low, high = (f"{100 * difference[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def within(interval: dict[str, float] | None, digits: int = 1) -> str:
    """Return a mean with its interval; "-" for none."""
    if not interval:
        return "-"
    mean, low, high = (f"{interval[name]:,.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if math.isfinite(interval["high"]) else mean


def spread(row: Row) -> str:
    """Return the mean accuracy with the standard deviation over seeds."""
    return "{mean_accuracy:.4f} ({standard_deviation:.4f})".format_map(row["extra_info"])


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def _table(title: str, figures: Callable[[Record], Iterable[Figures]], head: str, cells: str) -> Table:
    return Table(title, figures, head.split(" | "), cells.split(" | "))


def rates(group: str, title: str = "", extras: Mapping[str, str] = MappingProxyType({})) -> Table:
    """Return the table of a group: a line a benchmark, with extra columns (head -> format)."""
    columns = {
        "what": "{name}",
        "images/s": "{rate}",
        "times as fast as (low to high)": "{ratios}",
        **extras,
        "n": "{n}",
    }
    return Table(title or group, functools.partial(_raced, group=group), list(columns), list(columns.values()))


def _raced(record: Record, group: str) -> Iterator[Figures]:
    for row in record.of(group):
        info = row["extra_info"]
        ratios = "<br>".join(f"{ratio(over)} {name}" for name, over in info["over"].items())
        yield {**row, **info, "rate": rate(info["images_per_second"]), "ratios": ratios or "-"}


def _trained(record: Record, over: str, ours: str) -> Iterator[Figures]:
    """Yield the figures of fastcnn and of each script that it was raced against.

    over: the ratios' name in extra_info; ours: format of fastcnn's own name.
    """
    for row in record.of("train"):
        info = row["extra_info"]
        seconds = {"fastcnn": row["median_seconds"], **info["baseline_seconds"]}
        for name in seconds:
            script = name.partition(".py")[0]
            raced = info[over].get(name)
            yield {
                "what": name if raced else ours.format_map(info),
                "rate": rate(info["steady_images_per_second"][script]),
                "seconds": seconds[name],
                "ratio": ratio(raced) if raced else "-",
                "accuracy": info["val_accuracy"][script],
                "n": raced["n"] if raced else row["n"],
            }


def _busy(record: Record) -> Iterator[Figures]:
    for row in record.of("busy"):
        rates = row["extra_info"]["steady_images_per_second"]
        for name, raced in row["extra_info"]["steady_over"].items():
            theirs = rate(rates[name.partition(".py")[0]])
            yield {**row, "ours": rate(rates["fastcnn"]), "baseline": name, "theirs": theirs, "ratio": ratio(raced)}


def _stages(record: Record) -> Iterator[Figures]:
    for row in record.of("train"):
        for cache, seconds in row["extra_info"]["stages"].items():
            to_first_step = row["extra_info"]["seconds_to_first_step"][cache]
            command = seconds["total"] + seconds["start"]
            yield {**seconds, "cache": cache, "command": command, "to_first_step": to_first_step, "n": row["n"]}


def _grown(record: Record) -> Iterator[Figures]:
    by_photos = {row["extra_info"]["num_photos"]: row for row in record.grown("photos")}
    for point in record.growth["points"] if record.growth else []:
        row = by_photos[point["num_photos"]]
        milliseconds = {stage: 1e3 * seconds for stage, seconds in row["extra_info"]["photo_seconds"].items()}
        sizes = {name: _mebibytes(count) for name, count in point.items() if "bytes" in name}
        beyond = "{more_bytes} / {more_bytes_by_size} MiB = {memory_over_sizes:.2f}" if "more_bytes" in point else "-"
        beyond = beyond.format_map(point | sizes)
        yield {**point, **milliseconds, **sizes, "beyond": beyond, "n": row["n"]}


def _batches(record: Record) -> Iterator[Figures]:
    for row in record.grown("batch"):
        info = row["extra_info"]
        shown = {"rate": rate(info["steady_images_per_second"]), "memory": _mebibytes(info["peak_memory_bytes"])}
        yield {**row, **info, **shown}


def _recipes(record: Record) -> Iterator[Figures]:
    for row in record.of("recipes"):
        info = row["extra_info"]
        over = {"points": "-", "speed": "-"}
        if "difference" in info:
            over = {"points": points(info["difference"], 1), "speed": f"{info['speed']:.2f}"}
        yield {**row, **info, **over, "spread": spread(row)}


def _accuracy(record: Record) -> Iterator[Figures]:
    for row in record.of("accuracy"):
        info = row["extra_info"]
        target, train_ratio = "-", "-"
        if info["is_target"]:
            target = "the target"
        elif "target" in info:
            target = points(info["over_target"], 1)
            train_ratio = within(info["train_ratio"]) if info["reached"] else "below the target"
        commands = {
            f"{cache}_{measure}": within(info["commands"].get(cache, {}).get(measure))
            for cache in ("cold", "warm")
            for measure in ("seconds", "processor_seconds", "seconds_ratio")
        }
        accuracy, seconds = within(info["accuracy"], 4), within(info["train_seconds"])
        shown = {"accuracy": accuracy, "train_seconds": seconds, "target": target, "train_ratio": train_ratio}
        yield {**row, **info, **shown, **commands}


def _compared(row: Row) -> Figures:
    """Return the figures of an arm of a parity experiment: its accuracy, and each measure's difference from seed.py."""
    measures = row["extra_info"].get("measures")
    differences = {name: points(measures[name]) if measures else "-" for name in MEASURES}
    return {"name": row["name"], "n": row["n"], "spread": spread(row), **differences}


def _parity(record: Record) -> list[Figures]:
    rows = record.of("parity")
    if len(rows) < 2:
        return []
    return [{**record.settings, **_compared(rows[1]), "seed_spread": spread(rows[0])}]


def _ingredients(record: Record) -> list[Figures]:
    compared = [_compared(row) for row in record.of("ingredients")]
    empty = {**dict.fromkeys(MEASURES, ""), "n": 0}
    left_out = [{**empty, "name": one["name"], "spread": f"not measured: {one['reason']}"} for one in record.skipped]
    return compared + left_out if compared else []


TABLES = {
    "steady": _table(
        "Training, from the second epoch on",
        functools.partial(_trained, over="steady_over", ours="fastcnn ({engine}, {precision})"),
        "what | images/s | fastcnn is times as fast (low to high) | val accuracy | n",
        "{what} | {rate} | {ratio} | {accuracy:.3f} | {n}",
    ),
    "cold": _table(
        "From the start of the command, nothing decoded, to the trained model",
        functools.partial(_trained, over="over", ours="fastcnn, {num_photos:,} photos, {epochs} epochs"),
        "what | seconds | fastcnn is times as fast (low to high) | n",
        "{what} | {seconds:.1f} | {ratio} | {n}",
    ),
    "stages": _table(
        "Where the seconds of a run go",
        _stages,
        f"seconds | {' | '.join(STAGES)} | command | to the first step | n",
        " | ".join(
            ["{cache} cache", *(f"{{{stage}:.2f}}" for stage in STAGES), "{command:.1f} | {to_first_step:.2f} | {n}"]
        ),
    ),
    "busy": _table(
        "Training on a busy machine, from the second epoch on",
        _busy,
        "state | fastcnn, images/s | baseline | its images/s | fastcnn is times as fast (low to high) | n",
        "{name} | {ours} | {baseline} | {theirs} | {ratio} | {n}",
    ),
    "step": rates(
        "step",
        "The training step, photos resident",
        {
            "of the matrix rate": "{share_of_matrix_rate:.2f}",
            "of the copy bandwidth": "{share_of_copy_bandwidth:.2f}",
            "of the counted floor": "{share_of_floor:.2f}",
            "seconds to be ready": "{build_seconds:.2f}",
        },
    ),
    "decode": rates(
        "decode", "Decoding JPEGs", {"mean difference from Pillow, levels": "{mean_difference_levels:.2f}"}
    ),
    "loader": rates("loader", "Loading"),
    "augment": rates("augment", "Augmentation"),
    "recipes": _table(
        "Recipes at equal epochs, after the last",
        _recipes,
        "photos | recipe | accuracy (standard deviation) | points over the first (95% interval) | "
        "images/s over the first | seeds",
        "{data}, {num_held_out} held out | {name} | {spread} | {points} | {speed} | {n}",
    ),
    "accuracy": _table(
        "Seconds to the target: the mean accuracy of recipe seed after its last epoch (95% intervals)",
        _accuracy,
        "photos | what | accuracy after the last epoch | points over the target | training, seconds | times as fast as "
        "seed | command, warm, seconds | warm, times as fast as seed.py | warm, processor-seconds | "
        "command, cold, seconds | cold, times as fast as seed.py | cold, processor-seconds | n",
        "{data}, {num_held_out:,} held out | {name} | {accuracy} | {target} | {train_seconds} | {train_ratio} | "
        "{warm_seconds} | {warm_seconds_ratio} | {warm_processor_seconds} | {cold_seconds} | {cold_seconds_ratio} | "
        "{cold_processor_seconds} | {n}",
    ),
    "parity": _table(
        "Accuracy against seed.py's",
        _parity,
        "photos | seed.py: accuracy (standard deviation) | fastcnn | difference, points (90% interval) | "
        "held-out loss, % | training loss, % | margin, points | verdict | seeds",
        "{data}, {image_size} px, {epochs} epochs, {schedule}, {num_held_out:,} held out | {seed_spread} | {spread} | "
        "{accuracy} | {held_out_losses} | {train_losses} | {margin:g} | {verdict} | {n}",
    ),
    "ingredients": _table(
        "One change at a time",
        _ingredients,
        "what | accuracy (standard deviation) | over seed.py, points (90% interval) | held-out loss, % | "
        "training loss, % | seeds",
        "{name} | {spread} | {accuracy} | {held_out_losses} | {train_losses} | {n}",
    ),
    "growth": _table(
        "As photos grow (batch 32, one epoch, nothing decoded)",
        _grown,
        "photos | decode, ms a photo | train | eval | all that grows | over the fewest | peak memory, MiB | "
        "more than the fewest / by the photos' sizes | n",
        "{num_photos:,} | {decode:.2f} | {train:.2f} | {eval:.2f} | {total:.2f} | {over_fewest:.2f} | "
        "{peak_memory_bytes} | {beyond} | {n}",
    ),
    "batch": _table(
        "As the batch grows",
        _batches,
        "batch | photos | images/s | peak memory, MiB | n",
        "{batch:,} | {num_photos:,} | {rate} | {memory} | {n}",
    ),
    "infer": rates(
        "infer",
        "The exported model on the CPU",
        {"median ms": "{median_milliseconds:.2f}", "p99 ms": "{p99_milliseconds:.2f}"},
    ),
}
