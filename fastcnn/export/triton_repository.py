"""An exported model as an entry of a model repository that NVIDIA's Triton Inference Server serves.

The layout and the fields are those of Triton's model_configuration.md and model_config.proto.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastcnn.errors import FastCNNError, UsageError
from fastcnn.inference import artefact
from fastcnn.system.text import printable

MAX_BATCH_SIZE = 64  # photos that the server may run at once; 64 of 128 px are 3 MB


@dataclass(frozen=True)
class Platform:
    """How a format of ours stands in the repository."""

    name: str
    file: str
    """The file's name in the version folder: Triton's default for the platform."""
    input: str
    output: str


# TorchScript names no tensors: the server takes <name>__<position>. ONNX has names, which the server takes.
PLATFORMS = {
    ".torchscript": Platform("pytorch_libtorch", "model.pt", "INPUT__0", "OUTPUT__0"),
    ".onnx": Platform("onnxruntime_onnx", "model.onnx", "images", "probabilities"),
}


def write_repository(exported: str | Path, directory: str | Path, name: str) -> Path:
    """Return `directory`/`name`, after adding the exported model to the model repository `directory`.

    It becomes version 1, or the next one where a model of the same classes and size is there: Triton serves the latest.
    Written are config.pbtxt, labels.txt (a class a line) and VERSION/model.pt or model.onnx.

    Raises UsageError for a format that Triton does not serve or a name that is none, FastCNNError where another model
    stands there or the folder cannot be written.
    """
    exported = Path(exported)
    if exported.suffix not in PLATFORMS:
        raise UsageError(f"--triton: expected a file that ends in {' or '.join(PLATFORMS)}, got {exported}")
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise UsageError(f"--triton: a model's name has letters, digits, _ and - only, got '{name}'")
    model = artefact.open(exported)
    platform = PLATFORMS[exported.suffix]
    folder = Path(directory) / name
    texts = {
        "labels.txt": "".join(f"{printable(label)}\n" for label in model.classes),
        "config.pbtxt": _config(name, platform, model.image_size, len(model.classes)),
    }
    try:
        for file, text in texts.items():
            if (folder / file).is_file() and (folder / file).read_text(encoding="utf-8") != text:
                raise FastCNNError(f"{folder} has a model with another {file}: remove it, or give another --triton DIR")
        _add_version(exported, folder, platform.file)
        for file, text in texts.items():  # last, as a server that polls the folder takes it once config.pbtxt is there
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise FastCNNError(f"cannot write {folder}: {error.strerror or error}") from None
    return folder


def repository_name(run: Path) -> str:
    """Return a name for the model of a run folder."""
    return re.sub(r"[^0-9A-Za-z_]+", "-", run.resolve().name).strip("-") or "model"


def _add_version(exported: Path, folder: Path, file: str) -> None:
    """Copy the model into the next version's folder, unless the latest has it already."""
    folder.mkdir(parents=True, exist_ok=True)
    latest = max((int(p.name) for p in folder.iterdir() if re.fullmatch(r"[1-9]\d*", p.name)), default=0)
    there = folder / str(latest) / file
    if there.is_file() and filecmp.cmp(exported, there, shallow=False):
        return
    partial = folder / f".partial-{os.getpid()}"  # no number: the server does not look at it
    try:
        partial.mkdir()
        shutil.copyfile(exported, partial / file)
        partial.rename(folder / str(latest + 1))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(name: str, platform: Platform, image_size: int, num_classes: int) -> str:
    # The size is fixed: the server can only run requests of equal shapes as one batch.
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
