"""Photos listed as columns: of a class folder, or of the archives of a split."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcnn.data.path_list import PathList
from fastcnn.data.walk import Skipped, Stamp, files_below

COLUMNS = ("sizes", "mtimes", "ctimes", "inodes", "offsets")
"""Columns of an index that are facts of files."""


@dataclass(frozen=True)
class Listing:
    """Photos that were found in one place or in several."""

    paths: PathList
    labels: npt.NDArray[np.int64]
    facts: npt.NDArray[np.int64]
    """(5, N), see `COLUMNS`."""
    splits: npt.NDArray[np.str_]
    prefix: str = ""
    """How the paths of a folder begin."""


def list_folder(root: Path, folder: Path, label: int, split: str, skipped: Skipped) -> Listing:
    """Return the files below a folder that may be photos, sorted by path."""
    paths, numbers = [], array("q")
    for path, size, stamp in files_below(root, folder, skipped):
        paths.append(path)
        numbers.extend((size, *stamp, -1))
    order = sorted(range(len(paths)), key=paths.__getitem__)
    facts = np.array(numbers, np.int64).reshape(-1, len(COLUMNS))[order].T
    prefix = (folder.relative_to(root) / "_").as_posix()[:-1]
    sorted_paths = PathList.of([paths[i] for i in order])
    return Listing(sorted_paths, np.full(len(paths), label), facts, np.full(len(paths), split), prefix)


def list_rows(rows: Sequence[tuple[str, int, int, Stamp, str, int]]) -> Listing:
    """Return photos given as path, label, bytes, stamp, split and offset, in their order."""
    facts = [(size, *stamp, offset) for _, _, size, stamp, _, offset in rows]
    return Listing(
        PathList.of(path for path, *_ in rows),
        np.array([label for _, label, *_ in rows], np.int64),
        np.array(facts, np.int64).reshape(-1, len(COLUMNS)).T,
        np.array([split for *_, split, _ in rows], np.str_),
    )


def sort(listings: Sequence[Listing]) -> Listing:
    """Return the photos of listed folders sorted by path."""
    found = sorted(listings, key=lambda listing: listing.prefix)
    whole = join(found)
    if not any(after.prefix.startswith(before.prefix) for before, after in pairwise(found)):
        return whole
    order = np.array(sorted(range(len(whole.paths)), key=list(whole.paths).__getitem__), np.intp)  # --val-dir in train
    return Listing(whole.paths.take(order), whole.labels[order], whole.facts[:, order], whole.splits[order])


def join(listings: Sequence[Listing]) -> Listing:
    """Return the photos of listings, one behind the other; a split that all have in common takes no memory."""
    splits = np.concatenate([np.empty(0, "<U1"), *(listing.splits for listing in listings)])
    return Listing(
        PathList.joined([listing.paths for listing in listings]),
        np.concatenate([np.empty(0, np.int64), *(listing.labels for listing in listings)]),
        np.concatenate([np.empty((len(COLUMNS), 0), np.int64), *(listing.facts for listing in listings)], axis=1),
        np.broadcast_to(splits[:1], splits.shape) if (splits == splits[:1]).all() and len(splits) else splits,
    )
