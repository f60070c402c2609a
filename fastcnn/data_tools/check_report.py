"""Page of `fastcnn data check`: its findings, with thumbnails of the photos, in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcnn.data_tools.findings import Findings, Group, class_rows, counted, detail
from fastcnn.errors import FastCNNError, os_error_as
from fastcnn.reporting.run_report import data_url
from fastcnn.system.templates import render
from pipelines.facts import thumbnail

SIDE = 160  # pixels of a thumbnail
NUM_SAMPLES = 8  # per class
NUM_CLASSES = 100  # with samples
NUM_GROUPS = 60  # of duplicates
NUM_ROWS = 1_000  # per list


class Figure(NamedTuple):
    """Photo on the page."""

    path: str
    picture: str
    """Data URL of the thumbnail; "" where the file has gone since it was checked."""
    size: str
    note: str
    """Class and split, where the photos of a group differ in them."""


def write(path: Path, findings: Findings) -> None:
    """Write the page. Raises FastCNNError where that is not possible, or where the file is inside the data folder."""
    if path.resolve().is_relative_to(findings.index.root.resolve()):
        raise FastCNNError(f"{path} is inside the photos, which are never written to: choose another file")
    with os_error_as(f"cannot write {path}"):
        path.write_text(page(findings), encoding="utf-8")


def page(findings: Findings) -> str:
    """Return the page as HTML."""
    index, figures = findings.index, _figures(findings)
    heads, rows = class_rows(findings)
    kinds = [(name, counted(each)) for name, each in findings.kinds().items() if each]
    reasons = [(path, f"{verdict.reason}{detail(verdict.detail)}") for path, verdict in findings.bad.items()]
    hashed = "Told by a perceptual hash: see for yourself."
    return render(
        ["fastcnn.data_tools", "fastcnn.reporting"],
        "check_report.html",
        title=f"{index.root.resolve().name}: data check",
        figures=_headline(findings),
        problems=findings.problems(),
        heads=heads,
        rows=rows,
        duplicates=[
            _duplicates("The same file", "", findings.exact, figures),
            _duplicates("Look the same", hashed, findings.near, figures),
        ],
        lists=[
            _list("Cannot be used", ("photo", "reason"), reasons),
            _list("Damaged, and used as far as they can be read", ("photo", "damage"), findings.damaged.items()),
            _list("Named as another format", ("photo", "format"), findings.misnamed.items()),
            _list("In no class folder", ("file", ""), [(path, "") for path in index.outside]),
            _list("Kinds", ("", ""), kinds),
        ],
        samples=[
            (name, [figures(i, None) for i in _chosen(findings, label)])
            for label, name in list(enumerate(index.classes))[:NUM_CLASSES]
        ],
        num_samples=NUM_SAMPLES,
    )


def _headline(findings: Findings) -> list[tuple[str, str]]:
    index, imbalance = findings.index, findings.imbalance
    return [
        ("photos", f"{len(index):,}"),
        ("can be used", f"{int(findings.usable.sum()):,}"),
        ("classes", f"{len(index.classes):,}"),
        ("MiB", f"{index.sizes.sum() / 2**20:,.1f}"),
        ("largest over smallest class", f"{imbalance:.1f}" if np.isfinite(imbalance) else "-"),
        ("same file, look the same", f"{len(findings.exact):,}, {len(findings.near):,}"),
    ]


def _duplicates(
    title: str, note: str, groups: Sequence[Group], figures: Callable[[int, Group | None], Figure]
) -> tuple[str, str, list[list[Figure]]]:
    """Return title, note and figures of a section of groups of duplicates."""
    more = f" The first {NUM_GROUPS} of {len(groups):,}; --json lists all." if len(groups) > NUM_GROUPS else ""
    return (
        title,
        note + more,
        [[figures(i, group) for i in group.photos[:NUM_SAMPLES]] for group in groups[:NUM_GROUPS]],
    )


def _list(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]
) -> tuple[str, str, Sequence[str], list[Sequence[str]]]:
    """Return title, note, heads and rows of a section that lists files."""
    rows = list(rows)
    more = f"The first {NUM_ROWS:,} of {len(rows):,}; --json lists all." if len(rows) > NUM_ROWS else ""
    return title, more, heads, rows[:NUM_ROWS]


def _chosen(findings: Findings, label: int) -> list[int]:
    """Return photos of a class, evenly spaced over its usable ones."""
    mine = np.flatnonzero((findings.index.labels == label) & findings.usable)
    return [int(i) for i in mine[np.linspace(0, len(mine) - 1, min(NUM_SAMPLES, len(mine))).astype(int)]]


def _figures(findings: Findings) -> Callable[[int, Group | None], Figure]:
    """Return a function that gives the figure of a photo, in a group or by itself; all thumbnails are made here."""
    index = findings.index
    photos = {
        i for group in (*findings.exact[:NUM_GROUPS], *findings.near[:NUM_GROUPS]) for i in group.photos[:NUM_SAMPLES]
    }
    shown = sorted(photos.union(*(_chosen(findings, label) for label in range(min(len(index.classes), NUM_CLASSES)))))
    with ThreadPoolExecutor() as pool:
        pictures = dict(zip(shown, pool.map(lambda i: _picture(findings, i), shown), strict=True))

    def figure(photo: int, group: Group | None) -> Figure:
        known = findings.facts[photo]
        marks = [index.classes[index.labels[photo]]] if group and len(group.classes) > 1 else []
        marks += [str(index.folders[photo])] if group and len(group.splits) > 1 else []
        size = f"{known.width}x{known.height}" if known.width else ""
        return Figure(index.paths[photo], pictures[photo], size, ", ".join(marks))

    return figure


def _picture(findings: Findings, photo: int) -> str:
    try:
        return data_url("image/jpeg", thumbnail(findings.index.source(photo), SIDE, findings.max_pixels))
    except Exception:  # whatever a decoder raises for a file that has changed meanwhile
        return ""
