"""Shards: a folder of tar archives in WebDataset's layout, whose photos are read where they stand.

Files of an archive that share folder and name up to the first dot are one sample: 000012.jpg is its photo, 000012.cls
its label, a whole number in ASCII. Files with other extensions are ignored. `classes.txt` beside the archives names the
classes, one a line, from number 0 on.

A scan of an archive is remembered in the cache folder, by the archive's size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from fastcnn.data import class_names, tar
from fastcnn.data.walk import Stamp
from fastcnn.errors import DataError, os_error_as, warn
from fastcnn.storage import files
from fastcnn.system.text import comparable, first_few, printable
from pipelines.verdict import EXTENSIONS

CLASSES = "classes.txt"
ORIGINALS = "paths.csv"
"""File in which `fastcnn data shard` lists each photo's path in the original folder."""
PHOTO_EXTENSIONS = frozenset(chain(*EXTENSIONS.values()))

FORMAT = 2  # of remembered scans
SCANS = "shards-{}.json"  # their file, by the hash of the shards' folder
THREADS = 4  # archives read at once: half the time on a slow disk, none lost on a fast one

_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|lzma|Z))$", re.IGNORECASE)
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


class Photo(NamedTuple):
    """A photo in an archive."""

    path: str
    """<archive>/<name in it>."""
    offset: int
    """Position of its first byte in the archive."""
    size: int
    stamp: Stamp
    """That of the archive, with `offset` added to its modification time."""
    label: int
    """The number in its .cls file."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The photos of a folder's archives, in the order of the archives."""

    photos: list[Photo]
    names: dict[int, str] | None
    """Number -> class, from classes.txt; None without one."""
    num_hidden: int

    def classes(self) -> tuple[str, ...]:
        """Return the classes of the photos, by number: their names, or the numbers where those have none.

        Names without photos are a warning, as some of a set's shards are a set, too, and classes.txt must keep its
        lines.
        """
        numbers = sorted({photo.label for photo in self.photos})
        if self.names is None:
            return tuple(map(str, numbers))
        missing = [name for number, name in self.names.items() if number not in set(numbers)]
        if missing:
            some = first_few(missing, 10)
            warn(f"the training shards have no photos of {len(missing)} classes, which are left out: {some}")
        return tuple(self.names[number] for number in numbers if number in self.names)

    def labels(self, root: Path, classes: Sequence[str]) -> dict[int, int]:
        """Return number -> position in `classes`, for the numbers that photos have.

        A number stands for the name on that line of classes.txt. Without that file it stands for the class called by
        that number, or where classes have other names, for the one at that position. Raises DataError for a number
        that stands for none of them.
        """
        names = self.names
        if names is None:
            numbered = all(name.isascii() and name.isdecimal() for name in classes)
            names = {int(name): name for name in classes} if numbered else dict(enumerate(classes))
        labels, positions = {}, class_names.positions(classes)
        for photo in self.photos:
            if photo.label in labels:
                continue
            name = names.get(photo.label)
            if name is None or comparable(name) not in positions:
                label = f"label {photo.label}{'' if name is None else f', {printable(name)},'}"
                raise DataError(
                    f"{printable(str(root / photo.path))} has the {label} which is none of the {len(classes)} classes: "
                    f"{first_few(classes, 10)}"
                )
            labels[photo.label] = positions[comparable(name)]
        return labels


def archives(folder: Path) -> list[Path]:
    """Return the archives in a folder, sorted. Raises DataError for compressed ones, whose photos have no position."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    packed = [name for name in names if _COMPRESSED.search(name)]
    if packed:
        raise DataError(
            f"{printable(str(folder / packed[0]))} is compressed: unpack it to a .tar, as photos in shards are read "
            "where they stand"
        )
    return [folder / name for name in names if name.endswith(".tar")]


def archive_of(path: str) -> str:
    """Return the archive in a photo's path; no folder above it is named like one."""
    return path[: path.index(".tar/") + len(".tar")]


def read(root: Path, folder: Path, memory: Path | None = None) -> Shards:
    """Return the photos of the archives in `folder`, which is `root` or in it; paths are relative to `root`.

    `memory` is a folder of remembered scans: archives that have not changed since are not scanned again.
    Raises DataError where an archive is damaged or no archive, or a photo has no label or several.
    """
    scans = _scans(folder, memory)
    photos, unlabelled, alone = [], [], []
    for path, scan in scans.items():
        name, (mtime, *others) = path.relative_to(root).as_posix(), scan[1:4]
        photos += [
            Photo(f"{name}/{file}", at, size, Stamp(mtime + at, *others), label)
            for file, at, size, label in scan.photos
        ]
        unlabelled += [f"{name}/{file}" for file in scan.unlabelled]
        alone += [f"{name}/{file}" for file in scan.alone]
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
    return Shards(photos=photos, names=_names(root, folder), num_hidden=sum(scan.num_hidden for scan in scans.values()))


def forget(memory: Path) -> int:
    """Delete all remembered scans in a folder, where that is possible; return the bytes freed."""
    freed = 0
    for path in memory.glob(SCANS.format("*")):
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


class _Scan(NamedTuple):
    """Content of an archive."""

    size: int
    """Bytes of the archive."""
    mtime: int
    """Modification time of the archive in nanoseconds."""
    ctime: int
    inode: int
    photos: list[list[Any]]
    """Name, offset, size and label of each photo."""
    unlabelled: list[str]
    """Names of photos without a label."""
    alone: list[str]
    """Names of labels without a photo."""
    num_hidden: int


def _scans(folder: Path, memory: Path | None) -> dict[Path, _Scan]:
    """Return the scan of each archive in a folder: the remembered one, or a new one that is remembered."""
    paths = archives(folder)
    file = memory and memory / SCANS.format(hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16])
    known = _remembered(file) if file else {}

    def scan(path: Path) -> _Scan:
        with os_error_as(f"{printable(str(path))} cannot be read", kind=DataError):
            info = path.stat()
        old = known.get(path.name)
        return old if old and old[:4] == (info.st_size, *Stamp.of(info)) else _scan(path, info)

    with ThreadPoolExecutor(THREADS) as pool:
        scans = dict(zip(paths, pool.map(scan, paths), strict=True))
    found = {path.name: scan for path, scan in scans.items()}
    if file and found != known:
        with contextlib.suppress(OSError):  # a folder that cannot be written: the next run scans again
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write(file, json.dumps({"format": FORMAT, "archives": found}))
    return scans


def _remembered(file: Path) -> dict[str, _Scan]:
    """Return archive -> remembered scan; {} where the file is missing or not as `_scans` writes it."""
    content = files.read_json(file)
    try:
        known = {name: _Scan(*values) for name, values in content["archives"].items()}
    except (TypeError, KeyError, AttributeError):
        return {}
    return known if content.get("format") == FORMAT and all(map(_is_whole, known.values())) else {}


def _is_whole(scan: _Scan) -> bool:
    """Return whether a remembered scan is plain data of the right kinds, with all photos inside the archive."""
    lists = (scan.photos, scan.unlabelled, scan.alone)
    if not all(type(number) is int for number in (*scan[:4], scan.num_hidden)):
        return False
    if not all(type(each) is list for each in lists) or not all(type(name) is str for name in chain(*lists[1:])):
        return False
    return all(
        type(photo) is list
        and list(map(type, photo)) == [str, int, int, int]
        and min(photo[1:]) >= 0
        and photo[1] + photo[2] <= scan.size
        for photo in scan.photos
    )


def _scan(archive: Path, info: os.stat_result) -> _Scan:
    shown = printable(str(archive))
    photos: dict[str, tar.Entry] = {}
    labels: dict[str, int] = {}
    num_hidden = 0
    try:
        with archive.open("rb") as file:
            for entry in tar.entries(archive):
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
        why = "it is compressed" if packed else str(error)
        raise DataError(f"{shown} cannot be used as a shard: {why}; make or download it again") from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from None
    return _Scan(
        size=info.st_size,
        **Stamp.of(info)._asdict(),
        photos=[[entry.name, entry.offset, entry.size, labels[s]] for s, entry in photos.items() if s in labels],
        unlabelled=[entry.name for sample, entry in photos.items() if sample not in labels],
        alone=[f"{sample}.cls" for sample in labels if sample not in photos],
        num_hidden=num_hidden,
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _sample(name: str) -> str:
    """Return the sample that a file belongs to: its folder and its name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(content: bytes, entry: tar.Entry, archive: str) -> int:
    number = _LABEL.fullmatch(content)
    if not number or entry.size != len(content):
        raise DataError(f"{archive}, {printable(entry.name)}: expected a whole number from 0 on, got {content[:20]!r}")
    return int(number[1])


def _names(root: Path, folder: Path) -> dict[int, str] | None:
    """Return number -> class from classes.txt in the folder, the root or beside the training shards; None without."""
    path = next((path for place in (folder, root, root / "train") if (path := place / CLASSES).is_file()), None)
    if path is None:
        return None
    shown = printable(str(path))
    with os_error_as(f"{shown} cannot be read", kind=DataError):
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    names: dict[str, int] = {}
    for number, line in enumerate(lines):
        if not line.strip() or names.setdefault(line, number) != number:
            what = f"'{printable(line)}' is there twice" if line.strip() else "the line is empty"
            raise DataError(f"{shown}, line {number + 1}: expected the name of class {number}, but {what}")
    return dict(enumerate(lines))


def _many(names: Sequence[str], one: str, more: str) -> str:
    return f"1 {one}" if len(names) == 1 else f"{len(names):,} {more}"
