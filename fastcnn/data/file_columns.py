"""Files of class folders as columns: their paths as one buffer, and their facts as numbers."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastcnn.data.path_list import PathList
from fastcnn.data.walk import Skipped, files_below

FACTS = ("sizes", "mtimes", "ctimes", "inodes")
"""Columns of an index that are facts of files."""


def _columns() -> list[array[int]]:
    return [array("q") for _ in FACTS]


@dataclass
class FileColumns:
    """Files of some folders. They grow folder by folder, so that nothing but one folder is in memory twice."""

    letters: bytearray = field(default_factory=bytearray)
    """The paths, one behind the other."""
    ends: array[int] = field(default_factory=lambda: array("q"))
    """Where each path ends."""
    facts: list[array[int]] = field(default_factory=_columns)
    """Columns named in `FACTS`."""
    counts: list[int] = field(default_factory=list)
    """Files of each folder."""
    skipped: Skipped = field(default_factory=Skipped)
    """What was left out."""

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def of(cls, root: Path, folder: Path) -> FileColumns:
        """Return the files that may be photos of a folder, sorted by path."""
        skipped, found, numbers = Skipped(), list[str](), array("q")
        for some, their_numbers in files_below(root, folder, skipped):
            found += some
            numbers += their_numbers
        order = sorted(range(len(found)), key=found.__getitem__)
        paths = PathList.of([found[i] for i in order])
        facts = [
            array("q", column.tobytes()) for column in np.frombuffer(numbers, np.int64).reshape(-1, len(FACTS))[order].T
        ]
        return cls(bytearray(paths.letters), array("q", paths.ends.tobytes()), facts, [len(paths)], skipped)

    def join(self, later: FileColumns) -> None:
        """Append the files of the folders that follow."""
        self.ends.frombytes((np.frombuffer(later.ends, np.int64) + len(self.letters)).tobytes())
        self.letters += later.letters
        for column, values in zip(self.facts, later.facts, strict=True):
            column.extend(values)
        self.counts += later.counts
        self.skipped += later.skipped
