"""Photos that a cache knows by their bytes alone: those that were copied, moved, touched or replaced by a copy."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn.data import journal_files
from fastcnn.data.arrays import Positions
from fastcnn.data.cache_files import CacheFiles, chunks_of, folders_in, read_header, read_row
from fastcnn.data.index import Index
from fastcnn.data.journal import Journal, facts, of_entries
from pipelines import num_cores
from pipelines.verdict import Unusable, read

CHUNK = 512  # photos between two writes

SMALL = 20_000
"""Mean bytes of photos below which one thread is faster: for the rest, reading and hashing release the interpreter's
lock for long enough."""

MAX_THREADS = 8
"""Most threads that read the larger ones; measured with 2."""


def recognise(index: Index, files: CacheFiles, known: Journal, others: Iterable[Path], *, read_all: bool) -> Journal:
    """Return a cache's journal with the photos that are in it, or in one of `others`, under another path or stamp.

    A photo of which an entry has the size is read once, and its digest decides. Pixels that are another cache's are
    copied. Where the cache cannot be written, a photo that kept its row is entered in memory alone.

    Args:
        index: the photos.
        files: the files of this cache.
        known: the journal of this cache.
        others: folders of caches; those that differ in the data folder alone are looked at.
        read_all: whether to read the photos whose stamp is the same, too, and to forget those that are others.
    """
    current = known.find_current(index)
    changed = np.arange(len(index)) if read_all else np.flatnonzero(current < 0)
    if not len(changed):
        return known
    folders = [folder for folder in others if folder != files.folder and _differs_in_root(folder, files)]
    holders = {folder: journal_files.read(folder) for folder in folders} | {files.folder: known}
    places: dict[bytes, tuple[Path, int]] = {}
    for folder, holder in holders.items():  # this cache last: its rows need no copy
        packed = holder.digests.packed
        places |= {digest: (folder, at) for at, digest in enumerate(map(bytes, packed)) if any(digest)}
    placed = known.find(index)
    sizes = np.unique(np.concatenate([holder.facts[0] for holder in holders.values()]))
    entered: list[dict[str, Any]] = []
    unknown: list[int] = []
    for part in chunks_of(changed, CHUNK):
        found = _found(index, part, sizes, places)
        entries = {i: (folder, holders[folder].entry(at)) for i, (folder, at) in found.items()}
        entered += _enter(index, files, known, placed, entries)
        unknown += [i for i in part.tolist() if i not in found and current[i] >= 0]
    return known.without(current[unknown]).followed_by(of_entries(entered))


def digests(index: Index, photos: Positions) -> list[str]:
    """Return the digest of each photo's bytes; "" where it cannot be read or is not the one of the index any more."""
    if not len(photos) or index.sizes[photos].mean() < SMALL:
        return _digests(index, photos)
    parts = np.array_split(photos, min(num_cores(), MAX_THREADS))
    with ThreadPoolExecutor(len(parts)) as threads:
        return list(itertools.chain.from_iterable(threads.map(functools.partial(_digests, index), parts)))


def known_sizes(root: str, parent: Path) -> dict[str, int]:
    """Return path -> size in bytes of the photos that a folder held, as far as a cache in `parent` knows them."""
    folders = [folder for folder in folders_in(parent) if read_header(folder).get("root") == root]
    return {path: size for folder in folders for path, size in journal_files.read_sizes(folder).items()}


def _differs_in_root(folder: Path, files: CacheFiles) -> bool:
    return {**read_header(folder), "root": files.header["root"]} == files.header


def _digests(index: Index, photos: Positions) -> list[str]:
    return [_digest(index, photo) for photo in photos.tolist()]


def _digest(index: Index, photo: int) -> str:
    source = index.source(photo)
    try:
        digest = hashlib.blake2b(read(source), digest_size=16).hexdigest()
        info = os.stat(source if isinstance(source, Path) else source.archive)  # noqa: PTH116
    except (Unusable, OSError, ValueError):
        return ""
    return digest if index.is_unchanged(photo, info) else ""


def _found(
    index: Index, part: Positions, sizes: npt.NDArray[np.int64], places: dict[bytes, tuple[Path, int]]
) -> dict[int, tuple[Path, int]]:
    """Return position -> folder and place in the journal of the cache that holds it, for the photos of a known size."""
    candidates = part[np.isin(index.sizes[part], sizes)]
    named = zip(candidates.tolist(), map(bytes.fromhex, digests(index, candidates)), strict=True)
    return {i: places[digest] for i, digest in named if digest in places}


def _enter(
    index: Index, files: CacheFiles, known: Journal, placed: Positions, found: dict[int, tuple[Path, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Write the entries of the photos that were found, copy the pixels that other caches hold; return what is new."""
    entered: dict[int, dict[str, Any]] = {}
    for folder in {folder for folder, _ in found.values()}:
        mine = {i: entry for i, (where, entry) in found.items() if where == folder}
        rows = {i: entry["row"] for i, entry in mine.items()}
        try:
            if folder != files.folder:
                rows = _copied(files, folder, mine)
            entered |= {i: {**mine[i], **facts(index, i), "row": row} for i, row in rows.items()}
        except OSError:
            continue
    before = {i: known.entry(int(placed[i])) if placed[i] >= 0 else {} for i in entered}
    entered = {i: entry for i, entry in entered.items() if before[i] != entry}
    try:
        journal_files.append(files.folder, entered.values())
    except OSError:  # a cache that cannot be written: other ranks read the rows of its journal
        return [entry for i, entry in entered.items() if before[i].get("row") == entry["row"]]
    return [*entered.values()]


def _copied(files: CacheFiles, folder: Path, entries: dict[int, dict[str, Any]]) -> dict[int, int]:
    """Return position -> row in this cache, after appending the whole rows of another one's entries."""
    rows = {i: -1 for i, entry in entries.items() if entry["row"] == -1}
    pixels = np.empty((len(entries), files.image_size, files.image_size, 3), np.uint8)
    whole: list[int] = []
    if len(rows) < len(entries):
        with io.FileIO(folder / files.pixels.name) as file:
            for i, entry in entries.items():
                out = pixels[len(whole)]
                if entry["row"] >= 0 and read_row(file, entry["row"], out) and zlib.crc32(out.data) == entry["crc"]:
                    whole.append(i)
        first = files.end_row()
        files.write_rows(first, pixels[: len(whole)])
        rows |= {i: first + k for k, i in enumerate(whole)}
    return rows
