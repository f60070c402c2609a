"""Files of a cache's journal: a line of JSON for each photo, and an index of them that is read in far less time.

The lines in photos.jsonl are what counts; each ends in its own CRC-32. photos.index holds the same as arrays, for the
bytes that the journal had when it was written. It is used only where it and those bytes have the CRC-32 that it names;
lines behind them are read as such. Where it is missing, damaged or another journal's, all lines are read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastcnn.data.index import Index
from fastcnn.data.journal import DIGEST_BYTES, FACTS, Digests, Journal, facts_of, joined, latest, of_entries
from fastcnn.data.path_list import PathList
from fastcnn.storage import files

NAME, INDEX_NAME = "photos.jsonl", "photos.index"

FEW_LINES = 1000
"""Lines that are read faster than an index is written and synced to the disk."""

_CHUNK = 65536  # lines made columns at once, which bounds the memory that takes
_READ_BYTES = 2**22
_FORMAT = 1  # of the index
_KINDS = {"path": str, **dict.fromkeys(FACTS, int), "digest": str, "row": int, "crc": int, "reason": str}
_PHOTO_BYTES = 8 + 8 * len(FACTS) + 8 + 4 + DIGEST_BYTES  # in the index, beside the path
_SUM = b', "sum": '


def read(folder: Path, index: Index | None = None) -> Journal:
    """Return the journal in the folder of a cache; an empty one where there is none.

    index: one whose paths and facts it may well have, in this order: it then shares their memory.
    """
    with contextlib.suppress(FileNotFoundError), (folder / NAME).open("rb") as file:
        journal, checksum = _read_index(folder, index), 0
        if journal:
            left = journal.num_bytes
            while left and (block := file.read(min(left, _READ_BYTES))):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
            if left or checksum != journal.checksum:
                journal, checksum = None, file.seek(0)
        lines = _Lines(file, checksum)
        entries = (entry for entry in map(_value, lines) if _is_entry(entry, _KINDS))
        later = latest(joined([of_entries(some) for some in iter(lambda: list(islice(entries, _CHUNK)), [])]))
        whole = journal.followed_by(later) if journal else later
        num_indexed = len(journal) if journal else 0
        return replace(whole, num_bytes=file.tell(), checksum=lines.checksum, num_indexed=num_indexed)
    return of_entries([])


def read_sizes(folder: Path) -> dict[str, int]:
    """Return path -> size in bytes of each photo, in a cache of any format."""
    with contextlib.suppress(FileNotFoundError), (folder / NAME).open("rb") as lines:
        kinds = {"path": str, "size": int}
        return {entry["path"]: entry["size"] for entry in map(_value, lines) if _is_entry(entry, kinds)}
    return {}


def append(folder: Path, entries: Iterable[Mapping[str, Any]], segment: int = 0) -> None:
    """Append a line for each entry to the journal, or to a segment of it, from 1 on, that another process writes."""
    _append(folder / (f"photos.{segment}.jsonl" if segment else NAME), b"".join(map(line, entries)))


def segments(folder: Path) -> list[Path]:
    """Return the segments of a journal that are not part of it yet."""
    return sorted(folder.glob("photos.*.jsonl"))


def join_segments(folder: Path) -> None:
    """Append the segments to the journal. Where it was interrupted, lines are there twice, which harms nothing."""
    for path in segments(folder):
        _append(folder / NAME, path.read_bytes())
        path.unlink()


def _append(path: Path, lines: bytes) -> None:
    if not lines:
        return
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a line that was cut short must not swallow the first of these
                file.write(b"\n")
        file.write(lines)


def line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as a line that ends in its own checksum."""
    body = json.dumps(entry).encode()[:-1]
    return body + _SUM + str(zlib.crc32(body)).encode() + b"}\n"


def write_index(folder: Path, journal: Journal) -> None:
    """Write the index of a journal as it was read, where many of its lines are not in the index yet.

    The caller holds the lock of the cache. An index that cannot be written is left out.
    """
    if not journal.num_bytes or len(journal) - journal.num_indexed < max(FEW_LINES, journal.num_indexed // 16):
        return
    columns: list[npt.NDArray[Any]] = [*journal.facts, journal.rows, journal.checksums, journal.digests.packed]
    parts = [journal.paths.ends.tobytes(), journal.paths.letters, *(column.tobytes() for column in columns)]
    head = {
        "format": _FORMAT,
        "photos": len(journal),
        "letters": len(journal.paths.letters),
        "journal_bytes": journal.num_bytes,
        "journal_crc": journal.checksum,
        "crc": functools.reduce(lambda checksum, part: zlib.crc32(part, checksum), parts, 0),
        "notes": [*journal.notes.items()],
    }
    with contextlib.suppress(OSError), files.writing(folder / INDEX_NAME) as file:
        file.write(line(head))
        file.writelines(parts)


def _read_index(folder: Path, index: Index | None) -> Journal | None:
    """Return the journal that the index holds; None where there is no whole one."""
    with contextlib.suppress(OSError), (folder / INDEX_NAME).open("rb") as file:
        head = _value(file.readline())
        numbers = ("format", "photos", "letters", "journal_bytes", "journal_crc", "crc")
        if not _is_entry(head, dict.fromkeys(numbers, int) | {"notes": list}) or head["format"] != _FORMAT:
            return None
        count, letters, checksum = head["photos"], head["letters"], 0
        left = os.fstat(file.fileno()).st_size - file.tell()
        if min(count, letters) < 0 or count * _PHOTO_BYTES + letters != left:
            return None

        def column(dtype: type[np.generic], *shape: int) -> npt.NDArray[Any]:
            nonlocal checksum
            values = np.fromfile(file, dtype, math.prod(shape)).reshape(shape)
            checksum = zlib.crc32(values.data, checksum)
            return values

        ends = column(np.int64, count)
        paths = PathList(file.read(letters), ends)
        checksum = zlib.crc32(paths.letters, checksum)
        if index is not None and index.paths == paths:
            paths = index.paths
        del ends
        facts = [_equal(facts_of(index)[at] if index else None, column(np.int64, count)) for at in range(len(FACTS))]
        rows = column(np.int64, count)
        checksums, packed = column(np.uint32, count), column(np.uint8, count, DIGEST_BYTES)
        if checksum == head["crc"] and _are_notes(head["notes"], count):
            return Journal(
                paths=paths,
                facts=facts,
                rows=rows,
                checksums=checksums,
                digests=Digests(packed),
                notes=dict(head["notes"]),
                num_bytes=head["journal_bytes"],
                checksum=head["journal_crc"],
            )
    return None


def _equal(known: npt.NDArray[np.int64] | None, own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a column, in the memory of one that may equal it."""
    return known if known is not None and np.array_equal(known, own) else own


class _Lines:
    """The lines of a file, and the CRC-32 of those that were read and of what came before them."""

    def __init__(self, file: BinaryIO, checksum: int) -> None:
        self.file, self.checksum = file, checksum

    def __iter__(self) -> Iterator[bytes]:
        while one := self.file.readline():
            self.checksum = zlib.crc32(one, self.checksum)
            yield one


def _value(one: bytes) -> Any:
    """Return the value in a line that has its checksum, else None."""
    body, _, checksum = one.rstrip(b"\n}").rpartition(_SUM)
    if checksum == str(zlib.crc32(body)).encode():
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(body + b"}")
    return None


def _is_entry(entry: object, kinds: Mapping[str, type]) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(name)) is kind for name, kind in kinds.items())
        and isinstance(entry.get("decode_timeout", 0), int | float)
    )


def _are_notes(notes: Iterable[object], count: int) -> bool:
    """Return whether these are pairs of a photo's position and what is noted of it."""
    return all(
        isinstance(pair, list)
        and len(pair) == 2
        and type(pair[0]) is int
        and 0 <= pair[0] < count
        and _is_entry({"reason": "", **pair[1]} if isinstance(pair[1], dict) else None, {"reason": str})
        for pair in notes
    )
