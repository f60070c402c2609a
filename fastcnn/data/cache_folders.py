"""Folders of caches: where they are, which there are, and how they are deleted."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pipelines
from fastcnn.data import journal_files
from fastcnn.data.cache_files import folders_in, read_header
from fastcnn.data.shards import forget
from fastcnn.errors import FastCNNError, os_error_as, warn
from fastcnn.storage.locks import is_shared, locked
from fastcnn.storage.paths import user_cache_folder
from pipelines import workers


def default_folder(cache_dir: str | Path | None = None, *, strict: bool = False) -> Path:
    """Return the folder of all caches; `strict` as for `user_cache_folder`."""
    return Path(cache_dir) if cache_dir else user_cache_folder(strict=strict)


def start_early(
    root: str | Path, decoder: str, cache_dir: str | Path | None = None, *, strict: bool = False, fork: bool = False
) -> None:
    """Begin to import the CPU decoder in its own process where a folder has no cache; `workers.end_early` ends it.

    That takes a second, as does importing torch in this process: on two cores they take it together.

    fork: see `workers.start_early`.
    """
    with contextlib.suppress(OSError):
        here = str(Path(root).resolve(strict=True))
        known = [read_header(folder).get("root") for folder in folders_in(default_folder(cache_dir, strict=strict))]
        if pipelines.num_cores() > 1 and here not in known and not Path("/proc/driver/nvidia").exists():
            workers.start_early({"auto": "turbo"}.get(decoder, decoder), fork=fork)


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
                "photos": journal_files.read(folder).num_usable(),
                "bytes": sum(stat.st_size for stat in stats),
                "modified": max(stat.st_mtime for stat in stats),
            }
        )
    return caches


class _InUse(FastCNNError):
    """A cache that is not to be deleted now."""


def clear(cache_dir: str | Path | None = None, key: str | None = None, *, force: bool = False) -> int:
    """Delete one cache, or all; return the bytes freed. Only folders that hold a cache are touched.

    A cache that a run reads is left alone unless `force`, and one that a run is decoding photos into always: with a
    warning that names it, or, where it is the `key`, an error.

    Raises FastCNNError also where one cannot be deleted.
    """
    freed = 0
    for folder in folders_in(default_folder(cache_dir)):
        if key is None or folder.name == key:
            try:
                freed += _delete(folder, force=force)
            except _InUse as error:
                if key is not None:
                    raise
                warn(str(error))
    return freed + (forget(default_folder(cache_dir)) if key is None else 0)


def _delete(folder: Path, *, force: bool) -> int:
    def refuse() -> None:
        raise _InUse(f"a run is decoding photos into the cache {folder}: it is left alone; clear it when that is done")

    if not force and is_shared(folder / "pixels.bin"):
        raise _InUse(f"a run reads the cache {folder}: it is left alone; --force deletes it all the same")
    with os_error_as(f"cannot delete the cache {folder}"), locked(folder / "lock", refuse):
        freed = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
    return freed
