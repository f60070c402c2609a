"""What is in a folder of photos, before a run is spent on it: counts, formats, bad files, duplicates. Reads only."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.config import Decoder
from fastcnn.data.index import Index, outside, scan_loosely
from fastcnn.data_tools import duplicates
from fastcnn.errors import FastCNNError
from fastcnn.system.text import printable
from pipelines.facts import Facts, facts, misnamed
from pipelines.verdict import Source, Unusable, Verdict, read
from pipelines.workers import Workers, shared

CHUNK = 512  # photos decoded at once
NUM_NAMED = 10  # photos and groups that the table names
UNEQUAL = 3  # times the smallest class that the largest may be before it is worth a word

_COLOURS = {"L": "grey", "1": "black and white", "P": "palette", "LA": "grey with alpha", "RGBA": "RGB with alpha"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Photos that are the same."""

    photos: tuple[int, ...]
    """Positions in the index."""
    splits: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is in a folder."""

    index: Index
    refusal: str
    """Why a run cannot use it, "" where one can."""
    facts: Sequence[Facts]
    """(N,) of each photo."""
    verdicts: Sequence[Verdict]
    """(N,) of each photo."""
    exact: Sequence[Group]
    """Files with the same bytes."""
    near: Sequence[Group]
    """Photos that look the same, of which at least two are not the same file."""
    outside: Sequence[str]
    """Files that are in no class folder."""
    decoder: str
    max_pixels: int

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each photo can be used."""
        return np.array([verdict.ok for verdict in self.verdicts], np.bool_)

    @property
    def bad(self) -> dict[str, Verdict]:
        """Path -> verdict of each photo that cannot be used."""
        return {path: each for path, each in zip(self.index.paths, self.verdicts, strict=True) if not each.ok}

    @property
    def damaged(self) -> dict[str, str]:
        """Path -> what is wrong with a photo that can be used all the same."""
        pairs = zip(self.index.paths, self.verdicts, strict=True)
        return {path: each.warning for path, each in pairs if each.warning}

    @property
    def misnamed(self) -> dict[str, str]:
        """Path -> format of each photo whose name claims another one."""
        pairs = zip(self.index.paths, self.facts, strict=True)
        return {path: each.format for path, each in pairs if misnamed(path, each.format)}

    @property
    def imbalance(self) -> float:
        """How many times the usable training photos of the smallest class the largest has; infinite for none."""
        counts = self.counts()[:, 0]
        return float(counts.max() / counts.min()) if counts.min() else float("inf")

    def splits(self) -> list[str]:
        """Return the splits that the folder has, training first."""
        return [name for name in ("train", "val", "test") if name == "train" or (self.index.folders == name).any()]

    def counts(self) -> npt.NDArray[np.int64]:
        """Return (K, splits) usable photos."""
        index, usable = self.index, self.usable
        columns = [
            np.bincount(index.labels[usable & (index.folders == name)], minlength=len(index.classes))
            for name in self.splits()
        ]
        return np.stack(columns, 1)

    def kinds(self) -> dict[str, Counter[str]]:
        """Return how many photos are of each format, colours and peculiarity, by these three words."""
        readable = [each for each in self.facts if each.format]
        peculiar = {
            "progressive": [each.progressive for each in readable],
            "turned by EXIF": [each.orientation != 1 for each in readable],
            "named as another format": self.misnamed,
            "no extension": [not Path(path).suffix for path in self.index.paths],
        }
        return {
            "format": Counter(each.format for each in readable),
            "colours": Counter(colours(each) for each in readable if each.mode),
            "peculiarity": Counter({name: sum(map(bool, which)) for name, which in peculiar.items() if any(which)}),
        }

    def problems(self) -> list[str]:
        """Return what is wrong, a sentence each, the gravest first."""
        index, bad, damaged = self.index, self.bad, self.damaged
        found = [f"a run refuses this folder: {self.refusal}"] if self.refusal else []
        if bad:
            reasons = counted(Counter(each.reason for each in bad.values()))
            found.append(f"{len(bad):,} of {len(index):,} photos cannot be used: {reasons}")
        if damaged:
            found.append(f"{_photos(len(damaged))} damaged and used as far as they can be read")
        groups = [*self.exact, *self.near]
        if two := [group for group in groups if len(group.classes) > 1]:
            found.append(f"{_photos(len(two))} under two classes or more: one label is wrong")
        if two := [group for group in groups if len(group.splits) > 1]:
            found.append(f"{_photos(len(two))} in two splits or more: accuracy will look better than it is")
        if self.exact:
            copies = sum(len(group.photos) - 1 for group in self.exact)
            found.append(f"{_copies(copies)} of another to the byte")
        if self.near:
            copies = sum(len(group.photos) - 1 for group in self.near)
            found.append(f"{_copies(copies)} of another by looks")
        if groups and len(self.splits()) < 3 and any("train" in group.splits for group in groups):
            found.append("copies among the training photos may fall on both sides of the split into train and val")
        if self.outside:
            found.append(f"{len(self.outside):,} files are in no class folder and not used")
        if len(index.classes) > 1 and self.imbalance > UNEQUAL:
            found.append(f"the largest class has {self.imbalance:.1f} times the photos of the smallest: see --balance")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        index, kinds = self.index, self.kinds()
        rows = zip(index.paths, index.labels, index.folders, index.sizes, self.facts, self.verdicts, strict=True)
        return {
            "data": str(index.root),
            "decoder": self.decoder,
            "refusal": self.refusal,
            "problems": self.problems(),
            "num_photos": len(index),
            "num_usable": int(self.usable.sum()),
            "num_hidden": index.num_hidden,
            "imbalance": self.imbalance if np.isfinite(self.imbalance) else None,
            "classes": self.classes(),
            "formats": dict(kinds["format"]),
            "colours": dict(kinds["colours"]),
            "peculiarities": dict(kinds["peculiarity"]),
            "bad": [{"path": path, "reason": each.reason, "detail": each.detail} for path, each in self.bad.items()],
            "damaged": [{"path": path, "damage": damage} for path, damage in self.damaged.items()],
            "misnamed": [{"path": path, "format": name} for path, name in self.misnamed.items()],
            "exact_duplicates": [self._group(group) for group in self.exact],
            "near_duplicates": [self._group(group) for group in self.near],
            "outside": list(self.outside),
            "photos": [
                {
                    "path": path,
                    "class": index.classes[label],
                    "split": str(split),
                    "bytes": int(size),
                    "width": each.width,
                    "height": each.height,
                    "format": each.format,
                    "mode": each.mode,
                    "orientation": each.orientation,
                    "progressive": each.progressive,
                    "reason": verdict.reason,
                }
                for path, label, split, size, each, verdict in rows
            ],
        }

    def classes(self) -> list[dict[str, Any]]:
        """Return name, usable photos by split, bad ones, bytes, median and extreme sides of each class."""
        index, usable, counts, splits = self.index, self.usable, self.counts(), self.splits()
        sides = np.array([(each.width, each.height) for each in self.facts]).reshape(-1, 2)
        rows = []
        for label, name in enumerate(index.classes):
            mine = index.labels == label
            good = sides[mine & usable & (sides[:, 0] > 0)]
            rows.append(
                {
                    "class": name,
                    **{split: int(counts[label, i]) for i, split in enumerate(splits)},
                    "bad": int((mine & ~usable).sum()),
                    "bytes": int(index.sizes[mine].sum()),
                    "median_width": int(np.median(good[:, 0])) if len(good) else 0,
                    "median_height": int(np.median(good[:, 1])) if len(good) else 0,
                    "shortest_side": int(good.min()) if len(good) else 0,
                    "longest_side": int(good.max()) if len(good) else 0,
                }
            )
        return rows

    def _group(self, group: Group) -> dict[str, Any]:
        paths = [self.index.paths[i] for i in group.photos]
        return {"paths": paths, "classes": list(group.classes), "splits": list(group.splits)}


def check(
    root: str | Path,
    *,
    decoder: Decoder = "auto",
    workers: int | None = None,
    max_bad: float = 0.05,
    max_pixels: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Return what is in a folder of photos, of any layout; nothing in it is changed.

    Args:
        root: the folder.
        decoder: what decodes the photos; auto is turbo, else Pillow.
        workers: decoding threads; None is one a core.
        max_bad: share of unusable photos above which a run would refuse the folder.
        max_pixels: a larger photo is unusable; None is the default.
        progress: told photos decoded and photos to decode.

    Raises DataError where there is no such folder, FastCNNError where the decoder is missing.
    """
    index, refusal = scan_loosely(root)
    sources = index.sources()
    try:
        chosen, _ = pipelines.choose(decoder, gpu=False)
        verdicts, hashes, pictures = _decode(sources, chosen, workers, max_pixels or pipelines.MAX_PIXELS, progress)
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    usable = np.flatnonzero([verdict.ok for verdict in verdicts])
    with ThreadPoolExecutor(workers or pipelines.num_cores()) as pool:
        known = list(pool.map(lambda i: facts(sources[i], header=verdicts[i].ok), range(len(sources))))
        contents = _contents(sources, index.sizes, usable, pool)
    num_bad = len(index) - len(usable)
    if not refusal and num_bad > max_bad * len(index):
        refusal = f"{num_bad:,} of {len(index):,} photos cannot be used, more than --max-bad {max_bad:g}"
    exact = [tuple(group) for group in contents if len(group) > 1]
    alike = duplicates.groups(usable[duplicates.pairs(hashes[usable], pictures[usable])])
    copies = {frozenset(group) for group in exact}
    return Findings(
        index=index,
        refusal=refusal,
        facts=known,
        verdicts=verdicts,
        exact=_groups(index, exact),
        near=_groups(index, [tuple(group) for group in alike if not any(set(group) <= same for same in copies)]),
        outside=[] if index.classes == ("",) else outside(index.root),
        decoder=chosen,
        max_pixels=max_pixels or pipelines.MAX_PIXELS,
    )


def table(findings: Findings) -> str:
    """Return the findings as text: classes, kinds, what is wrong, and the first of each."""
    index, problems = findings.index, findings.problems()
    total = f"{len(index):,} photos, {index.sizes.sum() / 2**20:,.1f} MiB"
    blocks = [f"{total} in {printable(str(index.root))}", _columns(*class_rows(findings))]
    blocks.append("\n".join(f"{name}: {counted(each)}" for name, each in findings.kinds().items() if each))
    blocks.append("\n".join(["to look at:", *(f"  {line}" for line in problems)]) if problems else "nothing is wrong")
    bad = [f"{printable(path)}: {each.reason}{detail(each.detail)}" for path, each in findings.bad.items()]
    damaged = [f"{printable(path)}: {damage}" for path, damage in findings.damaged.items()]
    named = [f"{printable(path)}: {name}" for path, name in findings.misnamed.items()]
    exact, near = ([" = ".join(_names(index, group)) for group in each] for each in (findings.exact, findings.near))
    lists = {
        "cannot be used": bad,
        "damaged": damaged,
        "the same file": exact,
        "look the same": near,
        "named as another format": named,
        "in no class folder": [printable(path) for path in findings.outside],
    }
    for title, lines in lists.items():
        if lines:
            more = [f"  ... and {len(lines) - NUM_NAMED:,} more: --json lists all"] if len(lines) > NUM_NAMED else []
            blocks.append("\n".join([f"{title}:", *(f"  {line}" for line in lines[:NUM_NAMED]), *more]))
    return "\n\n".join(blocks)


def class_rows(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a table of the classes, with their sum."""
    splits, classes = findings.splits(), findings.classes()
    heads = ["class", *splits, "bad", "MiB", "median size", "sides"]
    rows = [
        [
            printable(each["class"]) or "(no class)",
            *(f"{each[split]:,}" for split in splits),
            f"{each['bad']:,}",
            f"{each['bytes'] / 2**20:,.1f}",
            f"{each['median_width']}x{each['median_height']}",
            f"{each['shortest_side']} to {each['longest_side']}",
        ]
        for each in classes
    ]
    sums = [f"{sum(each[name] for each in classes):,}" for name in [*splits, "bad"]]
    rows.append(["all", *sums, f"{findings.index.sizes.sum() / 2**20:,.1f}", "", ""])
    return heads, rows


def counted(counts: Counter[str]) -> str:
    """Return how many of what, the most first."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())


def colours(known: Facts) -> str:
    """Return how a photo's pixels are stored, in words."""
    return "16 bits" if known.mode.startswith("I;16") else _COLOURS.get(known.mode, known.mode)


def _decode(
    sources: Sequence[Source],
    decoder: str,
    threads: int | None,
    max_pixels: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Verdict], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Return the verdict, the hash and the small picture of every photo."""
    verdicts: list[Verdict] = []
    hashes = np.zeros(len(sources), np.uint64)
    pictures = np.zeros((len(sources), (duplicates.SIZE // 2) ** 2), np.uint8)
    with Workers(decoder, threads=threads, max_pixels=max_pixels) as decoding:
        buffer = shared((CHUNK, duplicates.SIZE, duplicates.SIZE, 3))
        for start in range(0, len(sources), CHUNK):
            part = sources[start : start + CHUNK]
            images = buffer[: len(part)]
            verdicts += decoding.decode(part, duplicates.SIZE, images)
            here = slice(start, start + len(part))
            hashes[here], pictures[here] = duplicates.describe(images)
            progress(start + len(part), len(sources))
    return verdicts, hashes, pictures


def _contents(
    sources: Sequence[Source], sizes: npt.NDArray[np.int64], usable: npt.NDArray[np.intp], pool: ThreadPoolExecutor
) -> list[list[int]]:
    """Return the photos with the same bytes, together. Only those of the same size are read."""
    by_size = defaultdict[int, list[int]](list)
    for i in usable:
        by_size[int(sizes[i])].append(int(i))
    candidates = [i for same in by_size.values() if len(same) > 1 for i in same]
    groups = defaultdict[bytes, list[int]](list)
    for i, digest in zip(candidates, pool.map(lambda i: _digest(sources[i]), candidates), strict=True):
        if digest:
            groups[digest].append(i)
    return list(groups.values())


def _digest(source: Source) -> bytes:
    try:
        return hashlib.sha256(read(source)).digest()
    except Unusable:
        return b""


def _groups(index: Index, groups: Iterable[Sequence[int]]) -> list[Group]:
    """Return the groups, those of two classes first, then those of two splits."""
    made = [
        Group(
            photos=tuple(group),
            splits=tuple(sorted({str(index.folders[i]) for i in group})),
            classes=tuple(sorted({index.classes[index.labels[i]] for i in group})),
        )
        for group in groups
    ]
    return sorted(made, key=lambda group: (-len(group.classes), -len(group.splits), group.photos))


def _names(index: Index, group: Group) -> list[str]:
    return [printable(index.paths[i]) for i in group.photos]


def detail(text: str) -> str:
    """Return a verdict's detail as it stands behind the reason."""
    return f" ({printable(text)})" if text else ""


def _photos(count: int) -> str:
    return "1 photo is" if count == 1 else f"{count:,} photos are"


def _copies(count: int) -> str:
    return "1 photo is a copy" if count == 1 else f"{count:,} photos are copies"


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in [heads, *rows]:
        first, *others = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
