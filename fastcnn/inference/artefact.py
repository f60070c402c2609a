"""Exported model of any format: its metadata, and class probabilities for images.

Needs numpy, and torch (for .torchscript and .pt2) or onnxruntime (for .onnx).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcnn.errors import CheckError, FastCNNError, first_line, ignoring_warnings, nearest, os_error_as, warn
from fastcnn.inference.file_formats import FORMATS, METADATA, check_program, digest
from fastcnn.storage.paths import user_cache_folder
from fastcnn.system.text import as_utf8

FORMAT = 2

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Runner = Callable[[Images], Probabilities]


@dataclass(frozen=True)
class Golden:
    """Synthetic image and the trained model's probabilities for it."""

    image: Images
    """(H, W, 3)."""
    probabilities: Probabilities
    """(num_classes,)."""


@dataclass(frozen=True)
class Artefact:
    """Opened exported model."""

    path: Path
    sha256: str
    """SHA-256 of the file, as `sha256sum` prints it."""
    metadata: dict[str, Any]
    _run: Runner

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the probabilities."""
        return list(map(as_utf8, self.metadata["classes"]))

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
        """Largest difference in a probability for images that the model resizes: rounding may differ."""
        return float(self.metadata["resize_tolerance"])

    @property
    def golden(self) -> list[Golden]:
        """Golden inputs that verification compares."""
        return [
            Golden(unpack_image(entry), np.array(entry["probabilities"], np.float32))
            for entry in self.metadata["golden"]
        ]

    def probabilities(self, images: Images) -> Probabilities:
        """(N, H, W, 3) uint8, any height and width -> (N, num_classes) fp32.

        Raises FastCNNError for other arrays, and where a probability is not a finite number.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise FastCNNError(f"expected (N, H, W, 3) uint8 images, got {images.shape} {images.dtype}")
        if not len(images):
            return np.zeros((0, len(self.classes)), np.float32)
        probabilities = self._run(np.ascontiguousarray(images))
        if not np.isfinite(probabilities).all():
            raise FastCNNError(f"{self.path} gives probabilities that are not finite numbers: train and export again")
        return probabilities


def open(path: str | Path, *, sha256: str | None = None, warn_of_strangers: bool = False) -> Artefact:
    """Return the exported model in a file, or in a run folder.

    Args:
        path: the file, or a folder with one.
        sha256: expected hash: the file's SHA-256, as `sha256sum` prints it, or the one of its weights and metadata.
        warn_of_strangers: warn if opening the file runs a program that was not exported on this machine and has no
            expected hash.

    Raises CheckError if the file is damaged or does not match its hash or `sha256`, FastCNNError if it is missing, was
    not exported by fastcnn or has another format version. The hash is checked before anything in the file runs.
    """
    path = find(Path(path))
    opener = OPENERS[path.suffix]
    with os_error_as(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        parts, metadata = FORMATS[path.suffix].read(content)
    except (RuntimeError, ValueError) as error:
        raise CheckError(f"{path} cannot be opened as an exported model: {first_line(error)}") from None
    if not isinstance(metadata.get("format"), int) or not isinstance(metadata.get("classes"), list):
        raise FastCNNError(f"{path} was not exported by fastcnn: it has no {METADATA}")
    if metadata["format"] > FORMAT:
        raise FastCNNError(
            f"{path} has format {metadata['format']}, this fastcnn reads up to {FORMAT}: upgrade fastcnn"
        )
    if metadata["format"] < FORMAT:
        raise FastCNNError(f"{path} has format {metadata['format']}, of an older fastcnn: export the run again")
    inner, outer = digest(parts, metadata), hashlib.sha256(content).hexdigest()
    if metadata.get("sha256") != inner:
        raise CheckError(
            f"{path} was changed after its export: weights and metadata do not match its SHA-256. Export the run again"
        )
    if sha256 and sha256.strip().lower() not in (inner, outer):
        raise CheckError(f"{path} is another file than expected: its SHA-256 is {outer}")
    if warn_of_strangers and opener.runs and not sha256 and outer not in known_hashes():
        warn(f"{path} was not exported here, and {opener.runs}: give its --sha256, or trust its source")
    try:
        return Artefact(path, outer, metadata, opener.open(content, parts, metadata))
    except ImportError as error:
        raise FastCNNError(f"{path} needs {error.name}: pip install 'fastcnn[export]'") from None
    except Exception as error:  # the libraries raise many types for a malformed file
        raise CheckError(f"{path} cannot be opened as an exported model: {first_line(error)}") from None


def find(path: Path) -> Path:
    """Return the exported file that a path names: itself, or the one in a folder. Raises FastCNNError."""
    if path.is_dir():
        found = exported_in(path)
        if not found:
            raise FastCNNError(f"{path} holds no exported model: run fastcnn export {shlex.quote(str(path))} first")
        return found
    if not path.is_file():
        raise FastCNNError(f"no exported model {path}: check the path, or run `fastcnn export` first")
    if path.suffix not in OPENERS:
        ends = nearest(path.suffix, OPENERS)
        raise FastCNNError(f"{path}: expected a file that ends in {', '.join(OPENERS)}{ends}")
    return path


def exported_in(folder: Path) -> Path | None:
    """Return the exported model in a folder, None where there is none."""
    files = (folder / f"model{suffix}" for suffix in OPENERS)
    return next((file for file in files if file.is_file()), None)


def _open_torchscript(content: bytes, parts: dict[str, bytes], metadata: dict[str, Any]) -> Runner:
    import torch

    with ignoring_warnings(DeprecationWarning):  # torch.jit is deprecated upstream
        module = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
    return _torch_runner(module)  # the program splits large batches itself


def _open_pt2(content: bytes, parts: dict[str, bytes], metadata: dict[str, Any]) -> Runner:
    import torch

    check_program(parts)  # torch.export.load unpickles and evaluates what it finds
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
    """Function that opens a format, and its risk."""

    open: Callable[[bytes, dict[str, bytes], dict[str, Any]], Runner]
    runs: str
    """Warning about what the file can do when opened; "" if it can only do arithmetic."""


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


def known_hashes() -> set[str]:
    """Return the SHA-256 hashes of the files that this user exported on this machine."""
    try:
        return set(_hashes_file().read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return set()


def remember_export(path: Path) -> str:
    """Record that a file was exported on this machine, and return its SHA-256."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with contextlib.suppress(OSError):  # the only cost is a warning when the file is opened
        _hashes_file().parent.mkdir(parents=True, exist_ok=True)
        with _hashes_file().open("a", encoding="ascii") as file:
            file.write(f"{sha256}\n")
    return sha256


def _hashes_file() -> Path:
    return user_cache_folder() / "exports.txt"
