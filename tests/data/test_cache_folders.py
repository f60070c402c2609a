"""Caches in their folder: listed, cleared, and left alone while they are used."""

from __future__ import annotations

from pathlib import Path

import filelock
import pytest

from fastcnn.data import cache_folders
from fastcnn.data.index import scan
from fastcnn.errors import FastCNNError, FastCNNWarning
from tests.data.caches import SIZE, assert_right, build


def test_a_cache_that_a_run_reads_is_left_alone(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    held = build(index, tmp_path)
    build(index, tmp_path, image_size=40)
    with pytest.warns(FastCNNWarning, match=f"a run reads the cache {held.folder}: it is left alone; --force"):
        assert cache_folders.clear(tmp_path / "cache") > 0
    assert [entry["key"] for entry in cache_folders.list_caches(tmp_path / "cache")] == [held.folder.name]
    with pytest.raises(FastCNNError, match="a run reads the cache"):
        cache_folders.clear(tmp_path / "cache", held.folder.name)
    assert_right(held, index)
    del held
    assert cache_folders.clear(tmp_path / "cache") > 0
    assert not cache_folders.list_caches(tmp_path / "cache")


@pytest.mark.parametrize("force", [False, True])
def test_a_cache_that_is_being_built_is_left_alone_and_all_others_are_cleared(
    force: bool, data: Path, tmp_path: Path
) -> None:
    index, root = scan(data), tmp_path / "cache"
    folders = sorted(build(index, tmp_path, image_size=size).folder for size in (SIZE, 40, 48))
    message = f"a run is decoding photos into the cache {folders[0]}: it is left alone"
    with filelock.FileLock(folders[0] / "lock"):
        with pytest.raises(FastCNNError, match=message):
            cache_folders.clear(root, folders[0].name, force=force)
        with pytest.warns(FastCNNWarning, match=message):
            assert cache_folders.clear(root, force=force) > 0
        assert [entry["key"] for entry in cache_folders.list_caches(root)] == [folders[0].name]
    assert cache_folders.clear(root) > 0


def test_list_and_clear(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    build(index, tmp_path)
    build(index, tmp_path, image_size=40)
    (tmp_path / "cache" / "not-ours").mkdir()
    (tmp_path / "cache" / "not-ours" / "photo.jpg").touch()
    first, second = cache_folders.list_caches(tmp_path / "cache")
    assert {first["image_size"], second["image_size"]} == {SIZE, 40}
    assert first["photos"] == second["photos"] == 20
    assert cache_folders.clear(tmp_path / "cache", first["key"]) == first["bytes"]
    assert [entry["key"] for entry in cache_folders.list_caches(tmp_path / "cache")] == [second["key"]]
    cache_folders.clear(tmp_path / "cache")
    assert (tmp_path / "cache" / "not-ours" / "photo.jpg").exists()
