"""Files of a cache: header and pixels; the journal has a module of its own."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.data import journal_files
from fastcnn.data.arrays import Pixels, Positions
from fastcnn.data.index import Index
from fastcnn.data.journal import Journal, facts
from fastcnn.errors import warn
from fastcnn.storage import files, locks

FORMAT = 3
"""2 lacked ctime, inode and digest, so a file replaced under its old time was not seen: such a cache is made anew."""

READ_BYTES = 2**21  # read at once: one call a row of 32 px costs more than its bytes

CHUNK = 512  # photos between two writes: an interrupted build loses at most these

_TRANSIENT = frozenset({"unreadable", "decoder killed"})  # verdicts on the moment, not the file: tried again

Rows = npt.NDArray[np.int64]
"""(n,) rows of pixels.bin."""


class Place(NamedTuple):
    """Where the photos of a chunk are written: the row of the first, and the segment of the journal."""

    row: int
    segment: int


class CacheFiles:
    """The files in the folder of a cache, the header that they must have, and the time limit of a photo in seconds."""

    def __init__(self, folder: Path, header: dict[str, Any], decode_timeout: float) -> None:
        self.folder, self.header, self.decode_timeout = folder, header, decode_timeout
        self.pixels = folder / "pixels.bin"
        self.keeps_pixels: bool = header.get("pixels", True)
        self.image_size: int = header["image_size"]
        self.row_bytes: int = self.image_size**2 * 3

    def num_rows(self) -> int:
        """Return the number of whole rows of pixels."""
        return self.pixels.stat().st_size // self.row_bytes if self.pixels.exists() else 0

    def ensure_header(self, unwritable: OSError | None) -> None:
        """Write the header of a new cache; where another one stands, delete the files of other photos under it.

        Raises `unwritable`, the reason why nothing can be written, where that would be necessary.
        """
        found = read_header(self.folder)
        if found == self.header:
            return
        if unwritable:
            raise unwritable
        old = [
            path
            for name in (journal_files.NAME, journal_files.INDEX_NAME, self.pixels.name)
            if (path := self.folder / name).exists()
        ] + journal_files.segments(self.folder)
        if old or found:
            other = next((name for name in self.header if found.get(name) != self.header[name]), "format")
            why = f"its {other} is another" if found else "its header is damaged"
            warn(f"the cache {self.folder} cannot be used ({why}): decoding every photo again")
        for path in old:  # unlinked, not truncated: a process that reads them can go on
            path.unlink()
        files.write(self.folder / "cache.json", json.dumps(self.header, indent=1))

    def find_missing(self, current: Positions, known: Journal) -> Positions:
        """Return the positions of the photos without an entry of their file as it is, or without its row of pixels.

        current: (N,) position of each photo in the journal, -1 for one that is not there as it is.
        """
        rows = known.rows[current] if len(known) else current
        noted = [at for at in known.notes if known.reason(at)]
        unusable = np.zeros(len(known) + 1, np.bool_)
        unusable[noted] = True
        again = np.zeros_like(unusable)
        again[[at for at in noted if known.reason(at) in _TRANSIENT or self._has_more_time(known.notes[at])]] = True
        kept = (current >= 0) & ~unusable[current] & self.keeps_pixels
        verdict = (current >= 0) & ~kept & (rows == -1) & ~again[current]
        lost = kept & ((rows < 0) | (rows >= self.num_rows()))
        if count := np.count_nonzero(lost):
            some = "1 photo" if count == 1 else f"{count:,} photos"
            warn(f"the cache {self.folder} has lost the pixels of {some}: decoding them again")
        return np.flatnonzero(~(kept | verdict) | lost)

    def _has_more_time(self, note: Mapping[str, Any]) -> bool:
        """Return whether the photo took longer than a time limit that is higher now."""
        return note["reason"] == "decoder hung" and bool(note.get("decode_timeout", 0) < self.decode_timeout)

    def write_chunk(
        self,
        index: Index,
        photos: Positions,
        pixels: Pixels,
        verdicts: Sequence[pipelines.Verdict],
        digests: Sequence[str],
        place: Place,
    ) -> None:
        """Write the rows of photos, then a line for each: a line is never there without its row.

        The row of an unusable photo holds zeros, so that a rank's rows do not depend on the verdicts of others.
        """
        if self.keeps_pixels:
            self.write_rows(place.row, pixels)
        entries = []
        chunk = zip(photos, verdicts, pixels, digests, strict=True)
        for row, (i, verdict, image, digest) in enumerate(chunk, place.row):
            kept = self.keeps_pixels and verdict.ok
            entry: dict[str, Any] = {
                **facts(index, i),
                "digest": digest,
                "row": row if kept else -1,
                "crc": zlib.crc32(image) if kept else 0,
                "reason": verdict.reason,
            }
            if verdict.warning:
                entry["damage"] = verdict.warning
            if verdict.reason == "decoder hung":  # asked again by a run that gives it more time
                entry["decode_timeout"] = self.decode_timeout
            entries.append(entry)
        journal_files.append(self.folder, entries, place.segment)

    def map_rows(self) -> tuple[Pixels, int | None]:
        """Return the rows as (R, size, size, 3) uint8, memory-mapped, and the inode of their file."""
        shape = (self.num_rows(), self.image_size, self.image_size, 3)
        if shape[0] == 0:
            return np.zeros(shape, np.uint8), None
        with self.pixels.open("rb") as file:
            locks.share(file.fileno())  # for as long as the map lives: it keeps the file open
            return np.memmap(file, np.uint8, "r", shape=shape), os.fstat(file.fileno()).st_ino

    def end_row(self) -> int:
        """Return the number of the row behind all others, one that an interrupted build left cut short among them."""
        return -(-self.pixels.stat().st_size // self.row_bytes) if self.pixels.exists() else 0

    def write_rows(self, row: int, pixels: Pixels) -> None:
        """Write rows from `row` on, which may lie behind the end of the file."""
        self.pixels.touch()
        with self.pixels.open("r+b") as file:  # not the map: a full disk is an error here, a SIGBUS there
            file.seek(row * self.row_bytes)
            file.write(pixels.data)


def folders_in(parent: Path) -> list[Path]:
    """Return the folders of the caches in a folder."""
    return sorted(path.parent for path in parent.glob("*/cache.json"))


def read_header(folder: Path) -> dict[str, Any]:
    """Return the strings and whole numbers in cache.json; {} where it cannot be read."""
    header = files.read_json(folder / "cache.json")
    return {name: value for name, value in header.items() if isinstance(value, str | int)}


def read_row(file: io.FileIO, row: int, out: Pixels) -> bool:
    """Write a row of pixels.bin into `out`; return whether the file is long enough."""
    file.seek(int(row) * out.nbytes)
    return file.readinto(out.data) == out.nbytes


def read_rows(file: io.FileIO, rows: Rows, out: Pixels) -> bool:
    """Write rows of pixels.bin into `out`, those that lie side by side at once; return whether the file is long enough.

    rows: (n,) numbers; out: (n, size, size, 3).
    """
    order = np.argsort(rows, kind="stable")  # in the order of the disk
    most = max(1, READ_BYTES // out[:1].nbytes)
    apart = (np.diff(rows[order]) != 1) | (np.diff(order) != 1)
    cuts = np.flatnonzero(apart | (np.arange(1, len(rows)) % most == 0)) + 1
    starts, ends = [0, *cuts.tolist()], [*cuts.tolist(), len(rows)]
    firsts, places = rows[order[starts]].tolist(), order[starts].tolist()
    for start, end, row, place in zip(starts, ends, firsts, places, strict=True):
        part = out[place : place + end - start]
        file.seek(row * out[:1].nbytes)
        if file.readinto(part.data) != part.nbytes:
            return False
    return True


def chunks_of(positions: Positions, size: int) -> list[Positions]:
    """Return consecutive parts of `size` elements; the last may be shorter."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]
