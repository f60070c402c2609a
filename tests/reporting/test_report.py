"""Plots and report of a run: for any number of classes, whatever they are called, and safe to open."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastcnn import Config, fit
from fastcnn.errors import FastCNNWarning
from fastcnn.reporting import plots, run_report
from fastcnn.reporting.class_scores import score_classes
from fastcnn.reporting.outcome import Sample
from fastcnn.reporting.run_report import Report
from fastcnn.runs import batch_picture
from fastcnn.storage import checkpoint
from fastcnn.training.metrics import Score
from fastcnn.training.step import TrainingStep

ODD = ["<b>bold</b> & co", "犬", "$x_1$ \\frac{", "line\nbreak", "no utf-8 \udcff", "🐶", "long " * 30, 'a"b']
SMALL: dict[str, Any] = {"epochs": 1, "image_size": 32, "filters": (8,), "batch_size": 16}


def size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return image.size


def row(epoch: int, loss: float = 1.0) -> dict[str, float]:
    names = ("seconds", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "images_per_second")
    return {"epoch": epoch, **dict.fromkeys(names, 0.5), "train/loss": loss, "val/loss": loss}


def story(classes: list[str], **changes: Any) -> Report:
    """Report of 60 made-up photos, about a class's share of them correct."""
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, len(classes), 60), rng.dirichlet(np.ones(len(classes)), 60)
    predicted = probabilities.argmax(1)
    score = Score(loss=1.0, accuracy=float((labels == predicted).mean()), count=60)
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    values: dict[str, Any] = {
        "rows": [row(1), row(2)],
        "best_epoch": 2,
        "judged": "val",
        "class_scores": score_classes(classes, score, labels, predicted, probabilities.astype(np.float32)),
        "samples": [
            Sample(path=f"{name}/1.jpg", image=image, label=name, predicted=classes[0], probability=0.9)
            for name in classes[:30]
        ],
        "filters": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "split": {name: np.ones(len(classes), np.int64) for name in ("train", "val", "test")},
        "bad": {},
    }
    return Report(**{**values, **changes})


def summary(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "result.json").read_text()))


class Reader(html.parser.HTMLParser):
    """Collects a page's tags, links and text; complains of tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("num_classes", [2, 4, 20, 21, pytest.param(100, marks=pytest.mark.long), 101])
def test_a_confusion_matrix_of_any_number_of_classes(num_classes: int) -> None:
    names = [f"{ODD[i % len(ODD)]} {i}" for i in range(num_classes)]
    counts = np.eye(num_classes, dtype=np.int64) * 7
    counts[0] = 0  # a class without photos
    width, height = size(plots.confusion_matrix(counts, names))
    assert 300 < height <= width < 2500


@pytest.mark.parametrize("losses", [[1.0], [1.0, float("nan"), 0.5], [float("nan")] * 2, [float("inf"), 1.0]])
def test_curves_of_any_losses(losses: list[float]) -> None:
    assert size(plots.curves([row(i, loss) for i, loss in enumerate(losses, 1)], 1)) == (990, 605)


@pytest.mark.parametrize(("count", "side"), [(1, 3), (8, 1), (32, 3), (100, 11)])
def test_filters_of_any_number_and_size(count: int, side: int) -> None:
    weights = np.random.default_rng(0).normal(size=(count, 3, side, side)).astype(np.float32)
    weights[0] = 0  # constant: nothing to scale by
    width, height = size(plots.filters(weights))
    assert 500 < width <= 1000
    assert height < 2 * width


@pytest.mark.parametrize("count", [1, 4, 30])
def test_predictions_of_any_number_of_photos(count: int) -> None:
    samples = list(story([f"{name} {i}" for i in range(4) for name in ODD]).samples[:count])
    width, height = size(plots.predictions(samples))
    assert 400 < width / min(count, 3) < 500
    # The first class is right, eight names on: four photos of it in 32, under a heading of their own.
    num_rows = -(-min(count, 4) // 3) + -(-(count - 4) // 3) if count > 4 else -(-count // 3)
    assert 240 * num_rows < height < 260 * num_rows + 200


def test_the_most_confident_mistakes_come_first_and_correct_ones_are_always_there() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 1, 1, 0, 2, 0])
    confidence = np.array([0.9, 0.5, 0.8, 0.7, 0.6, 0.4], np.float32)
    assert plots.choose_samples(labels, predicted, confidence, 1).tolist() == [3]
    assert plots.choose_samples(labels, predicted, confidence, 2).tolist() == [3, 0]
    assert plots.choose_samples(labels, predicted, confidence, 4).tolist() == [3, 1, 0, 4]
    assert plots.choose_samples(labels, predicted, confidence, 5).tolist() == [3, 1, 5, 0, 4]
    assert plots.choose_samples(labels, predicted, confidence).tolist() == [3, 1, 5, 0, 2, 4]
    wrong, right = np.ones(90, np.int64), np.zeros(90, np.int64)
    few_right = np.where(np.arange(90) < 4, right, wrong)
    for guesses, num_wrong, num_right in (
        (wrong, 30, 0),
        (right, 0, 30),
        (few_right, 26, 4),
        (labels.repeat(15), 15, 15),
    ):
        chosen = guesses[plots.choose_samples(right, guesses, np.ones(90, np.float32))] > 0
        assert (chosen[:num_wrong].all(), chosen[num_wrong:].any()) == (True, False)
        assert len(chosen) == num_wrong + num_right


@pytest.mark.parametrize("count", [1, 7, 36])
def test_a_batch_of_any_number_of_photos_and_any_names(count: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    captions = [[ODD[i % len(ODD)], "50%犬"][: 1 + i % 2] for i in range(count)]
    width, height = size(plots.batch(images, captions, "Epoch 1, step 1: 36 of 1,024 photos"))
    assert width >= 180 * min(count, 6)
    assert height >= 200 * -(-count // 6)


@pytest.mark.parametrize("loader", ["resident", pytest.param("stream", marks=pytest.mark.long)])
def test_the_picture_of_a_batch_is_what_the_step_gets_and_changes_nothing(
    photos: Path, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        data=str(photos), loader=loader, augment=("flip", "crop", "colour", "mixup"), dropout=0.3, deterministic=True,
        **{**SMALL, "report": False},
    )  # fmt: skip
    plain = fit(config)
    batches, pictures, read, batch = list[Any](), list[Any](), TrainingStep.read, plots.batch

    def reading(self: TrainingStep) -> Any:
        batches.append(read(self))
        return batches[-1]

    def drawing(*arguments: Any) -> bytes:
        pictures.append(arguments)
        return batch(*arguments)

    monkeypatch.setattr(TrainingStep, "read", reading)
    monkeypatch.setattr(plots, "batch", drawing)
    pictured = fit(dataclasses.replace(config, report=True))
    (looked, targets), (stepped, same_targets) = batches[:2]
    assert torch.equal(looked.images, stepped.images)
    assert torch.equal(targets, same_targets)
    ((pixels, captions, title),) = pictures
    assert np.array_equal(pixels, stepped.images.numpy())
    assert title == "Epoch 1, step 1: 16 photos"
    assert len(captions) == 16
    assert size((pictured.run_dir / "batch.png").read_bytes())

    one, other = (checkpoint.load(run.run_dir / "best.pt")["model"] for run in (plain, pictured))
    assert all(torch.equal(one[name], other[name]) for name in one)
    exact = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
    assert [plain.metrics[0][name] for name in exact] == [pictured.metrics[0][name] for name in exact]


def test_captions_name_what_was_mixed() -> None:
    classes = ["cat", "dog", "owl"]
    assert batch_picture.captions(torch.tensor([2, 0]), classes) == [["owl"], ["cat"]]
    mixed = torch.tensor([[0.3, 0.7, 0], [0, 1, 0], [0.001, 0, 0.999]])
    assert batch_picture.captions(mixed, classes) == [["70% dog", "30% cat"], ["dog"], ["owl"]]


def test_drawing_leaves_no_state_and_takes_none() -> None:
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "nothing like it"}):
        plots.curves([row(1)], 1)
        assert matplotlib.rcParams["text.usetex"]


def test_the_page_needs_nothing_else(run_dir: Path) -> None:
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert page.tags.count("img") == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert "http" not in text.replace("data:", "")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    result = summary(run_dir)
    for shown in (f"{result['val_accuracy']:.4f}", "batch_size", "fastcnn train", result["versions"]["torch"]):
        assert shown in "".join(page.text)
    assert result["seconds"]["report"] > 0


def test_names_are_text_whatever_they_are(run_dir: Path, tmp_path: Path) -> None:
    evil = '</table><script>alert("1")</script>'
    told = story([evil, *ODD], bad={evil: "not an image", "no utf-8 \udcff.jpg": "empty"})
    result, config = summary(run_dir), Config(data=evil, batch_norm=False, split="it's").to_dict()
    folder = tmp_path / "<i>run"
    folder.mkdir()
    run_report.write(folder, told, run_report.draw(told), result, config)
    page = Reader((folder / "report.html").read_text(encoding="utf-8"))
    assert {"script", "b", "em"}.isdisjoint(page.tags)
    assert evil in page.text
    assert "犬" in page.text
    assert "<i>run" in page.text
    assert "no utf-8 \\xff.jpg" in page.text


def test_the_command_trains_it_again() -> None:
    config = Config(data="my photos", epochs=3, filters=(8,), batch_norm=False, augment=("flip", "shift"), lr=0.01)
    assert run_report.command(config.to_dict()) == (
        "fastcnn train 'my photos' --augment flip=0.5,shift=0.0625 --filters 8,8,8,8,8 --no-batch-norm "
        "--epochs 3 --lr 0.01"
    )


def test_bad_photos_are_counted_and_the_first_are_named(run_dir: Path, tmp_path: Path) -> None:
    told = story(["a", "b"], bad={f"a/{i}.jpg": "empty" for i in range(50)})
    page = run_report.page(tmp_path, told, run_report.draw(told), summary(run_dir), Config(data="x").to_dict())
    assert "50 could not be used" in page
    assert "a/19.jpg" in page
    assert "a/20.jpg" not in page


def test_without_a_report(photos: Path) -> None:
    folder = fit(Config(data=str(photos), report=False, **SMALL)).run_dir
    assert not list(folder.glob("*.png"))
    assert not (folder / "report.html").exists()


def test_a_picture_that_fails_is_a_warning(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(plots, "curves", fail)
    monkeypatch.setattr(plots, "batch", fail)
    with (
        pytest.warns(FastCNNWarning, match="the run is finished, but its plots cannot be drawn: no fonts$"),
        pytest.warns(FastCNNWarning, match=r"training goes on without batch.png, which cannot be drawn: no fonts$"),
    ):
        run = fit(Config(data=str(photos), **SMALL))
    assert (run.run_dir / "result.json").is_file()
    assert not (run.run_dir / "report.html").exists()
