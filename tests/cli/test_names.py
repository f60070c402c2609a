"""Names of classes and files that are not UTF-8, or in the other Unicode form, through every command."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcnn.cli import main
from fastcnn.errors import FastCNNError
from fastcnn.inference import artefact
from fastcnn.inference.predict import find_photos
from tests.cli.test_cli import run

SMALL = ["--epochs", "1", "--image-size", "32", "--filters", "8", "--batch-size", "8", "--device", "cpu"]
COFFEE = {form: unicodedata.normalize(form, "Café") for form in ("NFC", "NFD")}
BYTES = os.fsdecode(b"th\xe9")


def photos(folder: Path, names: tuple[str, ...]) -> Path:
    random = np.random.default_rng(0)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for photo in range(6):
            pixels = random.integers(60 * number, 60 * number + 90, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / os.fsdecode(b"%d\xfe.jpg" % photo))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of photos and a run on it, whose own names are not UTF-8 either."""
    if os.name != "posix":
        pytest.skip("names are text here")
    folder = tmp_path_factory.mktemp("names")
    data = photos(folder / os.fsdecode(b"ph\xff otos"), (COFFEE["NFD"], "plain", BYTES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status = main(["train", str(data), *SMALL, "--quiet", "--cache-dir", "cache"])
    assert status == 0
    return data, folder / "runs" / data.name


@pytest.mark.long  # the sweep below trains on such a folder in the short form
def test_a_folder_of_bytes(
    trained: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run_dir = trained
    monkeypatch.chdir(run_dir.parents[1])
    for command in (["eval", run_dir], ["export", run_dir], ["data", "check", data], ["data", "shard", data, "shards"]):
        assert run(capfd, *command)[0] == 0, command
    assert artefact.open(run_dir).classes == [COFFEE["NFD"], "plain", "th\\xe9"]
    assert "ph\\xff otos" in run(capfd, "cache", "list", "--cache-dir", "cache")[1]
    assert "/ph\\xff otos/plain/0\\xfe.jpg  " in run(capfd, "predict", run_dir, data)[1]
    rows = list(csv.DictReader(run(capfd, "predict", run_dir, data, "--format", "csv", "--top-k", "3")[1].splitlines()))
    assert {row["class"] for row in rows} == {COFFEE["NFD"], "plain", "th\\xe9"}
    line = run(capfd, "predict", run_dir, data, "--format", "jsonl")[1].splitlines()[-1]
    assert json.loads(line)["path"].endswith("/th\\xe9/5\\xfe.jpg")
    found = json.loads(run(capfd, "data", "check", data, "--json")[1])
    assert [each["class"] for each in found["classes"]] == [COFFEE["NFD"], "plain", "th\\xe9"]
    assert "th\\xe9" in (run_dir / "report.html").read_text(encoding="utf-8")
    code, _, error = run(capfd, "data", "check", f"{data}x")
    assert (code, "did you mean 'ph\\xff otos'?" in error) == (3, True)


@pytest.mark.long
def test_a_sweep_on_a_folder_of_bytes(trained: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text("method: random\nparameters: {lr: {min: 0.001, max: 0.01}}\n", encoding="utf-8")
    code, out, error = run(capfd, "sweep", trained[0], "--config", "s.yaml", "--trials", "1", *SMALL)
    assert code == 0, error
    assert "1 finished" in out


def test_the_other_unicode_form_is_the_same_class(
    trained: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run of a folder from a Mac scores a folder of Linux, and reads its split there."""
    data, run_dir = trained
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / COFFEE["NFD"]).rename(other / COFFEE["NFC"])
    assert run(capfd, "eval", run_dir, other)[0] == 0
    split = ["--split", str(run_dir / "split.csv"), "--cache-dir", "cache", "--no-report", "--quiet"]
    assert run(capfd, "train", other, *SMALL, *split)[0] == 0


def test_a_folder_to_predict_has_other_files(tmp_path: Path) -> None:
    """A file given by name is always tried; below a folder only what may be a photo."""
    (tmp_path / "in" / "__MACOSX").mkdir(parents=True)
    for name in ("1.jpg", "1.xml", "Thumbs.db", ".hidden.jpg", "__MACOSX/1.jpg"):
        (tmp_path / "in" / name).write_bytes(b"x")
    assert list(find_photos(["in"])) == ["in/1.jpg"]
    assert list(find_photos(["in/1.xml"])) == ["in/1.xml"]


def test_a_folder_to_predict_has_links_and_our_own_folders(tmp_path: Path) -> None:
    """Linked photos are predicted as they are trained on; the pictures of a run are no photos."""
    for name in (
        "in/b/1.jpg",
        "in/runs/x/config.yaml",
        "in/runs/x/split.csv",
        "in/runs/x/predictions.png",
        "far/2.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "in" / "a").symlink_to("../far")
    (tmp_path / "far" / "back").symlink_to("../in")
    assert list(find_photos(["in"])) == ["in/a/2.jpg", "in/b/1.jpg"]
    assert list(find_photos(["in/runs/x"])) == ["in/runs/x/predictions.png"]  # as it is asked for


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (b"in/1.jpg\r\nin/2.jpg\r\n", ["in/1.jpg", "in/2.jpg"]),
        (b"in\n" + b"x" * 5000, ["in/1.jpg", "in/2.jpg", "x" * 5000]),
        (b"", []),
    ],
)
def test_lists_of_paths(given: bytes, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "in" / name).write_bytes(b"x")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert list(find_photos(["-"])) == found


def test_a_photo_is_no_list_of_paths(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = next(photos.rglob("*.jpg")).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(FastCNNError, match="standard input is a photo, not a list of paths"):
        list(find_photos(["-"]))
