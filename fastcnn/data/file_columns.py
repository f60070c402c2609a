"""Files of class folders as columns: their paths as one buffer, and their facts as numbers."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from fastcnn.data.path_list import PathList
from fastcnn.data.walk import Skipped, files_below

FACTS = ("sizes", "mtimes", "ctimes", "inodes")
"""Columns of an index that are facts of files."""


def _columns(count: int = len(FACTS)) -> list[array[int]]:
    return [array("q") for _ in range(count)]


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

    def write(self, file: IO[bytes]) -> None:
        """Write the files as a line of JSON and the bytes of the columns, as `read` reads them."""
        skipped = [self.skipped.hidden, self.skipped.unreadable, self.skipped.others]
        head = {"files": len(self), "letters": len(self.letters), "counts": self.counts, "skipped": skipped}
        file.write(json.dumps(head).encode() + b"\n" + self.letters)
        for column in (self.ends, *self.facts):
            file.write(column.tobytes())

    @classmethod
    def read(cls, file: IO[bytes]) -> FileColumns:
        """Return what was written. Raises EOFError or ValueError where it is not whole."""
        head = json.loads(file.readline())
        letters, columns = bytearray(file.read(head["letters"])), _columns(1 + len(FACTS))
        for column in columns:
            column.fromfile(file, head["files"])
        hidden, unreadable, others = head["skipped"]
        return cls(letters, columns[0], columns[1:], head["counts"], Skipped(hidden, unreadable, Counter(others)))
