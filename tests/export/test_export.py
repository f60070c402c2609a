"""Export and predict: the file says what the trained model says."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastcnn import cli, export_run, predict_photos
from fastcnn.config import read_yaml, resolve
from fastcnn.errors import CheckError, FastCNNError, FastCNNWarning, UsageError
from fastcnn.export import exporters, model_card, script_process
from fastcnn.export.exporters import EXPORTERS, Half, golden_images, write
from fastcnn.export.verify import verify_file
from fastcnn.export.verify_process import verify_in_new_process
from fastcnn.inference import artefact, file_formats
from fastcnn.network.inference_network import Inference
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import ACTIVATIONS, SmallCNN, restore
from fastcnn.runs.fit import write_config
from fastcnn.storage import checkpoint

SIZE = 32


@pytest.fixture(scope="session", params=EXPORTERS)
def kept(request: pytest.FixtureRequest, exports: Callable[[str], Path]) -> Path:
    """Return an export in each format. Read-only."""
    return exports(request.param)


@pytest.fixture
def exported(kept: Path, tmp_path: Path) -> Path:
    """Return a copy of it."""
    return Path(shutil.copy(kept, tmp_path))


@pytest.fixture
def check_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports checked in this process: starting another takes 1.5 s."""
    monkeypatch.setattr(
        exporters, "verify_in_new_process", lambda path, *run, **how: verify_file(artefact.open(path), *run, **how)
    )


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


PLAIN = """
import base64, json, sys, zlib
import torch
sys.modules["fastcnn"] = None  # importing it would fail
extra = {"fastcnn.json": ""}
model = torch.jit.load(sys.argv[1], _extra_files=extra)
metadata = json.loads(extra["fastcnn.json"])
assert model.classes == metadata["classes"]
for golden in metadata["golden"]:
    pixels = bytearray(zlib.decompress(base64.b64decode(golden["pixels"])))
    image = torch.frombuffer(pixels, dtype=torch.uint8).view(1, golden["height"], golden["width"], 3)
    difference = (model(image)[0] - torch.tensor(golden["probabilities"])).abs().max().item()
    assert difference <= metadata["tolerance"], difference
print(len(metadata["golden"]), metadata["training"]["val/accuracy"])
"""


@pytest.mark.parametrize("kept", ["torchscript"], indirect=True)
def test_plain_torch_finds_the_golden_inputs_equal(kept: Path, run_dir: Path) -> None:
    command = [sys.executable, "-I", "-W", "ignore", "-c", PLAIN, str(kept)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    count, accuracy = done.stdout.split()
    assert (int(count), float(accuracy)) == (4, checkpoint.load(run_dir / "best.pt")["best"]["val/accuracy"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kept", ["torchscript"], indirect=True)
@pytest.mark.parametrize(("dtype", "tolerance"), [("half", 1e-2), ("bfloat16", 5e-2), ("double", 1e-6)])
def test_torchscript_computes_in_another_type(kept: Path, dtype: str, tolerance: float) -> None:
    module, changed = torch.jit.load(str(kept)), torch.jit.load(str(kept)).to(getattr(torch, dtype))
    for size in (SIZE, SIZE + 9):
        images = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
        probabilities = changed(images)
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities, module(images), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[pytest.mark.long] * (name == "onnx")) for name in EXPORTERS]
)
def test_mirror_images_are_averaged_inside_the_file(run_dir: Path, tmp_path: Path, format: str) -> None:
    """The golden inputs are the trained network's, so verification compares the mean of both images."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    state = checkpoint.load(run_dir / "best.pt")
    plain, path = restore(state), tmp_path / f"model.{format}"
    for options in (state["network"], state["config"]):
        options["tta"] = "flip"
    write(state, path, format)
    model = artefact.open(path)
    assert verify_file(model).problems == ()
    assert "mirror image" in model_card.page(model.metadata, [path])
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    normalised = Normalise(state["config"]["mean"], state["config"]["std"], SIZE)(torch.from_numpy(images))
    with torch.inference_mode():
        mean = torch.softmax((plain(normalised) + plain(normalised.flip(3))) / 2, 1).numpy()
    np.testing.assert_allclose(model.probabilities(images), mean, atol=1e-6)


LONG = [pytest.param(name, marks=[pytest.mark.long] * (name != "torchscript")) for name in EXPORTERS]


@pytest.mark.usefixtures("check_here")
@pytest.mark.parametrize("half", ["auto", pytest.param("bf16", marks=pytest.mark.long), "fp16"])
@pytest.mark.parametrize("format", LONG)
def test_half_is_half_the_weights(run_dir: Path, tmp_path: Path, format: str, half: Half) -> None:
    if format == "onnx" and half == "bf16":
        pytest.skip("onnxruntime computes no bf16 convolution on a CPU")
    state = checkpoint.load(run_dir / "best.pt")
    path = export_run(run_dir, format=format, output=tmp_path / f"half.{format}", half=half)
    assert artefact.open(path).metadata["precision"] == {"auto": "fp16" if format == "onnx" else "bf16"}.get(half, half)
    write(state, tmp_path / f"whole.{format}", format)
    weights = sum(tensor.numel() for name, tensor in state["model"].items() if name.endswith("weight"))
    saved = (tmp_path / f"whole.{format}").stat().st_size - path.stat().st_size
    assert weights * 1.5 < saved < weights * 3


def test_the_inference_form_is_the_same_function() -> None:
    torch.manual_seed(0)
    for activation in ACTIVATIONS:
        for batch_norm in (True, False):
            network = SmallCNN(
                5,
                filters=(8, 6, 8, 6, 8),
                activation=activation,
                batch_norm=batch_norm,
                image_size=64,
                tta="flip" if batch_norm else "none",
            ).double()
            for name, buffer in network.named_buffers():
                buffer.copy_(torch.rand_like(buffer) + ("var" in name))
            for parameter in network.parameters():
                parameter.data.copy_(torch.randn_like(parameter) * 0.3)
            network.eval()
            images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
            torch.testing.assert_close(Inference(network)(images), network(images), rtol=0, atol=1e-6)


def tamper(path: Path, change: Callable[[dict[str, bytes], dict[str, Any]], None], *, rehash: bool = False) -> None:
    """Change parts or metadata of a file; with `rehash`, as somebody would who knows of the hash."""
    form = file_formats.FORMATS[path.suffix]
    parts, metadata = form.read(path.read_bytes())
    change(parts, metadata)
    if rehash:
        metadata["sha256"] = file_formats.digest(parts, metadata)
    path.write_bytes(form.pack(file_formats.Contents(parts, metadata)))


def tensors(path: Path) -> list[bytes]:
    """Return the bytes of each of a file's tensors."""
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        return [bytes(tensor.raw_data) for tensor in onnx.load(path).graph.initializer if len(tensor.raw_data) > 60]
    parts = file_formats.read_archive(path.read_bytes()).parts
    return [part for name, part in parts.items() if re.fullmatch(r"data/\d+|data/weights/weight_\d+", name)]


@pytest.fixture
def failure(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs `fastcnn verify`, which has to end with code 4, and returns its error."""

    def verify(*arguments: str | Path) -> str:
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastCNNWarning)  # a changed file is not known by its hash
            status = cli.main(["verify", *map(str, arguments)])
        assert status == 4
        error = capfd.readouterr().err
        assert error.splitlines()[-1].startswith("fastcnn: error: ")
        return error

    return verify


def test_one_flipped_bit_in_any_tensor_is_found(exported: Path, failure: Callable[..., str]) -> None:
    whole, found = exported.read_bytes(), tensors(exported)
    assert len(found) >= 10
    for tensor in found:
        content = bytearray(whole)
        content[whole.index(tensor) + len(tensor) // 2] ^= 1
        exported.write_bytes(content)
        with pytest.raises(CheckError):
            artefact.open(exported)
    failure(exported)


@pytest.mark.parametrize("name", ["classes", "image_size", "mean", "tolerance", "golden", "training", "sha256"])
def test_changed_metadata_is_found(exported: Path, name: str) -> None:
    def change(parts: dict[str, bytes], metadata: dict[str, Any]) -> None:
        value = metadata[name]
        metadata[name] = value[::-1] if isinstance(value, list | str) else value * 2 if name != "training" else {}

    tamper(exported, change)
    with pytest.raises(CheckError, match="changed after its export"):
        artefact.open(exported)


def test_swapped_classes_are_found(exported: Path, failure: Callable[..., str]) -> None:
    tamper(exported, lambda parts, metadata: metadata["classes"].reverse())
    assert "changed after its export" in failure(exported)


def test_weights_that_were_changed_and_hashed_again_do_not_give_the_golden_probabilities(
    exported: Path, failure: Callable[..., str]
) -> None:
    largest = max(tensors(exported), key=len)

    def change(parts: dict[str, bytes], metadata: dict[str, Any]) -> None:
        for name, part in parts.items():
            parts[name] = part.replace(largest, largest[::-1])

    tamper(exported, change, rehash=True)
    assert "golden inputs: " in failure(exported)


def test_another_file_than_expected_is_found(exported: Path, failure: Callable[..., str]) -> None:
    inside, outside = artefact.open(exported).metadata["sha256"], hashlib.sha256(exported.read_bytes()).hexdigest()
    for right in (inside, outside, outside.upper()):
        assert artefact.open(exported, sha256=right).sha256 == outside
    assert outside in failure(exported, "--sha256", "0" * 64)


def plant(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make exports wrong."""
    if what == "another resize":
        resize = torch.nn.functional.interpolate
        nearest = SimpleNamespace(interpolate=lambda x, size, **options: resize(x, size, mode="nearest"))
        monkeypatch.setattr("fastcnn.network.inference_network.F", nearest)
    else:
        monkeypatch.setattr(
            "fastcnn.network.inference_network.scale_and_shift",
            lambda norm, channels: (torch.ones(channels).double(),) * 2,
        )


@pytest.mark.usefixtures("check_here")
@pytest.mark.parametrize(
    ("what", "format"),
    [
        ("another resize", "pt2"),
        ("no batch norm", "torchscript"),
        pytest.param("another resize", "onnx", marks=pytest.mark.long),
        pytest.param("no batch norm", "onnx", marks=pytest.mark.long),
    ],
)
def test_a_wrong_export_is_not_kept(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, what: str
) -> None:
    plant(monkeypatch, what)
    with pytest.raises(CheckError, match=r"golden inputs: probabilities differ.*not kept"):
        export_run(run_dir, format=format, output=tmp_path / f"model.{format}")
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.usefixtures("check_here")
def test_a_model_that_was_trained_on_is_not_what_was_exported(
    run_dir: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    report = verify_file(artefact.open(export_run(run)))
    assert (report.photos, report.problems) == (24, ())
    assert report.accuracy == report.trained_accuracy == checkpoint.load(run / "best.pt")["best"]["val/accuracy"]
    state = torch.load(run / "best.pt", weights_only=True)
    state["model"]["output.bias"] += torch.arange(4)
    checkpoint.save(run / "best.pt", state)
    assert "validation photos: probabilities differ" in failure(run)


@pytest.mark.usefixtures("check_here")
def test_a_quick_check_takes_some_photos_and_says_so(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastcnn.export.verify.QUICK", 10)
    monkeypatch.setattr("fastcnn.export.verify.BATCH_SIZE", 4)
    done: list[tuple[int, int]] = []
    path = tmp_path / "a folder" / "of mine" / "model.torchscript"  # made
    export_run(run_dir, output=path, quick=True, progress=lambda *both: done.append(both), note=print)
    assert done == [(4, 10), (8, 10), (10, 10)]
    assert "10 of 24 validation photos: largest difference" in capsys.readouterr().out
    every = verify_file(artefact.open(path), run_dir)
    assert (every.photos, every.photos_left_out, every.problems) == (24, 0, ())


@pytest.mark.usefixtures("check_here")
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(exporters, "write")
    (tmp_path / "file").touch()
    with pytest.raises(FastCNNError, match=r"cannot write into the folder .*choose another"):
        export_run(run_dir, output=tmp_path / "file" / "model.torchscript")
    (tmp_path / "folder.torchscript").mkdir()
    with pytest.raises(UsageError, match="name of a file"):
        export_run(run_dir, output=tmp_path / "folder.torchscript")


def test_a_check_that_dies_says_with_what_code(
    exports: Callable[[str], Path], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckError, match="ended with code 1"):
        verify_in_new_process(exports("torchscript"), run_dir, None, None, quick=False, progress=lambda *both: None)


def test_an_export_without_the_photos(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    values = read_yaml(run / "config.yaml")
    write_config(run, resolve(values, {"data": str(tmp_path / "gone")}))
    with pytest.warns(FastCNNWarning, match=r"with --moved-to\): only the synthetic golden inputs are compared"):
        assert export_run(run).is_file()


def test_the_user_is_warned_of_programs_of_strangers(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artefact.open(exported, warn_of_strangers=True)  # exported here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    artefact.open(exported)
    artefact.open(exported, warn_of_strangers=True, sha256=artefact.open(exported).sha256)
    if exported.suffix == ".torchscript":
        with pytest.warns(FastCNNWarning, match="not exported here"):
            artefact.open(exported, warn_of_strangers=True)
    else:
        artefact.open(exported, warn_of_strangers=True)


class Trap:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trapped"),))


def test_nothing_is_unpickled_or_evaluated_in_a_pt2(exports: Callable[[str], Path], tmp_path: Path) -> None:
    def program(parts: dict[str, bytes], change: Callable[[Any], None]) -> None:
        content = json.loads(parts["models/model.json"])
        change(content)
        parts["models/model.json"] = json.dumps(content).encode()

    def config(parts: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        content = json.loads(parts[name])
        next(iter(content["config"].values()))["use_pickle"] = True
        parts[name] = json.dumps(content).encode()

    trap = pickle.dumps(Trap())
    guards = {"guards_code": ["__import__('pathlib').Path('trapped').touch()"]}
    changes: list[Callable[[dict[str, bytes]], object]] = [
        lambda parts: parts.update({"data/sample_inputs/model.pt": trap}),
        lambda parts: parts.update({"data/weights/model.pt": trap}),
        lambda parts: parts.update({"data/constants/opaque_obj_0": trap}),
        config,
        lambda parts: program(parts, lambda content: content.update(guards)),
        lambda parts: program(
            parts, lambda content: content["graph_module"]["graph"]["nodes"][0].update(target="torch.load")
        ),
        lambda parts: parts.update(
            {"models/model.json": re.sub(rb'"expr_str": "[^"]*"', b'"expr_str": "exit()"', parts["models/model.json"])}
        ),
    ]
    artefact.open(exports("pt2"))
    for change in changes:
        path = Path(shutil.copy(exports("pt2"), tmp_path))
        tamper(path, lambda parts, metadata, change=change: change(parts), rehash=True)  # type: ignore[misc]
        with pytest.raises(CheckError, match="cannot be opened"):
            artefact.open(path)
        assert not Path("trapped").exists()


@pytest.mark.long
@pytest.mark.parametrize("format", EXPORTERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated upstream
def test_the_same_run_gives_the_same_file(
    format: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this process did before, and however many threads another one has."""
    monkeypatch.setattr(exporters, "script", script_process.script)
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(7, 7)))
    here, there = tmp_path / f"here.{format}", tmp_path / f"there.{format}"
    write(checkpoint.load(run_dir / "best.pt"), here, format)
    write_it = (
        "import sys; from pathlib import Path; from fastcnn.export.exporters import write; "
        "from fastcnn.storage import checkpoint\n"
        "import torch; torch.set_num_threads(3)\n"
        "write(checkpoint.load(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[2]).suffix[1:])"
    )
    command = [sys.executable, "-W", "ignore", "-c", write_it, run_dir / "best.pt", there]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})  # the order of sets of strings
    assert artefact.open(there).metadata["sha256"] == artefact.open(here).metadata["sha256"]


def test_a_process_that_cannot_script_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-I", "-c", "raise KeyError('model')"]
    monkeypatch.setattr(script_process.own_module, "command", lambda *names: failing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated upstream
        torch.jit.script(torch.nn.Flatten())
    with pytest.raises(FastCNNError, match="the process that writes TorchScript ended with code 1: KeyError: 'model'"):
        script_process.script(checkpoint.load(run_dir / "best.pt"), "fp32")


def test_nothing_of_this_machine_is_inside(exported: Path) -> None:
    parts, metadata = file_formats.FORMATS[exported.suffix].read(exported.read_bytes())
    root = str(Path(__file__).resolve().parents[2]).encode()
    for content in [*parts.values(), json.dumps(metadata).encode()]:
        assert root not in content
        assert b"/deploy.py" not in content
        assert str(Path.home()).encode() not in content


def test_the_metadata_is_small(exported: Path) -> None:
    assert len(json.dumps(artefact.open(exported).metadata)) < 40_000
    for size in (32, 128, 200):
        images = golden_images(size)
        assert images[0].shape == (size, size, 3)
        assert any(image.shape[0] != image.shape[1] for image in images)
        assert sum(len(artefact.pack_image(image)["pixels"]) for image in images) < 60_000


def test_without_onnx_the_way_to_it_is_said(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FastCNNError, match=r"pip install 'fastcnn\[export\]'"):
        export_run(run_dir, format="onnx", output=tmp_path / "model.onnx")


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
