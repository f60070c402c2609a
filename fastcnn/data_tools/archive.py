"""Photos in a zip or tar file: unpacked once, into a folder beside it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fastcnn.data_tools import unzip
from fastcnn.errors import FastCNNError, os_error_as
from fastcnn.storage.files import check_space, filling, read_json
from fastcnn.storage.locks import locked
from fastcnn.system.console import Console
from fastcnn.system.text import printable
from pipelines.meant import may_hold_photos

MARKER = ".unpacked.json"
"""File in a folder that was unpacked: size and time of the archive."""

_TARS: dict[str, Callable[..., Any]] = {
    ".tar": open,
    **dict.fromkeys((".tar.gz", ".tgz"), gzip.open),
    **dict.fromkeys((".tar.bz2", ".tbz2"), bz2.open),
    **dict.fromkeys((".tar.xz", ".txz"), lzma.open),
}
SUFFIXES = (".zip", *_TARS)


def unpacked(data: str, console: Console | None = None) -> str:
    """Return a folder of photos: `data` itself, or where that is an archive, the folder that it is unpacked into.

    The folder lies beside the archive and has its name without the suffix. It is made once; a folder that only wraps
    another in it is stepped through. Raises DataError for a damaged or unsafe archive, FastCNNError where it cannot be
    written or something else has that name.
    """
    path, console = Path(data), console or Console(quiet=True)
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    if not suffix or not path.is_file():
        return data
    folder = path.with_name(path.name[: -len(suffix)])
    made_of = {"bytes": path.stat().st_size, "mtime": path.stat().st_mtime_ns}

    def wait() -> None:
        console.line(f"another command is unpacking {printable(str(path))}: waiting for it")

    advice = "; free some space, or unpack it elsewhere and give that folder"
    with (
        os_error_as(f"cannot unpack {printable(str(path))} beside it", advice),
        locked(folder.with_name(f".{folder.name}.lock"), wait, remove=True),
    ):
        if not folder.exists():
            _unpack(path, suffix, folder, made_of, console)
        elif read_json(folder / MARKER) != made_of:
            raise FastCNNError(
                f"{printable(str(folder))} is there already and was not unpacked from {printable(path.name)}: "
                "give that folder as DATA, or move it away"
            )
    folder = _without_wrappers(folder)
    console.line(f"photos of {printable(path.name)} in {printable(str(folder))}")
    return str(folder)


def _unpack(path: Path, suffix: str, folder: Path, made_of: dict[str, int], console: Console) -> None:
    """Unpack beside `folder` and rename, so that half an archive is never found there."""
    with filling(folder) as beside, console.progress("unpacking", "files") as progress:
        if suffix == ".zip":
            with unzip.opened(path, "get it again") as archive:
                members = unzip.files(archive)
                check_space(folder.parent, sum(each.file_size for each in members.values()), "the archive")
                unzip.unpack(archive, members, beside, progress)
        else:
            _untar(path, _TARS[suffix], beside)
        (beside / MARKER).write_text(json.dumps(made_of), encoding="utf-8")
        beside.rename(folder)


def _untar(path: Path, opener: Callable[..., Any], folder: Path) -> None:
    """Write the regular files of a tar file below an empty folder, under the same rules as those of a zip file."""
    with unzip.explained(path, "get it again"), opener(path, "rb") as content:
        limited = _Limited(content, max(unzip.ALWAYS_FINE, unzip.MAX_GROWTH * path.stat().st_size))
        with tarfile.open(fileobj=limited, mode="r|", errors="surrogateescape") as archive:  # type: ignore[call-overload]
            for member in archive:
                if member.isdir():
                    continue
                name = unzip.safe_path(member.name)
                if not member.isreg():
                    raise unzip.Refused(f"'{name}' is a link or a device")
                source = archive.extractfile(member)
                if source is None or unzip.is_junk(str(name)):
                    continue
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    with (folder / name).open("xb") as target:
                        shutil.copyfileobj(source, target, unzip.CHUNK)
                except FileExistsError:
                    raise unzip.Refused(f"'{name}' is in it twice") from None


class _Limited:
    """File that refuses to give more than `limit` bytes, which no archive of photos has."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.limit = file, limit

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.limit -= len(content)
        if self.limit < 0:
            raise unzip.Refused(f"it unpacks to more than {unzip.MAX_GROWTH} times its size")
        return content


def _without_wrappers(folder: Path) -> Path:
    """Return the folder itself, or the one that all its photos are in: archives often wrap their classes in one."""
    while True:
        inside = [path for path in folder.iterdir() if may_hold_photos(path.name)]
        if len(inside) != 1 or not inside[0].is_dir() or not any(path.is_dir() for path in inside[0].iterdir()):
            return folder
        folder = inside[0]
