"""Readings of a folder that are not certain: an error where two are possible, a warning where one is likely wrong."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from fastcnn.data.split_names import SPLITS, splits_in
from fastcnn.data.walk import Skipped, files_below, is_folder, visible_folders
from fastcnn.errors import DataError, nearest, warn
from fastcnn.system.text import comparable, first_few, printable

OTHER_TOOLS = re.compile(
    r"(runs|wandb|mlruns|mlartifacts|multirun|lightning_logs|tb_logs|tensorboard|logs?|checkpoints?|weights|models"
    r"|outputs?|results?|predictions|experiments|sweeps)[\d _-]*",
    re.IGNORECASE,
)
"""Names of folders that training tools leave beside the photos, also with a number behind."""

IMAGES = ("images", "image", "imgs", "img", "photos", "jpegimages")
ANNOTATIONS = ("annotations", "annotation", "labels", "masks", "trimaps", "meta", "attributes")
"""Names in small letters of folders that stand beside each other where photos come with annotations: no classes."""

FEW = 20
"""Folders in which split folders are looked for: listing those of a hundred classes would take as long as the scan."""


def check_classes_certain(root: Path, folder: Path, exclude: frozenset[str]) -> None:
    """Raise DataError where folders that would be classes may be splits, or photos and annotations.

    Warns of those that another program made, and of those that all have the same folders in them.
    """
    folders = visible_folders(folder, exclude)
    _check_annotated(root, folder, folders)
    inside: dict[Path, list[Path]] = {}
    for path in folders[:FEW]:
        with contextlib.suppress(DataError):  # it cannot be read: told when its photos are listed
            inside[path] = visible_folders(path, exclude)
    deeper = [path for some in inside.values() for path in some]
    trains = [path for path in folders + deeper if "train" in splits_in(path.name)]
    others = [path for path in folders if path not in trains and splits_in(path.name)]
    named = (repeated(path, exclude) for path in trains + others)
    doubtful = [path for path in named if len(visible_folders(path, exclude)) > 1]
    if doubtful:
        raise in_two_ways(root, folder, doubtful[0], exclude)
    _check_not_splits(root, folder, folders)
    for path in folders:
        if _of_another_tool(path):
            warn(
                f"{printable(str(path))} is read as a class: if another program made it, "
                f"leave it out with --exclude {printable(shlex.quote(path.name))}"
            )
    if not _warn_of_splits_inside(folder, inside.values()) and len(folders) <= FEW:
        _warn_of_same_folders(root, folder, inside)


def may_be_classes(root: Path, beside: list[Path]) -> bool:
    """Return whether folders beside a train folder that is the only split look like classes, and it like one of them.

    They do where one has folders of photos as the train folder has, or where several hold photos.
    """
    beside = [path for path in beside if not _of_another_tool(path)]
    if len([path for path in beside if _has_photos(root, path)]) > 1:
        return True
    return any(sum(_has_photos(root, inside) for inside in visible_folders(path)) > 1 for path in beside)


def _of_another_tool(folder: Path) -> bool:
    return OTHER_TOOLS.fullmatch(folder.name) is not None


def in_two_ways(root: Path, outer: Path, inner: Path, exclude: frozenset[str]) -> DataError:
    """Return the error that shows both readings: the folders in `outer` as classes, or those in `inner` below it."""
    readings = []
    for folder in (outer, inner):
        classes = visible_folders(folder, exclude)
        count = sum(len(paths) for path in classes for paths, _ in files_below(root, path, Skipped()))
        readings.append(f"{len(classes)} classes, {first_few([path.name for path in classes])}, of {count:,} photos")
    here, name = (printable(folder.relative_to(root).as_posix()) for folder in (outer, inner))
    return DataError(
        f"{printable(str(root))} can be read in two ways: {readings[0]}; or {readings[1]} in {name}. "
        f"Say which: --train-dir {here} or --train-dir {name} (with --val-dir and --test-dir for others)"
    )


def way_deeper(root: Path, only: Path, exclude: frozenset[str]) -> str:
    """Return how to read the folders in the only class folder as the classes; "" where it has none or one."""
    if len(visible_folders(only, exclude)) < 2:
        return ""
    return f"; where its folders are the classes, say --train-dir {printable(only.relative_to(root).as_posix())}"


def repeated(folder: Path, exclude: frozenset[str]) -> Path:
    """Return a folder, or the one in it that repeats its name and is all that is there."""
    inside = visible_folders(folder, exclude)
    same = len(inside) == 1 and inside[0].name.casefold() == folder.name.casefold()
    return repeated(inside[0], exclude) if same else folder


def _check_annotated(root: Path, folder: Path, folders: list[Path]) -> None:
    """Raise DataError where folders that would be classes are one of photos and one of annotations."""
    images, beside = (
        next((path for path in folders if path.name.casefold() in names), None) for names in (IMAGES, ANNOTATIONS)
    )
    if images and beside:
        here, name = (printable(path.relative_to(root).as_posix()) for path in (folder, images))
        raise DataError(
            f"{printable(str(folder))} has {images.name} beside {beside.name}: photos and annotations, not classes, "
            f"it seems. Where {images.name} has a folder per class, say --train-dir {name}; where it has photos, give "
            f"a table of paths and classes as DATA; where they are classes, say --train-dir {here}"
        )


def _check_not_splits(root: Path, folder: Path, folders: list[Path]) -> None:
    """Raise DataError where each of several folders has a split in its name: train/ and test1/, trainA/ and testA/."""
    named = [splits_in(path.name) for path in folders]
    exact = any(path.name.casefold() in SPLITS for path in folders)
    if len(folders) > 1 and all(named) and (exact or len(set[str]().union(*named)) > 1):
        raise DataError(
            f"no class folders in {printable(', '.join(path.name for path in folders))} of {printable(str(folder))}: "
            "expected train/<class>/<photos>, or a table of paths and classes as DATA; where these are classes, "
            f"say --train-dir {printable(folder.relative_to(root).as_posix())}"
        )


def _warn_of_splits_inside(folder: Path, inside: Iterable[list[Path]]) -> bool:
    """Warn where class folders hold folders of several splits; return whether they do."""
    names = {path.name for folders in inside for path in folders if splits_in(path.name)}
    if len(set[str]().union(*map(splits_in, names))) < 2:
        return False
    warn(
        f"the classes of {printable(str(folder))} have folders of splits in them ({first_few(sorted(names))}): their "
        "photos are one set here; a table of path, class and split as DATA keeps them apart"
    )
    return True


def _warn_of_same_folders(root: Path, folder: Path, inside: dict[Path, list[Path]]) -> None:
    """Warn where all classes have the same folders in them: these may be the classes, and what holds them splits."""
    names = [{comparable(path.name): path.name for path in folders} for folders in inside.values()]
    same = [name for name in names[0] if all(name in each for each in names)] if len(names) > 1 else []
    if len(same) > 1:
        first = printable(next(iter(inside)).relative_to(root).as_posix())
        warn(
            f"all classes of {printable(str(folder))} have the folders {first_few([names[0][name] for name in same])}: "
            f"where these are the classes, say --train-dir {first} (with --val-dir and --test-dir for others)"
        )


def _has_photos(root: Path, folder: Path) -> bool:
    return any(True for _ in files_below(root, folder, Skipped()))


def sibling(root: Path) -> str:
    """Return what a folder that does not exist may be meant for, of the folders beside where it would be."""
    try:
        beside = [entry.name for entry in os.scandir(root.parent) if is_folder(entry)]
        if comparable(root.name) in map(comparable, beside):
            return "; that name is there in another Unicode form: have the shell complete it"
        return nearest(root.name, beside)
    except OSError:
        return ""
