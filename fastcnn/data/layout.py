"""Layout of a folder of photos: which folders hold the splits, and what beside them is no class.

Folders come from Kaggle, from assignments and from desktops: split folders in any case and by several names, with a
word before or behind ("seg_train", "Train_Set"), inside a folder of the same name or in an archive's own folder.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastcnn.config import LayoutOptions
from fastcnn.data import shards
from fastcnn.data.walk import Skipped, files_below, folders_in, is_folder, is_ours
from fastcnn.errors import DataError, nearest, warn
from fastcnn.system.text import comparable, printable

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Name of a folder in small letters -> the split whose photos it holds."""

OTHER_TOOLS = ("runs", "wandb", "mlruns", "lightning_logs", "checkpoints", "sweeps")
"""Folders that training tools leave beside the photos."""

IMAGES = ("images", "image", "imgs", "img", "photos", "jpegimages")
ANNOTATIONS = ("annotations", "annotation", "labels", "masks", "trimaps", "meta", "attributes")
"""Names in small letters of folders that stand beside each other where photos come with annotations: no classes."""

NO_OPTIONS = LayoutOptions()

FEW = 20
"""Folders in which split folders are looked for: listing those of a hundred classes would take as long as the scan."""

_SPLIT_NAMES = "|".join(sorted(SPLITS, key=len, reverse=True))
JOINED = re.compile(rf"({_SPLIT_NAMES})(sets?|data|images?|imgs?|photos?|dir|folder)")
"""A split's name with a word written to it: trainset, testdata."""


@dataclass(frozen=True)
class Layout:
    """Where the classes of each split are."""

    splits: Mapping[str, Path]
    """Split -> folder of its class folders or shards; train alone, the folder itself, in a flat layout."""
    exclude: frozenset[str]
    """Names of folders that are left out wherever classes or splits stand."""
    described: str
    """The layout in words, such as "train, val/<class>"."""

    def class_names(self, folder: Path) -> list[str]:
        """Return the names of the class folders in a folder, sorted."""
        return [path.name for path in visible_folders(folder, self.exclude)]

    def holds_shards(self, folder: Path) -> bool:
        """Return whether archives stand in a folder in the place of class folders."""
        return not self.class_names(folder) and bool(shards.archives(folder))


def read(root: Path, options: LayoutOptions = NO_OPTIONS) -> Layout:
    """Return the layout of a folder that exists. What it finds beside the layout is named in a warning.

    Where the options name folders, nothing is guessed. Raises DataError where two folders are of one split, where
    held-out folders have no training folder, where there are two ways to read it, or where a folder cannot be read.
    """
    left_out, chosen = frozenset(options.exclude), options.folders
    if chosen and "train" not in chosen:
        raise DataError("--val-dir and --test-dir need --train-dir: the folder of the training photos")
    found = as_chosen(root, left_out, chosen) if chosen else by_names(root, left_out)
    warn_of_unused(root, found)
    return found


def by_names(root: Path, left_out: frozenset[str]) -> Layout:
    """Return the layout that the names of folders tell."""
    inner = _unwrapped(root, left_out)
    if inner != root:
        warn(f"{printable(str(root))} has one folder, {printable(str(inner.relative_to(root)))}: reading that")
    splits, ignored = split_folders(inner, left_out)
    if len(splits) == 1 and _may_be_classes(root, [inner / name for name in ignored]):
        raise _in_two_ways(root, inner, splits["train"], left_out)
    for split, path in list(splits.items()):
        if split != "train" and not _holds_classes(path, left_out):
            warn(f"{printable(str(path))} has no class folders: its photos cannot be scored, and are not read")
            del splits[split]
    where = "" if inner == root else f"{inner.relative_to(root).as_posix()}/"
    if splits:
        names = ", ".join(f"{where}{path.relative_to(inner).as_posix()}" for path in splits.values())
        if ignored:
            warn(
                f"{printable(', '.join(ignored))} in {printable(str(inner))} "
                f"{'is' if len(ignored) == 1 else 'are'} beside the split folders ({names}), and not read"
            )
        return Layout(splits, left_out, f"{printable(names)}, each with <class>/<photos>")
    _check_annotated(root, inner, left_out)
    _check_certain(root, inner, left_out)
    for path in visible_folders(inner, left_out):
        if path.name.casefold() in OTHER_TOOLS:
            warn(
                f"{printable(str(path))} is read as a class: if another program made it, "
                f"leave it out with --exclude {path.name}"
            )
    return Layout({"train": inner}, left_out, f"{where}<class>/<photos>")


def as_chosen(root: Path, exclude: frozenset[str], chosen: Mapping[str, str]) -> Layout:
    """Return the layout of split -> folder below the root. Raises DataError where there is no such folder."""
    splits = {split: root / name for split, name in chosen.items()}
    for split, path in splits.items():
        if not path.is_dir():
            raise DataError(f"--{split}-dir {chosen[split]}: no such folder in {printable(str(root))}")
    names = ", ".join(f"{split} in {name}" for split, name in chosen.items())
    return Layout(splits, exclude, f"{printable(names)}, each with <class>/<photos>")


def warn_of_unused(root: Path, read: Layout) -> None:
    """Warn of names to leave out that no folder has where classes or splits stand."""
    if not read.exclude:
        return
    places = {place for path in read.splits.values() for place in (path, *path.parents) if place.is_relative_to(root)}
    names = {comparable(path.name): path.name for place in places for path in folders_in(place)}
    for name in sorted(read.exclude):
        if comparable(name) not in names:
            there = printable(nearest(name, names.values()))
            warn(
                f"--exclude {printable(name)}: {printable(str(root))} has no class or split folder of that name{there}"
            )


def _check_annotated(root: Path, folder: Path, exclude: frozenset[str]) -> None:
    """Raise DataError where folders that would be classes are one of photos and one of annotations."""
    folders = visible_folders(folder, exclude)
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


def _check_certain(root: Path, folder: Path, exclude: frozenset[str]) -> None:
    """Raise DataError where folders that would be classes have a split in their names and folders inside."""
    folders = visible_folders(folder, exclude)
    deeper: list[Path] = []
    for path in folders[:FEW]:
        with contextlib.suppress(DataError):  # it cannot be read: told when its photos are listed
            deeper += visible_folders(path, exclude)
    trains = [path for path in folders + deeper if "train" in {SPLITS.get(word) for word in words_of(path)}]
    others = [path for path in folders if path not in trains and set(words_of(path)) & SPLITS.keys()]
    named = (_repeated(path, exclude) for path in trains + others)
    doubtful = [path for path in named if len(visible_folders(path, exclude)) > 1]
    if doubtful:
        raise _in_two_ways(root, folder, doubtful[0], exclude)
    exact = any(path.name.casefold() in SPLITS for path in folders)
    if exact and len(folders) > 1 and all(set(words_of(path)) & SPLITS.keys() for path in folders):
        raise DataError(
            f"no class folders in {printable(', '.join(path.name for path in folders))} of {printable(str(folder))}: "
            "expected train/<class>/<photos>, or a table of paths and classes as DATA; where these are classes, "
            f"say --train-dir {printable(folder.relative_to(root).as_posix())}"
        )


def _may_be_classes(root: Path, beside: list[Path]) -> bool:
    """Return whether folders beside a train folder that is the only split look like classes, and it like one of them.

    They do where one has folders of photos as the train folder has, or where several hold photos.
    """
    beside = [path for path in beside if path.name.casefold() not in OTHER_TOOLS]
    if len([path for path in beside if _has_photos(root, path)]) > 1:
        return True
    return any(sum(_has_photos(root, inside) for inside in visible_folders(path)) > 1 for path in beside)


def _in_two_ways(root: Path, outer: Path, inner: Path, exclude: frozenset[str]) -> DataError:
    """Return the error that shows both readings: the folders in `outer` as classes, or those in `inner` below it."""
    readings = []
    for folder in (outer, inner):
        classes = visible_folders(folder, exclude)
        names = printable(", ".join(path.name for path in classes[:3]) + (", ..." if len(classes) > 3 else ""))
        count = sum(len(paths) for path in classes for paths, _ in files_below(root, path, Skipped()))
        readings.append(f"{len(classes)} classes, {names}, of {count:,} photos")
    here, name = (printable(folder.relative_to(root).as_posix()) for folder in (outer, inner))
    return DataError(
        f"{printable(str(root))} can be read in two ways: {readings[0]}; or {readings[1]} in {name}. "
        f"Say which: --train-dir {here} or --train-dir {name} (with --val-dir and --test-dir for others)"
    )


def _has_photos(root: Path, folder: Path) -> bool:
    return any(True for _ in files_below(root, folder, Skipped()))


def words_of(folder: Path) -> list[str]:
    """Return the words of a folder's name in small letters: apart at signs, digits, capitals and joined words."""
    apart = re.sub(r"([a-z])([A-Z])|([^\W\d_])(\d)|(\d)([^\W\d_])", r"\1\3\5 \2\4\6", comparable(folder.name))
    found: list[str] = []
    for word in re.split(r"[\W_]+", apart.casefold()):
        joined = JOINED.fullmatch(word)
        found += joined.groups() if joined else [word]
    return found


def split_folders(root: Path, exclude: frozenset[str]) -> tuple[dict[str, Path], list[str]]:
    """Return split -> its folder, and the names of the folders beside these; {} for a flat layout.

    A class may be called 'train': then its folder holds photos and no folders.
    """
    folders = visible_folders(root, exclude)
    found = by_split(root, ((path, path.name.casefold()) for path in folders))
    if not found:
        found = by_split(root, _without_affix(folders))
        if not _holds_classes(found.get("train"), exclude):
            return {}, []
    others = [path.name for path in folders if path not in found.values()]
    if "train" not in found:
        if not others:
            raise DataError(
                f"{printable(str(root))} has {', '.join(path.name for path in folders)} but no train folder: "
                f"expected {printable(root.name)}/train/<class>/<photos>"
            )
        return {}, []
    if others and not _holds_classes(found["train"], exclude):
        return {}, []
    ordered = {split: found[split] for split in ("train", "val", "test") if split in found}
    return {split: _repeated(path, exclude) for split, path in ordered.items()}, others


def by_split(root: Path, folders: Iterable[tuple[Path, str]]) -> dict[str, Path]:
    """Return split -> folder, for those whose word names a split. Raises DataError for two of one split."""
    found: dict[str, Path] = {}
    for folder, word in folders:
        split = SPLITS.get(word)
        if split in found:
            kind = {"train": "training", "val": "validation", "test": "test"}[str(split)]
            raise DataError(
                f"{printable(str(root))} has two {kind} folders, {found[split].name} and {folder.name}: keep one, "
                f"or leave one out with --exclude {folder.name}"
            )
        if split is not None:
            found[split] = folder
    return found


def visible_folders(folder: Path, exclude: frozenset[str] = frozenset()) -> list[Path]:
    """Return the folders in a folder that are for photos: sorted, without hidden, excluded and our own ones."""
    left_out = set(map(comparable, exclude))
    return [
        path
        for path in folders_in(folder)
        if not path.name.startswith(".") and comparable(path.name) not in left_out and not _is_own(path)
    ]


def _holds_classes(folder: Path | None, exclude: frozenset[str]) -> bool:
    return folder is not None and bool(visible_folders(folder, exclude) or shards.archives(folder))


def _without_affix(folders: list[Path]) -> Iterator[tuple[Path, str]]:
    """Yield folders with the word of a split in their names, whose other words are those of a training folder."""
    words = {path: words_of(path) for path in folders}
    found = {path: [word for word in parts if word in SPLITS] for path, parts in words.items()}
    rest = {path: [word for word in parts if word not in SPLITS] for path, parts in words.items()}
    trained = [rest[path] for path, split in found.items() if [SPLITS[word] for word in split] == ["train"]]
    for path, split in found.items():
        if len(split) == 1 and rest[path] in trained[:1]:
            yield path, split[0]


def _repeated(folder: Path, exclude: frozenset[str]) -> Path:
    """Return a folder, or the one in it that repeats its name and is all that is there."""
    inside = visible_folders(folder, exclude)
    same = len(inside) == 1 and inside[0].name.casefold() == folder.name.casefold()
    return _repeated(inside[0], exclude) if same else folder


def _unwrapped(root: Path, exclude: frozenset[str]) -> Path:
    """Return a folder, or the only one in it where that holds the classes or the splits: an archive's own folder."""
    inside = visible_folders(root, exclude)
    if len(inside) != 1 or inside[0].name.casefold() in SPLITS or any(map(_is_photo, _files_in(root))):
        return root
    return inside[0] if len(visible_folders(inside[0], exclude)) > 1 else root


def _is_own(folder: Path, depth: int = 3) -> bool:
    """Return whether a folder is a run, cache or sweep of ours, or holds nothing but such."""
    folders = []
    try:
        if is_ours(folder):
            return True
        locked = (folder / ".lock").exists()  # by a run that has only begun
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    if not is_folder(entry):
                        return False  # at the first photo: class folders are long
                    folders.append(folder / entry.name)
    except OSError:
        return False
    return locked or (depth > 0 and bool(folders) and all(_is_own(one, depth - 1) for one in folders))


def _files_in(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if not is_folder(entry)]


def _is_photo(name: str) -> bool:
    return Path(name).suffix.lower() in {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".tar"}
