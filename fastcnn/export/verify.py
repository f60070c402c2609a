"""Verification of an exported file: its hash, its golden inputs, and its run's validation photos."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcnn.config import resolve
from fastcnn.data import dataset
from fastcnn.errors import CheckError, FastCNNError, FastCNNWarning, UsageError, ignoring_warnings, warn
from fastcnn.inference.artefact import Artefact, Images, Probabilities
from fastcnn.inference.classifier import model_threads
from fastcnn.network.inference_network import chunk
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.network.pixels import Normalise, resized
from fastcnn.network.small_cnn import restore
from fastcnn.storage import checkpoint

BATCH_SIZE = 64  # at most; see `inference_network.chunk`
QUICK = 500  # validation photos of a quick check

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


@dataclass(frozen=True)
class TrainingAccuracy:
    """Accuracy on the validation photos that the training run recorded."""

    accuracy: float
    rounding: float
    """Classes whose probabilities differ by less may be ranked the other way round in training's precision."""


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Validation photos to compare on, by batches."""

    count: int = 0
    left_out: int = 0
    """Number of the run's other validation photos."""
    batches: Sequence[Callable[[], Batch]] = ()
    """Functions that read a batch and run the trained model on it, called by several threads."""
    reported: TrainingAccuracy | None = None
    """Accuracy that training recorded on them; None: not compared."""


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
    photos_left_out: int = 0
    """Number of validation photos that a quick check did not compare."""
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
            some = f" of {self.photos + self.photos_left_out:,}" if self.photos_left_out else ""
            lines.append(
                f"{self.photos:,}{some} validation photos: largest difference {self.difference:.1g}, accuracy "
                f"{self.accuracy:.4f} (trained model {self.trained_accuracy:.4f})"
            )
        return lines


def verify(
    model: Artefact, photos: Photos | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Compare an exported model with the trained one on its golden inputs, and on photos.

    Args:
        model: the exported model, opened, which checked its hash.
        photos: photos to compare on too, see `validation_photos`.
        progress: called with the number of photos compared and the total.
    """
    photos = photos or Photos()
    size = (model.image_size, model.image_size, 3)
    golden, resized_golden = (
        _largest(
            _on_golden(model, one.image) - one.probabilities
            for one in model.golden
            if (one.image.shape == size) is same_size
        )
        for same_size in (True, False)
    )
    found = _compare(model, photos, progress)
    problems = []
    for name, value, allowed in (
        ("golden inputs", golden, model.tolerance),
        ("resized golden inputs", resized_golden, model.resize_tolerance),
        ("validation photos", found.difference, found.allowed),
    ):
        if not value <= allowed:  # NaN fails too
            problems.append(f"{name}: probabilities differ by {value:.2g} (at most {allowed:g})")
    count, reported = found.count, photos.reported
    if found.wrong:
        problems.append(f"{found.wrong} of {count} validation photos get another class than from the trained model")
    if reported and count and abs(found.trained_right - reported.accuracy * count) > found.close + 0.5:
        problems.append(f"accuracy {found.trained_right / count:.4f}, but training reported {reported.accuracy:.4f}")
    return Verification(
        sha256=model.sha256,
        tolerance=model.tolerance,
        num_golden=len(model.golden),
        golden_difference=max(golden, resized_golden),
        photos=count,
        photos_left_out=photos.left_out,
        difference=found.difference,
        num_ties=found.ties,
        accuracy=found.right / count if count else None,
        trained_accuracy=found.trained_right / count if count else None,
        problems=tuple(problems),
    )


def _on_golden(model: Artefact, image: Images) -> Probabilities:
    """Return the probabilities (num_classes,) of a golden input (H, W, 3)."""
    try:
        found: Probabilities = model.probabilities(image[None])[0]
    except FastCNNError as error:  # they are not finite
        raise CheckError(f"golden inputs: {error}") from None
    return found


def _largest(differences: Iterable[Probabilities]) -> float:
    return float(np.max([np.abs(difference).max() for difference in differences]))


@dataclass
class _Comparison:
    """Figures over the photos compared so far."""

    allowed: float
    """Largest difference in a probability that is accepted."""
    rounding: float
    """Largest difference between two classes that training's precision may have ranked the other way round."""
    difference: float = 0.0
    count: int = 0
    right: int = 0
    trained_right: int = 0
    ties: int = 0
    """Photos given another class than by the trained model, where the tolerance explains it."""
    wrong: int = 0
    """Photos given another class where it does not."""
    close: int = 0
    """Photos whose class training may have seen otherwise."""

    def add(self, labels: npt.NDArray[np.int64], trained: Probabilities, found: Probabilities) -> None:
        """Add photos: labels (n,), the trained and the exported model's probabilities (n, num_classes)."""
        self.difference = float(np.max([self.difference, np.abs(found - trained).max()]))  # NaN stays
        top, trained_top = found.argmax(1), trained.argmax(1)
        second, first = np.sort(trained, 1)[:, -2:].T
        near = first - trained[np.arange(len(top)), top] <= 2 * self.allowed
        self.ties += int(((top != trained_top) & near).sum())
        self.wrong += int((~near).sum())
        self.right += int((top == labels).sum())
        self.trained_right += int((trained_top == labels).sum())
        self.close += int((first - second <= self.rounding).sum())
        self.count += len(labels)


def _compare(model: Artefact, photos: Photos, progress: Callable[[int, int], None]) -> _Comparison:
    """Compare the models on photos: a batch at a time in each of several threads."""
    figures = _Comparison(model.tolerance, photos.reported.rounding if photos.reported else 0.0)

    def run(read: Callable[[], Batch]) -> tuple[Batch, Probabilities]:
        batch = read()
        return batch, model.probabilities(batch.pixels)

    with model_threads() as threads:
        for batch, found in threads.map(run, photos.batches):
            if batch.pixels.shape[1] != model.image_size:
                figures.allowed = model.resize_tolerance
            figures.add(batch.labels, batch.trained, found)
            progress(figures.count, photos.count)
    return figures


def verify_file(
    model: Artefact,
    run: str | Path | None = None,
    moved_to: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare an exported model with the trained one on its golden inputs and its run's validation photos.

    Args:
        model: the exported model.
        run: the run folder; None: the file's own folder, if it is one.
        moved_to: the folder that the run's photos were moved to; None: they are where its config.yaml has them, and
            are left out, with a warning, where they cannot be read.
        cache_dir: folder of all caches; None: the run's.
        quick: compare on `QUICK` of the photos.
        progress: called with the number of photos compared and the total.

    Raises FastCNNError where the photos are not in the folder that they were moved to.
    """
    folder = Path(run) if run else model.path.parent
    if not run and not all((folder / name).is_file() for name in ("config.yaml", "best.pt", "split.csv")):
        if moved_to:
            raise UsageError(f"--moved-to is for a model in its run folder, which {folder} is not: leave it out")
        return verify(model)
    try:
        photos = validation_photos(folder, moved_to, cache_dir, QUICK if quick else None)
    except FastCNNError as error:
        if moved_to:
            raise
        warn(f"cannot read the run's photos ({error}): only the synthetic golden inputs are compared")
        return verify(model)
    return verify(model, photos, progress)


def validation_photos(
    run: Path, moved_to: str | Path | None = None, cache_dir: str | Path | None = None, most: int | None = None
) -> Photos:
    """Return a run's validation photos from its cache, `most` of them spread over all, with its best model's answers.

    No accuracy is reported on a part of them, nor where they had to be decoded again, as the pixels may then differ
    from training's.
    """
    state = checkpoint.load_of_run(run, "best.pt")
    config = state["config"]
    with ignoring_warnings(FastCNNWarning):  # the run has reported its bad photos
        data = dataset.of_run(
            run,
            resolve(config, {"cache_dir": str(cache_dir)} if cache_dir else {}),
            moved_to,
            advice="if they were moved, give their folder with --moved-to",
            gpu=torch.device(config["device"]).index if config["device"].startswith("cuda") else None,
        ).with_classes(state["classes"])
    everything = data.photos("val")
    count = min(most or len(everything), len(everything))
    photos = everything[np.arange(count) * len(everything) // max(count, 1)]
    with contextlib.suppress(cpu_max_pool.NoKernel):  # as training does on a CPU; it saves a fifth
        cpu_max_pool.load()
    network, normalise = restore(state), Normalise(config["mean"], config["std"], config["image_size"])
    reading = threading.Lock()  # a loader that decodes has threads of its own

    def batch(chosen: npt.NDArray[np.intp]) -> Batch:
        with reading:
            pixels = np.ascontiguousarray(data.pixels(chosen))
        with torch.inference_mode():
            images = resized(torch.from_numpy(pixels), config["image_size"])
            trained = torch.softmax(network(normalise(images)), 1).numpy()
        return Batch(pixels, data.index.labels[chosen], trained)

    size = min(BATCH_SIZE, chunk(network, config["image_size"]))
    same_pixels = data.cache.num_decoded == 0 and data.loader != "stream"
    accuracy, rounding = state["best"].get("val/accuracy"), ROUNDING.get(config["precision"], 1.0)
    comparable = same_pixels and count == len(everything) and accuracy is not None
    return Photos(
        count=count,
        left_out=len(everything) - count,
        batches=[partial(batch, photos[start : start + size]) for start in range(0, count, size)],
        reported=TrainingAccuracy(accuracy, rounding) if comparable else None,
    )
