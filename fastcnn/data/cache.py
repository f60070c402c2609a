"""Decoded photos on disk: each photo of a folder decoded once, into a memory-mapped array of uint8 pixels.

A cache is a folder named by the hash of what determines pixels (data folder, image size, resize rule, decoder), with

    cache.json     header: format version and those values
    pixels.bin     rows of (size, size, 3) uint8; new photos come behind those that are there
    photos.index   the journal as arrays, where it is long (`journal_files`)
    photos.jsonl   journal, one line a photo: path, size, mtime, ctime, inode, digest of its bytes, row, CRC-32 of the
                   row or the reason why there is none, and the CRC-32 of the line
    photos.N.jsonl the lines of rank N, until the first rank appends them to the journal
    lock           held by the run that builds the cache

A photo whose path, size, times and inode are those of a line is not read. Any other is read once, and is the one whose
digest it has, in this cache or in that of another data folder, or is decoded: so photos added later are decoded alone,
a copied or moved set is not, and an interrupted build continues where it stopped. A line that is cut short or damaged
means that its photo is decoded again, as does a row with a wrong checksum when it is read (`cached_photos`); an
unexpected header, that all are. Files from elsewhere can do no more harm: all is plain data.

A set whose pixels fit nowhere has a cache of verdicts alone: its header says so, and it has no pixels and no rows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from fastcnn.config import DataConfig
from fastcnn.data import cache_files, journal_files
from fastcnn.data.arrays import Pixels, Positions
from fastcnn.data.cache_files import CacheFiles, Place, folders_in, read_header
from fastcnn.data.cache_folders import default_folder
from fastcnn.data.cached_photos import Cache, Decode
from fastcnn.data.index import Index
from fastcnn.data.journal import Digests, Journal, taken
from fastcnn.data.recognise import digests, recognise
from fastcnn.errors import FastCNNError, fall_back
from fastcnn.storage.files import check_space, free_bytes
from fastcnn.storage.locks import locked
from fastcnn.storage.paths import usual_cache_folder
from fastcnn.system.ranks import ALONE, Ranks
from pipelines.shared_memory import shared
from pipelines.workers import Workers, end_early

_Progress = Callable[[int, int], None]


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

    Ranks decode chunks and write them side by side: which row a photo gets depends on its number among the missing
    ones alone, so the pixels are those that one process writes, and lines go to a segment of the journal a rank.

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
            found: list[Journal] = []
            missing, first_row = ranks.broadcast(lambda: _look(index, files, found, unwritable, config))
            if read_header(folder) != files.header:  # the first rank has just written it
                raise FastCNNError(
                    f"rank {ranks.rank} does not see the cache {folder}, which the first rank has made: give a "
                    "--cache-dir that all machines share"
                )
            with _workers(config, gpu) as decoding:
                _decode(index, missing, first_row, files, decoding, ranks, progress)
            end_early()
            if reason := decoding.note:
                fall_back(f"photos were decoded in this process, which a damaged one may end: {reason}", strict=strict)
            whole = found[0] if found and not len(missing) else None
            known = _journal(folder, index, ranks, whole, writable=not unwritable)
    except pipelines.DecoderUnavailable as error:
        raise FastCNNError(str(error)) from None
    except OSError as error:
        raise FastCNNError(
            f"cannot write the cache {folder}: {error.strerror or error}; choose another with --cache-dir"
        ) from None
    decode = functools.partial(pipelines.decode, decoder=config.decoder, gpu=gpu, max_pixels=config.max_pixels)
    return _open(index, files, known, decode, len(missing), time.perf_counter() - start)


def _journal(folder: Path, index: Index, ranks: Ranks, known: Journal | None, *, writable: bool) -> Journal:
    """Return the journal, read where it is not known: by the first rank, whose index the others read far faster."""
    ranks.wait()  # each has written all of its segment
    if ranks.first:
        if writable:
            journal_files.join_segments(folder)
        known = journal_files.read(folder, index) if known is None else known
        if writable:
            known = known.in_order_of(index)
            journal_files.write_index(folder, known)
    ranks.wait()  # the lock is the first rank's
    return journal_files.read(folder, index) if known is None else known


def fits_on_disk(index: Index, config: DataConfig, *, gpu: int | None = None) -> bool:
    """Return whether the pixels of an index are in its cache or have room there; arguments as for `build`."""
    files = _files(index, config, gpu, True)
    return (len(index) - files.num_rows()) * files.row_bytes <= free_bytes(files.folder)


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
    index: Index, files: CacheFiles, found: list[Journal], unwritable: OSError | None, config: DataConfig
) -> tuple[Positions, int]:
    """Read the journal of a cache into `found`; return the photos that have to be decoded and the first one's row.

    Raises `unwritable` where there are some, FastCNNError where the disk has no room for them.
    """
    files.ensure_header(unwritable)
    if not unwritable:
        journal_files.join_segments(files.folder)  # of a build that was interrupted
    others = folders_in(default_folder(config.cache_dir))
    known = recognise(index, files, journal_files.read(files.folder, index), others, read_all=config.verify_cache)
    found.append(known)
    missing = files.find_missing(known.find_current(index), known)
    if len(missing) and unwritable:
        raise unwritable
    advice = "`fastcnn cache clear`, or choose another place with --cache-dir"
    check_space(files.folder, len(missing) * files.row_bytes * files.keeps_pixels, "the cache", advice)
    return missing, files.end_row()


def _workers(config: DataConfig, gpu: int | None) -> Workers:
    return Workers(
        config.decoder, threads=config.workers, gpu=gpu, max_pixels=config.max_pixels, timeout=config.decode_timeout
    )


def _decode(
    index: Index,
    missing: Positions,
    first_row: int,
    files: CacheFiles,
    decoding: Workers,
    ranks: Ranks,
    progress: _Progress,
) -> None:
    """Decode this rank's chunks of the missing photos and write each, to rows from `first_row` on, beside the next."""
    side, size = files.image_size, max(1, min(cache_files.CHUNK, -(-len(missing) // ranks.count)))
    starts = range(0, len(missing), size)[ranks.rank :: ranks.count]
    buffers = [shared((size, side, side, 3)) for _ in range(2 if starts else 0)]

    def write(photos: Positions, pixels: Pixels, verdicts: Sequence[pipelines.Verdict], place: Place) -> None:
        # A file that is still as scanned now was so when it was decoded.
        files.write_chunk(index, photos, pixels, verdicts, digests(index, photos), place)

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)
        for start in starts:
            photos = missing[start : start + size]
            buffers.reverse()
            pixels = buffers[0][: len(photos)]
            verdicts = decoding.decode(index.sources(photos), side, pixels)
            writing.result()
            writing = writer.submit(write, photos, pixels, verdicts, Place(first_row + start, ranks.rank))
            progress(start + len(photos), len(missing))
        writing.result()


def _open(index: Index, files: CacheFiles, known: Journal, decode: Decode, num_decoded: int, seconds: float) -> Cache:
    at: Positions | slice = slice(None)
    if known.paths != index.paths:
        at = known.find(index)
        assert (at >= 0).all(), "the journal lacks a photo"
    images, inode = files.map_rows()
    notes = taken(known.notes, np.arange(len(known))[at])
    return Cache(
        folder=files.folder,
        index=index,
        images=images,
        inode=inode,
        rows=known.rows[at],
        checksums=known.checksums[at],
        unchecked=np.ones(len(index), np.bool_),
        decode=decode,
        reasons={i: str(note["reason"]) for i, note in notes.items() if note.get("reason")},
        damage={i: str(note["damage"]) for i, note in notes.items() if note.get("damage")},
        digests=Digests(known.digests.packed[at]),
        num_decoded=num_decoded,
        decode_seconds=seconds,
    )
