"""Building a cache: which photos are decoded, and which were already."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pipelines
from fastcnn.config import Config, DataConfig
from fastcnn.data import cache, cache_files, cache_folders, dataset, journal_files, recognise
from fastcnn.data.index import scan
from fastcnn.data.journal import facts
from fastcnn.errors import DataError, FastCNNError, FastCNNWarning
from pipelines.workers import Workers
from tests.data.caches import SIZE, assert_right, build, expected_pixels


def test_pixels_and_reasons(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    done: list[tuple[int, int]] = []
    built = build(index, tmp_path, progress=lambda *now: done.append(now))
    assert_right(built, index)
    assert [*built.reasons.values()] == ["not an image"]
    assert built.num_decoded == len(index) == done[-1][0] == done[-1][1]


def test_a_second_build_decodes_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = scan(data)
    first = build(index, tmp_path)
    monkeypatch.setattr(Workers, "decode", None)
    second = build(scan(data), tmp_path)
    assert second.num_decoded == 0
    assert (second.rows == first.rows).all()
    assert second.reasons == first.reasons


def test_only_new_and_changed_photos_are_decoded(data: Path, tmp_path: Path) -> None:
    build(scan(data), tmp_path)
    photos = sorted(data.rglob("0*.jpg"))
    photos[0].with_name("new.jpg").write_bytes(photos[0].read_bytes() + b"\0")
    photos[1].write_bytes(photos[7].read_bytes() + b"\0")
    photos[2].unlink()
    expected_pixels.cache_clear()
    index = scan(data)
    built = build(index, tmp_path)
    assert built.num_decoded == 2
    assert_right(built, index)


def same_size(first: Path, second: Path) -> None:
    """Give two photos one size and one time: trailing bytes are no part of a JPEG."""
    content = [first.read_bytes(), second.read_bytes()]
    for path, data in zip((first, second), content, strict=True):
        path.write_bytes(data.ljust(max(map(len, content)), b"\0"))
        os.utime(path, ns=(10**18, 10**18))


def replace(old: Path, new: Path) -> None:
    """Replace a file by a copy with its times, as `cp -p` into a temporary file and `mv` do."""
    shutil.copy2(new, old.with_name("copy"))
    old.with_name("copy").rename(old)


def test_photos_added_later_are_in_the_index_where_they_belong(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that later runs need not look for each photo."""
    monkeypatch.setattr(journal_files, "FEW_LINES", 1)
    first = min(data.glob("*/*.jpg"))
    first.rename(tmp_path / "later.jpg")
    build(scan(data), tmp_path)
    (tmp_path / "later.jpg").rename(first)
    index = scan(data)
    built = build(index, tmp_path)
    assert_right(built, index)
    journal = journal_files.read(built.folder)
    assert journal.paths == index.paths
    assert journal.num_indexed == len(index)
    assert index.paths[np.argmax(journal.rows)] == first.relative_to(data).as_posix()  # its row is the last one
    assert_right(build(index, tmp_path), index)


@pytest.mark.parametrize("how", ["rename", "copy2", "replace"])
def test_a_file_of_the_same_size_and_time_is_not_the_same(data: Path, tmp_path: Path, how: str) -> None:
    first, second = (data / path for path in scan(data).paths[:2])
    same_size(first, second)
    build(scan(data), tmp_path)
    if how == "rename":
        other = first.rename(first.with_name("other"))
        second.rename(first)
        other.rename(second)
    else:
        {"copy2": shutil.copy2, "replace": lambda a, b: replace(b, a)}[how](second, first)
    expected_pixels.cache_clear()
    index = scan(data)
    built = build(index, tmp_path)
    assert built.num_decoded == 0  # both contents are known
    assert_right(built, index)


def test_class_folders_that_change_names(data: Path, tmp_path: Path) -> None:
    build(scan(data), tmp_path)
    first, second = sorted(data.iterdir())[:2]
    other = first.rename(data / "other")
    second.rename(first)
    other.rename(second)
    expected_pixels.cache_clear()
    index = scan(data)
    built = build(index, tmp_path)
    assert built.num_decoded == 0
    assert_right(built, index)


def test_unchanged_photos_are_not_read_and_touched_ones_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(scan(data), tmp_path)
    read: list[object] = []
    monkeypatch.setattr(recognise, "read", lambda source: read.append(source) or source.read_bytes())
    monkeypatch.setattr(Workers, "decode", None)
    build(scan(data), tmp_path)
    assert not read
    touched = data / scan(data).paths[0]
    os.utime(touched)
    for _ in range(2):
        build(scan(data), tmp_path)
        assert read == [touched]
    read.clear()
    build(scan(data), tmp_path, verify_cache=True)
    assert len(read) == len(scan(data))
    lines = len((build(scan(data), tmp_path).folder / "photos.jsonl").read_bytes())
    build(scan(data), tmp_path, verify_cache=True)
    assert len((build(scan(data), tmp_path).folder / "photos.jsonl").read_bytes()) == lines


def test_verify_cache_finds_bytes_that_changed_under_the_same_facts(data: Path, tmp_path: Path) -> None:
    """As a disk does that loses writes; here the journal is given the facts of the new file."""
    index = scan(data)
    folder = build(index, tmp_path).folder
    entry = journal_files.read(folder).entry(0)
    (data / index.paths[0]).write_bytes((data / index.paths[3]).read_bytes() + b"\0")
    index = scan(data)
    with (folder / "photos.jsonl").open("ab") as file:
        file.write(journal_files.line({**entry, **facts(index, 0)}))
    assert build(index, tmp_path).num_decoded == 0
    expected_pixels.cache_clear()
    built = build(index, tmp_path, verify_cache=True)
    assert built.num_decoded == 1
    assert_right(built, index)


@pytest.mark.parametrize("keep_pixels", [True, False])
def test_a_copied_or_moved_set_is_not_decoded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_pixels: bool
) -> None:
    config = DataConfig(image_size=SIZE, decoder="pillow", cache_dir=str(tmp_path / "cache"))
    first = cache.build(scan(data), config, keep_pixels=keep_pixels)
    shutil.copytree(data, tmp_path / "copy")
    data.rename(tmp_path / "moved")
    monkeypatch.setattr(Workers, "decode", None)
    for name in ("copy", "moved"):
        index = scan(tmp_path / name)
        built = cache.build(index, config, keep_pixels=keep_pixels)
        assert built.num_decoded == 0
        assert built.folder != first.folder
        assert built.reasons == first.reasons
        if keep_pixels:
            assert_right(built, index)


def test_a_cache_of_the_format_before_is_made_anew(data: Path, tmp_path: Path) -> None:
    """It cannot tell a file that was replaced under its old time."""
    index = scan(data)
    folder = build(index, tmp_path).folder
    header = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.warns(FastCNNWarning, match="decoding every photo again"):
        built = build(index, tmp_path)
    assert built.folder == folder
    assert built.num_decoded == len(index)
    assert_right(built, index)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 50))])
def test_pixels_are_those_of_the_files_whatever_happened_to_them(data: Path, tmp_path: Path, seed: int) -> None:
    """Ten sequences of changes, each followed by a build."""
    draw = random.Random(seed)
    names = scan(data).paths
    photos = [data / name for name in names]
    for photo in photos[1:]:
        same_size(photos[0], photo)
    kept = [photo.read_bytes() for photo in photos]
    for _ in range(10):
        for _ in range(draw.randint(1, 4)):
            path, other = draw.sample(photos, 2)
            match draw.randint(0, 5):
                case 0:
                    path.write_bytes(draw.choice(kept))
                case 1:  # mv a b; cp -p
                    replace(path, other)
                case 2:
                    shutil.copy2(other, path)
                case 3:
                    os.utime(path, ns=(10**18, 10**18))
                case 4:
                    path.write_bytes(path.read_bytes()[: draw.randint(0, 500)])
                case 5:  # two change names
                    path.rename(data / "aside")
                    other.rename(path)
                    (data / "aside").rename(other)
        index = scan(data)
        built = build(index, tmp_path)
        pixels = np.zeros((len(index), SIZE, SIZE, 3), np.uint8)
        verdicts = pipelines.decode(index.sources(), SIZE, pixels, decoder="pillow")
        assert built.reasons == {i: verdict.reason for i, verdict in enumerate(verdicts) if verdict.reason}
        usable = np.flatnonzero(built.usable)
        assert (built.pixels(usable) == pixels[usable]).all()


def test_another_size_or_decoder_is_another_cache(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    folders = {build(index, tmp_path, **o).folder for o in ({}, {"image_size": 40}, {"decoder": "turbo"})}
    assert len(folders) == 3


def test_unreadable_photos_are_tried_again(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    photo = data / index.paths[0]
    stat, content = photo.stat(), photo.read_bytes()
    photo.unlink()  # vanishes between scan and decode
    assert build(index, tmp_path).reasons[0] == "unreadable"
    photo.write_bytes(content)
    os.utime(photo, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    built = build(index, tmp_path)
    assert built.num_decoded == 1
    assert_right(built, index)


def test_a_photo_that_changes_between_scan_and_decode(data: Path, tmp_path: Path) -> None:
    """What is there when it is decoded counts; the next run sees that it is another, and decodes it again."""
    index = scan(data)
    (data / index.paths[0]).write_bytes((data / index.paths[3]).read_bytes() + b"\0")
    assert_right(build(index, tmp_path), index)
    index = scan(data)
    assert build(index, tmp_path).num_decoded == 1
    (data / index.paths[1]).write_bytes((data / index.paths[1]).read_bytes()[:400])  # being written
    assert build(index, tmp_path).num_decoded == 0
    built = build(scan(data), tmp_path)
    assert built.reasons[1] == "truncated"


def test_photos_with_names_of_any_kind(data: Path, tmp_path: Path) -> None:
    names = [b"with space.jpg", b"new\nline.jpg", b"\xff\xfe.jpg", b"n" * 251 + b".jpg", b"none"]
    folder, photo = data / scan(data).classes[0], data / scan(data).paths[0]
    for name in names:
        shutil.copy(photo, folder / os.fsdecode(name))
    (folder / "link.jpg").symlink_to(photo)
    index = scan(data)
    assert_right(build(index, tmp_path), index)
    assert build(index, tmp_path).num_decoded == 0


def test_damage_is_told_and_kept(data: Path, tmp_path: Path) -> None:
    """A JPEG with bytes too many between two segments decodes all the same; the next run knows of it, too."""
    index = scan(data)
    photo = data / index.paths[0]
    content = photo.read_bytes()
    photo.write_bytes(content.replace(b"\xff\xdb", b"\0\0\0\xff\xdb", 1))
    for _ in range(2):
        built = build(scan(data), tmp_path)
        assert built.damage[0].startswith("Corrupt JPEG data: 3 extraneous bytes")
        assert len(built.damage) == 1
        assert built.usable[0]


def test_a_run_is_told_of_bad_and_damaged_photos(data: Path, tmp_path: Path) -> None:
    photo = data / scan(data).paths[0]
    photo.write_bytes(photo.read_bytes().replace(b"\xff\xdb", b"\0\xff\xdb", 1))
    cache_dir = str(tmp_path / "cache")
    config = DataConfig(data=str(data), image_size=SIZE, decoder="pillow", cache_dir=cache_dir, loader="resident")
    with (
        pytest.warns(FastCNNWarning, match=r"1 of 21 photos cannot be used .*\(1 not an image\); see bad_images.csv"),
        pytest.warns(FastCNNWarning, match=r"1 of 20 photos are damaged .*Corrupt JPEG data.*fastcnn data check"),
    ):
        ready = dataset.prepare(config)
    assert list(ready.damaged) == [scan(data).paths[0]]
    assert list(ready.bad.values()) == ["not an image"]
    for i in range(12):
        (data / scan(data).classes[1] / f"0 page\n{i:02}.jpg").write_text("text")
    with pytest.raises(DataError) as error:
        dataset.prepare(config)
    message = str(error.value)
    assert "13 of 33 photos cannot be used (13 not an image), more than --max-bad 0.05" in message
    assert message.count("(not an image)") == 10
    assert "\n" not in message
    assert "fastcnn data check" in message


def test_the_default_limit_is_that_of_the_decoders() -> None:
    assert Config().max_pixels == pipelines.MAX_PIXELS


def test_max_pixels_is_part_of_the_key(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    built = build(index, tmp_path)
    assert build(index, tmp_path, max_pixels=pipelines.MAX_PIXELS).folder == built.folder
    small = build(index, tmp_path, max_pixels=100)
    assert set(small.reasons.values()) == {"too large", "not an image"}
    assert small.folder != built.folder


def test_an_interrupted_build_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "CHUNK", 4)
    index = scan(data)

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(index, tmp_path, progress=stop)
    folder = next((tmp_path / "cache").iterdir())
    with (folder / "pixels.bin").open("ab") as file:
        file.write(b"half a row")
    with (folder / "photos.jsonl").open("ab") as file:
        file.write(b'{"path": "cut sh')
    built = build(index, tmp_path)
    assert built.num_decoded == len(index) - 8
    assert_right(built, index)
    assert build(index, tmp_path).num_decoded == 0


def test_what_ranks_decoded_before_a_build_was_interrupted_is_kept(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    folder = build(index, tmp_path).folder
    lines = (folder / "photos.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "photos.jsonl").write_bytes(b"".join(lines[:5]))
    (folder / "photos.1.jsonl").write_bytes(b"".join(lines[5:9]) + b'{"path": "cut sh')
    (folder / "photos.3.jsonl").write_bytes(b"".join(lines[9:]))
    assert build(index, tmp_path).num_decoded == 0
    assert not list(folder.glob("photos.*.jsonl"))
    assert_right(build(index, tmp_path), index)


def test_lost_pixels_are_decoded_again_and_it_says_so(data: Path, tmp_path: Path) -> None:
    index = scan(data)
    built = build(index, tmp_path)
    os.truncate(built.folder / "pixels.bin", np.sort(built.rows)[-2] * SIZE**2 * 3 + 7)
    with pytest.warns(FastCNNWarning, match=r"has lost the pixels of 2 photos: decoding them again"):
        built = build(index, tmp_path)
    assert built.num_decoded == 2
    assert_right(built, index)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"root": "/elsewhere"}, "its root is another"),
        ({"image_size": 40}, "its image_size is another"),
        ({"decoder": "turbo-1"}, "its decoder is another"),
        ({"format": cache_files.FORMAT + 1}, "its format is another"),
        (b"{", "its header is damaged"),
        (b"[" * 100_000, "its header is damaged"),
        (None, "its header is damaged"),
    ],
)
def test_a_cache_under_another_header_is_built_anew_and_it_says_so(
    data: Path, tmp_path: Path, change: dict[str, object] | bytes | None, why: str
) -> None:
    """A cache of another folder, size, decoder or version, put in this one's place, gives none of its pixels."""
    index = scan(data)
    header = build(index, tmp_path).folder / "cache.json"
    if change is None:
        header.unlink()
    elif isinstance(change, bytes):
        header.write_bytes(change)
    else:
        header.write_text(json.dumps({**json.loads(header.read_text()), **change}))
    with pytest.warns(FastCNNWarning, match=f"cannot be used .{why}.: decoding every photo again"):
        built = build(index, tmp_path)
    assert built.num_decoded == len(index)
    assert_right(built, index)
    assert build(index, tmp_path).num_decoded == 0


def test_a_second_builder_waits(data: Path, tmp_path: Path) -> None:
    folder = build(scan(data), tmp_path).folder
    hold = (
        f"lock = filelock.FileLock({str(folder / 'lock')!r}); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", f"import filelock, time; {hold}"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout:
        holder.stdout.readline()
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            holder.kill()  # a dead builder's lock does not block

        assert build(scan(data), tmp_path, note=note).num_decoded == 0
    assert len(notes) == 1


def test_no_room(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(FastCNNError, match="MiB free"):
        build(scan(data), tmp_path)


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FastCNNError, match="--cache-dir"):
        build(scan(data), tmp_path, cache_dir=tmp_path / "file")


def test_the_journal_is_plain_data(data: Path, tmp_path: Path) -> None:
    folder = build(scan(data), tmp_path).folder
    lines = (folder / "photos.jsonl").read_text().split("\n")
    assert all(json.loads(line)["path"] for line in lines if line)
    assert time.time() - cache_folders.list_caches(tmp_path / "cache")[0]["modified"] < 3600
