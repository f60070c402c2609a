"""`fastcnn eval`: the run's own figures again, and others' photos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastcnn import Config, evaluate_run, fit
from fastcnn.cli import main
from fastcnn.errors import DataError, FastCNNError, FastCNNWarning
from fastcnn.reporting.class_scores import ClassScores, score_classes, top_k_accuracy
from fastcnn.training.metrics import Score

CLASSES = ("cat", "dog", "eel", "fox")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def card() -> ClassScores:
    """Worked by hand: 5 cats of which 3 are found, 3 dogs of which 2, an eel that is never predicted, no fox."""
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2])
    predicted = np.array([0, 0, 0, 1, 3, 1, 1, 0, 0])
    probabilities = np.eye(4, dtype=np.float32)[predicted]
    return score_classes(CLASSES, Score(loss=float("nan"), accuracy=5 / 9, count=9), labels, predicted, probabilities)


def test_figures_by_class() -> None:
    scores = card()
    assert scores.confusion.tolist() == [[3, 1, 0, 1], [1, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(scores.precision, [3 / 5, 2 / 3, 0, 0])
    np.testing.assert_allclose(scores.recall, [3 / 5, 2 / 3, 0, np.nan])
    np.testing.assert_allclose(scores.f1, [3 / 5, 2 / 3, 0, 0])
    name, photos, means = scores.rows()[-1]
    assert (name, photos) == ("mean", 9)
    assert means == pytest.approx([(3 / 5 + 2 / 3) / 3] * 3)  # over the three classes that have photos


def test_figures_as_data_and_table() -> None:
    data = card().to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["loss"] is None
    assert data["per_class"][3] == {"class": "fox", "photos": 0, "precision": 0.0, "recall": None, "f1": 0.0}
    lines = card().table().splitlines()
    assert lines[1].split() == ["class", "photos", "precision", "recall", "F1"]
    assert lines[5].split() == ["fox", "0", "0.0000", "-", "0.0000"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_top_k() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [np.nan] * 3], np.float32)
    labels = np.array([0, 2, 2, 0])
    assert [top_k_accuracy(labels, probabilities, k) for k in (1, 2, 3)] == [1 / 4, 2 / 4, 3 / 4]


def test_it_is_what_the_run_reported(run_dir: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    scores = evaluate_run(run_dir, device="cpu")
    assert list(scores.by_split) == ["val"]
    assert scores.by_split["val"].score.count == result["num_val"]
    if result["device"] == "cpu":
        assert scores.by_split["val"].score.accuracy == result["val_accuracy"]
        assert scores.by_split["val"].score.loss == result["val_loss"]
    assert scores.to_dict() == evaluate_run(run_dir, device="cpu").to_dict()


def test_the_test_set_and_the_moving_average(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data / "train", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(data / "train", data / "test")
    config = Config(data=str(data), epochs=1, image_size=32, filters=(8,), batch_size=16, ema=0.9, report=False)
    trained = fit(config)
    scores = evaluate_run(trained.run_dir, device="cpu").by_split
    assert scores["val"].score.accuracy == trained.summary["val_accuracy"]
    assert scores["test"].score.accuracy == trained.summary["test_accuracy"]
    assert scores["test"].confusion.sum() == 120


def test_other_photos_need_the_checkpoint_alone(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("best.pt", "config.yaml"):
        shutil.copy(run_dir / name, copy)
    scores = evaluate_run(copy, photos)
    assert list(scores.by_split) == ["all"]
    assert scores.by_split["all"].photos.tolist() == [30] * 4
    with pytest.raises(FastCNNError, match=r"no split\.csv"):
        evaluate_run(copy)


@pytest.mark.parametrize(
    ("folders", "used"),
    [(["test"], ["test"]), (["train"], ["train"]), (["train", "valid"], ["val"]), (["val", "test"], ["val", "test"])],
)
def test_held_out_folders_are_used_where_there_are_any(
    run_dir: Path, photos: Path, tmp_path: Path, folders: list[str], used: list[str]
) -> None:
    for folder in folders:
        shutil.copytree(photos, tmp_path / "data" / folder)
    scores = evaluate_run(run_dir, tmp_path / "data")
    assert list(scores.by_split) == used
    assert all(card.score.count == 120 for card in scores.by_split.values())


def test_classes_that_do_not_fit(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data, ignore=shutil.ignore_patterns(".*"))
    names = sorted(folder.name for folder in data.iterdir())
    for name in names[1:]:
        shutil.rmtree(data / name)
    with pytest.warns(FastCNNWarning, match=f"no photos of: {', '.join(names[1:])}"):
        scores = evaluate_run(run_dir, data)
    assert scores.by_split["all"].photos.tolist() == [30, 0, 0, 0]
    (data / "dragon").mkdir()
    with pytest.raises(DataError, match="dragon is a class that the model does not know"):
        evaluate_run(run_dir, data)


def test_photos_that_cannot_be_used(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data, ignore=shutil.ignore_patterns(".*"))
    folder = min(data.iterdir())
    (folder / "page.jpg").write_text("<html>")
    with pytest.warns(FastCNNWarning, match=r"1 of 121 photos cannot be used and are left out \(1 not an image\)$"):
        assert evaluate_run(run_dir, data).bad == {f"{folder.name}/page.jpg": "not an image"}


def test_the_command(capsys: pytest.CaptureFixture[str], run_dir: Path, photos: Path) -> None:
    code, out, err = run(capsys, "eval", run_dir)
    assert (code, err) == (0, f"opening {run_dir}\n")
    assert "accuracy" in out
    assert "F1" in out
    before = sorted(path.name for path in run_dir.iterdir())
    code, out, err = run(capsys, "eval", run_dir, photos, "--json", "--output", "scores.json", "--device", "cpu")
    assert (code, err) == (0, f"opening {run_dir}\n")
    data = json.loads(out)
    assert data == json.loads(Path("scores.json").read_text())
    assert set(data) == {"run", "data", "best_epoch", "device", "precision", "sets", "bad"}
    scores = data["sets"]["all"]
    assert set(scores) == {
        "photos", "accuracy", "loss", "top5_accuracy", "mean", "per_class", "confusion_matrix",
    }  # fmt: skip
    assert scores["accuracy"] == pytest.approx(np.trace(scores["confusion_matrix"]) / 120)
    assert before == sorted(path.name for path in run_dir.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], 1, "no run nothing"),
        (["{run}", "nowhere"], 3, "does not exist"),
        (["{run}", "empty"], 3, "no photos in"),
        (["{run}", "--decoder", "tubro"], 2, "did you mean 'turbo'?"),
        (["{run}", "--output", "no/folder.json"], 1, "cannot write no/folder.json"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], run_dir: Path, arguments: list[str], code: int, message: str
) -> None:
    Path("empty").mkdir()
    got, out, err = run(capsys, "eval", *(argument.format(run=run_dir) for argument in arguments))
    assert (got, out) == (code, "")
    assert message in err
    assert sum(not line.startswith("opening ") for line in err.splitlines()) == 1
