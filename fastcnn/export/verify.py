"""An exported file checked: its hash, its golden inputs, and the photos that its run held out."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcnn.config import resolve
from fastcnn.data import dataset
from fastcnn.errors import FastCNNError, FastCNNWarning, warn
from fastcnn.inference import artefact
from fastcnn.inference.artefact import Artefact, Golden, Images, Probabilities
from fastcnn.network.pixels import Normalise, resized
from fastcnn.network.small_cnn import restore
from fastcnn.storage import checkpoint

BATCH_SIZE = 64

# Two classes that are closer than this in a photo's probabilities may have changed places in training's own arithmetic.
ROUNDING = {"fp32": 1e-3, "tf32": 0.05, "fp16": 0.05, "bf16": 0.2}


class Batch(NamedTuple):
    """Photos, and what the trained model says of them."""

    pixels: Images
    """(n, H, W, 3)."""
    labels: npt.NDArray[np.int64]
    """(n,)."""
    trained: Probabilities
    """(n, num_classes)."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found."""

    sha256: str
    """Of the file."""
    tolerance: float
    """Largest difference in a probability that the file allows itself."""
    num_golden: int
    golden_difference: float
    """Largest difference in a probability of the golden inputs."""
    photos: int = 0
    """Photos that the run held out, as it saw them; 0 where they were not compared."""
    difference: float = 0.0
    """Largest difference in a probability of those."""
    num_ties: int = 0
    """Photos whose most probable class differs from the trained model's, but no more than the tolerance allows."""
    accuracy: float | None = None
    trained_accuracy: float | None = None
    """The trained model's on the same photos, in fp32."""
    problems: tuple[str, ...] = ()
    """What is wrong; nothing where the file is what it says."""

    def lines(self) -> list[str]:
        """Return the figures as text."""
        lines = [f"{self.num_golden} golden inputs: largest difference {self.golden_difference:.1g}"]
        if self.photos:
            lines.append(
                f"{self.photos:,} validation photos: largest difference {self.difference:.1g}, accuracy "
                f"{self.accuracy:.4f} (trained model {self.trained_accuracy:.4f})"
            )
        return lines


@dataclass(frozen=True)
class Reported:
    """What training itself said of the photos."""

    accuracy: float
    rounding: float
    """Two classes closer than this in probability may change places in training's arithmetic."""


def verify(model: Artefact, photos: Iterable[Batch] = (), reported: Reported | None = None) -> Report:
    """Return what a check of an exported model finds: on its golden inputs, and on photos.

    Args:
        model: opened, and so with the hash that it says.
        photos: what to compare on besides, see `held_out`.
        reported: training's own accuracy on them; None leaves that out.
    """
    size = (model.image_size, model.image_size, 3)
    own = [one for one in model.golden if one.image.shape == size]
    other = [one for one in model.golden if one.image.shape != size]
    golden, resized_golden = (_largest(_golden_difference(model, one) for one in some) for some in (own, other))
    differences = list[npt.NDArray[np.floating[Any]]]([np.zeros(1)])
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
        if not value <= allowed:  # so that what is no number fails
            problems.append(f"{name}: probabilities differ by {value:.2g} (at most {allowed:g})")
    if wrong:
        problems.append(f"{wrong} of {count} validation photos have another class than the trained model gives them")
    if reported and count and abs(trained_right - reported.accuracy * count) > close + 0.5:
        problems.append(f"accuracy {trained_right / count:.4f} where training reported {reported.accuracy:.4f}")
    return Report(
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


def _golden_difference(model: Artefact, golden: Golden) -> npt.NDArray[np.float32]:
    difference: npt.NDArray[np.float32] = model.probabilities(golden.image[None])[0] - golden.probabilities
    return difference


def _largest(differences: Iterable[npt.NDArray[np.floating[Any]]]) -> float:
    return float(np.max([np.abs(difference).max() for difference in differences]))


def verify_file(model: Artefact, run: str | Path | None = None) -> Report:
    """Return what a check of an exported model finds: on its golden inputs, and on the photos that its run held out.

    `run` is the run's folder; None is the file's own, where that is a run's. Without its photos, on the first alone.
    """
    folder = Path(run) if run else model.path.parent
    if not run and not all((folder / name).is_file() for name in ("config.yaml", "best.pt", "split.csv")):
        return verify(model)
    try:
        photos, reported = held_out(folder)
    except FastCNNError as error:
        warn(f"the run's photos cannot be read ({error}): only the synthetic golden inputs are compared")
        return verify(model)
    return verify(model, photos, reported)


def held_out(run: Path) -> tuple[Iterator[Batch], Reported | None]:
    """Return a run's validation photos as it has cached them, in batches, with what its best model says of them."""
    state = checkpoint.load(run / "best.pt")
    config = state["config"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastCNNWarning)  # the run has told of its bad photos
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

    # Photos that had to be decoded again are others than training saw, perhaps.
    same = data.cache.num_decoded == 0 and data.loader != "stream"
    accuracy, rounding = state["best"].get("val/accuracy"), ROUNDING.get(config["precision"], 1.0)
    return batches(), Reported(accuracy, rounding) if same and accuracy is not None else None


def main(path: str, run: str) -> None:
    """Print what a check finds as JSON: what export runs in a process of its own."""
    try:
        answer = dataclasses.asdict(verify_file(artefact.open(path), run))
    except FastCNNError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
