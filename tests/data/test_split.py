"""Splits: drawn by a seed, and read from a file."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fastcnn.data import split_file
from fastcnn.data.index import scan
from fastcnn.data.journal import DIGEST_BYTES, Digests
from fastcnn.data.split import SPLITS, draw_split
from fastcnn.data.split_file import read_split, write_split
from fastcnn.errors import DataError
from fastcnn.storage import files
from tests.data.test_index import many, named_split, touch


@pytest.mark.parametrize("count", [2, 3, 7, 10, 33])
def test_split_is_stratified_to_one_photo(tmp_path: Path, count: int) -> None:
    many(tmp_path, "a", count)
    many(tmp_path, "b", 2 * count)
    index = scan(tmp_path)
    splits = named_split(index, 0.2, 3)
    for label, total in enumerate((count, 2 * count)):
        held = int(((splits == "val") & (index.labels == label)).sum())
        assert 1 <= held < total
        assert abs(held - 0.2 * total) <= 0.5 or held == 1


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    many(tmp_path, "a", 50)
    many(tmp_path, "b", 50)
    index = scan(tmp_path)
    assert (draw_split(index, 0.2, 1) == draw_split(index, 0.2, 1)).all()
    assert (draw_split(index, 0.2, 1) != draw_split(index, 0.2, 2)).any()


def test_a_seed_draws_the_split_that_it_always_drew(tmp_path: Path) -> None:
    """Runs made before are compared with those made now by the same seed."""
    many(tmp_path, "a", 10)
    many(tmp_path, "b", 20)
    many(tmp_path, "c", 7)
    assert np.flatnonzero(named_split(scan(tmp_path), 0.2, 3) == "val").tolist() == [6, 9, 12, 17, 26, 27, 34]


def test_split_file_round_trip(tmp_path: Path) -> None:
    data = tmp_path / "data"
    many(data, 'a, "b"', 5)
    many(data, "c\nd", 5)
    if os.name == "posix":
        touch(data, os.fsdecode(b"c\nd/\xff.jpg"))
    index = scan(data)
    splits = draw_split(index, 0.4, 0)
    write_split(tmp_path / "split.csv", index, splits)
    photos, again = read_split(tmp_path / "split.csv", index)
    assert (photos == np.arange(len(index))).all()
    assert (again == splits).all()


def test_split_file_that_does_not_fit(tmp_path: Path) -> None:
    data = tmp_path / "data"
    many(data, "a", 5)
    many(data, "b", 5)
    index = scan(data)
    file = tmp_path / "split.csv"
    for text, message in (
        (
            "path,label,split\na/nope.jpg,a,train\n",
            "lacks 1 of the 1 photos in .*: a/nope.jpg .no usable photo.; give the folder",
        ),
        ("path,label,split\na/000.jpg,b,train\n", "not of class 'b'"),
        ("path,label,split\na/000.jpg,a,trian\n", "expected path, label, split"),
        ("path,label,split\na/000.jpg,a,train\n", "none for validation"),
        ("", "none for validation"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_split(file, index)
    file.write_text("path,label,split\na/000.jpg,a,train\nb/000.jpg,b,val\n")
    photos, splits = read_split(file, index)
    assert [index.paths[i] for i in photos] == ["a/000.jpg", "b/000.jpg"]
    assert [SPLITS[number] for number in splits] == ["train", "val"]


def test_split_csv_is_what_the_csv_module_writes(tmp_path: Path) -> None:
    """Names that need quotes and those that need none, in one file of several blocks."""
    data = tmp_path / "data"
    for name in ("plain", "caf\u00e9", "\ud55c", 'a, "b"'):
        many(data, name, 20)
    index = scan(data)
    splits = draw_split(index, 0.3, 0)
    packed = np.random.default_rng(0).integers(0, 256, (len(index), DIGEST_BYTES), np.uint8)
    packed[::7] = 0
    rows = [
        (path, index.classes[label], SPLITS[split], digest)
        for path, label, split, digest in zip(index.paths, index.labels, splits, Digests(packed), strict=True)
    ]
    with mock.patch.object(split_file, "LINES", 7):
        write_split(tmp_path / "split.csv", index, splits, Digests(packed))
    assert (tmp_path / "split.csv").read_bytes() == files.csv_lines([("path", "label", "split", "checksum"), *rows])
    assert "" in Digests(packed)
