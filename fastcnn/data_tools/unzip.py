"""Safe unpacking of a zip file into one folder, even of a malicious one.

Every name and size is checked before the first byte is written. Only regular files are written, with default
permissions: no links, no devices, no modes.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from fastcnn.errors import DataError, first_line
from fastcnn.system.text import printable

CHUNK = 2**20  # bytes
MAX_GROWTH, ALWAYS_FINE = 20, 2**26  # photos do not compress: above 20 times the archive (and 64 MiB) it is a bomb
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may ask for gigabytes of memory
DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³")})
JUNK = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db"})

_BROKEN_FORMAT = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error)
_DAMAGED = (*_BROKEN_FORMAT, EOFError, ValueError, OverflowError, RuntimeError)


class Refused(Exception):
    """The archive is unsafe: nothing of it is written."""


@contextlib.contextmanager
def explained(path: Path, way_on: str) -> Iterator[None]:
    """Raise DataError where the body finds an archive, of any kind, damaged or unsafe."""
    try:
        yield
    except Refused as error:
        raise DataError(f"the archive {printable(str(path))} is not unpacked: {error}; is it the right one?") from None
    except _DAMAGED as error:
        raise DataError(f"the archive {printable(str(path))} is damaged ({first_line(error)}): {way_on}") from None


@contextlib.contextmanager
def opened(path: Path, way_on: str = "delete it and run the same command again") -> Iterator[zipfile.ZipFile]:
    """Open a zip file. Raises DataError where it is none, or where the body finds it damaged or unsafe."""
    with explained(path, way_on), zipfile.ZipFile(path) as archive:
        yield archive


def files(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the regular files of an archive by safe relative path, without the operating system's own files.

    Raises Refused for a name that leads out of the folder, a link or device, a file in the place of a folder, a name
    twice, encryption, an unusual compression, or more content than the size of the archive allows.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        path = safe_path(info.orig_filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Refused(f"'{path}' is a link or a device")
        if info.is_dir() or kind == stat.S_IFDIR:
            continue
        if info.flag_bits & 1:
            raise Refused(f"'{path}' is encrypted")
        if info.compress_type not in METHODS:
            raise Refused(f"'{path}' is compressed by method {info.compress_type}, expected deflate")
        if str(path) in found:
            raise Refused(f"'{path}' is in it twice")
        found[str(path)] = info
    for name in found:
        blocked = next((str(above) for above in PurePosixPath(name).parents if str(above) in found), None)
        if blocked:
            raise Refused(f"'{blocked}' is a file and the folder of '{name}'")
    _check_sizes(archive, found)
    return {name: info for name, info in found.items() if not is_junk(name)}


def safe_path(name: str) -> PurePosixPath:
    """Return an archive's name as a path that stays below any folder; Refused for one that does not.

    The rules are those of Windows, on every system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or not parts:
        raise Refused(f"{_shown(name)} is not below its folder")
    for part in parts:
        if not part.strip(". "):  # "..", and names that Windows reads as it
            raise Refused(f"{_shown(name)} leads out of its folder")
        if any(character in '\\:<>"|?*' or not character.isprintable() for character in part):
            raise Refused(f"{_shown(name)} has characters that some systems do not allow")
        if part.partition(".")[0].rstrip(" ").upper() in DEVICES:
            raise Refused(f"{_shown(name)} is the name of a device")
    return PurePosixPath(*parts)


def unpack(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Write members to their paths below an empty folder, checking their checksums and lengths.

    `progress` is called with the number of files written and to write.
    """
    for done, (name, info) in enumerate(members.items()):
        progress(done, len(members))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        with archive.open(info) as source, path.open("xb") as target:
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > info.file_size:
                    break
                target.write(chunk)
        if written != info.file_size:
            raise zipfile.BadZipFile(f"'{name}' does not have the length in its header")
    progress(len(members), len(members))


def _check_sizes(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
    assert archive.filename is not None
    size = Path(archive.filename).stat().st_size
    packed = sum(info.compress_size for info in members.values())
    unpacked = sum(info.file_size for info in members.values())
    if packed > size or unpacked > max(ALWAYS_FINE, MAX_GROWTH * size):
        raise Refused(f"{unpacked / 2**20:,.0f} MiB in an archive of {size / 2**20:,.1f} MiB are not photos")


def is_junk(name: str) -> bool:
    """Return whether a file is one that operating systems leave in archives."""
    parts = PurePosixPath(name).parts
    return any(part in JUNK for part in parts) or parts[-1].startswith("._")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else f"{name[:77]}...")
