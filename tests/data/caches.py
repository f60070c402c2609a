"""Caches of a few photos, and what must be in them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from fastcnn.config import DataConfig
from fastcnn.data import cache
from fastcnn.data.cached_photos import Cache
from fastcnn.data.index import Index

SIZE = 32


def build(index: Index, tmp_path: Path, *, progress: Any = print, note: Any = print, **options: Any) -> Cache:
    options = {"image_size": SIZE, "decoder": "pillow", "cache_dir": tmp_path / "cache", **options}
    return cache.build(index, DataConfig(**options), progress=progress, note=note)


@functools.cache
def expected_pixels(root: Path, paths: tuple[str, ...]) -> np.ndarray:
    pixels = np.zeros((len(paths), SIZE, SIZE, 3), np.uint8)
    pipelines.decode([root / path for path in paths], SIZE, pixels, decoder="pillow")
    return pixels


def expected(index: Index) -> np.ndarray:
    return expected_pixels(index.root, tuple(index.paths))


def assert_right(built: Cache, index: Index) -> None:
    pixels = expected(index)
    for i in range(len(index)):
        assert (built.rows[i] < 0) == index.paths[i].endswith("page.jpg")
    usable = np.flatnonzero(built.usable)
    assert (built.pixels(usable) == pixels[usable]).all()
