"""Scoring the best model of a finished run: on the run's own held-out images, or on others."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.config import LAYOUT_FIELDS, Config, Decoder, resolve
from fastcnn.data import dataset, split_file
from fastcnn.data.dataset import Dataset
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.errors import DataError, FastCNNError, UsageError, warn
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN, restore
from fastcnn.reporting.class_scores import ClassScores, score_classes
from fastcnn.storage import checkpoint, run_folder
from fastcnn.system.device import DTYPES, num_cores, pick_device, pick_precision
from fastcnn.system.switches import torch_settings
from fastcnn.training.evaluation import BATCH_SIZE, Evaluator
from fastcnn.training.parameters import FlatParameters

_ELSEWHERE = {**dict.fromkeys(LAYOUT_FIELDS), "exclude": (), "max_bad": 1.0, "memory_limit": None}
"""Options of a run that are not for the images of another folder or table."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a run's best model."""

    run_dir: Path
    data: Path
    """Folder of the images."""
    best_epoch: int
    device: str
    precision: str
    by_split: dict[str, ClassScores]
    """By split: val and test, as the run or the folders split the images; else train, or all."""
    bad: dict[str, str]
    """Path -> reason, of the images that cannot be used."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "run": str(self.run_dir),
            "data": str(self.data),
            "best_epoch": self.best_epoch,
            "device": self.device,
            "precision": self.precision,
            "sets": {name: card.to_dict() for name, card in self.by_split.items()},
            "bad": self.bad,
        }


def evaluate_run(
    run: str | Path,
    data: str | Path | None = None,
    *,
    moved_to: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: str = "auto",
    decoder: Decoder | None = None,
    timeout: float | None = None,
    reading: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Return the scores of a run's best model; on the device of its training, exactly those that the run reported.

    Args:
        run: a run folder, or a name under `runs/`. Only `best.pt`, `config.yaml` and, without `data`, `split.csv` are
            read.
        data: a folder of images, see `index.scan_held_out`; None takes the run's own val and test images.
        moved_to: the folder in which the run's own images are now; None is where its config.yaml has them.
        cache_dir: folder of all caches; None is the run's.
        device: as for training.
        decoder: decodes images that are not in the cache; None is the run's.
        timeout: seconds that decoding one of them may take; None is the run's.
        reading: options of `config.LAYOUT_FIELDS`, for `data` or `moved_to`.
        progress: called with the numbers of images decoded and to decode.

    Raises DataError if the images do not fit the run, FastCNNError if weights or losses are not finite numbers.
    """
    run_dir = run_folder.find(run)
    saved, place = checkpoint.load_of_run(run_dir, "best.pt"), pick_device(device)
    given = {
        "cache_dir": cache_dir and str(cache_dir),
        "decoder": decoder,
        "decode_timeout": timeout,
        **(reading or {}),
    }
    earlier = saved["config"] if data is None else {**saved["config"], **_ELSEWHERE, "data": str(Path(data).resolve())}
    config = resolve(earlier, {name: value for name, value in given.items() if value})
    precision = pick_precision(config.precision, place, deterministic=config.deterministic, strict=config.strict)
    gpu = place.index if place.type == "cuda" else None
    own = run_dir if data is None else None
    images = _images(config, saved["classes"], own, moved_to, gpu=gpu, progress=progress)
    threads = min(config.threads or num_cores(), num_cores())
    with torch_settings(place, threads=threads, deterministic=config.deterministic, tf32=config.precision == "tf32"):
        splits = ("val", "test") if data is None else ("val", "test", "train", "all")
        model = FlatParameters(restore(saved).to(place), DTYPES[precision]).compute
        normalise = Normalise(config.mean, config.std, config.image_size, DTYPES[precision], place)
        by_split = {name: _score(model, normalise, images, name) for name in splits if len(images.photos(name))}
    _check_found(images, saved["classes"], by_split)
    return Scores(
        run_dir=run_dir,
        data=images.index.root,
        best_epoch=saved["epoch"],
        device=str(place),
        precision=precision,
        by_split=by_split,
        bad=images.bad,
    )


def _images(
    config: Config,
    classes: list[str],
    run_dir: Path | None,
    moved_to: str | Path | None,
    *,
    gpu: int | None,
    progress: Callable[[int, int], None],
) -> Dataset:
    """Return the images of the folder `config.data`, or a run's own where its folder is given, with the run's classes.

    Raises FastCNNError where the run has no split.csv, DataError where any of its images is missing.
    """
    if not run_dir:
        if moved_to:
            raise UsageError("--moved-to is for the run's own images: leave it out, or DATA")
        return dataset.prepare(config, gpu=gpu, classes=classes, progress=progress).with_classes(classes)
    command = f"fastcnn eval {shlex.quote(str(run_dir))}"
    if not (run_dir / split_file.NAME).is_file():
        raise FastCNNError(f"{run_dir} has no split.csv: give a folder of photos, as {command} DATA")
    advice = f"where the run's images are now: {command} --moved-to FOLDER"
    images = dataset.of_run(run_dir, config, moved_to, advice=advice, gpu=gpu, progress=progress)
    return images.with_classes(classes)


def _score(model: SmallCNN, normalise: Normalise, data: Dataset, split: str) -> ClassScores:
    """Return the class scores of the images of a split."""
    photos = data.photos(split)
    options = Options(
        device=normalise.scale.device, batch_size=BATCH_SIZE, decoder=data.decoder, max_pixels=data.max_pixels
    )
    feed = LOADERS[data.loader](data.cache, photos, options)
    found = Evaluator(model, feed, normalise, num_classes=len(data.index.classes))()
    if not math.isfinite(found.score.loss):
        raise FastCNNError(
            f"the loss on the {split} photos is not a finite number, as the run's weights are too large: "
            "train again, with a lower --lr"
        )
    predicted, probabilities = found.predicted.cpu().numpy(), found.probabilities.cpu().numpy()
    return score_classes(data.index.classes, found.score, data.index.labels[photos], predicted, probabilities)


def _check_found(data: Dataset, classes: list[str], by_split: dict[str, ClassScores]) -> None:
    """Raise DataError if there are no usable images; warn of classes without any."""
    if not by_split:
        raise DataError(f"no usable photos in {data.index.root}: {len(data.bad)} cannot be used")
    missing = [name for i, name in enumerate(classes) if not any(card.photos[i] for card in by_split.values())]
    if missing:
        warn(f"{data.index.root} has no photos of: {', '.join(missing)}")
