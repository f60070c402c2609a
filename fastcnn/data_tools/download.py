"""Download of known data sets: the whole set, or nothing that could be taken for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastcnn.data_tools import http_download, unzip
from fastcnn.errors import DataError, FastCNNError, UsageError, nearest
from fastcnn.storage.files import check_space, filling
from fastcnn.storage.locks import locked
from fastcnn.system.console import Console


@dataclass(frozen=True, kw_only=True)
class Source:
    """Address of a data set, and the names of its files here."""

    url: str
    archive: str
    """Name of the archive in the folder that it is downloaded into."""
    folder: str
    """Name of the folder, beside the archive, with train/<class>/... in it."""


DOWNLOADS: dict[str, Source] = {
    "inaturalist12k": Source(
        url="https://storage.googleapis.com/wandb_datasets/nature_12K.zip",
        archive="nature_12K.zip",
        folder="inaturalist_12K",
    ),
}


class DownloadInterrupted(FastCNNError):
    """Ctrl-C during a download; the part that was loaded is kept."""

    exit_code = 130


def download(
    name: str,
    folder: str | Path,
    *,
    url: str | None = None,
    console: Console | None = None,
    timeout: float = http_download.TIMEOUT,
    pause: float = http_download.PAUSE,
) -> Path:
    """Download a data set into a folder, unpack it there, and return the folder with train/<class>/... in it.

    Parts that are there already are not loaded again: the same command continues an interrupted one.

    Args:
        name: a key of `DOWNLOADS`.
        folder: target folder, made where it is missing; nothing is written outside it.
        url: address of a mirror; None is the original.
        console: prints lines and progress.
        timeout: seconds to wait for a connection, and for the next bytes.
        pause: seconds before the first retry after a broken connection.

    Raises FastCNNError where the server or the disk fails, DataError for a damaged or unsafe archive.
    """
    if name not in DOWNLOADS:
        raise UsageError(f"no data set '{name}'{nearest(name, DOWNLOADS)}; expected one of {', '.join(DOWNLOADS)}")
    source, folder, console = DOWNLOADS[name], Path(folder), console or Console()
    url = url or source.url
    http_download.check_url(url)
    photos, packed = folder / source.folder, folder / source.archive

    def refuse() -> None:
        raise FastCNNError(f"another command is loading into {folder}: wait for it to end")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_there(photos):
            console.line(f"{photos} is there already")
            return photos
        with locked(folder / f".{source.archive}.lock", refuse):
            if packed.is_file():
                console.line(f"{packed} is there already: unpacking it")
            else:
                http_download.fetch(url, packed, console, timeout=timeout, pause=pause)
            _unpack(packed, photos, console)
    except KeyboardInterrupt:
        raise DownloadInterrupted(
            f"interrupted; the part that was loaded is kept in {folder}: run the same command to go on"
        ) from None
    except OSError as error:
        raise FastCNNError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from None
    console.line(f"{packed} is no longer needed: delete it to free {packed.stat().st_size / 2**20:,.0f} MiB")
    return photos


def _is_there(photos: Path) -> bool:
    """Return whether the set is there: its folder is named only when it is whole."""
    if not photos.exists() and not photos.is_symlink():
        return False
    if (photos / "train").is_dir():
        return True
    raise DataError(f"{photos} is there but has no train folder: move it away, or choose another folder")


def _unpack(packed: Path, photos: Path, console: Console) -> None:
    """Unpack beside `photos` and rename, so that half a set is never found there."""
    with unzip.opened(packed) as opened, filling(photos) as beside:
        members = unzip.files(opened)
        root = photo_root(members)
        members = {name: info for name, info in members.items() if PurePosixPath(name).is_relative_to(root)}
        check_space(photos.parent, sum(info.file_size for info in members.values()), "what is in the archive")
        with console.progress("unpacking", "files") as progress:
            unzip.unpack(opened, members, beside, progress)
        (beside / root).rename(photos)
    console.line(f"{len(members):,} files in {photos}")


def photo_root(names: Iterable[str]) -> PurePosixPath:
    """Return the folder, among paths of files, with train/<class>/<file> of two classes or more in it.

    It is the uppermost of them, and among several the one with most files. Raises Refused where there is none.
    """
    classes = defaultdict[PurePosixPath, list[str]](list)
    for name in names:
        parts = PurePosixPath(name).parts
        if "train" in parts[:-2]:
            position = parts.index("train")
            classes[PurePosixPath(*parts[:position])].append(parts[position + 1])
    roots = [root for root, found in classes.items() if len(set(found)) >= 2]
    if not roots:
        raise unzip.Refused("it has no train/<class>/<photos> of two classes or more")
    return min(roots, key=lambda root: (len(root.parts), -len(classes[root])))
