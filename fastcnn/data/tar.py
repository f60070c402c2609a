"""What is in a tar archive: the regular files, by their headers alone.

Python's tarfile takes three times as long, silently ends at a damaged header, goes round in circles where a size is
negative (3.11.7), and reads whatever length a header claims. A test compares what the two find.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LONGEST = 2**20  # bytes of a long name or an extended header
PADDING = 2**20  # bytes after the end that are looked at: as a rule up to 10,240, all zero
SPARSE = "it holds a sparse file: pack it again without --sparse"

_ZEROS = bytes(BLOCK)
_FILES, _LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL = b"\x0007", b"L", b"K", b"xX", b"g"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: their size says nothing of what follows


class Damaged(Exception):
    """No tar archive, or one that is cut short, or holds what cannot be read in one piece; the message says which."""


class Entry(NamedTuple):
    """A regular file in an archive."""

    name: str
    """As it is there; bytes that are no UTF-8 as `os.fsdecode` has them."""
    offset: int
    """Where its bytes begin."""
    size: int


def entries(file: BinaryIO) -> Iterator[Entry]:
    """Yield the regular files of an archive, in their order; links, folders and the like are passed over.

    Between two, `file` may be read elsewhere. Raises Damaged, also where the end of the archive is missing: what was
    written after it cannot be known. Raises OSError.
    """
    end = os.fstat(file.fileno()).st_size
    at, long_name, long_size = 0, None, None
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == _ZEROS:
            if file.read(PADDING).strip(b"\0"):
                raise Damaged(f"something follows its end at byte {at:,}: two archives in one file?")
            return
        if len(header) < BLOCK:
            raise Damaged(f"it is cut short: no end at byte {end:,}" if at else "no tar archive")
        _check(header, at)
        kind, size = header[156:157], _number(header[124:136], at)
        if kind in _WITHOUT_DATA or (kind == b"\0" and header[:100].partition(b"\0")[0].endswith(b"/")):
            at, long_name, long_size = at + BLOCK, None, None
            continue
        if kind in _FILES and long_size is not None:
            size = long_size
        start, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if start + size > end:
            raise Damaged(f"it is cut short: {start + size:,} bytes or more are {end:,}")
        if kind == b"S":
            raise Damaged(SPARSE)
        if kind in _FILES:
            yield Entry(_name(header) if long_name is None else long_name, start, size)
            long_name, long_size = None, None
        elif kind in _LONG_NAME + _EXTENDED:
            if size > LONGEST:
                raise Damaged(f"a name of {size:,} bytes at byte {start:,}")
            body = file.read(size)
            if kind == _LONG_NAME:
                long_name = _text(body.partition(b"\0")[0])
                continue
            name, long_size = _extended(body, start)
            long_name = long_name if name is None else name
        elif kind not in _LONG_LINK + _GLOBAL:  # some system's own
            long_name, long_size = None, None


def _check(header: bytes, at: int) -> None:
    """Raise Damaged where the checksum of a header is wrong. It counts its own eight bytes as spaces."""
    said, found = _number(header[148:156], at), sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if said != found and said != found - 256 * sum(byte > 127 for byte in header):  # as some old writers count
        raise Damaged(f"a header is damaged at byte {at:,}" if at else "no tar archive")


def _number(field: bytes, at: int) -> int:
    """Return an octal number, or where it was too large for that, the binary one."""
    digits = field.rstrip(b" \0").lstrip(b" ")
    try:
        if digits.isdigit():  # no sign, no underscore
            return int(digits, 8)
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        if not digits:
            return 0
        digits = field.partition(b"\0")[0].strip()  # something stands behind it
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:  # 8 or 9
        pass
    raise Damaged(f"a header is damaged at byte {at:,}" if at else "no tar archive")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345] != 0:  # GNU's own format has times there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _extended(body: bytes, at: int) -> tuple[str | None, int | None]:
    """Return the path and the size that an extended header has, None for what it lacks."""
    path, size, start = None, None, 0
    body = body.rstrip(b"\0")
    while start < len(body):
        digits = body[start : start + 20].partition(b" ")[0]
        stop = start + int(digits) if digits.isdigit() else start
        keyword, equals, value = body[start + len(digits) + 1 : stop].partition(b"=")
        start = stop
        if keyword.startswith(b"GNU.sparse."):
            raise Damaged(SPARSE)
        if not equals or not value.endswith(b"\n") or (keyword == b"size" and not value[:-1].isdigit()):
            raise Damaged(f"an extended header is damaged at byte {at:,}")
        if keyword == b"path":
            path = _text(value[:-1].replace(b"\0", b""))
        if keyword == b"size":
            size = int(value[:20])
    return path, size


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
