"""Photos in shards: the same classes, pixels, verdicts and runs as from files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines
from fastcnn import Config, evaluate_run, fit
from fastcnn.config import DataConfig
from fastcnn.data import cache, cache_folders, dataset, index, split, split_file, tar
from fastcnn.data.cached_photos import Cache
from fastcnn.data.feeds import Feed
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.data_tools import check, write_shards
from fastcnn.errors import DataError, FastCNNWarning
from pipelines.shared_memory import shared
from pipelines.verdict import Member
from pipelines.workers import Workers

SIZE = 32
BAD = {
    "text.jpg": (b"<html>not found</html>", "not an image"),
    "empty.jpg": (b"", "empty"),
    "cut.jpg": (None, "truncated"),
}


def pack(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(*labels: object, first: int = 0) -> dict[str, bytes]:
    """Return a photo and a label for each of `labels`."""
    members = {}
    for number, label in enumerate(labels, first):
        members |= {f"{number:04}.jpg": b"photo", f"{number:04}.cls": str(label).encode()}
    return members


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val folders of three classes, with photos of both that cannot be used. Read-only."""
    root = tmp_path_factory.mktemp("files") / "photos"
    for name in sorted(path.name for path in photos.iterdir() if path.is_dir())[:3]:
        for i, photo in enumerate(sorted((photos / name).glob("*.jpg"))):
            part = root / ("train" if i < 20 else "val") / name
            part.mkdir(parents=True, exist_ok=True)
            shutil.copy2(photo, part / f"a.{photo.name}")
    whole = photo.read_bytes()
    for file, (content, _) in BAD.items():
        (part / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    return root


@pytest.fixture(scope="module")
def sharded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in five shards. Read-only."""
    out = tmp_path_factory.mktemp("shards") / "out"
    write_shards.write(folder, out, photos_each=25)
    return out


def originals(out: Path) -> dict[str, str]:
    with (out / "paths.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["photo"]: row["path"] for row in csv.DictReader(file)}


def matched(folder: Path, out: Path) -> tuple[index.Index, index.Index, np.ndarray]:
    """Return both indexes, and for each photo of the shards its position among the files."""
    files, found = index.scan(folder), index.scan(out)
    position = {path: i for i, path in enumerate(files.paths)}
    original = originals(out)
    return files, found, np.array([position[original[path]] for path in found.paths])


def test_the_same_photos_and_classes(folder: Path, sharded: Path) -> None:
    files, found, which = matched(folder, sharded)
    assert len(list(sharded.glob("*/*.tar"))) == 5
    assert sorted(which) == list(range(len(files)))
    assert found.classes == files.classes
    for name in ("labels", "folders", "sizes"):
        assert (getattr(found, name) == getattr(files, name)[which]).all()
    assert found.source(3).archive == str(sharded / "train/000000.tar")
    for photo, original in list(enumerate(which))[::7]:
        source = found.source(photo)
        assert isinstance(source, Member)
        whole = Path(source.archive).read_bytes()
        assert whole[source.offset : source.offset + source.size] == (folder / files.paths[original]).read_bytes()


@pytest.mark.parametrize(
    "decoder", [pytest.param(name, marks=[pytest.mark.long] * (name != "turbo")) for name in pipelines.BACKENDS]
)
def test_the_same_pixels_and_verdicts(folder: Path, sharded: Path, decoder: str) -> None:
    try:
        pipelines.choose(decoder, gpu=False)
    except pipelines.DecoderUnavailable as error:
        pytest.skip(str(error))
    files, found, which = matched(folder, sharded)
    shape = (len(found), SIZE, SIZE, 3)
    expected, there, elsewhere = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8), shared(shape)
    verdicts = pipelines.decode(files.sources(which), SIZE, expected, decoder=decoder)
    assert pipelines.decode(found.sources(), SIZE, there, decoder=decoder) == verdicts
    with Workers(decoder) as workers:
        assert workers.decode(found.sources(), SIZE, elsewhere) == verdicts
        assert not workers.note
    assert (there == expected).all()
    assert (elsewhere == expected).all()
    reasons = {Path(files.paths[i]).name: verdict.reason for i, verdict in zip(which, verdicts, strict=True)}
    assert {name: reasons[name] for name in BAD} == {name: reason for name, (_, reason) in BAD.items()}


def test_parts_of_files_that_are_not_there(tmp_path: Path, photos: Path) -> None:
    photo = next(photos.rglob("*.jpg"))
    size = photo.stat().st_size
    (tmp_path / "folder").mkdir()
    sources = [
        Member(str(photo), 0, size),
        Member(str(photo), 0, size + 1),
        Member(str(photo), 2**62, 5),
        Member(str(photo), 10, 0),
        Member(str(tmp_path / "none.tar"), 0, 5),
        Member(str(tmp_path / "folder"), 0, 5),
        Member("nu\0ll", 0, 5),
    ]
    verdicts = pipelines.decode(sources, SIZE, np.zeros((len(sources), SIZE, SIZE, 3), np.uint8), decoder="pillow")
    reasons = ["", "truncated", "truncated", "empty", "unreadable", "unreadable", "unreadable"]
    assert [verdict.reason for verdict in verdicts] == reasons


def test_the_cache_knows_a_shard_that_is_written_anew(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(sharded, out)

    def build() -> Cache:
        return cache.build(
            index.scan(out), DataConfig(image_size=SIZE, decoder="turbo", cache_dir=str(tmp_path / "cache"))
        )

    first, found = build(), index.scan(out)
    assert first.num_decoded == len(found)
    assert build().num_decoded == 0
    shard = out / "val/000000.tar"
    shutil.copy(shard, tmp_path / "copy.tar")
    os.replace(tmp_path / "copy.tar", shard)  # noqa: PTH105
    again = build()
    empty = [reason for reason in again.reasons.values() if reason == "empty"]
    assert again.num_decoded == len(empty)  # without bytes there is nothing to know it by
    usable = np.flatnonzero(again.usable)
    assert (again.pixels(usable) == first.pixels(usable)).all()


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache folder that tests share, each of whose photos is decoded once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_files_batches(loader: str, folder: Path, sharded: Path, cache_dir: str) -> None:
    files, found, which = matched(folder, sharded)
    usable = np.flatnonzero([Path(files.paths[i]).name not in BAD for i in which])
    seen = []
    for some, photos in ((files, which[usable]), (found, usable)):
        built = cache.build(some, DataConfig(image_size=SIZE, decoder="turbo", cache_dir=cache_dir))
        feed = LOADERS[loader](built, photos, Options(device=torch.device("cpu"), batch_size=16, crop_scale=None))
        batches: list[tuple[torch.Tensor, torch.Tensor]] = []

        def run(steps: int, feed: Feed = feed, batches: list[tuple[torch.Tensor, torch.Tensor]] = batches) -> None:
            for _ in range(steps):
                rows = feed.permutation[feed.cursor + torch.arange(16)]
                batches.append((feed.images[rows], feed.labels[rows]))
                feed.cursor.add_(16)

        with feed.start_epoch(7, 1):
            feed.drive(run, len(feed) // 16)
        seen.append(batches)
    assert len(seen[0]) == 5
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("loader", [pytest.param("resident", marks=pytest.mark.long), "stream"])
def test_a_run_and_its_evaluation(sharded: Path, loader: str, tmp_path: Path) -> None:
    options = {"epochs": 1, "image_size": 32, "filters": (4,), "batch_size": 8, "loader": loader, "max_bad": 0.5}
    options["report"] = False
    with pytest.warns(FastCNNWarning, match="3 of 93 photos cannot be used"):
        run = fit(Config(data=str(sharded), **options), run_dir=tmp_path / "run").run_dir  # type: ignore[arg-type]
    bad = (run / "bad_images.csv").read_text().splitlines()[1:]
    assert sorted(line.split(",")[1] for line in bad) == sorted(reason for _, reason in BAD.values())
    assert "val/000000.tar/" in (run / "split.csv").read_text()
    with pytest.warns(FastCNNWarning, match="cannot be used"):
        own = evaluate_run(run)
    with pytest.warns(FastCNNWarning, match="cannot be used"):
        # The only held-out folder is the run's test set.
        same = evaluate_run(run, sharded / "val")
    assert own.by_split["test"].to_dict() == same.by_split["all"].to_dict()


def test_check(folder: Path, sharded: Path) -> None:
    files, found = check.check(folder), check.check(sharded)
    assert not found.refusal
    assert not found.index.outside
    assert found.classes() == files.classes()
    assert sorted(each.reason for each in found.bad.values()) == sorted(each.reason for each in files.bad.values())
    assert sorted(map(len, (group.photos for group in found.exact))) == sorted(
        map(len, (group.photos for group in files.exact))
    )


def test_layouts(tmp_path: Path) -> None:
    pack(tmp_path / "b.tar", samples(2, 11))
    pack(tmp_path / "a.tar", {"z.jpg": b"1", "z.cls": b" 2\n", "a.jpg": b"22", "a.cls": b"02"})
    found = index.scan(tmp_path)
    assert found.classes == ("2", "11")
    assert found.paths == ("a.tar/z.jpg", "a.tar/a.jpg", "b.tar/0000.jpg", "b.tar/0001.jpg")
    assert found.labels.tolist() == [0, 0, 0, 1]
    assert found.take(found.labels == 1).source(0) == Member(str(tmp_path / "b.tar"), 2560, 5)
    (tmp_path / "classes.txt").write_text("".join(f"{name}\r\n" for name in "zyxwvutsrqpo"))
    with pytest.warns(FastCNNWarning, match=r"no photos of 10 classes, which are left out: z, y, w, .* p$"):
        found = index.scan(tmp_path)
    assert found.classes == ("x", "o")
    assert found.labels.tolist() == [0, 0, 0, 1]


def test_what_is_no_photo_is_passed_over(tmp_path: Path) -> None:
    members = samples(0, 1)
    members |= {".hidden.jpg": b"x", "._0000.jpg": b"x", ".git/x.jpg": b"x", "0000.txt": b"a cat", "0001.seg.png": b"x"}
    members |= {"README": b"", "./0005.JPG": b"x", "./0005.cls": b"0", "../up.jpg": b"x", "../up.cls": b"1"}
    members |= {
        "/etc/x.jpeg": b"x",
        "/etc/x.cls": b"1",
        "caf\udce9.png": b"x",
        "caf\udce9.cls": b"0",
        "x" * 200 + ".cls": b"0",
    }
    pack(tmp_path / "a.tar", {**members, "x" * 200 + ".webp": b"x"})
    found = index.scan(tmp_path)
    names = [path.removeprefix("a.tar/") for path in found.paths]
    assert names == [
        "0000.jpg",
        "0001.jpg",
        "./0005.JPG",
        "../up.jpg",
        "/etc/x.jpeg",
        "caf\udce9.png",
        f"{'x' * 200}.webp",
    ]
    assert found.labels.tolist() == [0, 1, 0, 1, 1, 0, 0]
    assert found.num_hidden == 3
    split_file.write_split(tmp_path / "split.csv", found, split.draw_split(found, 0.5, 0))
    assert (split_file.read_split(tmp_path / "split.csv", found)[1] == split.draw_split(found, 0.5, 0)).all()


def test_held_out_shards_have_the_training_shards_classes(tmp_path: Path) -> None:
    pack(tmp_path / "train/0.tar", samples(0, 1, 2))
    pack(tmp_path / "val/0.tar", samples(2, 1, 0))
    pack(tmp_path / "test/0.tar", samples(0, 1, 2))
    assert index.scan(tmp_path).classes == ("0", "1", "2")
    (tmp_path / "train/classes.txt").write_text("eel\ncat\ndog\n")
    (tmp_path / "test/classes.txt").write_text("cat\ndog\neel")
    found = index.scan(tmp_path)
    assert found.classes == ("eel", "cat", "dog")
    assert [found.labels[found.folders == part].tolist() for part in ("train", "val", "test")] == [
        [0, 1, 2],
        [2, 1, 0],
        [1, 2, 0],
    ]
    assert index.scan_held_out(tmp_path, ("cat", "dog", "eel")).labels.tolist() == [0, 1, 2, 1, 0, 2]
    # Class folders and shards side by side.
    (tmp_path / "test/0.tar").unlink()
    for name in found.classes:
        (tmp_path / "test" / name).mkdir()
        (tmp_path / "test" / name / "1.jpg").write_bytes(b"x")
    found = index.scan(tmp_path)
    assert found.paths[:3] == ("test/cat/1.jpg", "test/dog/1.jpg", "test/eel/1.jpg")
    assert found.source(0) == tmp_path / "test/cat/1.jpg"


REFUSED = {
    "no label": ({"0007.jpg": b"x", "0008.jpg": b"x"}, "2 photos have no label: expected a.tar/0007.cls beside"),
    "a word for a label": (
        {"0007.jpg": b"x", "0007.cls": b"cat"},
        r"a.tar, 0007.cls: expected a whole number .* b'cat'",
    ),
    "a negative label": ({"0007.jpg": b"x", "0007.cls": b"-1"}, "expected a whole number"),
    "a long label": ({"0007.jpg": b"x", "0007.cls": b" " * 100 + b"1"}, "expected a whole number"),
    "two photos": (
        {"0007.jpg": b"x", "0007.png": b"x", "0007.cls": b"1"},
        "two photos of one sample, 0007.jpg and 0007.p",
    ),
    "an unknown label": (
        {"0007.jpg": b"x", "0007.cls": b"5"},
        "0007.jpg has the label 5 which is none of the 2 classes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_samples(what: str, tmp_path: Path) -> None:
    members, message = REFUSED[what]
    pack(tmp_path / "a.tar", {**samples(0, 1), **members})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=message):
        index.scan(tmp_path)
    with pytest.raises(DataError, match=message):  # there is no looking into them otherwise
        check.check(tmp_path)


def test_refused_archives(tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.tar", samples(0, 1)).read_bytes()
    for content, message in (
        (whole[:700], "a.tar cannot be used as a shard: it is cut short"),
        (whole[:2048], "it is cut short: no end at byte 2,048"),
        (b"\x1f\x8b" + whole, "it is compressed"),
        (b"", "no tar archive"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            index.scan(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"a.tar.gz is compressed: unpack it"):
        index.scan(tmp_path)
    (tmp_path / "a.tar.gz").unlink()
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a.tar cannot be read: No such file"):
        index.scan(tmp_path)


def test_the_same_name_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.jpg", "a.cls", "a.cls"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="expected a whole number"):
        index.scan(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("cat\n\ndog", "line 2"), ("cat\ncat", "'cat' is there twice"), ("", "line 1")]
)
def test_refused_classes(text: str, message: str, tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(0, 1))
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        index.scan(tmp_path)


def test_labels_without_photos_are_a_warning(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {**samples(0, 1), "0005.cls": b"1", "0005.npy": b"x"})
    with pytest.warns(FastCNNWarning, match=r"1 label in the shards of .* without a photo: a.tar/0005.cls"):
        assert len(index.scan(tmp_path)) == 2


def test_prepared_like_any_folder(sharded: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": SIZE, "cache_dir": str(tmp_path), "loader": "stream", "max_bad": 0.5}
    with pytest.warns(FastCNNWarning, match="cannot be used"):
        data = dataset.prepare(DataConfig(data=str(sharded), **options))
    assert data.pixels(np.arange(5)).any((1, 2, 3)).all()


def test_scans_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, memory, scanned = tmp_path / "data", tmp_path / "memory", []
    root.mkdir()
    pack(root / "a.tar", samples(0, 1))
    pack(root / "b.tar", {**samples(2, 3), ".hidden": b""})
    plain = tar.entries
    monkeypatch.setattr(tar, "entries", lambda path: scanned.append(path.name) or plain(path))
    first = index.scan(root, memory)
    assert sorted(scanned) == ["a.tar", "b.tar"]
    assert_same(index.scan(root, memory), first)
    assert len(scanned) == 2
    pack(root / "b.tar", samples(5, 9))  # one that is written anew is scanned again, and no other
    again = index.scan(root, memory)
    assert scanned[2:] == ["b.tar"]
    assert again.paths == index.scan(root).paths
    (root / "b.tar").write_bytes((root / "b.tar").read_bytes()[:1200])
    with pytest.raises(DataError, match=r"b.tar cannot be used as a shard: it is cut short"):
        index.scan(root, memory)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"{",
        lambda content: b"[" * 100_000,
        lambda content: json.dumps({**content, "format": 0}).encode(),
        lambda content: json.dumps({**content, "archives": []}).encode(),
        lambda content: json.dumps({**content, "archives": {"a.tar": [1, 2]}}).encode(),
        lambda content: json.dumps(content).replace("512", "-512").encode(),
        lambda content: json.dumps(content).replace("512", "51200000").encode(),
        lambda content: json.dumps(content).replace("512", '"512"').encode(),
    ],
)
def test_a_damaged_memory_is_scanned_again(change: Any, tmp_path: Path) -> None:
    root, memory = tmp_path / "data", tmp_path / "memory"
    root.mkdir()
    pack(root / "a.tar", samples(0, 1))
    expected = index.scan(root, memory)
    file = next(memory.iterdir())
    whole = file.read_bytes()
    file.write_bytes(change(json.loads(whole)))
    assert file.read_bytes() != whole
    assert_same(index.scan(root, memory), expected)
    assert file.read_bytes() == whole
    assert cache_folders.clear(memory) == len(whole)
    assert not list(memory.iterdir())
    assert_same(index.scan(root, file / "nowhere"), expected)


def assert_same(found: index.Index, expected: index.Index) -> None:
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(found, name), value), name
