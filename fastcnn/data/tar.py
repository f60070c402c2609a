"""Files in a tar archive, found by Python's tarfile with the checks that it lacks.

tarfile (3.11) ends silently at a damaged header and at the end of a truncated archive, goes round in circles where a
size is negative, and allocates whatever length a header claims.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

MAX_HEADER = 2**20  # bytes of a long name or an extended header
PADDING = 2**20  # bytes after the end that are checked to be zero; usually there are up to 10,240


class Damaged(Exception):
    """A file that is no tar archive, or is truncated, damaged or not readable in one piece; the message says which."""


class Entry(NamedTuple):
    """A regular file in an archive."""

    name: str
    """Its name; bytes that are not UTF-8 are decoded as `os.fsdecode` does."""
    offset: int
    """Position of its first byte."""
    size: int


def entries(path: Path) -> list[Entry]:
    """Return the regular files of an archive, in their order. Raises Damaged or OSError."""
    size, at = path.stat().st_size, 0
    found = []
    try:
        with (
            _HeaderFile(io.FileIO(path)) as file,
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive,
        ):
            for member in archive:
                if member.issparse() or any(name.startswith("GNU.sparse.") for name in member.pax_headers):
                    raise Damaged("it holds a sparse file: pack it again without --sparse")
                if member.size < 0 or archive.offset <= at:
                    raise Damaged(f"a header is damaged at byte {at:,}")
                at = archive.offset
                if at > size:
                    raise Damaged(f"it is cut short: {at:,} bytes or more are {size:,}")
                if member.isreg():
                    found.append(Entry(member.name, member.offset_data, member.size))
            at = archive.offset
            file.seek(at)
            _check_end(file.read(tarfile.BLOCKSIZE), file.read(PADDING), at, size)
    except (Damaged, OSError):
        raise
    except Exception as error:  # tarfile raises errors of many kinds for damaged headers
        if "unexpected end" in str(error):
            raise Damaged(f"it is cut short at byte {size:,}") from None
        raise Damaged(f"a header is damaged at byte {at:,} or later" if at else "no tar archive") from None
    return found


class _HeaderFile(io.BufferedReader):
    """A file of which no more than the length of a header is read at once."""

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes. Raises Damaged for more than a header has."""
        if size is None or not 0 <= size <= MAX_HEADER:
            raise Damaged(f"a header of {size:,} bytes at byte {self.tell():,}")
        return super().read(size)


def _check_end(block: bytes, padding: bytes, at: int, size: int) -> None:
    """Raise Damaged unless a block of zeros, and nothing else, is at the end that tarfile found."""
    if len(block) < tarfile.BLOCKSIZE:
        raise Damaged(f"it is cut short: no end at byte {size:,}" if at else "no tar archive")
    if block.strip(b"\0"):
        raise Damaged(f"a header is damaged at byte {at:,}")
    if padding.strip(b"\0"):
        raise Damaged(f"something follows its end at byte {at:,}: two archives in one file?")
