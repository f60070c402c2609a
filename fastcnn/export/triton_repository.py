"""Model repository of NVIDIA's Triton Inference Server with an exported model.

The layout and the fields are those of Triton's model_configuration.md and model_config.proto.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastcnn.errors import FastCNNError, UsageError, os_error_as
from fastcnn.inference import artefact
from fastcnn.system.text import printable

MAX_BATCH_SIZE = 64  # photos in one batch; 64 of 128 px are 3 MB


@dataclass(frozen=True)
class Platform:
    """Triton platform that runs an export format, and the names it expects."""

    name: str
    file: str
    """File name in the version folder: Triton's default for the platform."""
    input: str
    output: str


# TorchScript has no tensor names: Triton expects <name>__<position>. ONNX has names, which Triton uses.
PLATFORMS = {
    ".torchscript": Platform("pytorch_libtorch", "model.pt", "INPUT__0", "OUTPUT__0"),
    ".onnx": Platform("onnxruntime_onnx", "model.onnx", "images", "probabilities"),
}


def write_repository(exported: str | Path, directory: str | Path, name: str) -> Path:
    """Add an exported model to the model repository `directory` and return its folder, `directory`/`name`.

    Writes config.pbtxt, labels.txt (one class per line) and VERSION/model.pt or model.onnx. VERSION is 1, or the next
    number if the folder has a model with the same classes and image size: Triton serves the latest.

    Raises UsageError for a format that Triton does not serve or an invalid name, FastCNNError if the folder has another
    model or cannot be written.
    """
    exported = Path(exported)
    if exported.suffix not in PLATFORMS:
        raise UsageError(f"--triton: expected a file that ends in {' or '.join(PLATFORMS)}, got {exported}")
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise UsageError(f"--triton: expected a model name of letters, digits, _ and -, got '{name}'")
    model = artefact.open(exported)
    platform = PLATFORMS[exported.suffix]
    folder = Path(directory) / name
    texts = {
        "labels.txt": "".join(f"{printable(label)}\n" for label in model.classes),
        "config.pbtxt": _config(name, platform, model.image_size, len(model.classes)),
    }
    with os_error_as(f"cannot write {folder}"):
        for file, text in texts.items():
            if (folder / file).is_file() and (folder / file).read_text(encoding="utf-8") != text:
                raise FastCNNError(f"{folder} has a model with another {file}: remove it, or give another --triton DIR")
        _add_version(exported, folder, platform.file)
        # Last: a server that polls the folder loads the model once config.pbtxt exists.
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
    return folder


def repository_name(run: Path) -> str:
    """Return a valid model name for a run folder."""
    return re.sub(r"[^0-9A-Za-z_]+", "-", run.resolve().name).strip("-") or "model"


def _add_version(exported: Path, folder: Path, file: str) -> None:
    """Copy the model into a new version folder, unless the latest version is the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    latest = max((int(p.name) for p in folder.iterdir() if re.fullmatch(r"[1-9]\d*", p.name)), default=0)
    there = folder / str(latest) / file
    if there.is_file() and filecmp.cmp(exported, there, shallow=False):
        return
    partial = folder / f".partial-{os.getpid()}"  # Triton ignores folders whose name is no number
    try:
        partial.mkdir()
        shutil.copyfile(exported, partial / file)
        partial.rename(folder / str(latest + 1))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(name: str, platform: Platform, image_size: int, num_classes: int) -> str:
    # The size is fixed because Triton batches only requests of equal shapes.
    return f"""\
name: "{name}"
platform: "{platform.name}"
max_batch_size: {MAX_BATCH_SIZE}
input [
  {{
    name: "{platform.input}"
    data_type: TYPE_UINT8
    dims: [ {image_size}, {image_size}, 3 ]
  }}
]
output [
  {{
    name: "{platform.output}"
    data_type: TYPE_FP32
    dims: [ {num_classes} ]
    label_filename: "labels.txt"
  }}
]
dynamic_batching {{ }}
"""
