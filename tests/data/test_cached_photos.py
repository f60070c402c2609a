"""Rows of a cache that are read: those asked for, and never a damaged one."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcnn.data import cache_files, cache_folders, loaders
from fastcnn.data.index import scan
from fastcnn.errors import FastCNNError, FastCNNWarning
from tests.data.caches import SIZE, assert_right, build, expected


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["pixels.bin", "photos.jsonl", "cache.json"])
def test_a_flipped_bit_never_gives_a_wrong_pixel(data: Path, tmp_path: Path, name: str, count: int) -> None:
    index = scan(data)
    folder = build(index, tmp_path).folder
    content = {path: path.read_bytes() for path in folder.iterdir()}
    chance, noticed = random.Random(0), 0
    for _ in range(count):
        for path, whole in content.items():
            path.write_bytes(whole)
        flip(folder / name, chance.randrange(len(content[folder / name])), chance.randrange(8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastCNNWarning)  # "damaged: decoding them again"
            built = build(index, tmp_path)
            assert_right(built, index)
        noticed += built.num_decoded > 0 or bool(built.damaged)
    print(f"{name}: {count} bits, {noticed} noticed, the others harmless")


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("loader", ["resident", "shared", "mapped"])
def test_damaged_pixels_are_decoded_again_when_they_are_read(
    data: Path, tmp_path: Path, loader: str, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run finds them whole, where the cache can be written."""
    index = scan(data)
    file = build(index, tmp_path).folder / "pixels.bin"
    whole = file.read_bytes()
    for row in (1, 3):
        flip(file, row * SIZE**2 * 3 + 100, 3)
    damaged = file.read_bytes()
    built = build(index, tmp_path)
    assert built.num_decoded == 0
    photos = np.flatnonzero(built.usable)
    options = loaders.Options(device=torch.device("cpu"), batch_size=len(photos))
    if not writable:
        monkeypatch.setattr(Path, "open", forbidden(file, Path.open))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            feed = loaders.LOADERS[loader](built, photos, options)
            with feed.start_in_order():
                feed.drive(lambda steps: None, 1)
                seen = feed.images[feed.permutation[: len(photos)]].numpy()
            assert (seen == expected(index)[photos]).all()
        assert [str(one.message) for one in said] == [
            f"the cache {file.parent} has damaged pixels, first those of {index.paths[photos[1]]}: decoding them again"
        ][: len(said)]
    assert file.read_bytes() == (whole if writable else damaged)
    assert len(built.damaged) == 2


def forbidden(file: Path, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Path.open that refuses to write one file, as a read-only disk does."""

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path == file and "+" in mode:
            raise PermissionError
        return plain(path, mode, *arguments, **options)

    return opened


@pytest.mark.parametrize(
    ("content", "why"), [(None, "unreadable"), (slice(400), "truncated"), (slice(None), "other pixels")]
)
def test_damaged_pixels_of_a_photo_that_changed_are_an_error(
    data: Path, tmp_path: Path, content: slice | None, why: str
) -> None:
    """After the scan: before it, the photo is another one and decoded."""
    index = scan(data)
    folder = build(index, tmp_path).folder
    flip(folder / "pixels.bin", 5000, 3)
    built = build(index, tmp_path)
    photo = int(np.flatnonzero(built.rows == 5000 // SIZE**2 // 3)[0])
    path = data / index.paths[photo]
    path.unlink()
    if content:
        path.write_bytes((data / index.paths[-1]).read_bytes()[content])
    with pytest.warns(FastCNNWarning, match="damaged pixels"), pytest.raises(FastCNNError) as caught:
        built.pixels(np.flatnonzero(built.usable))
    assert why in str(caught.value)
    assert f"run: fastcnn cache clear {folder.name} --cache-dir {folder.parent}" in str(caught.value)


def test_a_cache_that_was_replaced_in_use_gives_no_pixels(data: Path, tmp_path: Path) -> None:
    """`fastcnn cache clear` and a new build, while a run still reads: its rows mean other photos by then."""
    index = scan(data)
    old = build(index, tmp_path)
    cache_folders.clear(tmp_path / "cache", force=True)
    with pytest.raises(FastCNNError, match=r"cannot read the cache .* any more"):
        old.pixels(np.arange(3))
    build(index.take(np.arange(len(index)) > 2), tmp_path)
    with pytest.raises(FastCNNError, match=r"was replaced while it was used: run the command again"):
        old.pixels(np.arange(3))


@pytest.mark.parametrize("most", [1, 2, 100])
def test_rows_are_those_asked_for_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(20, 2, 2, 3), dtype=np.uint8)
    (tmp_path / "pixels.bin").write_bytes(pixels.tobytes())
    monkeypatch.setattr(cache_files, "READ_BYTES", most * pixels[0].nbytes)
    orders = [[*range(20)], [*range(19, -1, -1)], [3, 4, 5, 0, 1, 19, 18, 4, 5, 5], [7]]
    with io.FileIO(tmp_path / "pixels.bin") as file:
        for order in orders:
            out = np.zeros((len(order), *pixels.shape[1:]), np.uint8)
            assert cache_files.read_rows(file, np.array(order), out)
            assert (out == pixels[order]).all()
        assert not cache_files.read_rows(file, np.array([18, 19, 20]), out[:1].repeat(3, 0))
