"""The programs in examples/ are built and run as their READMEs say, and give the exported file's probabilities."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastcnn.export import triton_repository
from fastcnn.inference import artefact
from fastcnn.inference.artefact import Artefact
from tests.export.test_triton_server import read_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = [(32, 32), (300, 200), (33, 47)]  # the model's own, one to shrink, one to stretch


@pytest.fixture(scope="module")
def torchscript(exports: Callable[[str], Path]) -> Path:
    return exports("torchscript")


@pytest.fixture(scope="module")
def onnx(exports: Callable[[str], Path]) -> Path:
    return exports("onnx")


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def build(source: Path, folder: Path) -> Path:
    """Return the program built from a folder with a CMakeLists.txt; skip the test where nothing can be built."""
    if not shutil.which("cmake") or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("needs cmake and a C++ compiler")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", source, "-B", folder, prefix], ["--build", folder]):
        done = subprocess.run(["cmake", *command], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "classify"


@pytest.fixture(scope="module")
def libtorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(EXAMPLES / "libtorch", tmp_path_factory.mktemp("libtorch"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)


@pytest.mark.long  # building it takes 13 s
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_libtorch(libtorch: Path, torchscript: Path, width: int, height: int) -> None:
    photo(width, height).save("photo.ppm")
    done = run(libtorch, torchscript, "photo.ppm")
    assert (done.returncode, done.stderr) == (0, "")
    model = artefact.open(torchscript)
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    found = {name: float(probability) for probability, name in lines}
    assert set(found) == set(model.classes)
    assert [float(probability) for probability, _ in lines] == sorted(found.values(), reverse=True)
    expected = model.probabilities(np.array(photo(width, height))[None])[0]
    np.testing.assert_allclose([found[name] for name in model.classes], expected, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xd8\xff", "photo.ppm is no binary PPM file"),
        (b"P6\n4 4\n255\n---", "photo.ppm is truncated"),
        (b"P6\n-4 4\n255\n---", "photo.ppm is no binary PPM file"),
        (b"", "photo.ppm is no binary PPM file"),
    ],
)
def test_libtorch_says_what_is_wrong(libtorch: Path, torchscript: Path, content: bytes, message: str) -> None:
    Path("photo.ppm").write_bytes(content)
    done = run(libtorch, torchscript, "photo.ppm")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    done = run(libtorch, "photo.ppm", "photo.ppm")
    assert done.returncode == 1
    assert done.stderr.startswith("classify: error: ")
    assert run(libtorch).returncode == 2


def check_answer(line: str, model: Artefact, image: Image.Image) -> None:
    expected = model.probabilities(np.array(image)[None])[0]
    found = re.fullmatch(r"photo\.png  (.+) ([\d.]+)", line)
    assert found, line
    assert found[1] == model.classes[expected.argmax()]
    assert float(found[2]) == pytest.approx(expected.max(), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_onnxruntime(onnx: Path, width: int, height: int) -> None:
    photo(width, height).save("photo.png")
    alone = "sys.modules |= {'torch': None, 'fastcnn': None}"
    code = f"import runpy, sys; {alone}; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = run(sys.executable, "-c", code, EXAMPLES / "onnxruntime" / "classify.py", onnx, "photo.png")
    assert (done.returncode, done.stderr) == (0, "")
    check_answer(done.stdout.rstrip("\n"), artefact.open(onnx), photo(width, height))


class Server(http.server.BaseHTTPRequestHandler):
    """What of Triton's protocol the client uses, for one model: its metadata, and inference with classification."""

    model: Artefact
    config: Any
    labels: list[str]

    def do_GET(self) -> None:
        assert self.path == "/v2/models/animals"
        tensors = {
            kind: [{"name": t.name, "datatype": datatype, "shape": ["-1", *map(str, t.dims)]}]
            for kind, datatype, (t,) in (
                ("inputs", "UINT8", self.config.input),
                ("outputs", "FP32", self.config.output),
            )
        }
        self.answer({"name": "animals", "versions": ["1"], "platform": self.config.platform, **tensors})

    def do_POST(self) -> None:
        assert self.path == "/v2/models/animals/infer"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (pixels,), (wanted,) = request["inputs"], request["outputs"]
        assert (pixels["name"], pixels["datatype"]) == (self.config.input[0].name, "UINT8")
        assert pixels["shape"] == [1, *self.config.input[0].dims]
        assert wanted == {"name": self.config.output[0].name, "parameters": {"classification": 1}}
        probabilities = self.model.probabilities(np.array(pixels["data"], np.uint8).reshape(pixels["shape"]))[0]
        best = int(probabilities.argmax())
        text = f"{probabilities[best]:f}:{best}:{self.labels[best]}"
        self.answer({"outputs": [{"name": wanted["name"], "datatype": "BYTES", "shape": [1, 1], "data": [text]}]})

    def answer(self, what: dict[str, Any]) -> None:
        content = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(torchscript: Path, tmp_path: Path) -> Iterator[str]:
    folder = triton_repository.write_repository(torchscript, tmp_path, "animals")
    config = read_config(folder / "config.pbtxt")
    labels = (folder / config.output[0].label_filename).read_text().splitlines()
    handler = type("Handler", (Server,), {"model": artefact.open(torchscript), "config": config, "labels": labels})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_triton_client(server: str, torchscript: Path) -> None:
    model, image = artefact.open(torchscript), photo(300, 200)
    image.save("photo.png")
    done = run(sys.executable, EXAMPLES / "triton" / "classify.py", server, "animals", "photo.png")
    assert (done.returncode, done.stderr) == (0, "")
    size = (model.image_size, model.image_size)
    check_answer(done.stdout.rstrip("\n"), model, image.resize(size, Image.Resampling.BILINEAR))
