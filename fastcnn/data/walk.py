"""Folders in a folder, and the files below one that may be photos. Links are followed, but never in a circle."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastcnn.errors import DataError, os_error_as
from fastcnn.storage.own_folders import is_ours
from fastcnn.system.text import comparable, printable
from pipelines.meant import meant_as_photo, named_as_photo, of_the_system

_LARGEST = 2**63 - 1


class Stamp(NamedTuple):
    """Facts of a file that change with its content: what is at a path has not changed while all of them agree."""

    mtime: int
    """Modification time in nanoseconds."""
    ctime: int
    """Time, in nanoseconds, at which the system last changed the file's facts; no program can set it."""
    inode: int

    @classmethod
    def of(cls, info: os.stat_result, offset: int = 0) -> Stamp:
        """Return the stamp of a file, or of the part of it that begins at `offset`."""
        return cls(info.st_mtime_ns + offset, info.st_ctime_ns, info.st_ino & _LARGEST)


@dataclass
class Skipped:
    """What a walk has left out."""

    hidden: int = 0
    """Hidden files, and folders of the system and of ours."""
    unreadable: int = 0
    """Folders that cannot be read."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that nobody meant as photos: number by extension, with its dot."""

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped(self.hidden + other.hidden, self.unreadable + other.unreadable, self.others + other.others)


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without those of the system and without links to itself or above.

    Such a link would be a class of all photos. Raises DataError where it cannot be read.
    """
    with os_error_as(f"the folder {printable(str(folder))} cannot be read", kind=DataError):
        found = [
            folder / entry.name for entry in os.scandir(folder) if is_folder(entry) and not of_the_system(entry.name)
        ]
    here = folder.resolve()
    return sorted(path for path in found if not (path.is_symlink() and path.resolve() in (here, *here.parents)))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one to a place without permission
        return False


def visible_folders(folder: Path, exclude: Iterable[str] = ()) -> list[Path]:
    """Return the folders in a folder that are for photos: sorted, without hidden, excluded and our own ones."""
    left_out = set(map(comparable, exclude))
    return [
        path
        for path in folders_in(folder)
        if not path.name.startswith(".") and comparable(path.name) not in left_out and not _is_own(path)
    ]


def _is_own(folder: Path, depth: int = 3) -> bool:
    """Return whether a folder is a run, cache or sweep of ours, or holds nothing but such."""
    folders = []
    try:
        info = folder.stat()
        if (key := (info.st_dev, info.st_ino, info.st_mtime_ns)) in _with_files:
            return False
        if is_ours(folder):
            return True
        locked = (folder / ".lock").exists()  # by a run that has only begun
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    if not is_folder(entry):
                        _with_files.add(key)
                        return False  # at the first photo: class folders are long
                    folders.append(folder / entry.name)
    except OSError:
        return False
    return locked or (depth > 0 and bool(folders) and all(_is_own(one, depth - 1) for one in folders))


# Device, inode and mtime of folders that hold a file: each is looked at eight times by a run, for 0.4 ms if it is long.
_with_files: set[tuple[int, int, int]] = set()


def files_below(root: Path, folder: Path, skipped: Skipped) -> Iterator[tuple[list[str], array[int]]]:
    """Yield the files that may be photos of a folder, then of each folder below it; count the rest.

    Of each file its path below root, and its bytes, mtime, ctime and inode one behind the other. A broken link is
    yielded with zeros, so that it is reported with the photos that cannot be read.

    Plain strings, DirEntry and numbers instead of pathlib and tuples: a fourth of the time of a million files.
    """
    start = len(os.path.join(root, ""))  # noqa: PTH118
    below = folder.relative_to(root)  # root / "a" is "a" where root is "."
    stack = [(os.path.join(root, below) if below.parts else str(root), frozenset[tuple[int, int]]())]  # noqa: PTH118
    while stack:
        here, above = stack.pop()
        try:
            info = os.stat(here)  # noqa: PTH116
            entries = list(os.scandir(here))
        except OSError:
            skipped.unreadable += 1
            continue
        inode = (info.st_dev, info.st_ino)
        if inode in above:
            continue
        prefix = os.path.join(here, "")[start:].replace(os.sep, "/")  # noqa: PTH118
        paths, numbers = list[str](), array("q")
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                skipped.hidden += 1
            elif is_folder(entry):
                if of_the_system(name) or is_ours(entry.path):
                    skipped.hidden += 1
                else:
                    stack.append((entry.path, above | {inode}))
            elif not (named_as_photo(name) or meant_as_photo(entry.path)):
                skipped.others[PurePosixPath(name).suffix.lower()] += 1
            else:
                paths.append(prefix + name)
                try:
                    info = entry.stat()
                    numbers.extend((info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino & _LARGEST))
                except OSError:
                    numbers.extend((0, 0, 0, 0))
        if paths:
            yield paths, numbers
