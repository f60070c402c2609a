"""Folders of the user: where caches are kept, also where there is no home folder that can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from fastcnn import Config, fit
from fastcnn.data import dataset
from fastcnn.data.cache_folders import start_early
from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.storage import paths
from fastcnn.storage.paths import user_cache_folder


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
@pytest.mark.parametrize("home", ["", "elsewhere"])
def test_the_cache_folder_is_the_same_without_platformdirs(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare GPU box has no platformdirs: its cold runs would find a warm cache, and tests write into the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home else "")
    with_it = user_cache_folder()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert user_cache_folder() == with_it
    assert with_it == (tmp_path / home if home else Path.home() / ".cache") / "fastcnn"


SMALL = ["--epochs=1", "--image-size=32", "--filters=8", "--batch-size=16"]


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that cannot be made, also by root, and a folder for temporary files."""
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def folder_and_warnings() -> tuple[Path, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = user_cache_folder()
        assert user_cache_folder() == folder
    return folder, [str(warning.message) for warning in caught]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
def test_without_a_home_folder_the_cache_is_among_the_temporary_files(no_home: Path) -> None:
    folder, said = folder_and_warnings()
    assert folder == no_home / f"fastcnn-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    (line,) = said
    assert f"cannot be written: using {folder} instead; name a lasting one with XDG_CACHE_HOME" in line
    assert Path(os.environ["MPLCONFIGDIR"]).parent == folder


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
@pytest.mark.parametrize("cache_dir", [None, "cache"])
def test_without_a_home_folder_a_strict_run_ends_before_its_photos_are_read(
    cache_dir: str | None, no_home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --cache-dir, too: kernels and the engines' timings are kept in the other."""
    monkeypatch.chdir(no_home)
    with pytest.raises(FastCNNError, match=r"cannot be written: using .*because of --strict"):
        fit(Config(data=str(photos), strict=True, cache_dir=cache_dir))
    assert "MPLCONFIGDIR" not in os.environ
    with pytest.raises(FastCNNError, match=r"cannot be written: using .*because of --strict"):
        start_early(photos, "pillow", strict=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
def test_a_temporary_folder_of_anybody_elses_is_not_used(no_home: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (no_home / f"fastcnn-{os.getuid()}").symlink_to(tmp_path / "theirs")
    folder, said = folder_and_warnings()
    assert (folder.parent, folder.is_symlink(), len(said)) == (no_home, False, 1)
    assert folder.name != f"fastcnn-{os.getuid()}"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
def test_a_home_that_nobody_knows(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a user without an entry."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(FastCNNWarning, match="~/.cache/fastcnn cannot be written"):
        assert user_cache_folder().parent == no_home


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
@pytest.mark.parametrize("loader", ["stream", "auto", "mapped"])
def test_a_run_without_a_home_folder_goes_on_with_one_warning(no_home: Path, photos: Path, loader: str) -> None:
    environment = {**os.environ, "TMPDIR": str(no_home), "WANDB_MODE": "offline"}
    line = [
        sys.executable,
        "-m",
        "fastcnn.cli",
        "train",
        str(photos),
        "--loader",
        loader,
        *SMALL,
        "--export=torchscript",
    ]
    for _ in range(2):
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr.startswith("opening ")
        assert done.stderr.count("warning:") == 1  # on a slow machine lines of progress stand beside it
        assert "cannot be written: using" in done.stderr
    assert "nothing to decode" in done.stdout or "every photo was checked before" in done.stdout


def test_a_cache_that_is_whole_is_used_where_it_can_no_longer_be_written(
    no_home: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    config = Config(data=str(photos), image_size=32, decoder="pillow")
    first = dataset.prepare(config)
    assert first.cache.folder.parent == tmp_path / "home" / "fastcnn"
    monkeypatch.setattr(paths, "can_be_written", lambda folder: False)
    with pytest.warns(FastCNNWarning, match="cannot be written: using"):
        again = dataset.prepare(config)
    assert (again.cache.folder, again.cache.num_decoded) == (first.cache.folder, 0)
