"""Files that are there whole or not at all, whatever ends the process or fills the disk meanwhile."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".{}.partial"


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file so that `path` always holds a whole one: the old until the new is on the disk.

    Text is UTF-8; names that are none are written as the bytes that they are. Raises OSError.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that gets the name `path` when it is whole and on the disk, and is deleted where that fails."""
    temporary = path.with_name(PARTIAL.format(path.name))
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows, the names of the columns first, as `write` does."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write(path, text.getvalue())


def is_partial(path: Path) -> bool:
    """Return whether a file is what a killed `write` left."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: without it a rename may be undone by a power failure."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
