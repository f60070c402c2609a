"""An exported model, whatever its format: what it is, and probabilities for photos. Needs torch and numpy only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastcnn.errors import FastCNNError, first_line

FORMAT = 1
METADATA_FILE = "fastcnn.json"


@dataclass(frozen=True)
class Artefact:
    """An exported model, opened."""

    path: Path
    metadata: dict[str, Any]
    _run: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the probabilities."""
        return list(self.metadata["classes"])

    @property
    def image_size(self) -> int:
        """Side in pixels that the model resizes photos to."""
        return int(self.metadata["image_size"])

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(N, H, W, 3) uint8, any height and width -> (N, num_classes) probabilities."""
        return self._run(images)


def open(path: str | Path) -> Artefact:
    """Return the exported model in a file, or in a run folder.

    Raises FastCNNError where the file is missing, cannot be read, is no export of fastcnn, or of a newer format.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / f"model{suffix}" for suffix in OPENERS if (path / f"model{suffix}").is_file()]
        if not found:
            raise FastCNNError(f"{path} holds no exported model: run `fastcnn export {path}` first")
        path = found[0]
    if not path.is_file():
        raise FastCNNError(f"no exported model {path}")
    if path.suffix not in OPENERS:
        raise FastCNNError(f"{path}: expected a file that ends in {', '.join(OPENERS)}")
    try:
        metadata, run = OPENERS[path.suffix](path)
    except (RuntimeError, ValueError, OSError) as error:
        raise FastCNNError(f"{path} cannot be opened as an exported model: {first_line(error)}") from None
    if not isinstance(metadata.get("format"), int) or not isinstance(metadata.get("classes"), list):
        raise FastCNNError(f"{path} was not exported by fastcnn: it has no {METADATA_FILE}")
    if metadata["format"] > FORMAT:
        raise FastCNNError(f"{path} has format {metadata['format']}, this fastcnn reads up to {FORMAT}: upgrade it")
    return Artefact(path, metadata, run)


Runner = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


def _open_torchscript(path: Path) -> tuple[dict[str, Any], Runner]:
    extra = {METADATA_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated upstream
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra).eval()

    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            probabilities: npt.NDArray[np.float32] = module(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        return probabilities

    return json.loads(extra[METADATA_FILE] or "{}"), run


OPENERS: dict[str, Callable[[Path], tuple[dict[str, Any], Runner]]] = {
    ".torchscript": _open_torchscript,
}
