"""Split into train, validation and test: drawn, and explained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastcnn.data.index import Index
from fastcnn.errors import DataError, UsageError

SPLITS = ("train", "val", "test", "all")
_TRAIN, _VAL, _TEST, _ = range(len(SPLITS))


def split_numbers(splits: npt.NDArray[np.str_]) -> npt.NDArray[np.uint8]:
    """Return (N,) the position in `SPLITS` of each of some names of splits."""
    numbers = np.zeros(len(splits), np.uint8)
    for number, name in enumerate(SPLITS):
        numbers[splits == name] = number
    return numbers


def draw_split(index: Index, val_fraction: float, seed: int) -> npt.NDArray[np.uint8]:
    """Return (N,) the position in `SPLITS` of each photo's split: that of the folders, or one drawn by `seed`.

    A validation and a test folder are used as they are, as is the validation set of a manifest. One folder alone is the
    test set; the training photos are then split, stratified: each class gives round(n * val_fraction) of its n photos,
    at least 1 and at most n - 1, to validation. Where `val_fraction` is 0 it is the validation set instead, and no
    photos are the test set. Raises UsageError for 0 without such a folder, DataError for a class with fewer than two
    training photos.
    """
    check_fraction(index, val_fraction)
    held_out = {split for split in ("val", "test") if (index.folders == split).any()}
    if held_out == {"val", "test"} or (index.splits_given and "val" in held_out):
        return split_numbers(index.folders)
    if val_fraction == 0:
        return np.where(index.folders == "train", np.uint8(_TRAIN), np.uint8(_VAL))
    numbers = np.where(index.folders == "train", np.uint8(_TRAIN), np.uint8(_TEST))
    for label, mine in enumerate(_by_class(index, numbers == _TRAIN)):
        if len(mine) < 2:
            raise DataError(
                f"class '{index.classes[label]}' has {len(mine)} usable training photo: add photos, two are needed"
            )
        num_val = min(max(1, int(len(mine) * val_fraction + 0.5)), len(mine) - 1)
        order = np.random.default_rng([seed, label]).permutation(len(mine))
        numbers[mine[order[:num_val]]] = _VAL
    return numbers


def _by_class(index: Index, chosen: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.intp]]:
    """Return the positions of the chosen photos of each class, ascending."""
    photos = np.flatnonzero(chosen)
    labels = index.labels[photos].astype(np.min_scalar_type(len(index.classes)))  # small numbers sort faster
    ends = np.bincount(labels, minlength=len(index.classes)).cumsum()
    return np.split(photos[np.argsort(labels, kind="stable")], ends[:-1])


def check_fraction(index: Index, val_fraction: float) -> None:
    """Raise UsageError where nothing is left to validate on; known before any photo is decoded."""
    if val_fraction == 0 and (index.folders == "train").all():
        raise UsageError(f"--val-fraction 0 needs a val or test folder in {index.root}: add one, or leave it out")


def explain_split(index: Index, val_fraction: float) -> str:
    """Return how a split folder that is there alone was read, and how to get the other reading; "" without one."""
    held_out = [split for split in ("test", "val") if (index.folders == split).any()]
    if len(held_out) != 1 or (index.splits_given and held_out == ["val"]):
        return ""
    if val_fraction == 0:
        return f"training on all of train, validating on {held_out[0]}; no test set"
    return (
        f"{held_out[0]} is the test set, {val_fraction:.0%} of train validates; "
        f"to train on all of train and validate on {held_out[0]}: --val-fraction 0"
    )
