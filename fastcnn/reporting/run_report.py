"""A run's page: its figures, pictures and configuration in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn.config import Config, option_name
from fastcnn.reporting import html as pages
from fastcnn.reporting import plots as pictures
from fastcnn.reporting.class_scores import Scorecard, number
from fastcnn.reporting.outcome import Sample
from fastcnn.system.text import printable

NUM_BAD = 20  # bad photos that the page lists


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report tells of."""

    rows: Sequence[Mapping[str, float]]
    """A row an epoch, as in metrics.csv."""
    best_epoch: int
    judged: str
    """The split of the photos below: test where there is one, else val."""
    scorecard: Scorecard
    samples: Sequence[Sample]
    filters: npt.NDArray[np.float32]
    """(F, 3, k, k) weights of the first layer."""
    split: Mapping[str, npt.NDArray[np.int64]]
    """(K,) photos of each class, by split."""
    bad: Mapping[str, str]
    """Path -> reason of the photos left out."""


def draw(report: Report) -> dict[str, bytes]:
    """Return the pictures by file name."""
    scorecard = report.scorecard
    return {
        "curves.png": pictures.curves(report.rows, report.best_epoch),
        "confusion_matrix.png": pictures.confusion_matrix(scorecard.confusion, scorecard.classes),
        "predictions.png": pictures.predictions(report.samples),
        "filters.png": pictures.filters(report.filters),
    }


def write(
    folder: Path,
    report: Report,
    files: Mapping[str, bytes],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write the pictures (`files`) and `report.html`.

    Args:
        folder: the run folder.
        report: what the pictures were drawn from.
        files: what `draw` returned.
        summary: what result.json holds.
        config: the run's configuration, as in config.yaml.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "report.html").write_text(page(folder, report, files, summary, config), encoding="utf-8")


def page(
    folder: Path, report: Report, files: Mapping[str, bytes], summary: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """Return the page; the arguments are those of `write`."""
    scorecard, split = report.scorecard, "test" if report.judged == "test" else "validation"
    name = printable(folder.resolve().name)
    sections = [
        _headline(report, summary),
        pages.section("Curves", _picture(files, "curves.png", "Loss, accuracy and learning rate by epoch")),
        pages.section(
            "Predictions",
            _picture(files, "predictions.png", "Photos with their true and predicted class"),
            f"{split.capitalize()} photos: the most confident mistakes first, then right ones.",
        ),
        pages.section("Confusion matrix", _picture(files, "confusion_matrix.png", f"Confusion matrix, {split} photos")),
        pages.section("Classes", _class_table(scorecard), f"On the {scorecard.score.count:,} {split} photos."),
        pages.section("Filters", _picture(files, "filters.png", "The first layer's filters")),
        pages.section("Time", _stages(summary["seconds"])),
        pages.section("Photos", _split_table(report) + _bad(report.bad)),
        pages.section("Configuration", _config_table(config), "Bold: not the default."),
        pages.section("Machine", pages.table(("", ""), _machine(summary))),
        pages.section(
            "Train it again",
            f"<pre>fastcnn train --config {pages.text(shlex.quote(str(folder / 'config.yaml')))}</pre>"
            f"<p>or, without that file,</p><pre>{pages.text(command(config))}</pre>",
        ),
    ]
    return pages.page(name, sections)


def command(config: Mapping[str, Any]) -> str:
    """Return the command that trains with a configuration: the data folder and an option for all that is no default."""
    defaults = Config().to_dict()
    words = ["fastcnn", "train", shlex.quote(str(config["data"]))]
    for field, value in config.items():
        if field == "data" or value == defaults.get(field) or value is None:
            continue
        option = option_name(field)
        if isinstance(value, bool):
            words.append(option if value else option_name(f"no_{field}"))
        elif isinstance(value, list):
            words.append(f"{option} {','.join(map(str, value)) or 'none'}")
        else:
            words.append(f"{option} {shlex.quote(str(value))}")
    return " ".join(words)


def _headline(report: Report, summary: Mapping[str, Any]) -> str:
    score, seconds = report.scorecard.score, summary["seconds"]["total"]
    figures = [
        (f"{report.judged} accuracy", number(score.accuracy)),
        (f"{report.judged} loss", number(score.loss)),
        ("images/s", f"{summary['images_per_second']:,.0f}"),
        ("seconds in all", f"{seconds:,.1f}"),
        ("engine", f"{summary['engine']}, {summary['precision']}"),
        ("device", summary["hardware"].get("gpu", summary["device"])),
    ]
    if len(report.scorecard.classes) > 5:
        figures.insert(1, (f"{report.judged} top-5", number(report.scorecard.top5)))
    if report.judged == "test":
        figures.insert(0, ("val accuracy", number(summary["val_accuracy"])))
    return pages.headline(figures)


def _class_table(scorecard: Scorecard) -> str:
    rows = [
        (name, f"{photos:,}", *(number(figure, 3) for figure in figures)) for name, photos, figures in scorecard.rows()
    ]
    return pages.table(("class", "photos", "precision", "recall", "F1"), rows, last="sum")


def _split_table(report: Report) -> str:
    counts = np.array(list(report.split.values())).T  # (K, splits)
    rows = [
        (name, *(f"{count:,}" for count in row)) for name, row in zip(report.scorecard.classes, counts, strict=True)
    ]
    total = ("all", *(f"{count:,}" for count in counts.sum(0)))
    return pages.table(("class", *report.split), [*rows, total], last="sum")


def _bad(bad: Mapping[str, str]) -> str:
    if not bad:
        return "<p>Every photo could be used.</p>"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(bad.values()).most_common())
    text = f"<p>{len(bad):,} could not be used and were left out: {pages.text(reasons)}.</p>"
    rows = list(bad.items())[:NUM_BAD]
    more = f"<p>The first {NUM_BAD}; all are in bad_images.csv.</p>" if len(bad) > NUM_BAD else ""
    return text + pages.table(("photo", "reason"), rows) + more


def _stages(seconds: Mapping[str, float]) -> str:
    """Return a bar of the run's stages, with a table that says the same in numbers."""
    stages = {name: spent for name, spent in seconds.items() if name != "total" and spent >= 0.005}
    total = seconds["total"]
    stages["other"] = max(0.0, total - sum(stages.values()))
    parts, rows = [], []
    for i, (name, spent) in enumerate(stages.items()):
        color = f"background:hsl({(210 + 47 * i) % 360} 55% 50%)"
        parts.append(f'<span style="flex:{spent:.3f};{color}" title="{pages.text(name)}: {spent:.2f} s"></span>')
        label = f'<i style="{color}"></i>{pages.text(name)}'
        rows.append(f"<tr><th>{label}</th><td>{spent:,.2f}</td><td>{spent / max(total, 1e-9):.0%}</td></tr>")
    rows.append(f'<tr class="sum"><th>all</th><td>{total:,.2f}</td><td>100%</td></tr>')
    head = "<tr><th>stage</th><th>seconds</th><th>share</th></tr>"
    return f'<div class="bar">{"".join(parts)}</div><div class="box"><table>{head}{"".join(rows)}</table></div>'


def _config_table(config: Mapping[str, Any]) -> str:
    defaults = Config().to_dict()
    rows = []
    for field, value in config.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        shown = "none" if shown in (None, "") else shown
        rows.append((field, shown, "" if value == defaults.get(field) else "changed"))
    return pages.table(("option", "value"), [row[:2] for row in rows], marks=[row[2] for row in rows])


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    memory = ("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB")
    engine = ("engine", f"{summary['engine']}: {summary['engine_reason']}".removesuffix(": "))
    return [*summary["hardware"].items(), *summary["versions"].items(), engine, memory]


def _picture(files: Mapping[str, bytes], name: str, alt: str) -> str:
    data = base64.b64encode(files[name]).decode()
    kind = name.removesuffix(".png")
    image = f'<img alt="{pages.text(alt)}" src="data:image/png;base64,{data}">'
    hint = "" if kind == "filters" else '<p class="narrow">Scroll the picture sideways to see all of it.</p>'
    return f'{hint}<div class="box picture {kind}">{image}</div>'
