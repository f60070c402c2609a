"""What a scan finds in a folder of photos, and which folders it refuses."""

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fastcnn import Config, fit
from fastcnn.config import DataConfig
from fastcnn.data.dataset import prepare
from fastcnn.data.index import Index, scan, scan_held_out, scan_loosely
from fastcnn.data.split import SPLITS, draw_split, explain_split
from fastcnn.errors import DataError, FastCNNWarning, UsageError


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def _never(done: int, total: int) -> None:
    raise AssertionError("a photo is decoded")


def many(root: Path, folder: str, count: int) -> Path:
    return touch(root, *(f"{folder}/{i:03}.jpg" for i in range(count)))


def named_split(index: Index, val_fraction: float, seed: int) -> npt.NDArray[np.str_]:
    """Return the name of each photo's split."""
    return np.array(SPLITS)[draw_split(index, val_fraction, seed)]


def test_flat_layout(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "dog/1.jpg",
        "cat/2.jpg",
        "cat/deep/er/3.jpg",
        "cat/.hidden.jpg",
        ".DS_Store",
        "cat/.git/x.jpg",
        "note.txt",
    )
    index = scan(tmp_path)
    assert index.classes == ("cat", "dog")
    assert index.paths == ("cat/2.jpg", "cat/deep/er/3.jpg", "dog/1.jpg")
    assert index.labels.tolist() == [0, 0, 1]
    assert index.num_hidden == 2
    assert set(index.folders) == {"train"}


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_layout_is_used_as_it_is(tmp_path: Path, val: str) -> None:
    for folder in ("train/a", "train/b", f"{val}/a", f"{val}/b", "test/a", "test/b"):
        many(tmp_path, folder, 3)
    index = scan(tmp_path)
    splits = named_split(index, 0.2, 0)
    assert {s: int((splits == s).sum()) for s in ("train", "val", "test")} == {"train": 6, "val": 6, "test": 6}
    assert all((splits == "test") == [p.startswith("test/") for p in index.paths])


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_one_held_out_folder_is_the_test_set(tmp_path: Path, held_out: str) -> None:
    for folder in ("train/a", "train/b", f"{held_out}/a", f"{held_out}/b"):
        many(tmp_path, folder, 10)
    splits = named_split(scan(tmp_path), 0.2, 0)
    assert {s: int((splits == s).sum()) for s in ("train", "val", "test")} == {"train": 16, "val": 4, "test": 20}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    many(tmp_path, "train", 3)
    many(tmp_path, "bus", 3)
    assert scan(tmp_path).classes == ("bus", "train")


def test_errors_name_the_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="does not exist; did you mean 'photos'"):
        scan(tmp_path / "photo")
    with pytest.raises(DataError, match="no class folders"):
        scan(tmp_path / "photos")
    touch(tmp_path, "one/cat/1.jpg", "file", "none/a/.x", "none/b/.x", "ho/val/a/1.jpg", "ho/test/a/1.jpg")
    with pytest.raises(DataError, match="only one class, 'cat'"):
        scan(tmp_path / "one")
    with pytest.raises(DataError, match="is a file"):
        scan(tmp_path / "file")
    with pytest.raises(DataError, match="no photos at all"):
        scan(tmp_path / "none")
    with pytest.raises(DataError, match="no train folder"):
        scan(tmp_path / "ho")


def test_unknown_class_in_a_held_out_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/catt/1.jpg")
    with pytest.raises(DataError, match=r"val/catt .* did you mean 'cat'"):
        scan(tmp_path)


def test_class_missing_from_a_held_out_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg")
    with pytest.warns(FastCNNWarning, match=r"the val folder .* has no photos of: dog"):
        scan(tmp_path)


def test_two_validation_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "valid/a/1.jpg")
    with pytest.raises(DataError, match="two validation folders"):
        scan(tmp_path)


def test_links(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "elsewhere/.keep")
    (tmp_path / "elsewhere").rename(tmp_path / ".elsewhere")
    touch(tmp_path, ".elsewhere/2.jpg")
    try:
        (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
        (tmp_path / "a" / "more").symlink_to(tmp_path / ".elsewhere", target_is_directory=True)
        (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    except OSError:
        pytest.skip("this system makes no links")
    assert scan(tmp_path).paths == ("a/1.jpg", "a/gone.jpg", "a/more/2.jpg", "b/1.jpg")


def test_links_in_a_circle(tmp_path: Path) -> None:
    """A link to itself is a photo that cannot be read; one to the folder or above it is no class."""
    touch(tmp_path, "data/a/1.jpg", "data/b/1.jpg")
    (tmp_path / "data/a/self.jpg").symlink_to("self.jpg")
    (tmp_path / "data/all").symlink_to(".", target_is_directory=True)
    (tmp_path / "data/above").symlink_to("..", target_is_directory=True)
    (tmp_path / "data/b/one").symlink_to("two")
    (tmp_path / "data/b/two").symlink_to("one")
    index = scan(tmp_path / "data")
    assert index.classes == ("a", "b")
    assert index.paths == ("a/1.jpg", "a/self.jpg", "b/1.jpg", "b/one", "b/two")


def test_names_of_any_kind(tmp_path: Path) -> None:
    names = [b"with space.jpg", b"new\nline.jpg", b"\xff\xfe.jpg", b"n" * 251 + b".jpg", b"none", b"-o.jpg", b"%41.jpg"]
    for name in names:
        touch(tmp_path, "a/" + os.fsdecode(name), "b/" + os.fsdecode(name))
    for name in ("a/none", "b/none"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    assert {os.fsencode(path) for path in scan(tmp_path).paths} == {b + n for n in names for b in (b"a/", b"b/")}


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of one's own, as a user who is no root: root may read everything."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no such permissions")
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_folders_that_cannot_be_read(nobody: Path) -> None:
    touch(nobody, "data/a/1.jpg", "data/b/1.jpg", "data/b/closed/2.jpg", "data/b/3.jpg")
    (nobody / "data/b/closed").chmod(0)
    with pytest.warns(FastCNNWarning, match="1 folder below .* cannot be read"):
        assert scan(nobody / "data").paths == ("a/1.jpg", "b/1.jpg", "b/3.jpg")
    (nobody / "data/b").chmod(0)
    with (
        pytest.warns(FastCNNWarning, match="1 folder"),
        pytest.raises(DataError, match="no usable photos of class 'b'"),
    ):
        scan(nobody / "data")
    (nobody / "data").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        scan(nobody / "data")
    nobody.chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        scan(nobody / "data")


def test_many_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2_000):
            (tmp_path / name / f"{i}.jpg").touch()
    assert len(scan(tmp_path)) == 4_000


def test_unicode_forms_of_a_class(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    touch(tmp_path, f"data/train/{nfc}/1.jpg", "data/train/tea/1.jpg", f"data/val/{nfd}/1.jpg", "data/val/tea/1.jpg")
    index = scan(tmp_path / "data")
    assert index.classes == (nfc, "tea")  # as they are on the disk
    assert list(index.labels) == [0, 1, 0, 1]
    assert f"val/{nfd}/1.jpg" in index.paths
    assert list(scan_held_out(tmp_path / "data", [nfd, "tea"]).labels) == [0, 1]
    touch(tmp_path, f"two/{nfc}/1.jpg", f"two/{nfd}/2.jpg", "two/tea/1.jpg")
    with pytest.warns(FastCNNWarning, match="read as one class"):
        index = scan(tmp_path / "two")
    assert [len(index.classes), *np.bincount(index.labels)] == [2, 2, 1]
    touch(tmp_path, f"{nfd}/a/1.jpg")
    with pytest.raises(DataError, match="there in another Unicode form"):
        scan(tmp_path / nfc)


def test_a_folder_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = touch(tmp_path / "my photos", "train/a/in/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    (tmp_path / "link").symlink_to(data, target_is_directory=True)
    expected = ("train/a/in/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    for here, path in [
        *((data, path) for path in (".", "./", "../my photos", "../my photos/.", str(data))),
        *((tmp_path, path) for path in ("my photos", "my photos/", "./my photos//", "link", "link/")),
        *((data / "val", path) for path in ("..", "../", "../../link", "../.")),
    ]:
        monkeypatch.chdir(here)
        index = scan(path)
        assert index.paths == expected, path
        assert all(Path(source).is_file() for source in index.sources() if isinstance(source, Path)), path
        assert scan_held_out(path, ("a", "b")).paths == expected[2:], path
    monkeypatch.chdir(data / "val" / "a")
    assert scan_loosely(".")[0].paths == ("3.jpg",)  # no layout at all
    monkeypatch.chdir(data / "train")
    assert scan(".").paths == ("a/in/1.jpg", "b/2.jpg")


def test_what_is_no_photo_is_no_bad_photo(tmp_path: Path) -> None:
    """Files of systems, programs and annotators are counted; what has a photo's name or content is looked at."""
    for name in ("cat", "dog"):
        many(tmp_path, f"data/{name}", 3)
        for extension in ("xml", "json", "txt", "csv"):
            touch(tmp_path, f"data/{name}/000.{extension}")
        touch(tmp_path, f"data/{name}/Thumbs.db", f"data/{name}/desktop.ini", f"data/{name}/._000.jpg")
        touch(tmp_path, f"data/{name}/@eaDir/000.jpg", f"data/{name}/.ipynb_checkpoints/000-checkpoint.jpg")
        (tmp_path / f"data/{name}/empty").touch()
    touch(tmp_path, "data/__MACOSX/cat/000.jpg", "data/@eaDir/1.jpg", "data/.DS_Store", "data/train.csv")
    touch(tmp_path, "data/cat/photo", "data/cat/photo.dat", "data/cat/drawing.psd")
    for name in ("photo", "photo.dat"):
        (tmp_path / "data/cat" / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    os.mkfifo(tmp_path / "data/dog/pipe")
    index = scan(tmp_path / "data")
    assert index.classes == ("cat", "dog")
    assert [path for path in index.paths if not path.endswith(".jpg")] == [
        *("cat/drawing.psd", "cat/photo", "cat/photo.dat"),
        "dog/pipe",  # reported as unreadable
    ]
    assert len(index) == 10
    assert index.others == {".xml": 2, ".json": 2, ".txt": 2, ".csv": 2, ".db": 2, ".ini": 2, "": 2}
    assert index.told_others() == "14 other files (2 without extension, 2 .csv, 2 .db, ...)"
    touch(tmp_path, "data/annotations/1.xml")
    with pytest.raises(
        DataError, match=r"no usable photos of class 'annotations' .*15 other files \(3 .xml, .*no photos"
    ):
        scan(tmp_path / "data")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_held_out_folder_alone_may_validate(tmp_path: Path, held_out: str) -> None:
    for name in ("a", "b"):
        many(tmp_path, f"data/train/{name}", 5)
        many(tmp_path, f"data/{held_out}/{name}", 2)
    index = scan(tmp_path / "data")
    splits = named_split(index, 0, 0)
    assert (splits == np.where(index.folders == "train", "train", "val")).all()
    assert explain_split(index, 0) == f"training on all of train, validating on {held_out}; no test set"
    assert explain_split(index, 0.2).endswith(f"validate on {held_out}: --val-fraction 0")
    flat = scan(tmp_path / "data" / "train")
    assert explain_split(flat, 0.2) == ""
    with pytest.raises(UsageError, match="needs a val or test folder"):
        draw_split(flat, 0, 0)
    with pytest.raises(UsageError, match="needs a val or test folder"):  # known before a photo is decoded
        prepare(DataConfig(data=str(tmp_path / "data" / "train"), val_fraction=0), progress=_never)


def test_an_archive_is_no_folder(tmp_path: Path) -> None:
    """It is unpacked on the command line alone: a function that writes beside DATA would surprise."""
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError) as error:
        fit(Config(data=str(tmp_path / "x.zip")), run_dir=tmp_path / "run")
    assert str(error.value) == (
        f"the data folder {tmp_path / 'x.zip'} is a file, not a folder: expected a folder with one folder of photos "
        "per class, a .csv or .parquet with path and class of each, on the command line also a .zip or .tar"
    )
    assert not (tmp_path / "run").exists()
