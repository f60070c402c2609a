"""Writer of WebDataset shards: the unchanged bytes of photos in classes, shuffled by a seed."""

from __future__ import annotations

import contextlib
import io
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from fastcnn.config import LayoutOptions
from fastcnn.data import index, shards
from fastcnn.data.index import Index
from fastcnn.data.layout import NO_OPTIONS
from fastcnn.errors import DataError, FastCNNError, UsageError, os_error_as
from fastcnn.storage import files
from fastcnn.system import signals
from fastcnn.system.console import Console
from fastcnn.system.text import printable
from pipelines.verdict import EXTENSIONS, Unusable, image_format, read

SHARD_BYTES = 256_000_000
KEY = "{:08}"
SHARD = "{:06}.tar"

_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class Written:
    """Summary of new shards."""

    photos: int
    shards: int
    no_images: list[str]
    """Paths of files that do not begin like an image; they are in the shards, too, as unusable photos."""


def write(
    root: str | Path,
    out: str | Path,
    *,
    photos_each: int | None = None,
    bytes_each: int = SHARD_BYTES,
    seed: int = 0,
    options: LayoutOptions = NO_OPTIONS,
    console: Console | None = None,
) -> Written:
    """Write the photos of a folder as shards: OUT/000000.tar, or OUT/train/000000.tar where it has split folders.

    classes.txt is written beside the shards, and paths.csv with each photo's new and old path into `out`. The same
    photos and seed give the same bytes. `out` is filled only once everything is written.

    Args:
        root: a folder or table as `index.scan` takes it.
        out: an empty folder, or one that does not exist.
        photos_each: largest number of photos in a shard; None leaves it to `bytes_each`.
        bytes_each: largest number of bytes of a shard's photos, except for a shard of one photo.
        seed: seed of the order.
        options: see `index.scan`.
        console: prints progress.

    Raises DataError where the folder cannot be used or a photo cannot be read, FastCNNError where `out` is not empty or
    cannot be written.
    """
    out, console = Path(out), console or Console(quiet=True)
    found = index.scan(root, options=options)
    found.warn_of_outside()
    for name in found.classes:
        if "\n" in name or "\r" in name or not name.strip():
            raise DataError(f"class '{printable(name)}' of {found.root} does not fit on a line of {shards.CLASSES}")
    if out.resolve().is_relative_to(found.root.resolve()):
        raise UsageError(f"{out} is inside the photos, which are never written to: choose another folder")
    with os_error_as(f"cannot write the shards into {out}"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FastCNNError(f"{out} is {'not empty' if out.is_dir() else 'a file'}: choose another folder")
        # A photo and its label have a header each, and are padded to whole blocks.
        files.check_space(out, int(found.sizes.sum()) + len(found) * 4 * tarfile.BLOCKSIZE, "the content of the shards")
        with signals.raising(), _beside(out) as partial:
            written = _write(found, partial, photos_each or len(found), bytes_each, seed, console)
    if found.others:
        console.line(f"left out: {found.told_others()}")
    return written


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Yield a folder whose content is moved into `out` at the end; on an error `out` is left as it was."""
    made, partial = not out.exists(), out / _PARTIAL
    out.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        yield partial
        for path in sorted(partial.iterdir()):
            path.rename(out / path.name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    partial.rmdir()


def _write(found: Index, folder: Path, photos_each: int, bytes_each: int, seed: int, console: Console) -> Written:
    splits = [name for name in ("train", "val", "test") if (found.folders == name).any()]
    rows = [("photo", "path")]
    no_images: list[str] = []
    num_shards = 0
    with console.progress("writing", "photos") as progress:
        for number, split in enumerate(splits):
            below = "" if splits == ["train"] else f"{split}/"
            (folder / below).mkdir(exist_ok=True)
            files.write(folder / below / shards.CLASSES, "".join(f"{name}\n" for name in found.classes))
            mine = np.flatnonzero(found.folders == split)
            order = np.random.default_rng([seed, number]).permutation(mine)
            for shard, photos in enumerate(_parts(order, found.sizes, photos_each, bytes_each)):
                num_shards += 1
                name = below + SHARD.format(shard)
                with (
                    files.writing(folder / name) as file,
                    tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
                ):
                    for photo in photos:
                        key, path = KEY.format(len(rows) - 1), found.paths[photo]
                        content = _content(found, photo)
                        extension = _extension(path, content)
                        if not extension:
                            no_images.append(path)
                        member = f"{key}.{extension or 'jpg'}"
                        _add(archive, member, content)
                        _add(archive, f"{key}.cls", b"%d" % found.labels[photo])
                        rows.append((f"{name}/{member}", path))
                        progress(len(rows) - 1, len(found))
    files.write_csv(folder / shards.ORIGINALS, rows)
    return Written(photos=len(rows) - 1, shards=num_shards, no_images=no_images)


def _parts(
    photos: npt.NDArray[np.intp], sizes: npt.NDArray[np.int64], photos_each: int, bytes_each: int
) -> Iterator[Sequence[int]]:
    """Yield the photos (positions) of each shard."""
    part: list[int] = []
    num_bytes = 0
    for photo in photos:
        if part and (len(part) == photos_each or num_bytes + sizes[photo] > bytes_each):
            yield part
            part, num_bytes = [], 0
        part.append(int(photo))
        num_bytes += int(sizes[photo])
    yield part


def _content(found: Index, photo: int) -> bytes:
    try:
        return read(found.source(photo))
    except Unusable as error:
        if error.verdict.reason == "empty":
            return b""
        raise DataError(
            f"{printable(str(found.root / found.paths[photo]))} cannot be copied ({error.verdict.reason}: "
            f"{error.verdict.detail}): repair it or remove it"
        ) from None


def _extension(path: str, content: bytes) -> str:
    """Return the extension of a photo in a shard: its own, else that of its content; "" where that is no image."""
    own = PurePosixPath(path).suffix[1:].lower()
    if own in shards.PHOTO_EXTENSIONS:
        return own
    with contextlib.suppress(Unusable):
        return EXTENSIONS[image_format(content)][0]
    return ""


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without owner and time, so that the same photos give the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
