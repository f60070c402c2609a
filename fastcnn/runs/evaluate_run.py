"""A finished run's best model scored again: on the run's own held-out photos, or on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.config.fields import Decoder
from fastcnn.data import dataset
from fastcnn.data.dataset import Dataset
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.errors import DataError, FastCNNError, warn
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import restore
from fastcnn.reporting import class_scores as scorecard
from fastcnn.reporting.class_scores import Scorecard
from fastcnn.storage import checkpoint
from fastcnn.storage import run_folder as runs
from fastcnn.system.device import DTYPES, num_cores, pick_device, pick_precision, torch_settings
from fastcnn.training.evaluation import BATCH_SIZE, Evaluator
from fastcnn.training.parameters import FlatParameters

SETS = ("val", "test", "train", "all")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a run's best model got."""

    run_dir: Path
    data: Path
    """The folder of the photos."""
    best_epoch: int
    device: str
    precision: str
    scorecards: dict[str, Scorecard]
    """By set of photos: val and test as the run or the folder splits them; train, or all, where it does not."""
    bad: dict[str, str]
    """Path -> reason of the photos that could not be used."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "run": str(self.run_dir),
            "data": str(self.data),
            "best_epoch": self.best_epoch,
            "device": self.device,
            "precision": self.precision,
            "sets": {name: card.to_dict() for name, card in self.scorecards.items()},
            "bad": self.bad,
        }


def evaluate_run(
    run: str | Path,
    data: str | Path | None = None,
    *,
    device: str = "auto",
    decoder: Decoder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Return what a run's best model gets; on the device it was trained on, what the run itself reported.

    Args:
        run: a run folder, or a name under `runs/`. Only `best.pt` and, without `data`, `split.csv` are read.
        data: a folder of photos, see `index.scan_held_out`; None takes the run's own val and test photos.
        device: as for training.
        decoder: what decodes photos that are not in the cache; None is the run's.
        progress: told photos decoded and photos to decode.

    Raises DataError where the photos do not fit the run.
    """
    folder = runs.find(run)
    state = checkpoint.load(folder / "best.pt")
    config, classes, place = state["config"], state["classes"], pick_device(device)
    precision = pick_precision(
        config["precision"], place, deterministic=config["deterministic"], strict=config["strict"]
    )
    split = folder / "split.csv"
    if data is None and not split.is_file():
        raise FastCNNError(f"{folder} has no split.csv: say which photos, as fastcnn eval {folder} DATA")
    photos = dataset.prepare(
        config["data"] if data is None else Path(data).resolve(),  # resolved: as it stands in the cache's key
        image_size=config["cache_size"] or config["image_size"],
        loader=config["loader"],
        decoder=decoder or config["decoder"],
        gpu=place.index if place.type == "cuda" else None,
        cache_dir=config["cache_dir"],
        split=split if data is None else None,
        classes=None if data is None else classes,
        max_bad=1.0,
        max_pixels=config.get("max_pixels"),  # not in older checkpoints
        progress=progress,
    )
    _check(photos, classes)
    threads = min(config["threads"] or num_cores(), num_cores())
    with torch_settings(
        place, threads=threads, deterministic=config["deterministic"], tf32=config["precision"] == "tf32"
    ):
        dtype = DTYPES[precision]
        model = FlatParameters(restore(state).to(place), dtype).compute
        normalise = Normalise(config["mean"], config["std"], config["image_size"], dtype, place)
        cards = {}
        for name in SETS if data is not None else ("val", "test"):
            mine = photos.photos(name)
            if len(mine):
                options = Options(
                    device=place,
                    batch_size=BATCH_SIZE,
                    decoder=photos.decoder,
                    max_pixels=photos.max_pixels,
                )
                feed = LOADERS[photos.loader](photos.index, photos.cache, mine, options)
                found = Evaluator(model, feed, normalise, num_classes=len(classes))()
                predicted, probabilities = found.predicted.cpu().numpy(), found.probabilities.cpu().numpy()
                cards[name] = scorecard.make(classes, found.score, photos.index.labels[mine], predicted, probabilities)
    if not cards:
        raise DataError(f"no usable photos in {photos.index.root}: {len(photos.bad)} cannot be used")
    missing = [name for i, name in enumerate(classes) if not any(card.photos[i] for card in cards.values())]
    if missing:
        warn(f"{photos.index.root} has no photos of: {', '.join(missing)}")
    return Scores(
        run_dir=folder,
        data=photos.index.root,
        best_epoch=state["epoch"],
        device=str(place),
        precision=precision,
        scorecards=cards,
        bad=photos.bad,
    )


def _check(photos: Dataset, classes: list[str]) -> None:
    """Raise DataError where the folder's classes are not the run's."""
    index = photos.index
    for name in index.classes:
        if name not in classes:
            raise DataError(
                f"{index.root} now has a class that the run does not know: {name}; give a folder without it"
            )
    if index.classes != tuple(classes):
        missing = next(name for name in classes if name not in index.classes)
        raise DataError(f"{index.root} has no folder of the run's class '{missing}' any more; give a folder of photos")
