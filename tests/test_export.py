"""Export and predict: the file says what the trained model says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcnn import artefact, checkpoint, export_run, predict_photos
from fastcnn.errors import CheckError, FastCNNError, FastCNNWarning, UsageError
from fastcnn.evaluate import restore
from fastcnn.export import EXPORTERS
from fastcnn.step import Normalise

SIZE = 32


@pytest.fixture(params=EXPORTERS)
def exported(request: pytest.FixtureRequest, run_dir: Path, tmp_path: Path) -> Path:
    return export_run(run_dir, format=request.param, output=tmp_path / f"model.{request.param}")


def test_probabilities_are_those_of_the_trained_model(exported: Path, run_dir: Path) -> None:
    state = checkpoint.load(run_dir / "best.pt")
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    normalise = Normalise(state["config"]["mean"], state["config"]["std"], SIZE)
    with torch.inference_mode():
        trained = torch.softmax(restore(state)(normalise(torch.from_numpy(images))), 1).numpy()
    np.testing.assert_allclose(artefact.open(exported).probabilities(images), trained, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 70), (300, 200), (1, 1), (800, 33)])
def test_any_size_is_resized_inside_as_pillow_does(exported: Path, height: int, width: int) -> None:
    model = artefact.open(exported)
    y, x = np.mgrid[:height, :width]
    image = np.stack([y * 255 / height, x * 255 / width, (x + y) % 256], -1).astype(np.uint8)
    resized = np.array(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(model.probabilities(image[None]), model.probabilities(resized[None]), atol=0.02)


def test_metadata(exported: Path, run_dir: Path) -> None:
    model = artefact.open(exported)
    assert model.classes == checkpoint.load(run_dir / "best.pt")["classes"]
    assert model.image_size == SIZE
    assert model.metadata["mean"] == [0.485, 0.456, 0.406]


def test_plain_torch_can_use_it(run_dir: Path, tmp_path: Path) -> None:
    path = export_run(run_dir, output=tmp_path / "model.torchscript")
    code = (
        "import sys, torch; sys.modules['fastcnn'] = None\n"
        f"m = torch.jit.load({str(path)!r})\n"
        "p = m(torch.zeros(2, 50, 60, 3, dtype=torch.uint8))\n"
        "assert p.shape == (2, 4) and (p.sum(1) - 1).abs().max() < 1e-5 and len(m.classes) == 4"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_wrong_export_is_not_kept(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcnn.export.TOLERANCE", -1.0)
    with pytest.raises(CheckError):
        export_run(run_dir, output=tmp_path / "model.torchscript")
    assert not list(tmp_path.glob("*model*"))


def test_an_export_without_the_photos(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    state = torch.load(run / "best.pt", weights_only=True)
    state["config"]["data"] = str(tmp_path / "gone")
    torch.save(state, run / "best.pt")
    with pytest.warns(FastCNNWarning, match="synthetic"):
        assert export_run(run).is_file()


def test_wrong_names(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'torchscript'"):
        export_run(run_dir, format="torchscipt")
    with pytest.raises(FastCNNError, match="no run"):
        export_run(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"ends in \.torchscript"):
        export_run(run_dir, output=tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"not a zip"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.torchscript").write_bytes(content)
    with pytest.raises(FastCNNError, match="cannot be opened"):
        artefact.open(tmp_path / "model.torchscript")
    with pytest.raises(FastCNNError, match="no exported model"):
        artefact.open(tmp_path / "other.torchscript")
    (tmp_path / "data.bin").touch()
    with pytest.raises(FastCNNError, match="ends in"):
        artefact.open(tmp_path / "data.bin")


def test_torchscript_of_somebody_else(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "model.torchscript"))
    with pytest.raises(FastCNNError, match="not exported by fastcnn"):
        artefact.open(tmp_path / "model.torchscript")


def test_predict_takes_photos_and_folders(exported: Path, photos: Path, tmp_path: Path) -> None:
    model = artefact.open(exported)
    (tmp_path / "page.jpg").write_text("<html>")
    one = next(iter(sorted(photos.glob("*/*.jpg"))))
    predictions = list(predict_photos(model, [one, photos, tmp_path / "page.jpg"]))
    assert len(predictions) == 122
    assert predictions[0].path == predictions[1].path == str(one)
    assert (predictions[0].probabilities == predictions[1].probabilities).all()
    assert predictions[-1].reason == "not an image"
    assert all(abs(p.probabilities.sum() - 1) < 1e-5 for p in predictions[:-1])
    with pytest.raises(FastCNNError, match="no photo or folder"):
        list(predict_photos(model, [tmp_path / "gone.jpg"]))
