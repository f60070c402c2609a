"""split.csv: path, label, split and checksum of every photo of a run, and those photos found again in a folder."""

from __future__ import annotations

import contextlib
import csv
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcnn.data.arrays import Positions
from fastcnn.data.csv_columns import is_plain, lines
from fastcnn.data.index import Index
from fastcnn.data.journal import DIGEST_BYTES, Digests
from fastcnn.data.path_list import PathList
from fastcnn.data.split import SPLITS
from fastcnn.errors import DataError, warn
from fastcnn.storage import files
from fastcnn.system.text import comparable, first_few, printable

NAME = "split.csv"
MISSING = "missing_photos.csv"
LINES = 16384
"""Lines written at once, which bounds the memory that takes."""


class MissingPhotos(DataError):
    """Photos that a split.csv lists are not in the folder; `reasons` has path -> reason of each."""

    def __init__(self, path: Path, root: Path, reasons: Mapping[str, str], count: int) -> None:
        self.reasons = reasons
        super().__init__(
            f"{root} lacks {len(reasons):,} of the {count:,} photos in {path}: {_first(reasons)}; "
            "give the folder that the split was made from, or a whole copy of it"
        )


class Listed(NamedTuple):
    """Line of a split.csv."""

    path: str
    label: str
    split: str
    checksum: str
    """Digest of the file's bytes, see `recognise.digests`; "" where it is not known."""


def write_split(path: Path, index: Index, splits: npt.NDArray[np.uint8], digests: Digests | None = None) -> None:
    """Write path, label, split (by its position in `SPLITS`) and checksum of every photo as CSV.

    digests: None: the checksums are not known.
    """
    classes, names = PathList.of(index.classes), PathList.of(SPLITS)
    digests = digests or Digests(np.zeros((len(index), DIGEST_BYTES), np.uint8))
    with files.writing(path) as file:
        file.write(files.csv_lines([Listed._fields]))
        for start in range(0, len(index), LINES):
            part = slice(start, start + LINES)
            columns = [
                index.paths[part],
                classes.take(index.labels[part]),
                names.take(splits[part]),
                digests[part].encoded(),
            ]
            plain = all(map(is_plain, columns))
            file.write(lines(columns) if plain else files.csv_lines(zip(*columns, strict=True)))


def read_split(
    path: Path,
    index: Index,
    digests: Sequence[str] = (),
    *,
    moved: bool = False,
    known_sizes: Callable[[], Mapping[str, int]] = dict,
) -> tuple[Positions, npt.NDArray[np.uint8]]:
    """Return (M,) each: positions in the index of the photos that a split.csv lists, in its order; their split numbers.

    A photo is the one at its path, or where that is gone or has another checksum, one of its class with its checksum.
    Where there is none, the changed photo at its path is taken, with a warning; not if the photos were moved, as it may
    be another's. Lines without a checksum, as in the files of older runs, are compared by path and size.

    Args:
        path: the file.
        index: the usable photos of the folder.
        digests: digest of each photo of the index, "" where it is not known; empty: none is known.
        moved: whether the folder is another one than that of the run.
        known_sizes: returns the sizes in bytes, by path, of the photos in the folder of the run, as far as known.

    Raises MissingPhotos, and DataError where the file is no split.csv or lists a photo under another class.
    """
    rows = read_rows(path)
    sizes = known_sizes() if moved and not all(row.checksum for row in rows) else {}
    digests = digests or [""] * len(index)
    places = _places(path, rows, index)
    reasons = [_difference(row, place, index, digests, sizes) for row, place in zip(rows, places, strict=True)]
    found = {line: place for line, (place, why) in enumerate(zip(places, reasons, strict=True)) if not why}
    _find_by_content(rows, index, digests, found)
    taken = set(found.values())
    changed, missing = {}, {}
    for line, (row, place) in enumerate(zip(rows, places, strict=True)):
        if line in found:
            continue
        if moved or place < 0 or place in taken:
            missing[row.path] = reasons[line]
        else:
            found[line], changed[row.path] = place, reasons[line]
    if missing:
        raise MissingPhotos(path, index.root, missing, len(rows))
    if changed:
        warn(f"{len(changed):,} photos have changed since {path} was written, and are used so: {_first(changed)}")
    if moved and (unknown := sum(not row.checksum for row in rows)):
        how = "path and size" if sizes else "path alone, as no cache has their sizes"
        warn(f"{path} is of an older run and holds no checksums: {unknown:,} photos were found by {how}")
    splits = {found[line]: row.split for line, row in enumerate(rows)}
    if not {"train", "val"} <= set(splits.values()):
        raise DataError(f"{path} lists no photos for training or none for validation")
    return np.array(list(splits), np.intp), np.array([*map(SPLITS.index, splits.values())], np.uint8)


@contextlib.contextmanager
def missing_listed(run_dir: Path, data: str, advice: str) -> Iterator[None]:
    """Write the photos of a run that are not found into its `missing_photos.csv`; where the folder is gone, advise."""
    try:
        yield
    except MissingPhotos as error:
        listing = run_dir / MISSING
        try:
            files.write_csv(listing, [("path", "reason"), *error.reasons.items()])
        except OSError:  # a run of somebody else
            raise error from None
        raise DataError(f"{error}; {listing} lists all that are missing") from None
    except DataError as error:
        if Path(data).is_dir():
            raise
        raise DataError(f"{error}; {advice}") from None


def read_rows(path: Path) -> list[Listed]:
    """Return the lines of a split.csv. Raises DataError where it cannot be read or is none."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read the split {path}: {error}") from None
    for line, row in enumerate(rows, 2):
        if row.get("path") is None or row.get("split") not in ("train", "val", "test"):
            raise DataError(f"{path}, line {line}: expected path, label, split (train, val or test)")
    return [Listed(*(row.get(name) or "" for name in Listed._fields)) for row in rows]


def _places(path: Path, rows: Sequence[Listed], index: Index) -> list[int]:
    """Return the position in the index of the photo at the path of each line, -1 where there is none."""
    position = {comparable(photo): i for i, photo in enumerate(index.paths)}
    position |= {photo: i for i, photo in enumerate(index.paths)}  # two may differ in Unicode form alone
    places = [position.get(row.path, position.get(comparable(row.path), -1)) for row in rows]
    for line, (row, place) in enumerate(zip(rows, places, strict=True), 2):
        if place >= 0 and comparable(index.classes[index.labels[place]]) != comparable(row.label):
            raise DataError(f"{path}, line {line}: {printable(row.path)} is not of class '{printable(row.label)}'")
    return places


def _difference(row: Listed, place: int, index: Index, digests: Sequence[str], sizes: Mapping[str, int]) -> str:
    """Return why the photo at the path of a line is not the one that the line lists; "" if it is."""
    if place < 0:
        return "no usable photo"
    if row.checksum and digests[place] not in ("", row.checksum):
        return "other content"
    return "" if sizes.get(row.path, index.sizes[place]) == index.sizes[place] else "another size"


def _find_by_content(rows: Sequence[Listed], index: Index, digests: Sequence[str], found: dict[int, int]) -> None:
    """Enter, for each line not in `found` (line -> position), a photo of its class with its checksum that is left."""
    if len(found) == len(rows):
        return
    taken, left = set(found.values()), defaultdict(list)
    for place in reversed(range(len(index))):
        if place not in taken and digests[place]:
            left[comparable(index.classes[index.labels[place]]), digests[place]].append(place)
    for line, row in enumerate(rows):
        if line not in found and (same := left.get((comparable(row.label), row.checksum))):
            found[line] = same.pop()


def _first(reasons: Mapping[str, str]) -> str:
    return first_few([f"{path} ({reason})" for path, reason in reasons.items()])
