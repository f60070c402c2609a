"""Split into train, validation and test: drawn, written and read."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcnn.data.index import Index
from fastcnn.errors import DataError, UsageError
from fastcnn.storage import files
from fastcnn.system.text import comparable, printable


def draw_split(index: Index, val_fraction: float, seed: int) -> npt.NDArray[np.str_]:
    """Return (N,) train, val or test for each photo: the split of the folders, or a stratified one drawn by `seed`.

    A validation and a test folder are used as they are. One of them alone is the test set; the training photos are then
    split so that each class gives round(n * val_fraction) of its n photos, at least 1 and at most n - 1, to validation.
    Where `val_fraction` is 0 it is the validation set instead, and there is no test set. Raises UsageError for 0
    without such a folder, DataError for a class with fewer than two training photos.
    """
    check_fraction(index, val_fraction)
    splits = index.folders.astype("<U5")
    held_out = set(splits) - {"train"}
    if held_out == {"val", "test"}:
        return splits
    if val_fraction == 0:
        splits[splits == "test"] = "val"
        return splits
    splits[splits == "val"] = "test"
    for label in range(len(index.classes)):
        mine = np.flatnonzero((index.labels == label) & (splits == "train"))
        if len(mine) < 2:
            raise DataError(
                f"class '{index.classes[label]}' has {len(mine)} usable training photo: add photos, two are needed"
            )
        num_val = min(max(1, _round_half_up(len(mine) * val_fraction)), len(mine) - 1)
        order = np.random.default_rng([seed, label]).permutation(len(mine))
        splits[mine[order[:num_val]]] = "val"
    return splits


def check_fraction(index: Index, val_fraction: float) -> None:
    """Raise UsageError where nothing is left to validate on; known before any photo is decoded."""
    if val_fraction == 0 and (index.folders == "train").all():
        raise UsageError(f"--val-fraction 0 needs a val or test folder in {index.root}: add one, or leave it out")


def explain_split(index: Index, val_fraction: float) -> str:
    """Return how a split folder that is there alone was read, and how to get the other reading; "" without one."""
    held_out = sorted(set(index.folders.tolist()) - {"train"})
    if len(held_out) != 1:
        return ""
    if val_fraction == 0:
        return f"training on all of train, validating on {held_out[0]}; no test set"
    return (
        f"{held_out[0]} is the test set, {val_fraction:.0%} of train validates; "
        f"to train on all of train and validate on {held_out[0]}: --val-fraction 0"
    )


def write_split(path: Path, index: Index, splits: npt.NDArray[np.str_]) -> None:
    """Write path, label and split of every photo as CSV."""
    labels = (index.classes[label] for label in index.labels)
    files.write_csv(path, [("path", "label", "split"), *zip(index.paths, labels, splits, strict=True)])


def read_split(path: Path, index: Index) -> npt.NDArray[np.str_]:
    """Return (N,) train, val, test or "" (not listed) for each photo of the index, read from a split.csv.

    Raises DataError where the file is no split.csv, or lists a photo or class that the folder lacks.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read the split {path}: {error}") from None
    splits = np.full(len(index), "", "<U5")
    position = {comparable(photo): i for i, photo in enumerate(index.paths)}
    position |= {photo: i for i, photo in enumerate(index.paths)}  # two may differ in Unicode form alone
    for line, row in enumerate(rows, 2):
        photo, label, part = row.get("path"), row.get("label"), row.get("split")
        if photo is None or part not in ("train", "val", "test"):
            raise DataError(f"{path}, line {line}: expected path, label, split (train, val or test)")
        photo = photo if photo in position else comparable(photo)
        if photo not in position:
            raise DataError(
                f"{path}, line {line}: no usable photo {printable(photo)} in {index.root}; "
                "was the split made from another folder?"
            )
        if comparable(index.classes[index.labels[position[photo]]]) != comparable(label or ""):
            raise DataError(f"{path}, line {line}: {printable(photo)} is not of class '{printable(label or '')}'")
        splits[position[photo]] = part
    if not {"train", "val"} <= set(splits):
        raise DataError(f"{path} lists no photos for training or none for validation")
    return splits


def _round_half_up(x: float) -> int:
    return int(x + 0.5)
