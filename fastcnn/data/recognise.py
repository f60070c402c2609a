"""Photos that a cache knows by their bytes alone: those that were copied, moved, touched or replaced by a copy."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.data.cache_files import (
    CacheFiles,
    Journal,
    chunks_of,
    facts,
    folders_in,
    is_current,
    read_header,
    read_journal,
    read_row,
    read_sizes,
)
from fastcnn.data.feeds import Positions
from fastcnn.data.index import Index
from pipelines.verdict import Unusable, read

CHUNK = 512  # photos between two writes


def recognise(index: Index, files: CacheFiles, journal: Journal, others: Iterable[Path], *, read_all: bool) -> None:
    """Enter the photos that are in this cache, or in one of `others`, under another path or stamp; forget the outdated.

    A photo of which an entry has the size is read once, and its digest decides. Pixels that are another cache's are
    copied. Where the cache cannot be written, a photo that kept its row is entered in memory alone.

    Args:
        index: the photos.
        files: the files of this cache.
        journal: of this cache; changed in place.
        others: folders of caches; those that differ in the data folder alone are looked at.
        read_all: whether to read the photos whose stamp is the same, too.
    """
    changed = [
        i for i, path in enumerate(index.paths) if read_all or not is_current(journal.get(path), index, i)
    ]  # fmt: skip
    if not changed:
        return
    known: dict[str, tuple[Path, dict[str, Any]]] = {}
    others = [folder for folder in others if folder != files.folder and _differs_in_root(folder, files)]
    for folder in (*others, files.folder):  # this cache last: its rows need no copy
        entries = journal if folder == files.folder else read_journal(folder)
        known |= {entry["digest"]: (folder, entry) for entry in entries.values() if entry["digest"]}
    sizes = {entry["size"] for _, entry in known.values()}
    for part in chunks_of(np.array(changed, np.intp), CHUNK):
        found = _found(index, part, sizes, known)
        _enter(index, files, journal, found)
        for i in part:
            if not is_current(journal.get(index.paths[i]), index, i) or (read_all and i not in found):
                journal.pop(index.paths[i], None)


def digests(index: Index, photos: Positions) -> list[str]:
    """Return the digest of each photo's bytes; "" where it cannot be read or is not the one of the index any more."""
    with ThreadPoolExecutor() as threads:  # reading and hashing release the interpreter's lock
        return list(threads.map(lambda i: _digest(index, i), photos))


def known_sizes(root: str, parent: Path) -> dict[str, int]:
    """Return path -> size in bytes of the photos that a folder held, as far as a cache in `parent` knows them."""
    folders = [folder for folder in folders_in(parent) if read_header(folder).get("root") == root]
    return {path: size for folder in folders for path, size in read_sizes(folder).items()}


def _differs_in_root(folder: Path, files: CacheFiles) -> bool:
    return {**read_header(folder), "root": files.header["root"]} == files.header


def _digest(index: Index, photo: int) -> str:
    source = index.source(photo)
    try:
        digest = hashlib.blake2b(read(source), digest_size=16).hexdigest()
        info = os.stat(source if isinstance(source, Path) else source.archive)  # noqa: PTH116
    except (Unusable, OSError, ValueError):
        return ""
    return digest if index.is_unchanged(photo, info) else ""


def _found(
    index: Index, part: Positions, sizes: set[int], known: dict[str, tuple[Path, dict[str, Any]]]
) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Return position -> folder and entry of the cache that holds it, after reading the photos of a known size."""
    candidates = np.array([i for i in part if int(index.sizes[i]) in sizes], np.intp)
    named = zip(candidates.tolist(), digests(index, candidates), strict=True)
    return {i: known[digest] for i, digest in named if digest in known}


def _enter(index: Index, files: CacheFiles, journal: Journal, found: dict[int, tuple[Path, dict[str, Any]]]) -> None:
    """Write the entries of the photos that were found, and copy the pixels that other caches hold."""
    entered: Journal = {}
    for folder in {folder for folder, _ in found.values()}:
        mine = {i: entry for i, (where, entry) in found.items() if where == folder}
        rows = {i: entry["row"] for i, entry in mine.items()}
        try:
            if folder != files.folder:
                rows = _copied(files, folder, mine)
            entered |= {
                index.paths[i]: {**entry, **facts(index, i), "row": rows[i]}
                for i, entry in mine.items()
                if i in rows
            }  # fmt: skip
        except OSError:
            continue
    entered = {path: entry for path, entry in entered.items() if journal.get(path) != entry}
    unknown = [path for path, entry in entered.items() if journal.get(path, {}).get("row") != entry["row"]]
    try:
        files.append_entries(entered.values())
    except OSError:  # a cache that cannot be written: other ranks read the rows of its journal
        entered = {path: entry for path, entry in entered.items() if path not in unknown}
    journal |= entered


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
        first = files.append_rows(pixels[: len(whole)])
        rows |= {i: first + k for k, i in enumerate(whole)}
    return rows
