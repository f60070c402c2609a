"""Decoded photos on disk: each photo of a folder decoded once, into a memory-mapped array of uint8 pixels.

A cache is a folder named by the hash of what determines pixels (data folder, image size, resize rule, decoder), with

    cache.json     header: format version and those values
    pixels.bin     rows of (size, size, 3) uint8, only ever appended to
    photos.jsonl   journal, one line a photo: path, size, mtime, ctime, inode, digest of its bytes, row, CRC-32 of the
                   row or the reason why there is none, and the CRC-32 of the line
    lock           held by the run that builds the cache

A photo whose path, size, times and inode are those of a line is not read. Any other is read once, and is the one whose
digest it has, in this cache or in that of another data folder, or is decoded: so photos added later are decoded alone,
a copied or moved set is not, and an interrupted build continues where it stopped. A line that is cut short or damaged,
or a row with a wrong checksum, means that its photo is decoded again; an unexpected header, that all are. Files from
elsewhere can do no more harm: all is plain data.

A set whose pixels fit nowhere has a cache of verdicts alone: its header says so, and it has no pixels and no rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.config import DataConfig
from fastcnn.data import cache_files
from fastcnn.data.cache_files import CacheFiles, chunks_of, folders_in, read_header, read_journal, read_rows
from fastcnn.data.feeds import Pixels, Positions
from fastcnn.data.index import Index
from fastcnn.data.recognise import digests, recognise
from fastcnn.data.shards import forget
from fastcnn.errors import FastCNNError, fall_back, warn
from fastcnn.storage.files import check_space, free_bytes
from fastcnn.storage.locks import locked
from fastcnn.storage.paths import user_cache_folder, usual_cache_folder
from fastcnn.system.ranks import ALONE, Ranks
from pipelines import workers
from pipelines.workers import Workers, end_early, shared

_Progress = Callable[[int, int], None]
_GO_ON = "to continue a run from its last checkpoint, use fastcnn train --resume, which decodes again"


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The decoded photos of an index."""

    folder: Path
    images: Pixels
    """(R, size, size, 3), memory-mapped, read-only; R is 0 in a cache of verdicts alone."""
    rows: npt.NDArray[np.int64]
    """(N,) row in `images` of each photo of the index, -1 where it has none."""
    reasons: tuple[str, ...]
    """(N,) why a photo is unusable, "" for a usable one."""
    damage: tuple[str, ...]
    """(N,) what is wrong with a photo that is usable all the same, "" as a rule."""
    digests: tuple[str, ...]
    """(N,) digest of each photo's bytes, "" where it is not known."""
    num_decoded: int
    """Photos that this build decoded; the others were in the cache."""
    decode_seconds: float
    inode: int | None = None
    """Inode of pixels.bin, which `images` keeps from being reused: a file with another one has other rows."""

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each photo can be decoded."""
        return np.array([not reason for reason in self.reasons], np.bool_)

    def take(self, photos: Positions | npt.NDArray[np.bool_]) -> Cache:
        """Return the cache of `index.take(photos)`."""
        positions = np.arange(len(self.rows))[photos]
        texts = (self.reasons, self.damage, self.digests)
        reasons, damage, digests = (tuple(column[i] for i in positions) for column in texts)
        return dataclasses.replace(self, rows=self.rows[photos], reasons=reasons, damage=damage, digests=digests)

    def pixels(self, photos: Positions) -> Pixels:
        """Return a copy (n, size, size, 3) of the pixels of photos, given by their positions in the index."""
        out = np.empty((len(photos), *self.images.shape[1:]), np.uint8)
        self.read(photos, out)
        return out

    def pages(self) -> Pixels:
        """Return `images` as an array that torch accepts: the same pages, copied where they are written to.

        Raises FastCNNError where the file is gone, was replaced or is too short.
        """
        with self._opened() as file:
            if os.fstat(file.fileno()).st_size < self.images.nbytes:
                raise FastCNNError(f"{file.name} became shorter while it was used: {_GO_ON}")
            return np.memmap(file, np.uint8, "c", shape=self.images.shape)

    def read(self, photos: Positions, out: Pixels) -> None:
        """Write the pixels of photos, given by their positions in the index, into `out` (n, size, size, 3).

        They are read, not copied from the map: pages of the map that were touched count as this process's memory, which
        would grow to the size of the set. Raises FastCNNError where the file is gone, was replaced or is too short.
        """
        rows = self.rows[photos]
        if not len(rows):
            return
        with self._opened() as file:
            if not read_rows(file, rows, out):
                raise FastCNNError(f"{file.name} became shorter while it was used: {_GO_ON}")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """Yield pixels.bin, opened. Raises FastCNNError where it is gone or was replaced."""
        path = self.folder / "pixels.bin"
        try:
            with io.FileIO(path) as file:
                if self.inode is not None and os.fstat(file.fileno()).st_ino != self.inode:
                    raise FastCNNError(f"{path} was replaced while it was used: {_GO_ON}")
                yield file
        except OSError as error:
            raise FastCNNError(f"cannot read the cache {path} any more: {error.strerror or error}; {_GO_ON}") from None


def build(
    index: Index,
    config: DataConfig,
    *,
    gpu: int | None = None,
    keep_pixels: bool = True,
    strict: bool = False,
    ranks: Ranks = ALONE,
    progress: _Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Cache:
    """Return the cache of an index, after decoding the photos that it lacks.

    Ranks decode chunks in turn and append them in order, so the files are those that one process writes.

    Args:
        index: the photos.
        config: decoded size, decoder (not auto), decoding threads, folder of all caches, and largest photo.
        gpu: device on which DALI decodes; None is the CPU.
        keep_pixels: False decodes for the verdicts alone.
        strict: raise where no worker process can be started, instead of decoding in this process.
        ranks: the ranks that build it together; all of them must see the folder.
        progress: called with the number of photos decoded and to decode.
        note: called once with a line where another run is building this cache.

    Raises FastCNNError where the cache cannot be written, or the decoder fails on every photo.
    """
    files = _files(index, config, gpu, keep_pixels)
    folder, start = files.folder, time.perf_counter()
    try:
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / "lock", lambda: note("another run is decoding these photos: waiting for it"))
        with lock if ranks.first else contextlib.nullcontext() as unwritable:
            journal: cache_files.Journal = {}
            missing = ranks.broadcast(lambda: _look(index, files, journal, unwritable, config))
            if read_header(folder) != files.header:  # the first rank has just written it
                raise FastCNNError(
                    f"rank {ranks.rank} does not see the cache {folder}, which the first rank has made: give a "
                    "--cache-dir that all machines share"
                )
            with _workers(config, gpu) as decoding:
                _decode(index, missing, files, decoding, ranks, progress)
            end_early()
            if reason := decoding.note:
                fall_back(f"photos were decoded in this process, which a damaged one may end: {reason}", strict=strict)
            ranks.wait()  # the lock is the first rank's
            if len(missing) or not ranks.first:
                journal = read_journal(folder)
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    except OSError as error:
        raise FastCNNError(
            f"cannot write the cache {folder}: {error.strerror or error}; choose another with --cache-dir"
        ) from None
    return _open(index, files, journal, len(missing), time.perf_counter() - start)


def fits_on_disk(index: Index, config: DataConfig, *, gpu: int | None = None) -> bool:
    """Return whether the pixels of an index are in its cache or have room there; arguments as for `build`."""
    files = _files(index, config, gpu, True)
    return (len(index) - files.num_rows()) * files.row_bytes <= free_bytes(files.folder)


def default_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of all caches."""
    return Path(cache_dir) if cache_dir else user_cache_folder()


def start_early(root: str | Path, decoder: str, cache_dir: str | Path | None = None) -> None:
    """Begin to import the CPU decoder in its own process where a folder has no cache; `workers.end_early` ends it.

    That takes a second, as does importing torch in this process: on two cores they take it together.
    """
    with contextlib.suppress(OSError):
        here = str(Path(root).resolve(strict=True))
        known = [read_header(folder).get("root") for folder in folders_in(default_folder(cache_dir))]
        if pipelines.num_cores() > 1 and here not in known and not Path("/proc/driver/nvidia").exists():
            workers.start_early({"auto": "turbo"}.get(decoder, decoder))


def list_caches(cache_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """Return a mapping a cache: key, root, image_size, decoder, photos, bytes, modified (seconds since the epoch)."""
    caches = []
    for folder in folders_in(default_folder(cache_dir)):
        header = read_header(folder)
        stats = [path.stat() for path in folder.iterdir()]
        caches.append(
            {
                "key": folder.name,
                **{name: header.get(name, "?") for name in ("root", "image_size", "decoder")},
                "photos": sum(not entry["reason"] for entry in read_journal(folder).values()),
                "bytes": sum(stat.st_size for stat in stats),
                "modified": max(stat.st_mtime for stat in stats),
            }
        )
    return caches


def clear(cache_dir: str | Path | None = None, key: str | None = None, *, force: bool = False) -> int:
    """Delete one cache, or all; return the bytes freed. Only folders that hold a cache are touched.

    A cache that a run reads is left alone, with a warning, unless `force`; where it is the `key`, that is an error.

    Raises FastCNNError where a run is building one of them, or it cannot be deleted.
    """

    def refuse() -> None:
        raise FastCNNError("another run is decoding photos into this cache: clear it when that is done")

    freed = 0
    for folder in folders_in(default_folder(cache_dir)):
        if key is None or folder.name == key:
            if not force and cache_files.is_read(folder):
                problem = f"a run reads the cache {folder}: it is left alone; --force deletes it all the same"
                if key is not None:
                    raise FastCNNError(problem)
                warn(problem)
                continue
            try:
                with locked(folder / "lock", refuse):
                    freed += sum(path.stat().st_size for path in folder.iterdir())
                    shutil.rmtree(folder)
            except OSError as error:
                raise FastCNNError(f"cannot delete the cache {folder}: {error.strerror or error}") from None
    return freed + (forget(default_folder(cache_dir)) if key is None else 0)


def _files(index: Index, config: DataConfig, gpu: int | None, keep_pixels: bool) -> CacheFiles:
    header: dict[str, Any] = {
        "format": cache_files.FORMAT,
        "root": str(index.root.resolve()),
        "image_size": config.decoded_size,
        "resize": "squash-bilinear-antialias",
        "decoder": pipelines.identity(config.decoder, gpu),
    }
    if config.max_pixels != pipelines.MAX_PIXELS:
        header["max_pixels"] = config.max_pixels
    if not keep_pixels:
        header["pixels"] = False
    named = json.dumps({**header, "format": 2}, sort_keys=True)  # 2: an older cache is replaced, not left behind
    key = hashlib.sha256(named.encode()).hexdigest()[:16]
    kept = usual_cache_folder() / key  # of use where that folder is read-only by now
    known = not config.cache_dir and (kept / "cache.json").is_file()
    folder = kept if known else default_folder(config.cache_dir) / key
    return CacheFiles(folder, header, config.decode_timeout)


def _look(
    index: Index, files: CacheFiles, journal: cache_files.Journal, unwritable: OSError | None, config: DataConfig
) -> Positions:
    """Read the journal of a cache into `journal`; return the positions of the photos that have to be decoded.

    Raises `unwritable` where there are some, FastCNNError where the disk has no room for them.
    """
    files.ensure_header(unwritable)
    journal.update(read_journal(files.folder))
    recognise(index, files, journal, folders_in(default_folder(config.cache_dir)), read_all=config.verify_cache)
    missing = files.find_missing(index, journal)
    if len(missing) and unwritable:
        raise unwritable
    advice = "`fastcnn cache clear`, or choose another place with --cache-dir"
    check_space(files.folder, len(missing) * files.row_bytes * files.keeps_pixels, "the cache", advice)
    return missing


def _workers(config: DataConfig, gpu: int | None) -> Workers:
    return Workers(
        config.decoder, threads=config.workers, gpu=gpu, max_pixels=config.max_pixels, timeout=config.decode_timeout
    )


def _decode(
    index: Index, missing: Positions, files: CacheFiles, decoding: Workers, ranks: Ranks, progress: _Progress
) -> None:
    """Decode this rank's chunks of the missing photos and append each in its turn, while the next is decoded."""
    side, size = files.image_size, max(1, min(cache_files.CHUNK, -(-len(missing) // ranks.count)))
    chunks = chunks_of(missing, size)
    mine = range(ranks.rank, len(chunks), ranks.count)
    buffers = [shared((size, side, side, 3)) for _ in range(2 if mine else 0)]
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)
        for number in mine:
            photos = chunks[number]
            buffers.reverse()
            pixels = buffers[0][: len(photos)]
            verdicts = decoding.decode(index.sources(photos), side, pixels)
            writing.result()
            append = functools.partial(_append, index, files, photos, pixels, verdicts)
            writing = writer.submit(ranks.take_turn, number, len(chunks) - 1, append)
            progress(int(np.searchsorted(missing, photos[-1])) + 1, len(missing))
        writing.result()


def _append(
    index: Index, files: CacheFiles, photos: Positions, pixels: Pixels, verdicts: Sequence[pipelines.Verdict]
) -> None:
    # After decoding: a file that is still as scanned now was so when it was decoded.
    files.append_chunk(index, photos, pixels, verdicts, digests(index, photos))


def _open(index: Index, files: CacheFiles, journal: cache_files.Journal, num_decoded: int, seconds: float) -> Cache:
    entries = [journal[path] for path in index.paths]
    images, inode = files.map_rows()
    return Cache(
        folder=files.folder,
        images=images,
        inode=inode,
        rows=np.array([entry["row"] for entry in entries], np.int64),
        reasons=tuple(entry["reason"] for entry in entries),
        damage=tuple(str(entry.get("damage", "")) for entry in entries),
        digests=tuple(entry["digest"] for entry in entries),
        num_decoded=num_decoded,
        decode_seconds=seconds,
    )
