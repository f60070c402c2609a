"""`fastcnn data shard`: nothing is lost, nothing half done is left, and the same photos are the same bytes."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastcnn.cli import main
from fastcnn.data import index
from fastcnn.data_tools import write_shards
from fastcnn.errors import DataError, FastCNNError


@pytest.fixture
def few(photos: Path, tmp_path: Path) -> Path:
    """Fifteen photos of three classes, and files of which name or content, or neither, is a photo's."""
    root = tmp_path / "few"
    for name in sorted(path.name for path in photos.iterdir() if path.is_dir())[:3]:
        (root / name / "deep").mkdir(parents=True)
        for i, photo in enumerate(sorted((photos / name).glob("*.jpg"))[:5]):
            shutil.copy2(photo, root / name / ("a.b.jpg", "deep/a.JPEG", "noextension", "caf\udce9.jpg", "z.tmp")[i])
    (root / name / "notes.txt").write_text("some words")
    (root / name / "drawing.svg").write_text("<svg/>")
    (root / name / "empty.png").touch()
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main(["data", "shard", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_byte_is_there(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, few, tmp_path / "out", "--photos", "4")
    assert code == 0
    assert "17 photos in 5 shards" in out
    assert "2 files are no image" not in out  # an empty .png has the extension of one
    assert "1 file is no image" in out
    assert "left out: 1 other file (1 .txt)" in out
    assert f"next: fastcnn train {tmp_path / 'out'}" in out
    names = ["000000.tar", "000001.tar", "000002.tar", "000003.tar", "000004.tar", "classes.txt", "paths.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    files, found = index.scan(few), index.scan(tmp_path / "out")
    with (tmp_path / "out/paths.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        original = {row["photo"]: row["path"] for row in csv.DictReader(lines)}
    assert sorted(original.values()) == sorted(files.paths)
    for photo, path in enumerate(found.paths):
        source: Any = found.source(photo)
        with open(source.archive, "rb") as file:  # noqa: PTH123
            file.seek(source.offset)
            assert file.read(source.size) == (few / original[path]).read_bytes()
        assert original[path].startswith(found.classes[found.labels[photo]])
    extensions = Counter((Path(original[path]).suffix, Path(path).suffix) for path in found.paths)
    assert extensions == {
        (".jpg", ".jpg"): 6,
        (".JPEG", ".jpeg"): 3,
        ("", ".jpg"): 3,
        (".tmp", ".jpg"): 3,
        (".svg", ".jpg"): 1,
        (".png", ".png"): 1,
    }
    with tarfile.open(tmp_path / "out/000000.tar") as archive:
        members = archive.getmembers()
    assert len(members) == 8
    assert all(
        member.name.count(".") == 1 and (member.mtime, member.uid, member.gid) == (0, 0, 0) for member in members
    )


def test_the_order_is_the_seeds(few: Path, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shards.write(few, tmp_path / out, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["paths.csv"] != contents(tmp_path / "c")["paths.csv"]
    rows = contents(tmp_path / "a")["paths.csv"].splitlines()
    assert rows[1:] != sorted(rows[1:], key=lambda row: row.partition(b",")[2])


def test_split_folders_and_sizes(few: Path, tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        shutil.copytree(few, tmp_path / "data" / part, symlinks=True)
    size = max(path.stat().st_size for path in few.rglob("*"))
    written = write_shards.write(tmp_path / "data", tmp_path / "out", bytes_each=2 * size)
    found = index.scan(tmp_path / "out")
    assert written.photos == len(found) == 51
    assert set(found.folders) == {"train", "val", "test"}
    assert len({path.rpartition("/")[2] for path in found.paths}) == 51  # keys are nowhere the same
    shards = sorted(path.relative_to(tmp_path / "out").parts[0] for path in (tmp_path / "out").rglob("*.tar"))
    assert len(shards) == written.shards > 9
    again = write_shards.write(tmp_path / "out", tmp_path / "again", photos_each=51)
    assert (again.photos, again.shards) == (51, 3)
    assert index.scan(tmp_path / "again").classes == found.classes


def test_refused(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    assert "is not empty" in run(capsys, few, tmp_path / "full")[2]
    code, _, err = run(capsys, few, few / "out")
    assert (code, "is inside the photos" in err) == (2, True)
    assert not (few / "out").exists()
    code, _, err = run(capsys, few, tmp_path / "out", "--shard-size", "large")
    assert (code, "expected bytes as 256MB" in err) == (2, True)
    assert run(capsys, tmp_path / "none", tmp_path / "out")[0] == 3
    (few / "lost.jpg").symlink_to("nowhere")
    shutil.move(few / "lost.jpg", next(path for path in few.iterdir() if path.is_dir()))
    code, _, err = run(capsys, few, tmp_path / "out")
    assert (code, "lost.jpg cannot be copied (unreadable: No such file" in err) == (3, True)
    (few / "a\nb").mkdir()
    (few / "a\nb" / "1.jpg").touch()
    with pytest.raises(DataError, match=r"class 'a b' .* does not fit on a line"):
        write_shards.write(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("there", [False, True])
def test_interrupted(
    signum: int,
    code: int,
    there: bool,
    few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy, calls = write_shards._content, []

    def interrupted(*arguments: Any) -> bytes:
        calls.append(arguments)
        if len(calls) == 7:
            os.kill(os.getpid(), signum)
        return copy(*arguments)

    monkeypatch.setattr(write_shards, "_content", interrupted)
    if there:
        (tmp_path / "out").mkdir()
    assert run(capsys, few, tmp_path / "out", "--photos", "2") == (code, "", "\nfastcnn: error: interrupted\n")
    assert (tmp_path / "out").exists() == there
    assert not there or not any((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_line(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "_add", full)
        with pytest.raises(FastCNNError, match=r"cannot write the shards into .*: No space left on device"):
            write_shards.write(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(FastCNNError, match="the content of the shards needs 0 MiB"):
        write_shards.write(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()
