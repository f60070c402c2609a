"""Decoder sensitivity: figures worked by hand, and the table of generated photos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines
from fastcnn.errors import DataError
from fastcnn.export import decoder_sensitivity
from fastcnn.inference import artefact
from fastcnn.inference.artefact import Artefact


@pytest.fixture(scope="module")
def model(exports: Callable[[str], Path]) -> Artefact:
    return artefact.open(exports("torchscript"))


def test_figures_worked_by_hand() -> None:
    reference = np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [np.nan, np.nan]], np.float32)
    found = np.array([[0.5, 0.5], [0.75, 0.25], [np.nan, np.nan], [0.5, 0.5]], np.float32)
    way = decoder_sensitivity.compare("x", found, reference, np.array([0, 1, 0, 0]))
    assert way == decoder_sensitivity.DecoderResult(
        name="x", photos=2, accuracy=0.5, agreement=0.5, mean_difference=0.375, largest_difference=0.5
    )


def test_the_reference_agrees_with_itself_and_the_others_nearly(model: Artefact, photos: Path) -> None:
    found = decoder_sensitivity.measure(model, photos)
    first, *others = found.results
    assert (first.name, first.photos) == ("pillow", 120)
    assert (first.agreement, first.mean_difference, first.largest_difference) == (1, 0, 0)
    for way in others:
        assert way.photos == 120
        assert 0 < way.largest_difference < 0.1
        assert way.mean_difference < 0.02
        assert way.agreement > 0.9
    assert found.results[-1].name == "whole photo, model's resize"


def test_the_whole_photo_is_what_the_file_holds(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # what was up is on the left
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=turned)
    found, verdict = pipelines.decode_whole(tmp_path / "photo.png")
    assert verdict.ok
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))
    (tmp_path / "page.jpg").write_text("<html>")
    found, verdict = pipelines.decode_whole(tmp_path / "page.jpg")
    assert (found.size, verdict.reason) == (0, "not an image")


def test_bad_photos_and_missing_decoders_are_told(
    model: Artefact, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    name = model.classes[0]
    (data / name / "page.jpg").write_text("<html>")
    monkeypatch.setitem(pipelines.BACKENDS, "dali", "pipelines.no_such_module")
    monkeypatch.delitem(pipelines._imported, "dali", raising=False)
    found = decoder_sensitivity.measure(model, data)
    assert [way.name for way in found.results] == ["pillow", "turbo", "whole photo, model's resize"]
    assert {way.photos for way in found.results} == {120}
    assert found.bad == {f"{name}/page.jpg": "not an image"}
    assert "pip install" in found.left_out["dali"]
    assert json.loads(json.dumps(found.to_dict()))["ways"][0]["photos"] == 120
    table = found.table()
    assert "dali: not measured: nvidia-dali" in table
    assert "1 photos cannot be read" in table


def test_no_usable_photo(model: Artefact, tmp_path: Path) -> None:
    for name in model.classes:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "page.jpg").write_text("<html>")
    with pytest.raises(DataError, match="no usable photos"):
        decoder_sensitivity.measure(model, tmp_path / "data")
