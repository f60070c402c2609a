"""Photos listed as columns: of a class folder, or of the archives of a split."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcnn.data.file_columns import FACTS
from fastcnn.data.listing_process import list_files
from fastcnn.data.path_list import PathList
from fastcnn.data.walk import Skipped, Stamp
from pipelines import num_cores

if TYPE_CHECKING:
    from fastcnn.system.ranks import Ranks


class Listing(NamedTuple):
    """Photos that were found in one place or in several."""

    paths: PathList
    columns: dict[str, Any]
    """(N,) each, by its name in an index: labels, folders, offsets and `FACTS`."""


_Folder = tuple[str, Path, int, str]  # how paths begin there, the folder itself, label, split


def list_folders(
    root: Path, places: Iterable[tuple[Path, int, str]], ranks: Ranks | None = None
) -> tuple[Listing, Skipped]:
    """Return the files that may be photos below folders with a label and a split each, sorted by path; and the others.

    ranks: they list a share each, where the first calls this in what it broadcasts.
    """
    named = sorted(
        ((_prefix(root, folder), folder, label, split) for folder, label, split in places), key=itemgetter(0)
    )
    if ranks is None or ranks.count == 1:
        found, skipped = _list_share(root, num_cores(), named)
    else:
        cuts = [len(named) * rank // ranks.count for rank in range(ranks.count + 1)]
        shares = ranks.map(functools.partial(_list_share, root, 1), [named[start:end] for start, end in pairwise(cuts)])
        found = join([listing for listing, _ in shares])
        skipped = functools.reduce(operator.add, (left_out for _, left_out in shares))
    if any(after.startswith(before) for before, after in pairwise(prefix for prefix, *_ in named)):
        in_order = sorted(range(len(found.paths)), key=list(found.paths).__getitem__)  # --val-dir in train
        order = np.array(in_order, np.intp)
        found = Listing(found.paths.take(order), {name: column[order] for name, column in found.columns.items()})
    return found, skipped


def _list_share(root: Path, num_processes: int, named: Sequence[_Folder]) -> tuple[Listing, Skipped]:
    """Return the photos below some folders, and what is left out."""
    files = list_files(root, [folder for _, folder, _, _ in named], num_processes)
    num_photos = np.array(files.counts, np.int64)
    found = {
        "labels": np.repeat(np.array([label for *_, label, _ in named], np.int64), num_photos),
        "folders": _repeated([split for *_, split in named], num_photos),
        "offsets": np.broadcast_to(np.int64(-1), len(files)),
        **{name: np.frombuffer(column, np.int64) for name, column in zip(FACTS, files.facts, strict=True)},
    }
    return Listing(PathList(bytes(files.letters), np.frombuffer(files.ends, np.int64)), found), files.skipped


def _prefix(root: Path, folder: Path) -> str:
    """Return how the paths of a folder begin."""
    return (folder.relative_to(root) / "_").as_posix()[:-1]


def _repeated(names: Sequence[str], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """Return each name so many times; one name alone takes no memory."""
    filled = {name for name, count in zip(names, counts, strict=True) if count}
    if len(filled) == 1:
        return np.broadcast_to(np.str_(filled.pop()), int(counts.sum()))
    return np.repeat(np.array(names, np.str_), counts)


def list_rows(rows: Sequence[tuple[str, int, int, Stamp, str, int]]) -> Listing:
    """Return photos given as path, label, bytes, stamp, split and offset, in their order."""
    facts = np.array([(size, *stamp) for _, _, size, stamp, _, _ in rows], np.int64).reshape(-1, len(FACTS))
    columns = {
        "labels": np.array([label for _, label, *_ in rows], np.int64),
        "folders": np.array([split for *_, split, _ in rows], np.str_),
        "offsets": np.array([offset for *_, offset in rows], np.int64),
        **dict(zip(FACTS, facts.T, strict=True)),
    }
    return Listing(PathList.of(path for path, *_ in rows), columns)


def join(listings: Sequence[Listing]) -> Listing:
    """Return the photos of listings, one behind the other; a column of one value takes no memory."""
    if len(listings) == 1:
        return listings[0]
    columns = {name: _joined([listing.columns[name] for listing in listings]) for name in listings[0].columns}
    return Listing(PathList.joined([listing.paths for listing in listings]), columns)


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return columns, one behind the other."""
    filled = [part for part in parts if len(part)]
    if filled and all((part == filled[0][0]).all() for part in filled):
        return np.broadcast_to(filled[0][0], sum(map(len, filled)))
    return np.concatenate(parts)
