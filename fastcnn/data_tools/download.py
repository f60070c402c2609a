"""Folders of photos from elsewhere: `download` gets a known set whole, or leaves nothing that looks like it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastcnn.data_tools import http_download, unzip
from fastcnn.errors import DataError, FastCNNError, UsageError, nearest
from fastcnn.storage.files import check_space
from fastcnn.storage.locks import locked
from fastcnn.system.console import Console


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a set of photos is, and what it is called here."""

    url: str
    archive: str
    """The archive's name in the folder it is loaded into."""
    folder: str
    """The folder, beside the archive, that holds train/<class>/... afterwards."""


DOWNLOADS: dict[str, Source] = {
    "inaturalist12k": Source(
        url="https://storage.googleapis.com/wandb_datasets/nature_12K.zip",
        archive="nature_12K.zip",
        folder="inaturalist_12K",
    ),
}


class DownloadInterrupted(FastCNNError):
    """Ctrl-C, with what is there kept."""

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
    """Load a set of photos into a folder, unpack it there, and return the folder of its train/<class>/...

    What is there already is not loaded again. An interrupted command is gone on with by the same command.

    Args:
        name: a key of `DOWNLOADS`.
        folder: made where it is missing; nothing is written outside it.
        url: a mirror's address; left out, the set's own.
        console: where lines and progress go.
        timeout: seconds for connecting, and for the next bytes to come.
        pause: seconds before the first new try after a broken connection.

    Raises FastCNNError where the server or the disk fails, DataError for an archive that is damaged or unsafe.
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
    console.line(f"{packed} is not needed any more: delete it to free {packed.stat().st_size / 2**20:,.0f} MiB")
    return photos


def _is_there(photos: Path) -> bool:
    """Whether the set is there: it gets its name only when it is whole."""
    if not photos.exists() and not photos.is_symlink():
        return False
    if (photos / "train").is_dir():
        return True
    raise DataError(f"{photos} is there but holds no train folder: move it away, or choose another folder")


def _unpack(packed: Path, photos: Path, console: Console) -> None:
    """Unpack beside `photos` and rename, so that half a set never has its name."""
    beside = photos.with_name(f".{photos.name}.unpacking")
    if beside.exists():  # of a command that was killed
        shutil.rmtree(beside)
    with unzip.opened(packed) as opened:
        members = unzip.files(opened)
        root = photo_root(members)
        members = {name: info for name, info in members.items() if PurePosixPath(name).is_relative_to(root)}
        check_space(photos.parent, sum(info.file_size for info in members.values()), "what is in the archive")
        beside.mkdir()
        try:
            with console.progress("unpacking", "files") as progress:
                unzip.unpack(opened, members, beside, lambda done, total: progress(done, total, ""))
            (beside / root).rename(photos)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    console.line(f"{len(members):,} files in {photos}")


def photo_root(names: Iterable[str]) -> PurePosixPath:
    """Return the folder, among the paths of files, that holds train/<class>/<file> of two classes or more.

    The uppermost, and of several the one of most files, whatever it is called. Raises Refused where there is none.
    """
    classes = defaultdict[PurePosixPath, list[str]](list)
    for name in names:
        parts = PurePosixPath(name).parts
        if "train" in parts[:-2]:
            position = parts.index("train")
            classes[PurePosixPath(*parts[:position])].append(parts[position + 1])
    roots = [root for root, found in classes.items() if len(set(found)) >= 2]
    if not roots:
        raise unzip.Refused("it holds no train/<class>/<photos> of two classes or more")
    return min(roots, key=lambda root: (len(root.parts), -len(classes[root])))
