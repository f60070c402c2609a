"""Photos listed as columns: of a class folder, or of the archives of a split."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn.data.path_list import PathList
from fastcnn.data.walk import Skipped, Stamp, files_below

COLUMNS = ("sizes", "mtimes", "ctimes", "inodes")
"""Columns of an index that are facts of files."""


@dataclass(frozen=True)
class Listing:
    """Photos that were found in one place or in several."""

    paths: PathList
    labels: npt.NDArray[np.int64]
    facts: npt.NDArray[np.int64]
    """(4, N), see `COLUMNS`."""
    offsets: npt.NDArray[np.int64]
    splits: npt.NDArray[np.str_]
    prefix: str = ""
    """How the paths of a folder begin."""


def list_folder(root: Path, folder: Path, label: int, split: str, skipped: Skipped) -> Listing:
    """Return the files below a folder that may be photos, sorted by path."""
    paths, numbers = list[str](), array("q")
    for some, their_numbers in files_below(root, folder, skipped):
        paths += some
        numbers += their_numbers
    order = sorted(range(len(paths)), key=paths.__getitem__)
    facts = np.frombuffer(numbers, np.int64).reshape(-1, len(COLUMNS))[order].T
    prefix = (folder.relative_to(root) / "_").as_posix()[:-1]
    sorted_paths = PathList.of([paths[i] for i in order])
    labels, offsets, splits = (np.broadcast_to(value, len(paths)) for value in (np.int64(label), np.int64(-1), split))
    return Listing(sorted_paths, labels, facts, offsets, splits, prefix)


def list_rows(rows: Sequence[tuple[str, int, int, Stamp, str, int]]) -> Listing:
    """Return photos given as path, label, bytes, stamp, split and offset, in their order."""
    facts = [(size, *stamp) for _, _, size, stamp, _, _ in rows]
    return Listing(
        PathList.of(path for path, *_ in rows),
        np.array([label for _, label, *_ in rows], np.int64),
        np.array(facts, np.int64).reshape(-1, len(COLUMNS)).T,
        np.array([offset for *_, offset in rows], np.int64),
        np.array([split for *_, split, _ in rows], np.str_),
    )


def sort(listings: Sequence[Listing]) -> Listing:
    """Return the photos of listed folders sorted by path."""
    found = sorted(listings, key=lambda listing: listing.prefix)
    whole = join(found)
    if not any(after.prefix.startswith(before.prefix) for before, after in pairwise(found)):
        return whole
    order = np.array(sorted(range(len(whole.paths)), key=list(whole.paths).__getitem__), np.intp)  # --val-dir in train
    columns = (whole.labels[order], whole.facts[:, order], whole.offsets[order], whole.splits[order])
    return Listing(whole.paths.take(order), *columns)


def join(listings: Sequence[Listing]) -> Listing:
    """Return the photos of listings, one behind the other; a column of one value takes no memory."""
    if len(listings) == 1:
        return listings[0]
    return Listing(
        PathList.joined([listing.paths for listing in listings]),
        np.concatenate([np.empty(0, np.int64), *(listing.labels for listing in listings)]),
        np.concatenate([np.empty((len(COLUMNS), 0), np.int64), *(listing.facts for listing in listings)], axis=1),
        _joined([np.empty(0, np.int64), *(listing.offsets for listing in listings)]),
        _joined([np.empty(0, "<U1"), *(listing.splits for listing in listings)]),
    )


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return columns, one behind the other."""
    filled = [part for part in parts if len(part)]
    if filled and all((part == filled[0][0]).all() for part in filled):
        return np.broadcast_to(filled[0][0], sum(map(len, filled)))
    return np.concatenate(parts)
