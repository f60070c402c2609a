"""Ultralytics' classification trainer with its smallest network, as a careful user of it runs it. Needs ultralytics.

Photos and split are those of `seed.py`. The network is not: the trainer takes models of its own, so it is the smallest
that the package has (nano), from scratch, trained with the package's defaults on squares, cropped; photos in memory
after the first look.
Nothing is downloaded or sent; nothing of fastcnn is imported.

    python -m bench.baselines.ultralytics_classify DATA --epochs 5   # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.ultralytics_classify DATA --probe      # prints the faster and stops
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.baselines.seed import Row, Say, arguments, photos_of, run

MODELS = ("yolo26n-cls.yaml", "yolo11n-cls.yaml", "yolov8n-cls.yaml")  # the package's own files, newest first
QUIET = {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "YOLO_AUTOINSTALL": "false"}


def laid_out(args: argparse.Namespace, folder: Path) -> Path:
    """Return a folder as the trainer wants it: train/ and val/ with a folder of links a class."""
    classes, train, val = photos_of(args)
    for split, photos in (("train", train), ("val", val)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
        for number, (path, label) in enumerate(photos):
            (folder / split / classes[label] / f"{number:06}{path.suffix}").symlink_to(path.resolve())
    return folder


def smallest_model() -> str:
    """Return the newest nano classifier that this version of the package describes."""
    import ultralytics

    known = {path.name for path in Path(ultralytics.__file__).parent.glob("cfg/models/*/*.yaml")}
    return next(name for name in MODELS if name.replace("n-cls", "-cls") in known)


def train(args: argparse.Namespace, say: Say, photos: Path, workers: int) -> None:
    """Train and hand on a row an epoch: loss, accuracy, seconds and images a second."""
    import torch
    from ultralytics import YOLO, settings

    settings.update({name: False for name, value in settings.items() if value is True})  # reports, trackers, sync
    row: Row = {}
    began = 0.0

    def start_of_epoch(trainer: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end_of_training(trainer: Any) -> None:
        seconds, count = time.perf_counter() - began, len(trainer.train_loader.dataset)
        losses = trainer.tloss.values() if isinstance(trainer.tloss, dict) else [trainer.tloss.sum()]  # by version
        row.update({"epoch": trainer.epoch + 1, "train_seconds": seconds, "images_per_second": count / seconds})
        row["train_loss"] = float(sum(losses))

    def end_of_epoch(trainer: Any) -> None:
        if row:  # it comes once more, for the best weights
            found = trainer.metrics
            say({**row, "val_loss": float(found["val/loss"]), "val_accuracy": float(found["metrics/accuracy_top1"])})
            row.clear()

    model = YOLO(smallest_model(), task="classify")
    model.add_callback("on_train_epoch_start", start_of_epoch)
    model.add_callback("on_train_epoch_end", end_of_training)
    model.add_callback("on_fit_epoch_end", end_of_epoch)
    with contextlib.redirect_stdout(sys.stderr):  # its log is not ours
        model.train(
            data=str(photos),
            epochs=args.epochs,
            imgsz=args.image_size,
            workers=workers,
            device=0 if torch.cuda.is_available() else "cpu",
            amp=False,  # its check of mixed precision downloads a network
            seed=args.seed,
            deterministic=False,
            pretrained=False,
            cache="ram",
            patience=0,
            plots=False,
            save=False,
            verbose=False,
            project=str(photos.parent),
            name="run",
        )


def rate(args: argparse.Namespace, photos: Path, workers: int) -> float:
    """Return images a second of an epoch with so many workers."""
    rows = list[Row]()
    train(argparse.Namespace(**{**vars(args), "epochs": 1}), rows.append, photos, workers)
    return rows[-1]["images_per_second"]


def main() -> None:
    """Train with the workers asked for, else the faster of none and one a core."""
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {**QUIET, "YOLO_CONFIG_DIR": folder}  # read when the package is imported; the user's own stays
        photos = laid_out(args, Path(folder) / "photos")
        run(args, functools.partial(rate, photos=photos), functools.partial(train, photos=photos))


if __name__ == "__main__":
    main()
