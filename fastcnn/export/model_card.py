"""The model card: what an exported model is, how good, and how to call it, as a page of Markdown beside the files."""

from __future__ import annotations

import contextlib
import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcnn.errors import FastCNNError
from fastcnn.storage import files as whole
from fastcnn.system.text import printable


def write(folder: Path, metadata: Mapping[str, Any], files: Sequence[Path], run: Path | None = None) -> Path:
    """Return `folder`/model_card.md, written anew: it tells of the exported `files`, which share this metadata.

    Its name begins as the first file's: model_card.md is that of model.torchscript. With a `run` folder it says how
    many photos of each class there were. Raises FastCNNError where it cannot be written.
    """
    path = folder / f"{files[0].stem}_card.md"
    try:
        whole.write(path, page(metadata, files, count_photos(run) if run else None))
    except OSError as error:
        raise FastCNNError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def page(
    metadata: Mapping[str, Any], files: Sequence[Path], photos: Mapping[str, Mapping[str, int]] | None = None
) -> str:
    """Return the card as Markdown; `photos` is what `count_photos` returns."""
    versions = metadata.get("versions", {})
    return (
        "\n\n".join(
            [
                "# Model card",
                f"A small convolutional network that sorts photos into {len(metadata['classes'])} classes, trained and "
                f"exported by fastcnn {versions.get('fastcnn', '')} with torch {versions.get('torch', '')}.",
                _files(files),
                "## Classes",
                ", ".join(_plain(name) for name in metadata["classes"])
                + ".\n\nThis is the order of the probabilities.",
                "## Data",
                _data(metadata["classes"], photos),
                "## Figures",
                _figures(metadata.get("training", {})),
                "## Preprocessing",
                _preprocessing(metadata),
                "## Limits",
                LIMITS,
                "## How to call it",
                *(SNIPPETS[file.suffix].replace("MODEL", file.name) for file in files),
            ]
        )
        + "\n"
    )


def _files(files: Sequence[Path]) -> str:
    rows = [f"| {_plain(file.name)} | {NEEDS[file.suffix]} |" for file in files]
    return "\n".join(["| file | runs with |", "| --- | --- |", *rows])


def count_photos(run: Path) -> dict[str, Counter[str]]:
    """Return the photos of each class in each split of a run; none where its split.csv is gone."""
    counts: dict[str, Counter[str]] = {split: Counter() for split in ("train", "val", "test")}
    with (
        contextlib.suppress(OSError),
        (run / "split.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        for row in csv.DictReader(file):
            counts[row["split"]][row["label"]] += 1
    return counts


def _data(classes: Sequence[str], photos: Mapping[str, Mapping[str, int]] | None) -> str:
    text = (
        "A folder of photos, a folder a class. Validation photos were held out from training and chose the epoch; test "
        "photos, where there are any, were looked at once. All come from the same places."
    )
    if not photos or not any(photos.values()):
        return text
    rows = {_plain(name): [counts.get(name, 0) for counts in photos.values()] for name in classes}
    totals = [sum(counts.values()) for counts in photos.values()]
    lines = [
        " | ".join([name, *(f"{count:,}" for count in counts)]) for name, counts in [*rows.items(), ("all", totals)]
    ]
    table = ["class | training photos | validation | test", "--- | --- | --- | ---", *lines]
    return "\n".join([text, "", *(f"| {line} |" for line in table)])


def _figures(training: Mapping[str, Any]) -> str:
    rows = [
        f"| {label} | {value:,} |" if isinstance(value, int) else f"| {label} | {value:.4g} |"
        for name, label in FIGURES.items()
        if isinstance(value := training.get(name), int | float)
    ]
    return "\n".join(["| what | figure |", "| --- | --- |", *rows])


def _preprocessing(metadata: Mapping[str, Any]) -> str:
    size = metadata["image_size"]
    mean, std = (", ".join(f"{value:g}" for value in metadata[name]) for name in ("mean", "std"))
    return (
        f"All of it is in the file. In: (N, H, W, 3) uint8, RGB, any height and width. The model squashes photos to "
        f"{size} x {size} (bilinear, antialiased), takes off the mean ({mean}), divides by the standard deviation "
        f"({std}), both of values between 0 and 1, and applies softmax. Out: (N, {len(metadata['classes'])}) "
        "probabilities.\n\nLeft to the caller: to decode the photo, to turn it upright as its EXIF says, to lay what "
        "is transparent over white."
    )


def _plain(text: str) -> str:
    """Return a name as Markdown shows it."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text))


FIGURES = {
    "epoch": "best epoch, by validation accuracy",
    "train/accuracy": "accuracy on training photos, while training",
    "val/accuracy": "accuracy on validation photos",
    "val/loss": "cross-entropy on validation photos",
}
"""Name in the metadata's training figures -> what the card calls it."""

LIMITS = """\
- It knows its classes only: a photo of anything else gets one of them, often with a high probability.
- The probabilities are softmax outputs and are not calibrated: choose thresholds on photos of your own.
- Expect less on photos from other cameras, places or times than those it learnt from; `fastcnn eval RUN DATA`
  measures it, class by class.
- Proportions are not kept: photos are squashed to a square, as in training.
- How photos are decoded matters a little: `fastcnn verify MODEL DATA` measures how much.
- TorchScript files are programs that run with your rights: open those whose maker you trust."""

NEEDS = {".torchscript": "torch, LibTorch (C++)", ".onnx": "ONNX Runtime", ".pt2": "torch (`torch.export`)"}

_PYTHON = """\
### {title}

```python
{imports}
from PIL import Image, ImageOps

photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
{body}
print(classes[probabilities.argmax()], float(probabilities.max()))
```"""

_TORCHSCRIPT = _PYTHON.format(
    title="Python",
    imports="import numpy as np\nimport torch",
    body="""\
model = torch.jit.load("MODEL")
classes = model.classes
with torch.inference_mode():
    probabilities = model(torch.from_numpy(np.array(photo)[None]))[0]""",
)

_CPP = """\
### C++

```cpp
#include <torch/script.h>

#include <cstdio>

int main() {
  torch::jit::Module model = torch::jit::load("MODEL");
  // (1, height, width, 3): the bytes of a photo, as any library decodes it. This one is grey.
  torch::Tensor photo = torch::full({1, 300, 400, 3}, 128, torch::kUInt8);
  torch::Tensor probabilities = model.forward({photo}).toTensor()[0];
  int64_t best = probabilities.argmax().item<int64_t>();
  std::string name = model.attr("classes").toList().get(best).toStringRef();
  std::printf("%s %f\\n", name.c_str(), probabilities[best].item<float>());
}
```

`examples/libtorch` in fastcnn's repository has this as a program, with its CMakeLists.txt."""

_ONNX = _PYTHON.format(
    title="ONNX Runtime",
    imports="import json\n\nimport numpy as np\nimport onnxruntime",
    body="""\
session = onnxruntime.InferenceSession("MODEL", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["fastcnn.json"])["classes"]
probabilities = session.run(None, {"images": np.array(photo)[None]})[0][0]""",
)

_PT2 = _PYTHON.format(
    title="Python, torch.export",
    imports="import json\n\nimport numpy as np\nimport torch",
    body="""\
extra = {"fastcnn.json": ""}
model = torch.export.load("MODEL", extra_files=extra).module(check_guards=False)
classes = json.loads(extra["fastcnn.json"])["classes"]
with torch.inference_mode():
    probabilities = model(torch.from_numpy(np.array(photo)[None]))[0]""",
)

SNIPPETS = {".torchscript": f"{_TORCHSCRIPT}\n\n{_CPP}", ".onnx": _ONNX, ".pt2": _PT2}
"""How to call each format; MODEL stands for the file's name."""
