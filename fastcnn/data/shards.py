"""Shards: a folder of tar archives in WebDataset's layout, whose photos are read where they stand.

The files of an archive that share folder and name up to the first dot are one sample: 000012.jpg is its photo,
000012.cls its label, a whole number in ASCII. What other extensions hold is passed over. `classes.txt` beside the
archives names the classes, a line each, from number 0 on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastcnn.data import tar
from fastcnn.errors import DataError, warn
from fastcnn.system.text import printable
from pipelines.verdict import EXTENSIONS

CLASSES = "classes.txt"
ORIGINALS = "paths.csv"
"""Where `fastcnn data shard` leaves each photo's path in the folder that it comes from."""
PHOTO_EXTENSIONS = frozenset(chain(*EXTENSIONS.values()))

THREADS = 4  # archives read at once: half the time where the disk is waited for, and no loss where it is not

_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|lzma|Z))$", re.IGNORECASE)
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


class Photo(NamedTuple):
    """A photo in an archive."""

    path: str
    """<archive>/<name in it>."""
    offset: int
    """Where its bytes begin in the archive."""
    size: int
    mtime: int
    """Changes with the archive: its modification time in nanoseconds, and the place of the photo in it."""
    label: int
    """The number in its .cls."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The photos of a folder's archives, by the archive's name and the place in it."""

    photos: list[Photo]
    names: dict[int, str] | None
    """Number -> class, of classes.txt; None without one."""
    num_hidden: int


def archives(folder: Path) -> list[Path]:
    """Return the archives in a folder, sorted. Raises DataError for compressed ones: no photo in them has a place."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    packed = [name for name in names if _COMPRESSED.search(name)]
    if packed:
        raise DataError(
            f"{printable(str(folder / packed[0]))} is compressed: unpack it to a .tar, as photos in shards are read "
            "where they stand"
        )
    return [folder / name for name in names if name.endswith(".tar")]


def archive_of(path: str) -> str:
    """Return the archive in a photo's path, which no folder above it resembles."""
    return path[: path.index(".tar/") + len(".tar")]


def read(root: Path, folder: Path) -> Shards:
    """Return the photos of the archives in `folder`, which is `root` or in it; paths are below `root`.

    Raises DataError where an archive is none, or damaged, or a photo has no label or not one.
    """
    photos: list[Photo] = []
    unlabelled: list[str] = []
    alone: list[str] = []
    num_hidden = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda path: _read(path, path.relative_to(root).as_posix()), archives(folder)):
            photos += found.photos
            unlabelled += found.unlabelled
            alone += found.alone
            num_hidden += found.num_hidden
    if unlabelled:
        raise DataError(
            f"{_many(unlabelled, 'photo has', 'photos have')} no label: "
            f"expected {printable(_sample(unlabelled[0]))}.cls beside {printable(unlabelled[0])}"
        )
    if alone:
        warn(
            f"{_many(alone, 'label', 'labels')} in the shards of {printable(str(folder))} without a photo: "
            f"{printable(alone[0])}{', ...' if len(alone) > 1 else ''}"
        )
    return Shards(photos=photos, names=_names(root, folder), num_hidden=num_hidden)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What is in an archive."""

    photos: list[Photo]
    unlabelled: list[str]
    alone: list[str]
    num_hidden: int


def _read(archive: Path, name: str) -> _Found:
    shown = printable(str(archive))
    photos: dict[str, tar.Entry] = {}
    labels: dict[str, int] = {}
    num_hidden = 0
    try:
        with archive.open("rb") as file:
            mtime = archive.stat().st_mtime_ns
            for entry in tar.entries(file):
                if (entry.name.startswith(".") or "/." in entry.name) and _is_hidden(entry.name):
                    num_hidden += 1
                    continue
                sample = _sample(entry.name)
                extension = entry.name[len(sample) + 1 :].lower()
                if extension in PHOTO_EXTENSIONS:
                    if sample in photos:
                        two = f"{printable(photos[sample].name)} and {printable(entry.name)}"
                        raise DataError(f"{shown} has two photos of one sample, {two}: keep one")
                    photos[sample] = entry
                elif extension == "cls":
                    if sample in labels:
                        raise DataError(f"{shown} has {printable(entry.name)} twice: keep one")
                    file.seek(entry.offset)
                    labels[sample] = _label(file.read(min(entry.size, 64)), entry, shown)
    except tar.Damaged as error:
        with archive.open("rb") as file:
            packed = file.read(8).startswith(_PACKED)
        what = "it is compressed" if packed else str(error)
        raise DataError(f"{shown} cannot be used as a shard: {what}; make it or load it again") from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from None
    return _Found(
        photos=[
            Photo(f"{name}/{entry.name}", entry.offset, entry.size, mtime + entry.offset, labels[sample])
            for sample, entry in photos.items()
            if sample in labels
        ],
        unlabelled=[f"{name}/{entry.name}" for sample, entry in photos.items() if sample not in labels],
        alone=[f"{name}/{sample}.cls" for sample in labels if sample not in photos],
        num_hidden=num_hidden,
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _sample(name: str) -> str:
    """Return the folder and the name up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(content: bytes, entry: tar.Entry, archive: str) -> int:
    number = _LABEL.fullmatch(content)
    if not number or entry.size != len(content):
        raise DataError(f"{archive}, {printable(entry.name)}: expected a whole number from 0 on, got {content[:20]!r}")
    return int(number[1])


def _names(root: Path, folder: Path) -> dict[int, str] | None:
    """Return the names in the folder's classes.txt, in the one of the root or of the training shards."""
    path = next((path for place in (folder, root, root / "train") if (path := place / CLASSES).is_file()), None)
    if path is None:
        return None
    shown = printable(str(path))
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from None
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    names: dict[str, int] = {}
    for number, line in enumerate(lines):
        if not line.strip() or names.setdefault(line, number) != number:
            what = f"'{printable(line)}' is there twice" if line.strip() else "the line is empty"
            raise DataError(f"{shown}, line {number + 1}: expected the name of class {number}, but {what}")
    return dict(enumerate(lines))


def _many(names: Sequence[str], one: str, more: str) -> str:
    return f"1 {one}" if len(names) == 1 else f"{len(names):,} {more}"
