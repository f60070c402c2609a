"""The photos that the quickstart and the tests run on: the same bytes again, the folders asked for, no shortcut."""

import os
import sys
from pathlib import Path

import make_dataset
import numpy as np
import pytest
import torch
from PIL import Image


def _files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make_dataset.py", *map(str, arguments), "--workers", "1"])
    return make_dataset.main()


def test_same_arguments_give_same_bytes_whatever_the_workers(tmp_path):
    make_dataset.make(tmp_path / "one", classes=3, photos=35, seed=7, workers=1)
    make_dataset.make(tmp_path / "two", classes=3, photos=35, seed=7, workers=2)
    one = _files(tmp_path / "one")
    assert one == _files(tmp_path / "two")
    assert len(set(one.values())) == 35 + 1  # and the marker: no photo twice


def test_another_seed_gives_other_photos():
    one, other = (np.asarray(make_dataset.photo(0, 0, seed, 10)) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_flat_layout_spreads_photos_evenly(tmp_path):
    make_dataset.make(tmp_path / "out", classes=4, photos=10, seed=0, workers=1)
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == sorted(make_dataset.class_name(label) for label in range(4))
    assert sorted(len(list(folder.iterdir())) for folder in folders) == [2, 2, 3, 3]
    assert (folders[0] / "00000.jpg").is_file()


def test_split_layout_is_four_fifths_train_and_the_same_photos(tmp_path):
    make_dataset.make(tmp_path / "flat", classes=2, photos=20, seed=0, workers=1)
    make_dataset.make(tmp_path / "split", classes=2, photos=20, seed=0, layout="split", workers=1)
    for label in range(2):
        name = make_dataset.class_name(label)
        train, val = (_files(tmp_path / "split" / split / name) for split in ("train", "val"))
        assert (len(train), len(val)) == (8, 2)
        assert train | val == _files(tmp_path / "flat" / name)


@pytest.mark.parametrize("label", range(make_dataset.MAX_CLASSES))
def test_every_class_has_photos_of_300_to_800_pixels_a_side(label):
    image = make_dataset.photo(label, label, 0, make_dataset.MAX_CLASSES)
    assert image.mode == "RGB"
    assert 300 <= min(image.size) <= max(image.size) <= 800


def test_class_names_are_distinct():
    assert (
        len({make_dataset.class_name(label) for label in range(make_dataset.MAX_CLASSES)}) == make_dataset.MAX_CLASSES
    )


def test_a_complete_dataset_is_left_alone(tmp_path, monkeypatch, capsys):
    arguments = (tmp_path, "--classes", 2, "--photos", 4)
    assert _main(monkeypatch, *arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(make_dataset, "_run", lambda *_: pytest.fail("made photos again"))
    assert _main(monkeypatch, *arguments) == 0
    assert "already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("there", ["other files", "another dataset", "another interrupted one", "a file"])
def test_anything_else_is_refused_and_left_alone(tmp_path, monkeypatch, capsys, there):
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    elif there == "other files":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        make_dataset.make(out, classes=2, photos=4, seed=1, workers=1)
        if there == "another interrupted one":
            (out / ".dataset.json").rename(out / ".dataset.partial")
    before = _files(tmp_path)
    assert _main(monkeypatch, out, "--classes", 2, "--photos", 4) == 2
    error = capsys.readouterr().err
    assert str(out) in error
    assert error.count("\n") == 1
    assert before == _files(tmp_path)


@pytest.mark.parametrize("arguments", [("--classes", 1), ("--classes", 99), ("--photos", 3), ("--seed", -1)])
def test_arguments_out_of_range_are_refused(tmp_path, monkeypatch, capsys, arguments):
    assert _main(monkeypatch, tmp_path / "out", *arguments) == 2
    assert arguments[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_is_completed(tmp_path, monkeypatch):
    make_dataset.make(tmp_path / "whole", classes=2, photos=8, seed=0, workers=1)
    out, replace = tmp_path / "out", Path.replace
    written = []

    def stops(self: Path, target: Path) -> Path:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            make_dataset.make(out, classes=2, photos=8, seed=0, workers=1)
    assert len(list(out.rglob("[!.]*.jpg"))) == 3
    assert not (out / ".dataset.json").exists()
    os.utime(written[0], (0, 0))
    make_dataset.make(out, classes=2, photos=8, seed=0, workers=1)
    assert written[0].stat().st_mtime == 0  # kept, not made again
    assert _files(out) == _files(tmp_path / "whole")


@pytest.mark.long
def test_thumbnails_do_not_tell_the_classes_apart(tmp_path):
    make_dataset.make(tmp_path, classes=10, photos=3000, seed=0)
    paths = sorted(tmp_path.glob("*/*.jpg"))
    names = sorted({path.parent.name for path in paths})
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    pixels = np.stack([_thumbnail(path) for path in paths]).reshape(len(paths), -1)
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    train, val = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    images = torch.from_numpy(pixels).float()
    images = (images - images[train].mean(0)) / images[train].std(0)
    # The best of them on val, which flatters the linear model: that is the safe side.
    assert max(_linear_accuracy(images, labels, train, val, decay) for decay in (1e-3, 1e-2, 1e-1, 1.0)) < 0.35


def _thumbnail(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX))


def _linear_accuracy(
    images: torch.Tensor, labels: torch.Tensor, train: torch.Tensor, val: torch.Tensor, weight_decay: float
) -> float:
    model = torch.nn.Linear(images.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[train]), labels[train])
        loss = loss + weight_decay * model.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return (model(images[val]).argmax(1) == labels[val]).float().mean().item()
