"""Everything that the revision before the rooms left on a disk is read, resumed, verified and evaluated by this one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastcnn import open_artefact
from fastcnn.cli import main
from fastcnn.storage import checkpoint
from tests.conftest import ROOT

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:the cache .* cannot be used")]

REVISION = "cd23ba7931"
SMALL = ["--image-size", "32", "--filters", "8", "--batch-size", "16", "--dense-neurons", "16", "--no-report"]
EXACT = ["--deterministic", "--threads", "1", "--cache-dir", "cache", "--decoder", "pillow"]
SWEEP = """
method: grid
metric: {name: val/accuracy, goal: maximize}
parameters:
  lr: {values: [0.001, 0.003]}
  batch_norm: {values: [true, false]}
"""


def earlier(tree: Path, *arguments: str) -> None:
    """Run a command of the earlier revision in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "fastcnn.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def now(*arguments: str) -> None:
    """Run a command of this revision; it must succeed."""
    status = main(list(arguments))
    assert not status


@pytest.fixture(scope="module")
def left(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, cache, two runs, a sweep and exported files, all made by the earlier revision."""
    folder, tree = tmp_path_factory.mktemp("earlier"), tmp_path_factory.mktemp("revision") / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    if subprocess.run([*git, "add", "--detach", str(tree), REVISION], capture_output=True, check=False).returncode:
        pytest.skip(f"this clone does not hold the revision {REVISION}")
    shutil.copytree(photos, folder / "photos")
    (folder / "sweep.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            earlier(tree, "train", "photos", "--epochs", "1", "--run-dir", "one", *SMALL, *EXACT)
            earlier(tree, "train", "photos", "--epochs", "2", "--run-dir", "two", *SMALL, *EXACT)
            earlier(tree, "export", "two", "--format", "torchscript,onnx,pt2")
            options = ["--config", "sweep.yaml", "--dir", "sweep", "--epochs", "1", *SMALL[:-1], *EXACT]
            earlier(tree, "sweep", "photos", "--trials", "2", *options)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    shutil.copytree(folder / "cache", folder / "untouched")
    return folder


@pytest.fixture
def mine(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder: photos and cache keep their place. Tests change what no other one looks at."""
    monkeypatch.chdir(left)
    return left


def test_the_cache_is_made_anew(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot tell a photo that was replaced under its old size and time."""
    now("train", "photos", "--epochs", "1", "--run-dir", "again", *SMALL, *EXACT, "--cache-dir", "untouched")
    assert "decoded " in capsys.readouterr().out
    assert same_weights(mine / "one" / "last.pt", mine / "again" / "last.pt")


def test_a_run_is_resumed_to_the_same_weights(mine: Path, tmp_path: Path) -> None:
    shutil.copytree("one", tmp_path / "one")
    now("train", "--resume", str(tmp_path / "one"), "--epochs", "2")
    assert same_weights(mine / "two" / "last.pt", tmp_path / "one" / "last.pt")
    rows = [
        list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (mine / "two", tmp_path / "one")
    ]
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert [float(row[name]) for row in rows[0]] == pytest.approx([float(row[name]) for row in rows[1]], rel=1e-3)


def test_a_configuration_trains_the_same_network(mine: Path, tmp_path: Path) -> None:
    now("train", "--config", "two/config.yaml", "--run-dir", str(tmp_path / "again"))
    assert same_weights(mine / "two" / "last.pt", tmp_path / "again" / "last.pt")


def test_a_run_is_evaluated(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((mine / "two" / "result.json").read_text())
    now("eval", "two", "--json")
    found = json.loads(capsys.readouterr().out)["sets"]["val"]
    assert found["accuracy"] == pytest.approx(summary["val_accuracy"])
    assert found["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["model.torchscript", "model.onnx", "model.pt2"])
def test_exported_files_are_verified_and_predict(mine: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    now("verify", f"two/{name}")
    now("verify", "two")
    capsys.readouterr()
    photo = next(path for path in sorted((mine / "photos").rglob("*.jpg")))
    now("predict", f"two/{name}", str(photo), "--format", "jsonl")
    assert json.loads(capsys.readouterr().out)["predictions"]


def test_a_run_is_exported(mine: Path, tmp_path: Path) -> None:
    shutil.copytree("two", tmp_path / "two")
    now("export", str(tmp_path / "two"), "--format", "torchscript")
    one, two = (open_artefact(run / "model.torchscript") for run in (mine / "two", tmp_path / "two"))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    assert np.allclose(one.probabilities(images), two.probabilities(images), atol=1e-6)


def test_a_sweep_goes_on(mine: Path) -> None:
    options = ["--config", "sweep.yaml", "--dir", "sweep", "--epochs", "1", *SMALL[:-1], *EXACT]
    now("sweep", "photos", "--trials", "4", *options)
    with (mine / "sweep" / "sweep.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["finished"] * 4
    assert len({(trial["lr"], trial["batch_norm"]) for trial in trials}) == 4


def same_weights(one: Path, two: Path) -> bool:
    """But for rounding: in fp32 the bias of a convolution is added after pooling now, in another order of sums.

    Adam makes a whole step of a gradient that is nothing but rounding, so a few weights may differ by more.
    """
    first, second = (checkpoint.load(path)["model"] for path in (one, two))
    return first.keys() == second.keys() and all(
        float((first[name] - second[name]).norm()) < 1e-2 * float(first[name].norm()) + 1e-4 for name in first
    )


def figures(run: Path) -> list[tuple[str, ...]]:
    """Losses and accuracies by epoch, as they stand in metrics.csv."""
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [(row["train/loss"], row["val/loss"], row["val/accuracy"]) for row in rows]
