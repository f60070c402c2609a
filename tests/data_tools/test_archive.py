"""DATA that is an archive: unpacked once, whole or not at all, and never outside its folder."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
from pathlib import Path

import pytest

from fastcnn.data.index import scan
from fastcnn.data_tools import archive, unzip
from fastcnn.data_tools.archive import unpacked
from fastcnn.errors import DataError, FastCNNError
from tests.cli.test_cli import run

FORMATS = {"zip": ".zip", "tar": ".tar", "gztar": ".tar.gz", "bztar": ".tar.bz2", "xztar": ".tar.xz"}


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Three photos of each of two classes in a wrapping folder, with what a Mac leaves."""
    for name in sorted(path.name for path in photos.iterdir() if path.is_dir())[:2]:
        (tmp_path / "packed" / "my set" / name).mkdir(parents=True)
        for photo in sorted((photos / name).glob("*.jpg"))[:3]:
            shutil.copy(photo, tmp_path / "packed" / "my set" / name)
    (tmp_path / "packed" / "__MACOSX").mkdir()
    (tmp_path / "packed" / "__MACOSX" / "._x.jpg").write_bytes(b"x")
    return tmp_path / "packed"


@pytest.mark.parametrize("format", FORMATS)
def test_an_archive_is_unpacked_once(folder: Path, tmp_path: Path, format: str) -> None:
    packed = Path(shutil.make_archive(str(tmp_path / "photos"), format, folder))
    assert packed.name == f"photos{FORMATS[format]}"
    found = Path(unpacked(str(packed)))
    assert found == tmp_path / "photos" / "my set"
    assert scan(found).paths == scan(folder / "my set").paths
    before = (tmp_path / "photos").stat().st_mtime_ns
    assert unpacked(str(packed)) == str(found)
    assert (tmp_path / "photos").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "photos", packed.name]
    packed.write_bytes(packed.read_bytes() + b"\0" * 1024)
    with pytest.raises(FastCNNError, match="is there already and was not unpacked from"):
        unpacked(str(packed))


def test_what_is_no_archive_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "a.jpg").touch()
    for name in ("a.zip", "a.jpg", "nothing.zip"):
        assert unpacked(str(tmp_path / name)) == str(tmp_path / name)


@pytest.mark.parametrize("format", FORMATS)
def test_half_an_archive_leaves_nothing(folder: Path, tmp_path: Path, format: str) -> None:
    packed = Path(shutil.make_archive(str(tmp_path / "photos"), format, folder))
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with pytest.raises(DataError, match=r"is damaged .*: get it again$"):
        unpacked(str(packed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", packed.name]


def tar_of(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            info.mode = stat.S_ISUID | 0o777
            packed.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("../evil", tarfile.REGTYPE, b"x"), "leads out of its folder"),
        (("/evil", tarfile.REGTYPE, b"x"), "is not below its folder"),
        (("evil", tarfile.SYMTYPE, b""), "is a link or a device"),
        (("evil", tarfile.LNKTYPE, b""), "is a link or a device"),
        (("evil", tarfile.FIFOTYPE, b""), "is a link or a device"),
        (("a/1.jpg", tarfile.REGTYPE, b"y"), "is in it twice"),
        (("a/bomb", tarfile.REGTYPE, bytes(200_000)), "more than 20 times its size"),
    ],
)
def test_a_malicious_tar_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: tuple[str, bytes, bytes], message: str
) -> None:
    monkeypatch.setattr(unzip, "ALWAYS_FINE", 50_000)
    packed = tar_of(tmp_path / "x.tgz", ("a/1.jpg", tarfile.REGTYPE, b"x"), member)
    with pytest.raises(DataError, match=message):
        unpacked(str(packed))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tgz"]


def test_modes_of_a_tar_are_not_kept(tmp_path: Path) -> None:
    found = Path(unpacked(str(tar_of(tmp_path / "x.tgz", ("a/1.jpg", tarfile.REGTYPE, b"x")))))
    assert not (found / "a" / "1.jpg").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)
    assert (found / archive.MARKER).is_file()


def test_the_commands_take_an_archive(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.make_archive(str(tmp_path / "photos"), "zip", folder)
    code, out, _ = run(capsys, "data", "check", "photos.zip")
    assert (code, out.splitlines()[0]) == (0, "photos of photos.zip in photos/my set")
    small = ["--epochs", "1", "--image-size", "32", "--filters", "8", "--batch-size", "2", "--no-report", "--quiet"]
    assert run(capsys, "train", "photos.zip", *small, "--cache-dir", "cache")[:2] == (0, "")
    assert run(capsys, "eval", "my set", "photos.zip", "--json")[0] == 0
    assert run(capsys, "data", "shard", "photos.zip", "shards")[0] == 0
