"""Files that revision cd23ba7 exported are opened, verified and predicted with by today's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcnn import predict_photos
from fastcnn.export.verify import verify_file
from fastcnn.inference import artefact

FILES = Path(__file__).parent / "files"
NAMES = ["model.torchscript", "model.onnx", "model.pt2"]


@pytest.fixture(params=NAMES)
def file(request: pytest.FixtureRequest) -> Path:
    if request.param == "model.onnx":
        pytest.importorskip("onnxruntime")
    return FILES / str(request.param)


def test_opens_verifies_and_predicts(file: Path) -> None:
    model = artefact.open(file)  # checks the hash
    assert len(model.classes) == 2
    found = verify_file(model)
    assert (found.problems, found.num_golden) == ((), 4)
    Image.fromarray(model.golden[0].image).save("photo.png")
    (predicted,) = predict_photos(model, ["photo.png"])
    np.testing.assert_allclose(predicted.probabilities, model.golden[0].probabilities, atol=1e-4)
