"""Files and folders made whole or not at all, whatever ends the process or fills the disk; and free disk space."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastcnn.errors import FastCNNError


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file so that `path` always holds a whole one: the old until the new is on the disk.

    Text is written as UTF-8; surrogate escapes become the bytes that they stand for. Raises OSError.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is renamed to `path` once it is whole and on the disk, and deleted where that fails."""
    temporary = path.with_name(f".{path.name}.partial")
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


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, to be renamed to it once it is whole; what is not renamed is deleted."""
    beside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)  # left by a command that was killed
    beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows, the column names first, as `write` does."""
    write(path, csv_lines(rows))


def csv_lines(rows: Iterable[Sequence[object]]) -> bytes:
    """Return rows as CSV in UTF-8; surrogate escapes become the bytes that they stand for."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; {} where the file cannot be read, or is damaged or of another kind."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_partial(path: Path) -> bool:
    """Return whether a file was left by a `write` that was killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder`, or will hold it once it is made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def check_space(folder: Path, needed: int, what: str, advice: str = "choose another folder") -> None:
    """Raise FastCNNError where the disk of `folder` has less than `needed` bytes free for `what`."""
    free = free_bytes(folder)
    if needed > free:
        raise FastCNNError(
            f"{what} needs {needed / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB free: "
            f"free some space or {advice}"
        )


def _sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk: without it a power failure may undo a rename."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
