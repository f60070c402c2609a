"""Unpacking a zip file inside one folder, whatever its author had in mind.

Every name and size is checked before the first byte is written. What is unpacked are regular files with the
permissions of new ones: no links, no devices, no modes.
"""

from __future__ import annotations

import contextlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from fastcnn.errors import DataError, first_line

CHUNK = 2**20  # bytes
MAX_GROWTH, ALWAYS_FINE = 20, 2**26  # photos do not compress: more than 20 times the archive (and 64 MiB) is a bomb
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may ask for gigabytes of memory
DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³")})
JUNK = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db"})

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, RuntimeError)


class Refused(Exception):
    """What is in the archive is not written anywhere."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file; DataError for what is none, or proves damaged or is refused later."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Refused as error:
        raise DataError(f"the archive {path} is not unpacked: {error}; is it the right one?") from None
    except _DAMAGED as error:
        raise DataError(
            f"the archive {path} is damaged ({first_line(error)}): delete it and run the same command again"
        ) from None


def files(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the regular files of an archive by safe relative path, without what systems leave in archives.

    Raises Refused for an archive with a name that leads elsewhere, a link or device, a file that stands where a
    folder should, a name twice, encryption, an unusual compression, or more in it than its own size allows.
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
            raise Refused(f"'{path}' is compressed by method {info.compress_type}; deflate is understood")
        if str(path) in found:
            raise Refused(f"'{path}' is in it twice")
        found[str(path)] = info
    for name in found:
        blocked = next((str(above) for above in PurePosixPath(name).parents if str(above) in found), None)
        if blocked:
            raise Refused(f"'{blocked}' is a file and the folder of '{name}'")
    _check_sizes(archive, found)
    return {name: info for name, info in found.items() if not _is_junk(name)}


def safe_path(name: str) -> PurePosixPath:
    """Return the path below any folder that an archive's name stands for; Refused for one that leads elsewhere.

    As strict on every system as Windows has to be.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or not parts:
        raise Refused(f"{_shown(name)} is not below its folder")
    for part in parts:
        if not part.strip(". "):  # "..", and what Windows takes for it
            raise Refused(f"{_shown(name)} leads out of its folder")
        if any(character in '\\:<>"|?*' or not character.isprintable() for character in part):
            raise Refused(f"{_shown(name)} has characters that some systems do not allow")
        if part.partition(".")[0].rstrip(" ").upper() in DEVICES:
            raise Refused(f"{_shown(name)} is the name of a device")
    return PurePosixPath(*parts)


def unpack(
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write members to their paths below a folder that is empty; their checksums and lengths are checked.

    `progress` is told files written and files to write.
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
            raise zipfile.BadZipFile(f"'{name}' is not as long as it says")
    progress(len(members), len(members))


def _check_sizes(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
    assert archive.filename is not None
    size = Path(archive.filename).stat().st_size
    packed = sum(info.compress_size for info in members.values())
    unpacked = sum(info.file_size for info in members.values())
    if packed > size or unpacked > max(ALWAYS_FINE, MAX_GROWTH * size):
        raise Refused(f"{unpacked / 2**20:,.0f} MiB in an archive of {size / 2**20:,.1f} MiB are not photos")


def _is_junk(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part in JUNK for part in parts) or parts[-1].startswith("._")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else f"{name[:77]}...")
