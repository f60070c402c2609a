"""Findings of a data check: counts, formats, bad and damaged files, duplicates, and what is wrong, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn.data.index import Index
from fastcnn.system.text import finite_or_none, printable
from pipelines.facts import Facts, misnamed
from pipelines.verdict import Verdict

IMBALANCED = 3  # ratio of the largest class to the smallest from which it is reported

_COLOURS = {"L": "grey", "1": "black and white", "P": "palette", "LA": "grey with alpha", "RGBA": "RGB with alpha"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Photos that show the same."""

    photos: tuple[int, ...]
    """Positions in the index."""
    splits: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that a check found in a folder of photos."""

    index: Index
    refusal: str
    """Why a run refuses the folder, "" where it does not."""
    facts: Sequence[Facts]
    """(N,) format, size and colours of each photo."""
    verdicts: Sequence[Verdict]
    """(N,) whether each photo can be used."""
    exact: Sequence[Group]
    """Files with the same bytes."""
    near: Sequence[Group]
    """Photos that look the same, at least two of them not with the same bytes."""
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
        """Path -> damage of each photo that can be used all the same."""
        pairs = zip(self.index.paths, self.verdicts, strict=True)
        return {path: each.warning for path, each in pairs if each.warning}

    @property
    def misnamed(self) -> dict[str, str]:
        """Path -> format of each photo whose extension claims another one."""
        pairs = zip(self.index.paths, self.facts, strict=True)
        return {path: each.format for path, each in pairs if misnamed(path, each.format)}

    @property
    def imbalance(self) -> float:
        """Usable training photos of the largest class over those of the smallest; infinite where that has none."""
        counts = self.counts()[:, 0]
        return float(counts.max() / counts.min()) if counts.min() else float("inf")

    def splits(self) -> list[str]:
        """Return the names of the splits in the folder, training first."""
        return [name for name in ("train", "val", "test") if name == "train" or (self.index.folders == name).any()]

    def counts(self) -> npt.NDArray[np.int64]:
        """Return (num_classes, num_splits) the number of usable photos."""
        index, usable = self.index, self.usable
        columns = [
            np.bincount(index.labels[usable & (index.folders == name)], minlength=len(index.classes))
            for name in self.splits()
        ]
        return np.stack(columns, 1)

    def kinds(self) -> dict[str, Counter[str]]:
        """Return the number of photos of each format, of each kind of colours, and with each peculiarity."""
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
        """Return one sentence for everything that is wrong, the gravest first."""
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
            found.append(f"{_copies(self.exact)} of another to the byte")
        if self.near:
            found.append(f"{_copies(self.near)} of another by looks")
        if groups and len(self.splits()) < 3 and any("train" in group.splits for group in groups):
            found.append("copies among the training photos may fall on both sides of the split into train and val")
        if self.index.outside:
            found.append(f"{_photos(len(self.index.outside))} in no class folder and not used")
        if len(index.classes) > 1 and self.imbalance > IMBALANCED:
            found.append(f"the largest class has {self.imbalance:.1f} times the photos of the smallest: see --balance")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all findings as plain data."""
        index, kinds = self.index, self.kinds()
        rows = zip(index.paths, index.labels, index.folders, index.sizes, self.facts, self.verdicts, strict=True)
        return {
            "data": str(index.root),
            "layout": index.layout,
            "decoder": self.decoder,
            "refusal": self.refusal,
            "problems": self.problems(),
            "num_photos": len(index),
            "num_usable": int(self.usable.sum()),
            "num_hidden": index.num_hidden,
            "other_files": dict(index.others),
            "imbalance": finite_or_none(self.imbalance),
            "classes": self.classes(),
            "formats": dict(kinds["format"]),
            "colours": dict(kinds["colours"]),
            "peculiarities": dict(kinds["peculiarity"]),
            "bad": [{"path": path, "reason": each.reason, "detail": each.detail} for path, each in self.bad.items()],
            "damaged": [{"path": path, "damage": damage} for path, damage in self.damaged.items()],
            "misnamed": [{"path": path, "format": name} for path, name in self.misnamed.items()],
            "exact_duplicates": [self._group(group) for group in self.exact],
            "near_duplicates": [self._group(group) for group in self.near],
            "outside": list(self.index.outside),
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
        """Return name, usable photos by split, bad photos, bytes, median and extreme sides (pixels) of each class."""
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


def class_rows(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Return the column names and the rows of a table of the classes, the sums last."""
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
    """Return counts and their names in words, the largest first."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())


def colours(known: Facts) -> str:
    """Return the kind of a photo's colours in words."""
    return "16 bits" if known.mode.startswith("I;16") else _COLOURS.get(known.mode, known.mode)


def _photos(count: int) -> str:
    return "1 photo is" if count == 1 else f"{count:,} photos are"


def _copies(groups: Sequence[Group]) -> str:
    count = sum(len(group.photos) - 1 for group in groups)
    return "1 photo is a copy" if count == 1 else f"{count:,} photos are copies"


def detail(text: str) -> str:
    """Return a verdict's detail as it is printed behind its reason."""
    return f" ({printable(text)})" if text else ""
