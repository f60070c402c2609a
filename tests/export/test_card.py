"""The model card tells what the file tells, and what it says to run runs."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcnn.errors import FastCNNError
from fastcnn.export import model_card as card
from fastcnn.export.exporters import EXPORTERS
from fastcnn.inference import artefact
from tests.end_to_end.test_examples import EXAMPLES, build


@pytest.fixture(scope="module")
def folder(exports: Callable[[str], Path]) -> Path:
    """A folder with a run's model in every format that can be made here, and their card. Read-only."""
    for name in EXPORTERS:
        with contextlib.suppress(pytest.skip.Exception):
            exports(name)
    return exports("torchscript").parent


def snippets(folder: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (folder / "model_card.md").read_text(encoding="utf-8"), re.DOTALL)


def test_it_stands_beside_the_files_and_names_them(folder: Path) -> None:
    text = (folder / "model_card.md").read_text(encoding="utf-8")
    for file in folder.glob("model.*"):
        assert f"| {file.name} |" in text
    model = artefact.open(folder / "model.torchscript")
    assert ", ".join(model.classes) in text
    assert f"{model.image_size} x {model.image_size}" in text
    for name in ("## Data", "## Preprocessing", "## Limits"):
        assert name in text
    assert "| all | 96 | 24 | 0 |" in text
    accuracy = model.metadata["training"]["val/accuracy"]
    assert f"| accuracy on validation photos | {accuracy:.4g} |" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated upstream
def test_python_snippets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = shutil.copytree(folder, tmp_path / "work")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((300, 200)).save(work / "photo.jpg")
    pixels = np.array(Image.open(work / "photo.jpg"))
    expected = artefact.open(work / "model.torchscript").probabilities(pixels[None])[0]
    name = artefact.open(work / "model.torchscript").classes[expected.argmax()]
    codes = snippets(folder, "python")
    assert len(codes) == len(list(folder.glob("model.*")))
    monkeypatch.chdir(work)
    capsys.readouterr()
    for code in codes:
        exec(code, {"__name__": "__main__"})
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(codes)
    for answer in answers:
        found, _, probability = answer.rpartition(" ")
        assert found == name
        assert float(probability) == pytest.approx(expected.max(), abs=1e-5)


@pytest.mark.long
def test_the_cpp_snippet(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(EXAMPLES / "libtorch" / "CMakeLists.txt", source)
    (code,) = snippets(folder, "cpp")
    (source / "classify.cpp").write_text(code, encoding="utf-8")
    program = build(source, tmp_path / "build")
    done = subprocess.run([program], check=True, cwd=folder, capture_output=True, text=True)
    expected = artefact.open(folder / "model.torchscript").probabilities(np.full((1, 300, 400, 3), 128, np.uint8))[0]
    name, _, probability = done.stdout.strip().rpartition(" ")
    assert name == artefact.open(folder / "model.torchscript").classes[expected.argmax()]
    assert float(probability) == pytest.approx(expected.max(), abs=1e-5)


def test_names_cannot_break_the_page(folder: Path) -> None:
    metadata = artefact.open(folder / "model.torchscript").metadata
    metadata = {**metadata, "classes": ["<b>a|b</b>", "c\n# d", "*e*", "`f`"]}
    text = card.page(metadata, [Path("model.torchscript")])
    assert r"\<b\>a\|b\</b\>, c \# d, \*e\*, \`f\`." in text


def test_it_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    metadata = artefact.open(folder / "model.torchscript").metadata
    with pytest.raises(FastCNNError, match="cannot write"):
        card.write(tmp_path / "gone", metadata, [Path("model.torchscript")])
