"""Whole runs, from a folder of photos to the run folder."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from fastcnn import Config, fit
from fastcnn.config import read_yaml, resolve
from fastcnn.errors import DataError, FastCNNError, FastCNNWarning, UsageError
from fastcnn.network.small_cnn import restore
from fastcnn.runs.results import STAGES
from fastcnn.runs.trackers import COLUMNS
from fastcnn.storage import checkpoint
from pipelines.workers import Workers

SMALL = {"epochs": 2, "image_size": 32, "filters": (8,), "batch_size": 16, "report": False}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_run_folder(run_dir: Path, photos: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.yaml", "split.csv", "bad_images.csv", "metrics.csv", "result.json", "last.pt", "best.pt",
        "curves.png", "confusion_matrix.png", "predictions.png", "filters.png", "batch.png", "report.html",
    }  # fmt: skip
    metrics = rows(run_dir / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["1", "2"]
    assert set(metrics[0]) == set(COLUMNS)
    assert all(math.isfinite(float(value)) for row in metrics for value in row.values())
    assert len(rows(run_dir / "split.csv")) == 120
    assert rows(run_dir / "bad_images.csv") == []
    result = json.loads((run_dir / "result.json").read_text())
    assert {"engine", "decoder", "loader", "precision", "device", "best_epoch", "num_train", "num_val", "num_test",
            "val_accuracy", "val_loss", "test_accuracy", "test_loss", "images_per_second", "seconds",
            "peak_memory_bytes", "versions"} <= set(result)  # fmt: skip
    assert result["num_train"] == 96
    assert result["num_val"] == 24
    assert result["test_accuracy"] is None
    assert set(result["seconds"]) == {*STAGES, "total"}
    best = max(metrics, key=lambda row: (float(row["val/accuracy"]), -float(row["val/loss"])))
    assert result["best_epoch"] == int(best["epoch"])
    assert result["val_accuracy"] == float(best["val/accuracy"])


def test_the_checkpoint_is_the_model_that_was_scored(run_dir: Path) -> None:
    state = torch.load(run_dir / "best.pt", weights_only=True)
    assert state["classes"] == sorted(state["classes"])
    assert not restore(state).training


def test_config_yaml_reproduces_the_run_to_the_bit(photos: Path, tmp_path: Path) -> None:
    first = fit(Config(data=str(photos), deterministic=True, dropout=0.3, **SMALL), run_dir=tmp_path / "a")
    again = fit(resolve(read_yaml(tmp_path / "a" / "config.yaml")), run_dir=tmp_path / "b")
    a, b = (checkpoint.load(run.run_dir / "last.pt")["model"] for run in (first, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    scores = [[(row["train/loss"], row["val/loss"]) for row in run.metrics] for run in (first, again)]
    assert scores[0] == scores[1]
    assert first.summary["precision"] == "fp32"


def test_a_second_run_decodes_nothing(
    run_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "decode", None)
    assert fit(Config(data=str(photos), **SMALL)).summary["num_decoded"] == 0


def test_run_folders_are_numbered_and_never_overwritten(photos: Path, tmp_path: Path) -> None:
    config = Config(data=str(photos), **{**SMALL, "epochs": 1})
    assert [fit(config).run_dir for _ in range(2)] == [Path("runs/photos"), Path("runs/photos-2")]
    with pytest.raises(FastCNNError, match="not empty"):
        fit(config, run_dir="runs/photos")


def test_a_run_that_cannot_begin_leaves_no_folder(photos: Path) -> None:
    with pytest.raises(DataError):
        fit(Config(data=str(photos), **{**SMALL, "batch_size": 1000}))
    assert not Path("runs").exists()


def test_a_given_split_is_used(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    config = Config(data=str(photos), split=str(run_dir / "split.csv"), seed=5, **{**SMALL, "epochs": 1})
    fit(config, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "split.csv").read_bytes() == (run_dir / "split.csv").read_bytes()


def test_the_test_folder_is_scored_once_with_the_best(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data / "train", ignore=shutil.ignore_patterns(".*"))
    for folder in (data / "train").iterdir():
        (data / "val" / folder.name).mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:5]:
            photo.rename(data / "val" / folder.name / photo.name)
    summary = fit(Config(data=str(data), **SMALL)).summary
    assert (summary["num_train"], summary["num_val"], summary["num_test"]) == (80, 20, 20)
    assert 0 <= summary["test_accuracy"] <= 1


def test_bad_photos_are_named_and_left_out(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data, ignore=shutil.ignore_patterns(".*"))
    folder = sorted(data.iterdir())[0]
    (folder / "page.jpg").write_text("<html>")
    (folder / "empty.jpg").touch()
    with pytest.warns(FastCNNWarning, match="2 of 122 photos cannot be used"):
        run = fit(Config(data=str(data), **{**SMALL, "epochs": 1}))
    bad = {row["path"]: row["reason"] for row in rows(run.run_dir / "bad_images.csv")}
    assert bad == {f"{folder.name}/empty.jpg": "empty", f"{folder.name}/page.jpg": "not an image"}
    assert run.summary["num_train"] + run.summary["num_val"] == 120
    with pytest.raises(DataError, match=r"2 of 122 .* more than --max-bad 0.01: .*page.jpg"):
        fit(Config(data=str(data), max_bad=0.01, **SMALL))


def test_too_few_photos_for_a_batch(photos: Path) -> None:
    with pytest.raises(DataError, match="lower --batch-size"):
        fit(Config(data=str(photos), **{**SMALL, "batch_size": 1000}))


def test_data_is_asked_for() -> None:
    with pytest.raises(UsageError, match="fastcnn train DATA"):
        fit(Config())


def test_a_missing_gpu_is_said_so(photos: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(FastCNNError, match="no NVIDIA GPU"):
        fit(Config(data=str(photos), device="cuda"))


def test_strict_makes_a_fallback_an_error(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcnn.system.device.has_bf16", lambda device: False)
    config = Config(data=str(photos), precision="bf16", **{**SMALL, "epochs": 1})
    with pytest.warns(FastCNNWarning, match="fp32"):
        assert fit(config).summary["precision"] == "fp32"
    with pytest.raises(FastCNNError, match="--strict"):
        fit(resolve(config.to_dict(), {"strict": True}))


def test_settings_are_put_back(photos: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fit(Config(data=str(photos), threads=1, deterministic=True, **{**SMALL, "epochs": 1}))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_it_learns(photos: Path) -> None:
    """Four classes that differ in shape: far better than chance on the photos it was trained on."""
    config = Config(data=str(photos), epochs=8, image_size=32, filters=(8,), batch_size=16, lr=5e-3, report=False)
    assert fit(config).metrics[-1]["train/accuracy"] > 0.7


@pytest.mark.cuda
def test_a_run_on_a_gpu(photos: Path) -> None:
    summary = fit(Config(data=str(photos), device="cuda", **SMALL)).summary
    assert summary["device"] == "cuda:0"
    assert math.isfinite(summary["val_loss"])
