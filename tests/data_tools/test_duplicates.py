"""Photos that look the same are found, others are not, without comparing all with all."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import pipelines
from fastcnn.data_tools import duplicates
from tests.conftest import SHARED_DATA
from tests.pipelines.test_pipelines import camera, encoded


def images(sources: list[bytes]) -> np.ndarray:
    out = np.zeros((len(sources), duplicates.SIZE, duplicates.SIZE, 3), np.uint8)
    assert all(verdict.ok for verdict in pipelines.decode(sources, duplicates.SIZE, out))
    return out


COPIES = {
    "compressed": lambda image: encoded(image, quality=40),
    "smaller": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "larger": lambda image: encoded(image.resize((image.width * 2, image.height * 2))),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15)),
    "grey": lambda image: encoded(image.convert("L")),
    "png": lambda image: encoded(image, "PNG"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found_and_nothing_else(copy: str) -> None:
    photos = [camera(200, 150, seed) for seed in range(100)]
    sources = [encoded(photo) for photo in photos] + [COPIES[copy](photo) for photo in photos[:20]]
    found = duplicates.pairs(*duplicates.describe(images(sources)))
    assert found.tolist() == [[i, 100 + i] for i in range(20)]


@pytest.mark.shared
@pytest.mark.parametrize("copy", ["compressed", "smaller"])
def test_copies_of_real_photos(copy: str) -> None:
    paths = sorted(SHARED_DATA.glob("clothing-10/train/*/*"))[::50]
    photos = [Image.open(io.BytesIO(Path(path).read_bytes())).convert("RGB") for path in paths]
    sources = [encoded(photo) for photo in photos] + [COPIES[copy](photo) for photo in photos]
    found = {tuple(pair) for pair in duplicates.pairs(*duplicates.describe(images(sources))).tolist()}
    right = {(i, len(photos) + i) for i in range(len(photos))}
    assert len(found & right) >= 0.9 * len(right)
    assert not found - right


def test_the_search_finds_what_comparing_all_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, np.uint64)
    near = hashes[rng.integers(0, 300, 900)]
    for _ in range(8):  # flips up to 8 bits, in the 63 that a hash has
        near ^= np.uint64(1) << rng.integers(0, 63, 900).astype(np.uint64)
    hashes = np.concatenate([hashes, near])
    alike = np.tile(rng.integers(0, 256, 256, np.uint8), (len(hashes), 1))
    close = np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= duplicates.DISTANCE, 1))
    assert len(close) > 100
    assert np.array_equal(duplicates.pairs(hashes, alike), close)


def test_many_photos_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one photo, thousands of times, in blocks that fit the memory."""
    monkeypatch.setattr(duplicates, "_BLOCK", 1_000)
    hashes, pictures = duplicates.describe(np.repeat(images([encoded(camera(60, 60, 0))]), 300, 0))
    found = duplicates.pairs(hashes, pictures)
    assert len(found) == 300 * 299 // 2
    assert duplicates.groups(found) == [list(range(300))]


def test_groups_are_what_pairs_connect() -> None:
    assert duplicates.groups(np.array([[4, 9], [0, 2], [2, 7], [5, 9]])) == [[0, 2, 7], [4, 5, 9]]
    assert duplicates.groups(np.zeros((0, 2), np.intp)) == []


def test_photos_that_show_nothing_look_like_nothing() -> None:
    plain = [encoded(Image.new("RGB", (40, 40), colour)) for colour in ("white", "black", "red")]
    assert not len(duplicates.pairs(*duplicates.describe(images(plain))))


def test_none_and_one() -> None:
    for count in (0, 1):
        assert duplicates.pairs(*duplicates.describe(np.zeros((count, 32, 32, 3), np.uint8))).shape == (0, 2)


@pytest.mark.long
def test_a_hundred_thousand() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 100_000, np.uint64)
    pictures = rng.integers(0, 256, (100_000, 256), np.uint8)
    hashes[70_000:70_010], pictures[70_000:70_010] = hashes[:10] ^ np.uint64(5), pictures[:10]
    assert duplicates.pairs(hashes, pictures).tolist() == [[i, 70_000 + i] for i in range(10)]
