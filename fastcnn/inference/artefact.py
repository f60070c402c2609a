"""An exported model, whatever its format: what it is, and probabilities for photos.

Needs numpy, and torch (for .torchscript and .pt2) or onnxruntime (for .onnx).
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcnn.errors import CheckError, FastCNNError, first_line, nearest, warn
from fastcnn.inference import file_formats as container
from fastcnn.inference.file_formats import FORMATS
from fastcnn.storage.paths import user_cache_folder

FORMAT = 2

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Runner = Callable[[Images], Probabilities]


@dataclass(frozen=True)
class Golden:
    """An image that was made up for the purpose, and what the trained model says of it."""

    image: Images
    """(H, W, 3)."""
    probabilities: Probabilities
    """(num_classes,)."""


@dataclass(frozen=True)
class Artefact:
    """An exported model, opened."""

    path: Path
    sha256: str
    """Of the file, as `sha256sum` prints it."""
    metadata: dict[str, Any]
    _run: Runner

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the probabilities."""
        return list(self.metadata["classes"])

    @property
    def image_size(self) -> int:
        """Side in pixels that the model resizes photos to."""
        return int(self.metadata["image_size"])

    @property
    def tolerance(self) -> float:
        """Largest difference in a probability from the trained model's."""
        return float(self.metadata["tolerance"])

    @property
    def resize_tolerance(self) -> float:
        """Likewise for photos of another size than the model's: where its resize rounds to another level."""
        return float(self.metadata["resize_tolerance"])

    @property
    def golden(self) -> list[Golden]:
        """What the file is checked on."""
        return [
            Golden(unpack_image(entry), np.array(entry["probabilities"], np.float32))
            for entry in self.metadata["golden"]
        ]

    def probabilities(self, images: Images) -> Probabilities:
        """(N, H, W, 3) uint8, any height and width -> (N, num_classes) probabilities."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise FastCNNError(f"expected (N, H, W, 3) uint8 images, got {images.shape} {images.dtype}")
        if not len(images):
            return np.zeros((0, len(self.classes)), np.float32)
        return self._run(np.ascontiguousarray(images))


def open(path: str | Path, *, sha256: str | None = None, warn_of_strangers: bool = False) -> Artefact:
    """Return the exported model in a file, or in a run folder.

    Args:
        path: the file, or a folder with one.
        sha256: what the file must be: its own SHA-256, as `sha256sum` prints it, or the one of weights and metadata.
        warn_of_strangers: whether to warn where opening the file runs a program that was not exported on this machine
            and is not known by its hash.

    Raises CheckError where the file is damaged or not what its hash or `sha256` says, FastCNNError where it is missing,
    no export of fastcnn, or of another format. The file is taken apart and hashed before anything in it runs.
    """
    path = _find(Path(path))
    opener = OPENERS[path.suffix]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FastCNNError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        parts, metadata = FORMATS[path.suffix].read(content)
    except (RuntimeError, ValueError) as error:
        raise CheckError(f"{path} cannot be opened as an exported model: {first_line(error)}") from None
    if not isinstance(metadata.get("format"), int) or not isinstance(metadata.get("classes"), list):
        raise FastCNNError(f"{path} was not exported by fastcnn: it has no {container.METADATA}")
    if metadata["format"] > FORMAT:
        raise FastCNNError(f"{path} has format {metadata['format']}, this fastcnn reads up to {FORMAT}: upgrade it")
    if metadata["format"] < FORMAT:
        raise FastCNNError(f"{path} has format {metadata['format']}, of an older fastcnn: export the run again")
    inner, outer = container.digest(parts, metadata), hashlib.sha256(content).hexdigest()
    if metadata.get("sha256") != inner:
        raise CheckError(f"{path} was changed after its export: weights and metadata have another SHA-256 than it says")
    if sha256 and sha256.strip().lower() not in (inner, outer):
        raise CheckError(f"{path} is another file than expected: its SHA-256 is {outer}")
    if warn_of_strangers and opener.runs and not sha256 and outer not in known():
        warn(f"{path} was not exported here, and {opener.runs}: give its --sha256, or trust who made it")
    try:
        return Artefact(path, outer, metadata, opener.open(content, parts, metadata))
    except ImportError as error:
        raise FastCNNError(f"{path} needs {error.name}: pip install 'fastcnn[export]'") from None
    except Exception as error:  # whatever the libraries make of a file that is not theirs
        raise CheckError(f"{path} cannot be opened as an exported model: {first_line(error)}") from None


def _find(path: Path) -> Path:
    if path.is_dir():
        found = [path / f"model{suffix}" for suffix in OPENERS if (path / f"model{suffix}").is_file()]
        if not found:
            raise FastCNNError(f"{path} holds no exported model: run `fastcnn export {path}` first")
        return found[0]
    if not path.is_file():
        raise FastCNNError(f"no exported model {path}")
    if path.suffix not in OPENERS:
        ends = nearest(path.suffix, OPENERS)
        raise FastCNNError(f"{path}: expected a file that ends in {', '.join(OPENERS)}{ends}")
    return path


def _open_torchscript(content: bytes, parts: dict[str, bytes], metadata: dict[str, Any]) -> Runner:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated upstream
        module = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
    return _torch_runner(module)  # it splits what is large itself


def _open_pt2(content: bytes, parts: dict[str, bytes], metadata: dict[str, Any]) -> Runner:
    import torch

    container.check_program(parts)  # what follows unpickles and evaluates whatever it finds
    program = torch.export.load(io.BytesIO(content))
    return _torch_runner(program.module(check_guards=False), metadata["chunk"])


def _torch_runner(module: Callable[..., Any], chunk: int | None = None) -> Runner:
    import torch

    def run(images: Images) -> Probabilities:
        with torch.inference_mode():
            parts = [module(some) for some in torch.from_numpy(images).split(chunk or len(images))]
            probabilities: Probabilities = torch.cat(parts).numpy()
        return probabilities

    return run


def _open_onnx(content: bytes, parts: dict[str, bytes], metadata: dict[str, Any]) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Images) -> Probabilities:
        probabilities: Probabilities = session.run(None, {"images": images})[0]
        return probabilities

    return run


class Opener(NamedTuple):
    """How a format is opened."""

    open: Callable[[bytes, dict[str, bytes], dict[str, Any]], Runner]
    runs: str
    """What opening it makes possible to who made it; "" where that is nothing but arithmetic."""


OPENERS = {
    ".torchscript": Opener(_open_torchscript, "TorchScript is a program that runs with your rights"),
    ".onnx": Opener(_open_onnx, ""),
    ".pt2": Opener(_open_pt2, ""),
}


def pack_image(image: Images) -> dict[str, Any]:
    """Return an image as plain data: height, width, and its bytes compressed by zlib, in base64."""
    pixels = base64.b64encode(zlib.compress(image.tobytes(), 9)).decode()
    return {"height": image.shape[0], "width": image.shape[1], "pixels": pixels}


def unpack_image(entry: dict[str, Any]) -> Images:
    """Return the (H, W, 3) image of `pack_image`."""
    pixels = zlib.decompress(base64.b64decode(entry["pixels"]))
    return np.frombuffer(pixels, np.uint8).reshape(entry["height"], entry["width"], 3).copy()


def known() -> set[str]:
    """Return the SHA-256 of the files that this user exported on this machine."""
    try:
        return set(_known().read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return set()


def remember(path: Path) -> str:
    """Note that a file was exported here, and return its SHA-256."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        _known().parent.mkdir(parents=True, exist_ok=True)
        with _known().open("a", encoding="ascii") as file:
            file.write(f"{sha256}\n")
    except OSError:
        pass  # a warning more on opening it is all that this costs
    return sha256


def _known() -> Path:
    return user_cache_folder() / "exports.txt"
