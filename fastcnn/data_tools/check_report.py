"""The page of `fastcnn data check`: its findings with small pictures of the photos, in one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastcnn.data_tools.findings import Findings, Group, class_rows, counted, detail
from fastcnn.errors import FastCNNError
from fastcnn.reporting import html as pages
from pipelines.facts import thumbnail

SIDE = 160  # pixels of a thumbnail
NUM_SAMPLES = 8  # of each class
NUM_CLASSES = 100  # whose samples are shown
NUM_GROUPS = 60  # of the same photos
NUM_ROWS = 1_000  # of a list

_STYLE = """
ul.problems { margin: 0; padding-left: 1.2rem; }
ul.problems li { margin: .2rem 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; font-weight: 600; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
.photos { display: flex; flex-wrap: wrap; gap: .6rem; padding-bottom: .6rem; border-bottom: 1px solid var(--line); }
.photos:last-child { border-bottom: 0; padding-bottom: 0; }
figure { margin: 0; width: 7.5rem; }
figure img { display: block; width: 100%; height: 7.5rem; object-fit: contain; background: var(--page);
  border-radius: .3rem; }
figcaption { font-size: .75rem; line-height: 1.3; color: var(--dim); overflow-wrap: anywhere; margin-top: .2rem; }
.mark { color: #b35900; font-weight: 600; }
@media (prefers-color-scheme: dark) { .mark { color: #ffa657; } }
@media (max-width: 34rem) { figure { width: 6rem; } figure img { height: 6rem; } }
"""


def write(path: Path, findings: Findings) -> None:
    """Write the page. Raises FastCNNError where that is not possible, or where the file is inside the data folder."""
    if path.resolve().is_relative_to(findings.index.root.resolve()):
        raise FastCNNError(f"{path} is inside the photos, which are never written to: choose another file")
    try:
        path.write_text(page(findings), encoding="utf-8")
    except OSError as error:
        raise FastCNNError(f"cannot write {path}: {error.strerror or error}") from None


def page(findings: Findings) -> str:
    """Return the page."""
    index, bad = findings.index, findings.bad
    shown = _shown(findings)
    with ThreadPoolExecutor() as pool:
        pictures = dict(zip(shown, pool.map(lambda i: _picture(findings, i), shown), strict=True))

    def figures(photos: Iterable[int], notes: Callable[[int], str]) -> str:
        return f'<div class="photos">{"".join(_figure(findings, i, pictures[i], notes(i)) for i in photos)}</div>'

    heads, rows = class_rows(findings)
    kinds = [(name, counted(each)) for name, each in findings.kinds().items() if each]
    reasons = [(path, f"{verdict.reason}{detail(verdict.detail)}") for path, verdict in bad.items()]
    sections = [
        pages.headline(_headline(findings)),
        pages.section("To look at", _problems(findings.problems())),
        pages.section("Classes", pages.table(heads, rows, last="sum"), "Photos that can be used, by split."),
        _groups("The same file", findings, findings.exact, figures),
        _groups("Look the same", findings, findings.near, figures, "Told by a perceptual hash: see for yourself."),
        _list("Cannot be used", ("photo", "reason"), reasons),
        _list("Damaged, and used as far as they can be read", ("photo", "damage"), findings.damaged.items()),
        _list("Named as another format", ("photo", "format"), findings.misnamed.items()),
        _list("In no class folder", ("file", ""), [(path, "") for path in findings.outside]),
        pages.section("Kinds", pages.table(("", ""), kinds)) if kinds else "",
        pages.section("Photos", "".join(_samples(findings, figures)), f"Up to {NUM_SAMPLES} of each class."),
    ]
    return pages.page(f"{index.root.resolve().name}: data check", filter(None, sections), _STYLE)


def _headline(findings: Findings) -> list[tuple[str, object]]:
    index, imbalance = findings.index, findings.imbalance
    return [
        ("photos", f"{len(index):,}"),
        ("can be used", f"{int(findings.usable.sum()):,}"),
        ("classes", f"{len(index.classes):,}"),
        ("MiB", f"{index.sizes.sum() / 2**20:,.1f}"),
        ("largest over smallest class", f"{imbalance:.1f}" if np.isfinite(imbalance) else "-"),
        ("same file, look the same", f"{len(findings.exact):,}, {len(findings.near):,}"),
    ]


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return "<p>Nothing is wrong.</p>"
    return f'<ul class="problems">{"".join(f"<li>{pages.text(line)}</li>" for line in problems)}</ul>'


def _groups(
    title: str,
    findings: Findings,
    groups: Sequence[Group],
    figures: Callable[[Iterable[int], Callable[[int], str]], str],
    note: str = "",
) -> str:
    """Return a section of groups of photos, "" for none. Where they differ in class or split, that is marked."""
    if not groups:
        return ""
    index = findings.index

    def notes(group: Group) -> Callable[[int], str]:
        def words(i: int) -> str:
            name, split = index.classes[index.labels[i]], str(index.folders[i])
            marks = [name] * (len(group.classes) > 1) + [split] * (len(group.splits) > 1)
            return f'<span class="mark">{pages.text(", ".join(marks))}</span><br>' if marks else ""

        return words

    parts = [figures(group.photos[:NUM_SAMPLES], notes(group)) for group in groups[:NUM_GROUPS]]
    more = f" The first {NUM_GROUPS} of {len(groups):,}; --json lists all." if len(groups) > NUM_GROUPS else ""
    return pages.section(title, "".join(parts), note + more)


def _list(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    more = f"The first {NUM_ROWS:,} of {len(rows):,}; --json lists all." if len(rows) > NUM_ROWS else ""
    return pages.section(title, pages.table(heads, rows[:NUM_ROWS]), more)


def _samples(findings: Findings, figures: Callable[[Iterable[int], Callable[[int], str]], str]) -> Iterable[str]:
    for label, name in list(enumerate(findings.index.classes))[:NUM_CLASSES]:
        if name:
            yield f"<h3>{pages.text(name)}</h3>"
        yield figures(_chosen(findings, label), lambda i: "")


def _chosen(findings: Findings, label: int) -> list[int]:
    """Return photos of a class, evenly spaced over its usable ones."""
    mine = np.flatnonzero((findings.index.labels == label) & findings.usable)
    return [int(i) for i in mine[np.linspace(0, len(mine) - 1, min(NUM_SAMPLES, len(mine))).astype(int)]]


def _shown(findings: Findings) -> list[int]:
    """Return the photos that the page has pictures of."""
    groups = [*findings.exact[:NUM_GROUPS], *findings.near[:NUM_GROUPS]]
    photos = {i for group in groups for i in group.photos[:NUM_SAMPLES]}
    classes = range(min(len(findings.index.classes), NUM_CLASSES))
    return sorted(photos.union(*(_chosen(findings, label) for label in classes)))


def _picture(findings: Findings, photo: int) -> str:
    """Return a photo as a data URL, "" where it has gone since it was checked."""
    try:
        content = thumbnail(findings.index.source(photo), SIDE, findings.max_pixels)
    except Exception:  # whatever its decoder makes of a file that is changed meanwhile
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _figure(findings: Findings, photo: int, picture: str, note: str) -> str:
    path, known = pages.text(findings.index.paths[photo]), findings.facts[photo]
    size = f"<br>{known.width}x{known.height}" if known.width else ""
    return f'<figure><img alt="{path}" src="{picture}"><figcaption>{note}{path}{size}</figcaption></figure>'
