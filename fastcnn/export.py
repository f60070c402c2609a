"""A trained run as a file that carries its preprocessing: photos in, probabilities out."""

# No `from __future__ import annotations`: TorchScript reads the types of attributes.

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn import artefact, checkpoint, dataset, runs, runtime
from fastcnn.augment import resized
from fastcnn.errors import CheckError, FastCNNError, FastCNNWarning, UsageError, nearest, warn
from fastcnn.evaluate import restore
from fastcnn.step import Normalise

TOLERANCE = 1e-4  # largest difference in a probability between the trained and the exported model
MAX_CHECKED = 1024  # validation photos that an export is compared on


class Deployed(nn.Module):
    """A network with everything around it: resize, normalisation, softmax."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float], classes: Sequence[str]
    ) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.classes = list(classes)
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8, any height and width -> (N, num_classes) fp32 probabilities."""
        assert images.dtype == torch.uint8, "expected uint8 images"
        assert images.dim() == 4, "expected images of shape (N, H, W, 3)"
        assert images.size(3) == 3, "expected images of shape (N, H, W, 3)"
        x = images.permute(0, 3, 1, 2).float()
        if images.size(1) != self.image_size or images.size(2) != self.image_size:
            size = [self.image_size, self.image_size]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
            x = x.round().clamp(0.0, 255.0)  # as the uint8 pixels that the network was trained on
        return torch.softmax(self.network(x * self.scale + self.shift), dim=1)


def export_run(run: str | Path, *, format: str = "torchscript", output: str | Path | None = None) -> Path:
    """Export a run's best weights and return the file, after comparing it with the trained model.

    Args:
        run: a run folder, or a name under `runs/`.
        format: a name in `EXPORTERS`.
        output: the file; None is `model.<format>` in the run folder. An earlier export is replaced.

    Raises CheckError, and keeps nothing, where the file's probabilities on the validation photos differ from the
    trained model's by more than `TOLERANCE`.
    """
    if format not in EXPORTERS:
        raise UsageError(
            f"--format: expected one of {', '.join(EXPORTERS)}, got '{format}'{nearest(format, EXPORTERS)}"
        )
    folder = runs.find(run)
    state = checkpoint.load(folder / "best.pt")
    config, network = state["config"], restore(state)
    path = Path(output) if output else folder / f"model.{format}"
    if not path.suffix == f".{format}":
        raise UsageError(f"--output: expected a name that ends in .{format}, got {path}")
    model = Deployed(network, config["image_size"], config["mean"], config["std"], state["classes"]).eval()
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        EXPORTERS[format](model, temporary, _metadata(state))
        _verify(temporary, network, config, _validation_pixels(folder, config))
        temporary.replace(path)
    except OSError as error:
        raise FastCNNError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _export_torchscript(model: Deployed, path: Path, metadata: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated upstream
        # Not frozen: a frozen module has no parameters left, so .to("cuda") would not move it.
        scripted = torch.jit.script(model)
        torch.jit.save(scripted, str(path), _extra_files={artefact.METADATA_FILE: json.dumps(metadata)})


EXPORTERS: dict[str, Callable[[Deployed, Path, dict[str, Any]], None]] = {
    "torchscript": _export_torchscript,
}


def _metadata(state: dict[str, Any]) -> dict[str, Any]:
    config = state["config"]
    return {
        "format": artefact.FORMAT,
        "classes": state["classes"],
        "image_size": config["image_size"],
        "mean": config["mean"],
        "std": config["std"],
        "training": state["best"],
        "versions": runtime.versions(),
    }


def _validation_pixels(folder: Path, config: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Return (n, size, size, 3) cached validation photos of a run; synthetic ones where its photos are gone."""
    size = config["image_size"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastCNNWarning)  # the run has told of its bad photos
            data = dataset.prepare(
                config["data"],
                image_size=config["cache_size"] or size,
                loader=config["loader"],
                decoder=config["decoder"],
                gpu=torch.device(config["device"]).index if config["device"].startswith("cuda") else None,
                cache_dir=config["cache_dir"],
                split=folder / "split.csv",
                max_bad=1.0,
                max_pixels=config.get("max_pixels"),  # not in older checkpoints
            )
        return data.pixels(data.photos("val")[:MAX_CHECKED])
    except FastCNNError as error:
        warn(f"the run's photos cannot be read ({error}): the export is compared on synthetic ones")
        return np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)


def _verify(path: Path, network: nn.Module, config: dict[str, Any], pixels: npt.NDArray[np.uint8]) -> None:
    """Raise CheckError where the file at `path` and the trained network disagree on `pixels`."""
    exported = artefact.open(path)
    normalise = Normalise(config["mean"], config["std"], config["image_size"])
    for start in range(0, len(pixels), 64):
        batch = pixels[start : start + 64]
        with torch.inference_mode():
            images = resized(torch.from_numpy(batch), config["image_size"])
            trained = torch.softmax(network(normalise(images)), 1).numpy()
        difference = float(np.abs(exported.probabilities(batch) - trained).max())
        if not difference <= TOLERANCE:
            raise CheckError(
                f"the exported model's probabilities differ from the trained one's by {difference:.2g} "
                f"(at most {TOLERANCE:g} expected): nothing was kept; please report this"
            )
