"""Report of a run: figures, plots and configuration in one self-contained HTML file."""

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
from fastcnn.reporting import plots
from fastcnn.reporting.class_scores import ClassScores, number
from fastcnn.reporting.outcome import Sample
from fastcnn.system.templates import render

NUM_BAD = 20  # unusable photos that the page lists


@dataclass(frozen=True, kw_only=True)
class Report:
    """Content of a run's report."""

    rows: Sequence[Mapping[str, float]]
    """One row per epoch, as in metrics.csv."""
    best_epoch: int
    judged: str
    """Split that the scores and samples are of: test where there is one, else val."""
    class_scores: ClassScores
    samples: Sequence[Sample]
    filters: npt.NDArray[np.float32]
    """(F, 3, k, k) weights of the first layer."""
    split: Mapping[str, npt.NDArray[np.int64]]
    """(K,) number of photos of each class, by split."""
    bad: Mapping[str, str]
    """Path -> reason of the photos left out."""


def draw(report: Report) -> dict[str, bytes]:
    """Return the plots as PNG files, by file name."""
    scores = report.class_scores
    return {
        "curves.png": plots.curves(report.rows, report.best_epoch),
        "confusion_matrix.png": plots.confusion_matrix(scores.confusion, scores.classes),
        "predictions.png": plots.predictions(report.samples),
        "filters.png": plots.filters(report.filters),
    }


def write(
    folder: Path,
    report: Report,
    files: Mapping[str, bytes],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write the plots (`files`) and `report.html`.

    Args:
        folder: the run folder.
        report: content of the report.
        files: plots, as `draw` returns them.
        summary: content of result.json.
        config: the run's configuration, as in config.yaml.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content)
    batch = folder / "batch.png"  # drawn when the run began
    pictures = {**files, batch.name: batch.read_bytes()} if batch.is_file() else files
    (folder / "report.html").write_text(page(folder, report, pictures, summary, config), encoding="utf-8")


def page(
    folder: Path, report: Report, files: Mapping[str, bytes], summary: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """Return the page as HTML; the arguments are those of `write`."""
    defaults = Config().to_dict()
    return render(
        ["fastcnn.reporting"],
        "run_report.html",
        title=folder.resolve().name,
        figures=_headline(report, summary),
        pictures={name.removesuffix(".png"): data_url("image/png", content) for name, content in files.items()},
        split="test" if report.judged == "test" else "validation",
        num_photos=f"{report.class_scores.score.count:,}",
        class_rows=[
            (name, f"{photos:,}", *(number(figure, 3) for figure in figures))
            for name, photos, figures in report.class_scores.rows()
        ],
        stages=_stages(summary["seconds"]),
        total=summary["seconds"]["total"],
        splits=_splits(report),
        bad=list(report.bad.items()),
        reasons=", ".join(f"{count:,} {reason}" for reason, count in Counter(report.bad.values()).most_common()),
        num_bad=NUM_BAD,
        options=[(field, _shown(value)) for field, value in config.items()],
        marks=["" if value == defaults.get(field) else "changed" for field, value in config.items()],
        machine=_machine(summary),
        config_path=shlex.quote(str(folder / "config.yaml")),
        command=command(config),
    )


def command(config: Mapping[str, Any]) -> str:
    """Return the command that trains with a configuration, with an option for each value that is not the default."""
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


def _headline(report: Report, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    scores, split = report.class_scores, report.judged
    figures = [
        (f"{split} accuracy", number(scores.score.accuracy)),
        (f"{split} loss", number(scores.score.loss)),
        ("images/s", f"{summary['images_per_second']:,.0f}"),
        ("seconds in all", f"{summary['seconds']['total']:,.1f}"),
        ("engine", f"{summary['engine']}, {summary['precision']}"),
        ("device", summary["hardware"].get("gpu", summary["device"])),
    ]
    if len(scores.classes) > 5:
        figures.insert(1, (f"{split} top-5", number(scores.top5)))
    if split == "test":
        figures.insert(0, ("val accuracy", number(summary["val_accuracy"])))
    return figures


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return name, seconds, share of the whole and colour of each stage of the run."""
    spent = {name: value for name, value in seconds.items() if name != "total" and value >= 0.005}
    spent["other"] = max(0.0, seconds["total"] - sum(spent.values()))
    return [
        {
            "name": name,
            "seconds": value,
            "share": value / max(seconds["total"], 1e-9),
            "color": f"hsl({(210 + 47 * i) % 360} 55% 50%)",
        }
        for i, (name, value) in enumerate(spent.items())
    ]


def _splits(report: Report) -> dict[str, Any]:
    """Return heads and rows of a table of the photos of each class and split, the sums last."""
    counts = np.array(list(report.split.values())).T  # (K, splits)
    names = [*report.class_scores.classes, "all"]
    rows = [(name, *(f"{n:,}" for n in row)) for name, row in zip(names, [*counts, counts.sum(0)], strict=True)]
    return {"heads": ("class", *report.split), "rows": rows}


def _shown(value: object) -> object:
    shown = ", ".join(map(str, value)) if isinstance(value, list) else value
    return "none" if shown in (None, "") else shown


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    peak, pixels = (count / 2**20 for count in (summary["peak_memory_bytes"], summary["memory_bytes"]["pixels"]))
    memory = ("peak memory", f"{peak:,.0f} MiB, pixels {pixels:,.0f} MiB")
    engine = ("engine", f"{summary['engine']}: {summary['engine_reason']}".removesuffix(": "))
    return [*summary["hardware"].items(), *summary["versions"].items(), engine, memory]


def data_url(media_type: str, content: bytes) -> str:
    """Return a file as a URL that holds it, so that a page needs nothing else."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
