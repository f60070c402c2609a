"""Decoded photos on disk: each photo of a folder decoded once, into a memory-mapped array of uint8 pixels.

A cache is a folder named by the hash of what determines pixels (data folder, image size, resize rule, decoder), with

    cache.json     the header: format version and those values
    pixels.bin     rows of (size, size, 3) uint8, only ever appended to
    photos.jsonl   a journal, a line a photo: path, size, mtime, row, CRC-32 of the row, or the reason why it has none,
                   and the CRC-32 of the line
    lock           held by the run that builds

A photo is found again by path, size and modification time, so that photos added later are decoded alone and an
interrupted build goes on where it stopped. A line that is cut short or damaged, or a row whose checksum is wrong, only
means that its photo is decoded again; a header that is not the one expected means that all are. Files from elsewhere
can do no more harm than that: all of it is plain data.

A set whose pixels fit nowhere has a cache of verdicts alone: its header says so, and pixels.bin and rows are left out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.config.fields import user_cache_folder
from fastcnn.data.index import Index
from fastcnn.errors import FastCNNError, fall_back, warn
from fastcnn.storage import files
from fastcnn.system.ranks import ALONE, Ranks
from pipelines.workers import Workers, shared
from pipelines.workers import end_early as end_early
from pipelines.workers import start_early as start_decoder

FORMAT = 2
RESIZE = "squash-bilinear-antialias"
CHUNK = 512  # photos between two writes: what a killed build loses at most

_TRANSIENT = frozenset(
    {"unreadable", "decoder killed"}
)  # verdicts about the moment, not the file: asked again by the next run


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The decoded photos of an index."""

    folder: Path
    images: npt.NDArray[np.uint8]
    """(R, size, size, 3), memory-mapped, read-only; none in a cache of verdicts alone."""
    rows: npt.NDArray[np.int64]
    """(N,) row in `images` of each photo of the index, -1 where it has none."""
    reasons: tuple[str, ...]
    """(N,) why a photo is unusable, "" where it is not."""
    damage: tuple[str, ...]
    """(N,) what is wrong with a photo that is usable all the same, "" as a rule."""
    num_decoded: int
    """Photos that this build decoded; the rest were there."""
    decode_seconds: float
    inode: int | None = None
    """Of pixels.bin, which `images` keeps from being used again: another file of that name has other rows."""

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each photo can be decoded."""
        return np.array([not reason for reason in self.reasons], np.bool_)

    def take(self, keep: npt.NDArray[np.bool_]) -> Cache:
        """Return the cache of `index.take(keep)`."""
        reasons = tuple(reason for reason, kept in zip(self.reasons, keep, strict=True) if kept)
        damage = tuple(damage for damage, kept in zip(self.damage, keep, strict=True) if kept)
        return Cache(**{**vars(self), "rows": self.rows[keep], "reasons": reasons, "damage": damage})

    def pixels(self, photos: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Return (n, size, size, 3): the pixels of photos, by their positions in the index, in memory."""
        out = np.empty((len(photos), *self.images.shape[1:]), np.uint8)
        self.read(photos, out)
        return out

    def pages(self) -> npt.NDArray[np.uint8]:
        """Return `images` as an array that may be given to torch: the same pages, copied where they are written to.

        Raises FastCNNError where the file is gone, is another or is shorter.
        """
        with self._opened() as file:
            if os.fstat(file.fileno()).st_size < self.images.nbytes:
                raise FastCNNError(f"{file.name} became shorter while it was used: run again")
            return np.memmap(file, np.uint8, "c", shape=self.images.shape)

    def read(self, photos: npt.NDArray[np.intp], out: npt.NDArray[np.uint8]) -> None:
        """Write the pixels of photos into `out` (n, size, size, 3).

        Read, not copied from the map: pages of the map that were touched count as this process's memory, so that it
        would grow to the size of the set. Raises FastCNNError where the file is gone or too short.
        """
        rows = self.rows[photos]
        if not len(rows):
            return
        with self._opened() as file:
            for i in np.argsort(rows):  # in the disk's order
                if not _read_row(file, rows[i], out[i]):
                    raise FastCNNError(f"{file.name} became shorter while it was used: run again")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """Yield the file of the pixels. Raises FastCNNError where it is gone, or another."""
        path = self.folder / "pixels.bin"
        try:
            with io.FileIO(path) as file:
                if self.inode is not None and os.fstat(file.fileno()).st_ino != self.inode:
                    raise FastCNNError(f"{path} was replaced while it was used: run again")
                yield file
        except OSError as error:
            raise FastCNNError(f"cannot read the cache {path} any more: {error.strerror or error}; run again") from None


def build(
    index: Index,
    *,
    image_size: int,
    decoder: str,
    gpu: int | None = None,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    keep_pixels: bool = True,
    max_pixels: int | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Cache:
    """Return the cache of an index, after decoding what it lacks.

    Ranks decode it together, each every count-th chunk, and append in turn: it is the one that one process makes.

    Args:
        index: the photos.
        image_size: side in pixels.
        decoder: a name in `pipelines.BACKENDS`.
        gpu: device on which DALI decodes; None is the CPU.
        workers: decoding threads; None is one a core.
        cache_dir: where caches are kept; None is the user's cache folder.
        keep_pixels: False decodes for the verdicts alone.
        max_pixels: a larger photo is unusable; None is `pipelines.MAX_PIXELS`.
        strict: decoding in this process, where no worker process can be started, is an error.
        ranks: who builds it; all of them see one folder.
        progress: told photos decoded and photos to decode.
        note: told, once, that another run is building this cache.

    Raises FastCNNError where the cache cannot be written, or the decoder fails on every photo.
    """
    header = _header(index, image_size, decoder, gpu, keep_pixels, max_pixels)
    folder = _folder(header, cache_dir)
    start = time.perf_counter()
    try:
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        journal: dict[str, dict[str, Any]] = {}
        with _locked(folder, note) if ranks.first else contextlib.nullcontext(True) as writable:

            def look() -> npt.NDArray[np.intp]:
                _check_header(folder, header, writable)
                journal.update(_read_journal(folder / "photos.jsonl"))
                missing = _missing(index, journal, folder, image_size, keep_pixels)
                if len(missing) and not writable:
                    raise PermissionError(errno.EROFS, "it is read-only, and photos are missing in it")
                _check_space(folder, len(missing) * image_size**2 * 3 * keep_pixels)
                return missing

            missing = ranks.share(look)
            if _read_header(folder) != header:  # the first rank has just written it
                raise FastCNNError(
                    f"rank {ranks.rank} does not see the cache {folder}, which the first rank has made: give a "
                    "--cache-dir that all machines share"
                )
            size = max(1, min(CHUNK, -(-len(missing) // ranks.count)))
            chunks = _chunks(missing, size)
            mine = range(ranks.rank, len(chunks), ranks.count)
            # A chunk is written while the next is decoded.
            with _workers(decoder, workers, gpu, max_pixels, strict) as decoding, ThreadPoolExecutor(1) as writer:
                writing: Future[None] | None = None
                buffers = [shared((size, image_size, image_size, 3)) for _ in range(2 if mine else 0)]
                for number in mine:
                    photos = chunks[number]
                    buffers.reverse()
                    pixels = buffers[0][: len(photos)]
                    verdicts = decoding.decode(index.sources(photos), image_size, pixels)
                    if writing:
                        writing.result()
                    append = functools.partial(_append, folder, index, photos, pixels, verdicts, keep_pixels)
                    writing = writer.submit(ranks.take_turn, number, len(chunks) - 1, append)
                    progress(int(np.searchsorted(missing, photos[-1])) + 1, len(missing))
                if writing:
                    writing.result()
            ranks.wait()  # the lock is the first rank's
            if len(missing) or not ranks.first:
                journal = _read_journal(folder / "photos.jsonl")
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    except OSError as error:
        raise FastCNNError(
            f"cannot write the cache {folder}: {error.strerror or error}; choose another with --cache-dir"
        ) from None
    entries = [journal[path] for path in index.paths]
    images, inode = _map(folder, image_size)
    return Cache(
        folder=folder,
        images=images,
        inode=inode,
        rows=np.array([entry["row"] for entry in entries], np.int64),
        reasons=tuple(entry["reason"] for entry in entries),
        damage=tuple(str(entry.get("damage", "")) for entry in entries),
        num_decoded=len(missing),
        decode_seconds=time.perf_counter() - start,
    )


def fits_on_disk(
    index: Index,
    *,
    image_size: int,
    decoder: str,
    gpu: int | None = None,
    cache_dir: str | Path | None = None,
    max_pixels: int | None = None,
) -> bool:
    """Return whether the pixels of an index are in its cache, or have room there."""
    folder = _folder(_header(index, image_size, decoder, gpu, True, max_pixels), cache_dir)
    pixels = folder / "pixels.bin"
    there = pixels.stat().st_size if pixels.exists() else 0
    while not folder.exists():
        folder = folder.parent
    return len(index) * image_size**2 * 3 - there <= shutil.disk_usage(folder).free


def default_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder that caches are kept in."""
    return Path(cache_dir) if cache_dir else user_cache_folder()


def start_early(root: str | Path, decoder: str, cache_dir: str | Path | None = None) -> None:
    """Begin to import what decodes on a CPU where a folder has no cache: in its own process, beside our own imports.

    That takes a second, as does importing torch here; with two cores they take it together. `end_early` when done.
    """
    with contextlib.suppress(OSError):
        here = str(Path(root).resolve(strict=True))
        known = [_read_header(folder).get("root") for folder in _cache_folders(cache_dir)]
        gpu = Path("/proc/driver/nvidia").exists()  # then another decoder does it
        if pipelines.num_cores() > 1 and not gpu and here not in known:
            start_decoder({"auto": "turbo"}.get(decoder, decoder))


def list_caches(cache_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """Return a mapping a cache: key, root, image_size, decoder, photos, bytes, modified (seconds since the epoch)."""
    caches = []
    for folder in sorted(_cache_folders(cache_dir)):
        header = _read_header(folder)
        stats = [path.stat() for path in folder.iterdir()]
        journal = _read_journal(folder / "photos.jsonl")
        caches.append(
            {
                "key": folder.name,
                **{name: header.get(name, "?") for name in ("root", "image_size", "decoder")},
                "photos": sum(not entry["reason"] for entry in journal.values()),
                "bytes": sum(stat.st_size for stat in stats),
                "modified": max(stat.st_mtime for stat in stats),
            }
        )
    return caches


def clear(cache_dir: str | Path | None = None, key: str | None = None) -> int:
    """Delete one cache, or all; return the bytes freed. Only folders that hold a cache are touched.

    Raises FastCNNError where a run is building one of them, or it cannot be deleted.
    """
    freed = 0
    for folder in _cache_folders(cache_dir):
        if key is None or folder.name == key:
            try:
                with _locked(folder, _refuse_to_wait):
                    freed += sum(path.stat().st_size for path in folder.iterdir())
                    shutil.rmtree(folder)
            except OSError as error:
                raise FastCNNError(f"cannot delete the cache {folder}: {error.strerror or error}") from None
    return freed


def _refuse_to_wait(text: str) -> None:
    raise FastCNNError("another run is decoding photos into this cache: clear it when that is done")


def _header(
    index: Index, image_size: int, decoder: str, gpu: int | None, keep_pixels: bool, max_pixels: int | None
) -> dict[str, Any]:
    header = {
        "format": FORMAT,
        "root": str(index.root.resolve()),
        "image_size": image_size,
        "resize": RESIZE,
        "decoder": pipelines.identity(decoder, gpu),
    }
    if max_pixels not in (None, pipelines.MAX_PIXELS):
        header["max_pixels"] = max_pixels
    return header if keep_pixels else {**header, "pixels": False}


def _folder(header: dict[str, Any], cache_dir: str | Path | None) -> Path:
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    return default_folder(cache_dir) / key


def _cache_folders(cache_dir: str | Path | None) -> list[Path]:
    return [path.parent for path in default_folder(cache_dir).glob("*/cache.json")]


@contextlib.contextmanager
def _locked(folder: Path, note: Callable[[str], None]) -> Iterator[bool]:
    """Hold the cache's lock. The system gives it up when its holder dies. Yield False where nothing can be written."""
    import filelock

    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        note("another run is decoding these photos: waiting for it")
        lock.acquire()
    except NotImplementedError:
        raise OSError(errno.ENOSYS, "its file system has no locks") from None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _read_header(folder: Path) -> dict[str, Any]:
    """Return what cache.json says, as far as it is the plain data that it should be."""
    try:
        header = json.loads((folder / "cache.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(header, dict):
        return {}
    return {name: value for name, value in header.items() if isinstance(value, str | int)}


def _check_header(folder: Path, header: dict[str, Any], writable: bool) -> None:
    """Write the header of a new cache. What stands under another one is no cache of these photos, and is deleted."""
    found = _read_header(folder)
    if found == header:
        return
    if not writable:
        raise PermissionError(errno.EROFS, "it is read-only, and no cache of these photos")
    old = [path for name in ("photos.jsonl", "pixels.bin") if (path := folder / name).exists()]
    if old or found:
        other = next((name for name in header if found.get(name) != header[name]), "format") if found else ""
        why = f"its {other} is another" if other else "its header is damaged"
        warn(f"the cache {folder} cannot be used ({why}): decoding every photo again")
    for path in old:  # unlinked, not cut: whoever is reading them goes on reading
        path.unlink()
    files.write(folder / "cache.json", json.dumps(header, indent=1))


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last whole line of each photo, by path."""
    journal = {}
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        for line in lines:
            body, _, checksum = line.rstrip(b"\n}").rpartition(_SUM)
            if checksum != str(zlib.crc32(body)).encode():
                continue
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(body + b"}")
                if _is_entry(entry):
                    journal[entry["path"]] = entry
    return journal


_SUM = b', "sum": '


def _line(entry: dict[str, Any]) -> bytes:
    """Return an entry as a line that ends in the checksum of what stands before that."""
    body = json.dumps(entry).encode()[:-1]
    return body + _SUM + str(zlib.crc32(body)).encode() + b"}\n"


def _is_entry(entry: object) -> bool:
    kinds = {"path": str, "size": int, "mtime": int, "row": int, "crc": int, "reason": str}
    return isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in kinds.items())


def _missing(
    index: Index, journal: dict[str, dict[str, Any]], folder: Path, image_size: int, keep_pixels: bool
) -> npt.NDArray[np.intp]:
    """Return the positions of the photos that have no entry, or one that does not hold any more."""
    missing, kept = [], []  # kept: (row, position, checksum) of those whose pixels are to be compared
    for i, photo in enumerate(index.paths):
        entry = journal.get(photo)
        if entry is None or (entry["size"], entry["mtime"]) != (index.sizes[i], index.mtimes[i]):
            missing.append(i)
        elif keep_pixels and not entry["reason"]:
            kept.append((entry["row"], i, entry["crc"]))
        elif entry["row"] != -1 or entry["reason"] in _TRANSIENT:
            missing.append(i)
    damaged = _damaged(folder / "pixels.bin", sorted(kept), image_size)
    if damaged:
        some = "1 photo" if len(damaged) == 1 else f"{len(damaged):,} photos"
        warn(f"the pixels of {some} in the cache {folder} are damaged: decoding them again")
    return np.array(sorted(missing + damaged), np.intp)


def _damaged(path: Path, kept: Sequence[tuple[int, int, int]], image_size: int) -> list[int]:
    """Return the positions of those (row, position, checksum) whose pixels are not what they were."""

    def check(part: Sequence[tuple[int, int, int]]) -> list[int]:
        pixels = np.empty((image_size, image_size, 3), np.uint8)
        num_rows = path.stat().st_size // pixels.nbytes
        with path.open("rb", buffering=0) as file:
            return [
                i
                for row, i, checksum in part
                if not (0 <= row < num_rows and _read_row(file, row, pixels) and zlib.crc32(pixels.data) == checksum)
            ]

    if not kept:
        return []
    if not path.exists():
        return [i for _, i, _ in kept]
    with ThreadPoolExecutor() as threads:  # reading and summing let go of the interpreter
        return [i for part in threads.map(check, _chunks(kept, CHUNK)) for i in part]


@contextlib.contextmanager
def _workers(
    decoder: str,
    threads: int | None,
    gpu: int | None,
    max_pixels: int | None,
    strict: bool,
) -> Iterator[Workers]:
    """Yield what decodes the missing photos, in processes of its own: where it dies of a photo, that photo is lost."""
    max_pixels = max_pixels or pipelines.MAX_PIXELS
    with Workers(decoder, threads=threads, gpu=gpu, max_pixels=max_pixels) as workers:
        yield workers
    end_early()
    if workers.note:
        fall_back(f"photos were decoded in this process, which a damaged one may end: {workers.note}", strict=strict)


def _read_row(file: io.FileIO, row: int, out: npt.NDArray[np.uint8]) -> bool:
    """Write a row of pixels.bin into `out` (size, size, 3); return whether there was so much."""
    file.seek(int(row) * out.nbytes)
    return file.readinto(out.data) == out.nbytes


_Some = TypeVar("_Some", npt.NDArray[np.intp], Sequence[tuple[int, int, int]])


def _chunks(some: _Some, size: int) -> list[_Some]:
    return [some[start : start + size] for start in range(0, len(some), size)]


def _append(
    folder: Path,
    index: Index,
    photos: npt.NDArray[np.intp],
    pixels: npt.NDArray[np.uint8],
    verdicts: Sequence[pipelines.Verdict],
    keep_pixels: bool,
) -> None:
    """Append the usable photos' rows, then a line for every photo: a line never stands without its row."""
    good = np.array([keep_pixels and verdict.ok for verdict in verdicts])
    row = _append_rows(folder / "pixels.bin", pixels[good]) if keep_pixels else 0
    lines = []
    for i, verdict, image, kept in zip(photos, verdicts, pixels, good, strict=True):
        entry: dict[str, Any] = {
            "path": index.paths[i],
            "size": int(index.sizes[i]),
            "mtime": int(index.mtimes[i]),
            "row": row if kept else -1,
            "crc": zlib.crc32(image) if kept else 0,
            "reason": verdict.reason,
        }
        if verdict.warning:
            entry["damage"] = verdict.warning
        row += bool(kept)
        lines.append(_line(entry))
    with (folder / "photos.jsonl").open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a line that was cut must not swallow the first of these
                file.write(b"\n")
        file.write(b"".join(lines))


def _append_rows(path: Path, pixels: npt.NDArray[np.uint8]) -> int:
    """Append rows; return the number of the first."""
    with path.open("ab") as file:  # not the map: a full disk is an error here, a SIGBUS there
        row_bytes = int(np.prod(pixels.shape[1:]))
        row = -(-file.tell() // row_bytes)
        file.truncate(row * row_bytes)  # fills up the row that a killed build left cut short
        file.write(pixels.data)
    return row


def _map(folder: Path, size: int) -> tuple[npt.NDArray[np.uint8], int | None]:
    """Return the rows as (R, size, size, 3) uint8, memory-mapped, and the file's inode."""
    path = folder / "pixels.bin"
    rows = path.stat().st_size // (size * size * 3) if path.exists() else 0
    if rows == 0:
        return np.zeros((0, size, size, 3), np.uint8), None
    with path.open("rb") as file:
        images = np.memmap(file, np.uint8, "r", shape=(rows, size, size, 3))
        return images, os.fstat(file.fileno()).st_ino


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FastCNNError(
            f"the cache needs {needed / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB free: "
            "free some space, `fastcnn cache clear`, or choose another place with --cache-dir"
        )
