"""A run's page: its figures, pictures and configuration in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn import config as configs
from fastcnn import pictures
from fastcnn.index import printable
from fastcnn.metrics import Sample
from fastcnn.scorecard import Scorecard, number

NUM_BAD = 20  # bad photos that the page lists
NUM_ROWS = 60  # a table of more scrolls in its box


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
        _section("Curves", _picture(files, "curves.png", "Loss, accuracy and learning rate by epoch")),
        _section(
            "Predictions",
            _picture(files, "predictions.png", "Photos with their true and predicted class"),
            f"{split.capitalize()} photos: the most confident mistakes first, then right ones.",
        ),
        _section("Confusion matrix", _picture(files, "confusion_matrix.png", f"Confusion matrix, {split} photos")),
        _section("Classes", _class_table(scorecard), f"On the {scorecard.score.count:,} {split} photos."),
        _section("Filters", _picture(files, "filters.png", "The first layer's filters")),
        _section("Time", _stages(summary["seconds"])),
        _section("Photos", _split_table(report) + _bad(report.bad)),
        _section("Configuration", _config_table(config), "Bold: not the default."),
        _section("Machine", _table(("", ""), _machine(summary))),
        _section(
            "Train it again",
            f"<pre>fastcnn train --config {_text(shlex.quote(str(folder / 'config.yaml')))}</pre>"
            f"<p>or, without that file,</p><pre>{_text(command(config))}</pre>",
        ),
    ]
    return _PAGE.format(title=_text(name), style=_STYLE, body="\n".join(sections))


def command(config: Mapping[str, Any]) -> str:
    """Return the command that trains with a configuration: the data folder and an option for all that is no default."""
    defaults = configs.Config().to_dict()
    words = ["fastcnn", "train", shlex.quote(str(config["data"]))]
    for field, value in config.items():
        if field == "data" or value == defaults.get(field) or value is None:
            continue
        option = configs.option_name(field)
        if isinstance(value, bool):
            words.append(option if value else configs.option_name(f"no_{field}"))
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
    cards = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in figures)
    return f'<dl class="headline">{cards}</dl>'


def _class_table(scorecard: Scorecard) -> str:
    rows = [
        (name, f"{photos:,}", *(number(figure, 3) for figure in figures)) for name, photos, figures in scorecard.rows()
    ]
    return _table(("class", "photos", "precision", "recall", "F1"), rows, last="sum")


def _split_table(report: Report) -> str:
    counts = np.array(list(report.split.values())).T  # (K, splits)
    rows = [
        (name, *(f"{count:,}" for count in row)) for name, row in zip(report.scorecard.classes, counts, strict=True)
    ]
    total = ("all", *(f"{count:,}" for count in counts.sum(0)))
    return _table(("class", *report.split), [*rows, total], last="sum")


def _bad(bad: Mapping[str, str]) -> str:
    if not bad:
        return "<p>Every photo could be used.</p>"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(bad.values()).most_common())
    text = f"<p>{len(bad):,} could not be used and were left out: {_text(reasons)}.</p>"
    rows = list(bad.items())[:NUM_BAD]
    more = f"<p>The first {NUM_BAD}; all are in bad_images.csv.</p>" if len(bad) > NUM_BAD else ""
    return text + _table(("photo", "reason"), rows) + more


def _stages(seconds: Mapping[str, float]) -> str:
    """Return a bar of the run's stages, with a table that says the same in numbers."""
    stages = {name: spent for name, spent in seconds.items() if name != "total" and spent >= 0.005}
    total = seconds["total"]
    stages["other"] = max(0.0, total - sum(stages.values()))
    parts, rows = [], []
    for i, (name, spent) in enumerate(stages.items()):
        color = f"background:hsl({(210 + 47 * i) % 360} 55% 50%)"
        parts.append(f'<span style="flex:{spent:.3f};{color}" title="{_text(name)}: {spent:.2f} s"></span>')
        label = f'<i style="{color}"></i>{_text(name)}'
        rows.append(f"<tr><th>{label}</th><td>{spent:,.2f}</td><td>{spent / max(total, 1e-9):.0%}</td></tr>")
    rows.append(f'<tr class="sum"><th>all</th><td>{total:,.2f}</td><td>100%</td></tr>')
    head = "<tr><th>stage</th><th>seconds</th><th>share</th></tr>"
    return f'<div class="bar">{"".join(parts)}</div><div class="box"><table>{head}{"".join(rows)}</table></div>'


def _config_table(config: Mapping[str, Any]) -> str:
    defaults = configs.Config().to_dict()
    rows = []
    for field, value in config.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        shown = "none" if shown in (None, "") else shown
        rows.append((field, shown, "" if value == defaults.get(field) else "changed"))
    return _table(("option", "value"), [row[:2] for row in rows], marks=[row[2] for row in rows])


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    memory = ("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB")
    engine = ("engine", f"{summary['engine']}: {summary['engine_reason']}".removesuffix(": "))
    return [*summary["hardware"].items(), *summary["versions"].items(), engine, memory]


def _section(title: str, content: str, note: str = "") -> str:
    return f"<section><h2>{_text(title)}</h2>{f'<p>{_text(note)}</p>' if note else ''}{content}</section>"


def _picture(files: Mapping[str, bytes], name: str, alt: str) -> str:
    data = base64.b64encode(files[name]).decode()
    kind = name.removesuffix(".png")
    image = f'<img alt="{_text(alt)}" src="data:image/png;base64,{data}">'
    hint = "" if kind == "filters" else '<p class="narrow">Scroll the picture sideways to see all of it.</p>'
    return f'{hint}<div class="box picture {kind}">{image}</div>'


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], *, last: str = "", marks: Sequence[str] | None = None
) -> str:
    """Return a table in a box of its own. The first column is the rows' heading; `last` and `marks` are row classes."""
    rows = list(rows)
    marks = marks or [""] * (len(rows) - 1) + [last]
    head = "".join(f"<th>{_text(text)}</th>" for text in heads) if any(heads) else ""
    lines = [
        f'<tr class="{mark}"><th>{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for mark, (first, *cells) in zip(marks, rows, strict=True)
    ]
    kind = "box long" if len(rows) > NUM_ROWS else "box"
    top = f"<tr>{head}</tr>" if head else ""
    return f'<div class="{kind}"><table>{top}{"".join(lines)}</table></div>'


def _text(value: object) -> str:
    """Return anything as text that is safe in HTML: names of classes and files are whatever their owner called them."""
    return html.escape(printable(str(value)))


_STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #fff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --dim: #9198a1; --line: #30363d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
p { margin: .25rem 0 .5rem; color: var(--dim); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 0; }
.headline div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
.box { overflow: auto; margin: .5rem 0; }
.long { max-height: 40rem; }
.picture { background: #fff; border-radius: .4rem; }
.picture img { display: block; margin: 0 auto; max-width: 100%; min-width: 32rem; height: auto; }
.picture.predictions img { min-width: 44rem; }
.picture.filters img { min-width: 0; }
.narrow { display: none; font-size: .85rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; font-weight: 400; min-width: 6rem; max-width: 24rem; overflow-wrap: anywhere; }
th { color: var(--dim); }
td { white-space: nowrap; }
tr > :nth-child(2):last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.changed td, .sum th, .sum td { font-weight: 600; color: var(--text); }
.bar { display: flex; height: 1.5rem; border-radius: .3rem; overflow: hidden; margin: .5rem 0; }
table i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .5rem; }
pre { overflow-x: auto; background: var(--page); border-radius: .3rem; padding: .6rem; font-size: .85rem; }
@media (max-width: 34rem) {
  .narrow { display: block; }
  th:first-child { min-width: 5rem; max-width: 9rem; }
  table { font-size: .85rem; }
  th, td { padding-right: .5rem; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: fastcnn</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
