"""Runs whose photos, cache or folder were moved: resumed, evaluated, exported and verified as if nothing had been."""

from __future__ import annotations

import csv
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcnn import Config, evaluate_run, fit
from fastcnn.cli import main
from fastcnn.config import read_yaml
from fastcnn.data.index import scan
from fastcnn.data.split_file import MISSING
from fastcnn.errors import FastCNNError, FastCNNWarning
from fastcnn.export.verify import validation_photos, verify_file
from fastcnn.inference import artefact
from fastcnn.runs.resume import resumed_config
from fastcnn.storage import checkpoint

SMALL: dict[str, Any] = {
    "image_size": 32,
    "filters": (8,),
    "batch_size": 16,
    "dropout": 0.2,
    "schedule": "constant",
    "deterministic": True,
    "report": False,
}

Table = list[dict[str, str]]


@pytest.fixture(scope="module")
def settings(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of the runs, with a cache of their own that holds the photos where they were."""
    return {**SMALL, "data": str(photos), "cache_dir": str(tmp_path_factory.mktemp("caches"))}


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of three epochs whose photos stayed where they were. Read-only."""
    return fit(Config(epochs=3, **settings), run_dir=tmp_path_factory.mktemp("whole") / "run").run_dir


@pytest.fixture(scope="module")
def two_epochs(settings: dict[str, Any], whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two epochs, the same as the first two of `whole`. Read-only."""
    return fit(Config(epochs=2, **settings), run_dir=tmp_path_factory.mktemp("two") / "run").run_dir


@pytest.fixture
def cut(two_epochs: Path, tmp_path: Path) -> Path:
    """Copy of the run of two epochs, in another place and under another name."""
    return Path(shutil.copytree(two_epochs, tmp_path / "renamed"))


@pytest.fixture
def elsewhere(photos: Path, tmp_path: Path) -> Path:
    """Copy of the photos."""
    return Path(shutil.copytree(photos, tmp_path / "elsewhere"))


def table(path: Path) -> Table:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Table, *columns: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def gone(run: Path, nowhere: Path) -> None:
    """Let the run's photos have been in a folder that is gone."""
    text = (run / "config.yaml").read_text()
    data = read_yaml(run / "config.yaml")["data"]
    (run / "config.yaml").write_text(text.replace(f"data: {data}\n", f"data: {nowhere}\n"))


def older(run: Path) -> Table:
    """Let split.csv be as in 0.1.0, without checksums; return its lines."""
    rows = table(run / "split.csv")
    write(run / "split.csv", rows, "path", "label", "split")
    return rows


def go_on(run: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return fit(resumed_config(run, {"data": str(data), "epochs": 3, **changes}), resume=run).summary


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def assert_same(run: Path, whole: Path) -> None:
    """Every tensor and figure of the last checkpoint, to the bit; the best one's weights."""
    one, other = checkpoint.load(run / "last.pt"), checkpoint.load(whole / "last.pt")
    for part in ("model", "optimizer"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    assert torch.equal(one["rng"], other["rng"])
    assert (one["step"], one["cursor"]) == (other["step"], other["cursor"])
    clock = ("seconds", "images_per_second")
    figures = [[{k: v for k, v in row.items() if k not in clock} for row in each["rows"]] for each in (one, other)]
    assert figures[0] == figures[1]
    best, best_whole = (checkpoint.load(folder / "best.pt")["model"] for folder in (run, whole))
    assert all(torch.equal(best[name], best_whole[name]) for name in best)


def renamed(root: Path) -> None:
    """Give every photo a name that sorts the other way round."""
    for folder in filter(Path.is_dir, list(root.iterdir())):
        files = sorted(folder.iterdir())
        for number, file in enumerate(reversed(files)):
            file.rename(folder / f"renamed-{number:03}{file.suffix}")


def in_a_train_folder(root: Path) -> None:
    """Put the class folders below a folder train."""
    classes = [folder for folder in root.iterdir() if folder.is_dir()]
    (root / "train").mkdir()
    for folder in classes:
        folder.rename(root / "train" / folder.name)


def with_more(root: Path) -> None:
    """Add copies of photos under names that sort first."""
    for folder in filter(Path.is_dir, list(root.iterdir())):
        shutil.copy(min(folder.iterdir()), folder / "0-another.jpg")


@pytest.mark.parametrize("rearranged", [lambda root: None, renamed, in_a_train_folder, with_more])
@pytest.mark.filterwarnings("ignore:4 photos are not listed")
def test_a_run_goes_on_where_its_photos_are_now(
    cut: Path, whole: Path, elsewhere: Path, photos: Path, rearranged: Callable[[Path], None]
) -> None:
    """They are found by content and path; no photo is decoded again, and what the run keeps is of the new place."""
    rearranged(elsewhere)
    gone(cut, cut / "nowhere")
    before = table(cut / "split.csv")
    assert go_on(cut, elsewhere)["num_decoded"] == 0
    assert_same(cut, whole)
    assert read_yaml(cut / "config.yaml")["data"] == str(elsewhere)
    after = table(cut / "split.csv")
    assert [(row["split"], row["checksum"]) for row in after] == [(row["split"], row["checksum"]) for row in before]
    assert all((elsewhere / row["path"]).is_file() for row in after)
    assert evaluate_run(cut, device="cpu").data == elsewhere


@pytest.mark.filterwarnings("ignore:1 of 116 photos cannot be used")
def test_photos_that_are_missing_are_listed(cut: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(cut / "split.csv")
    names = [row["path"] for row in rows]
    for name in names[:4]:
        (elsewhere / name).unlink()
    shutil.copy(elsewhere / names[10], elsewhere / names[-1])  # another photo under its name
    (elsewhere / names[-2]).write_bytes(b"no photo")
    code, out, err = command(capsys, "train", elsewhere, "--resume", cut, "--epochs", 3, "--quiet")
    assert (code, out) == (3, "")
    assert f"lacks 6 of the 120 photos in {cut / 'split.csv'}: {names[0]} (no usable photo), " in err
    assert err.endswith(f"; {cut / MISSING} lists all that are missing\n")
    missing = table(cut / MISSING)
    assert [row["path"] for row in missing] == [*names[:4], *names[-2:]]
    assert [row["reason"] for row in missing[-2:]] == ["no usable photo", "other content"]
    assert table(cut / "split.csv") == rows


@pytest.mark.parametrize("cache", ["there", "gone"])
def test_older_runs_are_compared_by_path_and_size(
    cut: Path, whole: Path, elsewhere: Path, tmp_path: Path, cache: str
) -> None:
    first = older(cut)[0]["path"]
    changes = {} if cache == "there" else {"cache_dir": str(tmp_path / "new cache")}
    how = "path and size" if cache == "there" else "path alone, as no cache has their sizes"
    content = (elsewhere / first).read_bytes()
    if cache == "there":
        (elsewhere / first).write_bytes(content + b"\0")
        with pytest.raises(FastCNNError, match=f"lacks 1 of the 120 photos .*{first} .another size"):
            go_on(cut, elsewhere)
        (elsewhere / first).write_bytes(content)
    with pytest.warns(FastCNNWarning, match=f"holds no checksums: 120 photos were found by {how}$"):
        go_on(cut, elsewhere, **changes)
    assert_same(cut, whole)
    assert all(row["checksum"] for row in table(cut / "split.csv"))  # the next time they are found by content


def test_photos_that_changed_where_they_are_are_named(cut: Path, elsewhere: Path) -> None:
    """A run that goes on in its own folder takes the photo at the path, as before there were checksums."""
    go_on(cut, elsewhere)
    first, second, *_ = (row["path"] for row in table(cut / "split.csv"))
    shutil.copy(elsewhere / second, elsewhere / first)
    with pytest.warns(FastCNNWarning, match=rf"^1 photos have changed since .*: {first} \(other content\)$"):
        evaluate_run(cut)


def test_a_run_that_saved_nothing_goes_on_elsewhere(
    settings: dict[str, Any], cut: Path, whole: Path, elsewhere: Path
) -> None:
    (cut / "last.pt").unlink()
    go_on(cut, elsewhere)
    assert_same(cut, whole)


@pytest.mark.filterwarnings("ignore:30 photos are not listed")
def test_a_class_that_sorts_elsewhere_in_another_unicode_form(photos: Path, tmp_path: Path) -> None:
    """From a Mac (NFD) to Linux (NFC): a run that goes on keeps its classes in their order; so do eval and verify."""
    nfc, nfd = (unicodedata.normalize(form, "\u00e9cole") for form in ("NFC", "NFD"))
    before, now = shutil.copytree(photos, tmp_path / "before"), shutil.copytree(photos, tmp_path / "now")
    for root, names in ((before, (nfd, "zoo")), (now, (nfc, "zoo"))):
        for folder, name in zip(sorted(root.glob("*/")), names, strict=False):
            folder.rename(root / name)
    assert [name for name in scan(before).classes if name in (nfd, "zoo")] == [nfd, "zoo"]
    assert [name for name in scan(now).classes if name in (nfc, "zoo")] == ["zoo", nfc]
    settings = {**SMALL, "data": str(before), "cache_dir": str(tmp_path / "cache")}
    whole, cut = (fit(Config(epochs=n, **settings), run_dir=tmp_path / f"{n}").run_dir for n in (2, 1))
    assert go_on(cut, now, epochs=2)["num_decoded"] == 0
    assert_same(cut, whole)
    assert checkpoint.load(cut / "last.pt")["classes"] == checkpoint.load(whole / "last.pt")["classes"]
    scores = [evaluate_run(run, moved_to=now, device="cpu").by_split["val"].to_dict() for run in (cut, whole)]
    assert scores[0] == scores[1]
    labels = [validation_photos(run, moved_to=now).batches[0]().labels.tolist() for run in (cut, whole)]
    assert labels[0] == labels[1] == validation_photos(whole).batches[0]().labels.tolist()
    shutil.copytree(now / nfc, now / "school")
    with pytest.raises(FastCNNError, match="now has a class that the run does not know: school; give a folder without"):
        go_on(cut, now)


@pytest.mark.usefixtures("verified_here")
def test_own_figures_of_photos_that_were_moved(
    cut: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eval, export and verify, each told where the photos are; then told nothing."""
    summary = json.loads((cut / "result.json").read_text())
    gone(cut, tmp_path / "nowhere")
    shutil.copytree(checkpoint.load(cut / "best.pt")["config"]["cache_dir"], tmp_path / "cache")
    moved = ("--moved-to", elsewhere, "--cache-dir", tmp_path / "cache")
    code, out, err = command(capsys, "eval", cut, *moved, "--json", "--device", "cpu")
    assert (code, err) == (0, f"opening {cut}\n")
    assert json.loads(out)["sets"]["val"]["loss"] == summary["val_loss"]
    for name, said in (("export", f"opening {cut}\n"), ("verify", "")):
        code, out, err = command(capsys, name, cut, *moved)
        assert (code, err) == (0, said)
        assert "24 validation photos" in out
    with pytest.warns(FastCNNWarning, match=r"--moved-to\): only the synthetic golden inputs are compared"):
        assert verify_file(artefact.open(cut)).photos == 0
    code, _, err = command(capsys, "eval", cut)
    assert code == 3
    assert err.endswith(f"; where the run's images are now: fastcnn eval {cut} --moved-to FOLDER\n")
    code, _, err = command(capsys, "train", "--resume", cut, "--epochs", 3, "--quiet")
    assert code == 3
    assert err.endswith(f"; to go on where its photos are now: fastcnn train FOLDER --resume {cut}\n")


@pytest.mark.filterwarnings("ignore:4 of 120 photos cannot be used")
def test_a_folder_of_other_photos_is_refused(
    cut: Path, elsewhere: Path, exports: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(exports("torchscript"), cut)
    for folder in filter(Path.is_dir, elsewhere.iterdir()):
        next(folder.glob("*.jpg")).write_bytes(b"no photo")
    for name in ("eval", "verify"):
        code, _, err = command(capsys, name, cut, "--moved-to", elsewhere)
        assert code == 3
        assert "lacks 4 of the 120 photos" in err
        assert len(table(cut / MISSING)) == 4
        (cut / MISSING).unlink()


def test_moved_to_is_for_the_runs_own_photos(
    cut: Path, elsewhere: Path, exports: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, "eval", cut, elsewhere, "--moved-to", elsewhere)
    assert (code, sum(not line.startswith("opening ") for line in err.splitlines())) == (2, 1)
    code, _, err = command(capsys, "verify", exports("torchscript"), "--moved-to", elsewhere)
    assert code == 2
    assert "--moved-to is for a model in its run folder" in err
