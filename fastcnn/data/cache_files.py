"""Files of a cache: header, journal and pixels."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.data.feeds import Pixels, Positions
from fastcnn.data.index import Index
from fastcnn.errors import warn
from fastcnn.storage import files, locks

FORMAT = 3
"""2 lacked ctime, inode and digest, so a file replaced under its old time was not seen: such a cache is made anew."""

READ_BYTES = 2**21  # read at once: one call a row of 32 px costs more than its bytes

CHUNK = 512  # photos between two writes: an interrupted build loses at most these

_TRANSIENT = frozenset({"unreadable", "decoder killed"})  # verdicts on the moment, not the file: tried again
_KINDS = {
    **{"path": str, "size": int, "mtime": int, "ctime": int, "inode": int, "digest": str},
    **{"row": int, "crc": int, "reason": str},
}
_SUM = b', "sum": '

Journal = dict[str, dict[str, Any]]
"""Path -> its entry: path, size, mtime, ctime, inode, digest, row, crc, reason, perhaps damage, or the time limit."""

Rows = npt.NDArray[np.int64]
"""(n,) rows of pixels.bin."""

_Sequence = TypeVar("_Sequence", Positions, Sequence[tuple[int, int, int]])


class CacheFiles:
    """The files in the folder of a cache, the header that they must have, and the time limit of a photo in seconds."""

    def __init__(self, folder: Path, header: dict[str, Any], decode_timeout: float) -> None:
        self.folder, self.header, self.decode_timeout = folder, header, decode_timeout
        self.pixels, self.journal = folder / "pixels.bin", folder / "photos.jsonl"
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
        old = [path for path in (self.journal, self.pixels) if path.exists()]
        if old or found:
            other = next((name for name in self.header if found.get(name) != self.header[name]), "format")
            why = f"its {other} is another" if found else "its header is damaged"
            warn(f"the cache {self.folder} cannot be used ({why}): decoding every photo again")
        for path in old:  # unlinked, not truncated: a process that reads them can go on
            path.unlink()
        files.write(self.folder / "cache.json", json.dumps(self.header, indent=1))

    def find_missing(self, index: Index, journal: Journal) -> Positions:
        """Return the positions of the photos without an entry, or with an outdated one or damaged pixels."""
        missing, kept = [], []  # kept: (row, position, checksum) of those whose pixels are verified
        for i, photo in enumerate(index.paths):
            entry = journal.get(photo)
            if entry is None or not is_current(entry, index, i):
                missing.append(i)
            elif self.keeps_pixels and not entry["reason"]:
                kept.append((entry["row"], i, entry["crc"]))
            elif entry["row"] != -1 or entry["reason"] in _TRANSIENT or self._has_more_time(entry):
                missing.append(i)
        damaged = self._find_damaged(sorted(kept))
        if damaged:
            some = "1 photo" if len(damaged) == 1 else f"{len(damaged):,} photos"
            warn(f"the pixels of {some} in the cache {self.folder} are damaged: decoding them again")
        return np.array(sorted(missing + damaged), np.intp)

    def _has_more_time(self, entry: dict[str, Any]) -> bool:
        """Return whether the photo took longer than a time limit that is higher now."""
        return entry["reason"] == "decoder hung" and bool(entry.get("decode_timeout", 0) < self.decode_timeout)

    def append_chunk(
        self,
        index: Index,
        photos: Positions,
        pixels: Pixels,
        verdicts: Sequence[pipelines.Verdict],
        digests: Sequence[str],
    ) -> None:
        """Append the rows of usable photos, then a line for every photo: a line is never there without its row."""
        good = np.array([self.keeps_pixels and verdict.ok for verdict in verdicts])
        row = self.append_rows(pixels[good]) if self.keeps_pixels else 0
        entries = []
        for i, verdict, image, kept, digest in zip(photos, verdicts, pixels, good, digests, strict=True):
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
            row += bool(kept)
            entries.append(entry)
        self.append_entries(entries)

    def append_entries(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append a line for each entry to the journal."""
        lines = b"".join(map(journal_line, entries))
        if not lines:
            return
        with self.journal.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a line that was cut short must not swallow the first of these
                    file.write(b"\n")
            file.write(lines)

    def map_rows(self) -> tuple[Pixels, int | None]:
        """Return the rows as (R, size, size, 3) uint8, memory-mapped, and the inode of their file."""
        shape = (self.num_rows(), self.image_size, self.image_size, 3)
        if shape[0] == 0:
            return np.zeros(shape, np.uint8), None
        with self.pixels.open("rb") as file:
            locks.share(file.fileno())  # for as long as the map lives: it keeps the file open
            return np.memmap(file, np.uint8, "r", shape=shape), os.fstat(file.fileno()).st_ino

    def _find_damaged(self, kept: Sequence[tuple[int, int, int]]) -> list[int]:
        """Return the positions, of `kept` (row, position, checksum), of rows that no longer have their checksum."""
        num_rows = self.num_rows()

        def check(part: Sequence[tuple[int, int, int]]) -> list[int]:
            pixels = np.empty(self.row_bytes, np.uint8)
            with self.pixels.open("rb", buffering=0) as file:
                return [
                    i
                    for row, i, checksum in part
                    if not (0 <= row < num_rows and read_row(file, row, pixels) and zlib.crc32(pixels.data) == checksum)
                ]

        if not num_rows:
            return [i for _, i, _ in kept]
        with ThreadPoolExecutor() as threads:  # reading and summing release the interpreter's lock
            return [i for part in threads.map(check, chunks_of(kept, CHUNK)) for i in part]

    def append_rows(self, pixels: Pixels) -> int:
        """Append rows; return the number of the first."""
        with self.pixels.open("ab") as file:  # not the map: a full disk is an error here, a SIGBUS there
            row = -(-file.tell() // self.row_bytes)
            file.truncate(row * self.row_bytes)  # completes the row that an interrupted build left cut short
            file.write(pixels.data)
        return row


def facts(index: Index, photo: int) -> dict[str, Any]:
    """Return what an entry says of a photo's file; while it agrees, the file is taken to be the same, unread."""
    columns = {"size": index.sizes, "mtime": index.mtimes, "ctime": index.ctimes, "inode": index.inodes}
    return {"path": index.paths[photo], **{name: int(column[photo]) for name, column in columns.items()}}


def is_current(entry: dict[str, Any] | None, index: Index, photo: int) -> bool:
    """Return whether an entry is that of a photo's file as it is."""
    if entry is None:
        return False
    return (entry["size"], entry["mtime"], entry["ctime"], entry["inode"]) == (
        index.sizes[photo],
        index.mtimes[photo],
        index.ctimes[photo],
        index.inodes[photo],
    )


def folders_in(parent: Path) -> list[Path]:
    """Return the folders of the caches in a folder."""
    return sorted(path.parent for path in parent.glob("*/cache.json"))


def read_header(folder: Path) -> dict[str, Any]:
    """Return the strings and whole numbers in cache.json; {} where it cannot be read."""
    try:
        header = json.loads((folder / "cache.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(header, dict):
        return {}
    return {name: value for name, value in header.items() if isinstance(value, str | int)}


def is_read(folder: Path) -> bool:
    """Return whether a process has mapped the pixels of a cache."""
    return locks.is_shared(folder / "pixels.bin")


def read_journal(folder: Path) -> Journal:
    """Return the last whole entry of each photo."""
    return {entry["path"]: entry for entry in _whole_lines(folder) if _is_entry(entry, _KINDS)}


def read_sizes(folder: Path) -> dict[str, int]:
    """Return path -> size in bytes of each photo, in a cache of any format."""
    return {
        entry["path"]: entry["size"] for entry in _whole_lines(folder) if _is_entry(entry, {"path": str, "size": int})
    }


def journal_line(entry: dict[str, Any]) -> bytes:
    """Return an entry as a line that ends in its own checksum."""
    body = json.dumps(entry).encode()[:-1]
    return body + _SUM + str(zlib.crc32(body)).encode() + b"}\n"


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


def chunks_of(sequence: _Sequence, size: int) -> list[_Sequence]:
    """Return consecutive parts of `size` elements; the last may be shorter."""
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


def _whole_lines(folder: Path) -> Iterator[Any]:
    """Yield the value in each line of a journal that has its checksum."""
    with contextlib.suppress(FileNotFoundError), (folder / "photos.jsonl").open("rb") as lines:
        for line in lines:
            body, _, checksum = line.rstrip(b"\n}").rpartition(_SUM)
            if checksum == str(zlib.crc32(body)).encode():
                with contextlib.suppress(ValueError, RecursionError):
                    yield json.loads(body + b"}")


def _is_entry(entry: object, kinds: Mapping[str, type]) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(name)) is kind for name, kind in kinds.items())
        and isinstance(entry.get("decode_timeout", 0), int | float)
    )
