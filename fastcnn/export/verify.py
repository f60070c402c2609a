"""Verification of an exported file: its hash, its golden inputs, and its run's validation photos."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcnn.config import resolve
from fastcnn.data import dataset
from fastcnn.errors import CheckError, FastCNNError, FastCNNWarning, warn
from fastcnn.inference import artefact
from fastcnn.inference.artefact import Artefact, Images, Probabilities
from fastcnn.network.pixels import Normalise, resized
from fastcnn.network.small_cnn import restore
from fastcnn.storage import checkpoint

BATCH_SIZE = 64

# Two classes whose probabilities differ by less than this may be ranked the other way round in training's precision.
ROUNDING = {"fp32": 1e-3, "tf32": 0.05, "fp16": 0.05, "bf16": 0.2}


class Batch(NamedTuple):
    """Photos with labels, and the trained model's probabilities."""

    pixels: Images
    """(n, H, W, 3)."""
    labels: npt.NDArray[np.int64]
    """(n,)."""
    trained: Probabilities
    """(n, num_classes)."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of comparing an exported model with the trained one."""

    sha256: str
    """SHA-256 of the file."""
    tolerance: float
    """Largest difference in a probability that is accepted."""
    num_golden: int
    golden_difference: float
    """Largest difference in a probability on the golden inputs."""
    photos: int = 0
    """Number of validation photos compared; 0 if the run's photos are not available."""
    difference: float = 0.0
    """Largest difference in a probability on the validation photos."""
    num_ties: int = 0
    """Photos given another class than by the trained model, where the tolerance explains it."""
    accuracy: float | None = None
    trained_accuracy: float | None = None
    """Accuracy of the trained model on the same photos, in fp32."""
    problems: tuple[str, ...] = ()
    """Reasons why the file fails; empty if it passes."""

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        lines = [f"{self.num_golden} golden inputs: largest difference {self.golden_difference:.1g}"]
        if self.photos:
            lines.append(
                f"{self.photos:,} validation photos: largest difference {self.difference:.1g}, accuracy "
                f"{self.accuracy:.4f} (trained model {self.trained_accuracy:.4f})"
            )
        return lines


def _on_golden(model: Artefact, image: Images) -> Probabilities:
    """Return the probabilities (num_classes,) of a golden input (H, W, 3)."""
    try:
        found: Probabilities = model.probabilities(image[None])[0]
    except FastCNNError as error:  # they are not finite
        raise CheckError(f"golden inputs: {error}") from None
    return found


@dataclass(frozen=True)
class TrainingAccuracy:
    """Accuracy on the validation photos that the training run recorded."""

    accuracy: float
    rounding: float
    """Classes whose probabilities differ by less may be ranked the other way round in training's precision."""


def verify(model: Artefact, photos: Iterable[Batch] = (), reported: TrainingAccuracy | None = None) -> Verification:
    """Compare an exported model with the trained one on its golden inputs, and on photos.

    Args:
        model: the exported model, opened, which checked its hash.
        photos: photos to compare on too, see `validation_photos`.
        reported: accuracy that training recorded on them; None: not compared.
    """
    size = (model.image_size, model.image_size, 3)
    golden, resized_golden = (
        _largest(
            _on_golden(model, one.image) - one.probabilities
            for one in model.golden
            if (one.image.shape == size) is same_size
        )
        for same_size in (True, False)
    )
    differences: list[Probabilities] = [np.zeros(1, np.float32)]
    allowed_photos = model.tolerance
    count = ties = wrong = right = trained_right = close = 0
    for pixels, labels, trained in photos:
        found = model.probabilities(pixels)
        differences.append(found - trained)
        allowed_photos = model.tolerance if pixels.shape[1] == model.image_size else model.resize_tolerance
        top, trained_top = found.argmax(1), trained.argmax(1)
        second, first = np.sort(trained, 1)[:, -2:].T
        near = first - trained[np.arange(len(top)), top] <= 2 * allowed_photos
        ties += int(((top != trained_top) & near).sum())
        wrong += int((~near).sum())
        right += int((top == labels).sum())
        trained_right += int((trained_top == labels).sum())
        close += int((first - second <= reported.rounding).sum()) if reported else 0
        count += len(labels)
    difference = _largest(differences)
    problems = []
    for name, value, allowed in (
        ("golden inputs", golden, model.tolerance),
        ("resized golden inputs", resized_golden, model.resize_tolerance),
        ("validation photos", difference, allowed_photos),
    ):
        if not value <= allowed:  # NaN fails too
            problems.append(f"{name}: probabilities differ by {value:.2g} (at most {allowed:g})")
    if wrong:
        problems.append(f"{wrong} of {count} validation photos get another class than from the trained model")
    if reported and count and abs(trained_right - reported.accuracy * count) > close + 0.5:
        problems.append(f"accuracy {trained_right / count:.4f}, but training reported {reported.accuracy:.4f}")
    return Verification(
        sha256=model.sha256,
        tolerance=model.tolerance,
        num_golden=len(model.golden),
        golden_difference=max(golden, resized_golden),
        photos=count,
        difference=difference,
        num_ties=ties,
        accuracy=right / count if count else None,
        trained_accuracy=trained_right / count if count else None,
        problems=tuple(problems),
    )


def _largest(differences: Iterable[Probabilities]) -> float:
    return float(np.max([np.abs(difference).max() for difference in differences]))


def verify_file(model: Artefact, run: str | Path | None = None) -> Verification:
    """Compare an exported model with the trained one on its golden inputs and its run's validation photos.

    `run` is the run folder; None: the file's own folder, if it is one. Photos that cannot be read are left out, with a
    warning.
    """
    folder = Path(run) if run else model.path.parent
    if not run and not all((folder / name).is_file() for name in ("config.yaml", "best.pt", "split.csv")):
        return verify(model)
    try:
        photos, reported = validation_photos(folder)
    except FastCNNError as error:
        warn(f"cannot read the run's photos ({error}): only the synthetic golden inputs are compared")
        return verify(model)
    return verify(model, photos, reported)


def validation_photos(run: Path) -> tuple[Iterator[Batch], TrainingAccuracy | None]:
    """Return a run's validation photos from its cache with its best model's probabilities, and its recorded accuracy.

    The accuracy is None if the photos had to be decoded again, as the pixels may then differ from training's.
    """
    state = checkpoint.load(run / "best.pt")
    config = state["config"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastCNNWarning)  # the run has reported its bad photos
        data = dataset.prepare(
            resolve(config, {"split": run / "split.csv", "max_bad": 1.0, "memory_limit": None}),
            gpu=torch.device(config["device"]).index if config["device"].startswith("cuda") else None,
        )
    photos = data.photos("val")

    def batches() -> Iterator[Batch]:
        network, normalise = restore(state), Normalise(config["mean"], config["std"], config["image_size"])
        for start in range(0, len(photos), BATCH_SIZE):
            chosen = photos[start : start + BATCH_SIZE]
            pixels = np.ascontiguousarray(data.pixels(chosen))
            with torch.inference_mode():
                images = resized(torch.from_numpy(pixels), config["image_size"])
                trained = torch.softmax(network(normalise(images)), 1).numpy()
            yield Batch(pixels, data.index.labels[chosen], trained)

    same_pixels = data.cache.num_decoded == 0 and data.loader != "stream"
    accuracy, rounding = state["best"].get("val/accuracy"), ROUNDING.get(config["precision"], 1.0)
    return batches(), TrainingAccuracy(accuracy, rounding) if same_pixels and accuracy is not None else None


def main(path: str, run: str) -> None:
    """Print the verification of a file as JSON; `export_run` starts this in a new process."""
    try:
        answer = dataclasses.asdict(verify_file(artefact.open(path), run))
    except FastCNNError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
