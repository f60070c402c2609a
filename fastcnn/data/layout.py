"""Layout of a folder of photos: which folders hold the splits, and what beside them is no class.

Folders come from Kaggle, from assignments and from desktops: split folders in any case and by several names, with a
word before or behind ("seg_train", "Train_Set"), inside a folder of the same name or in an archive's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastcnn.config import LayoutOptions
from fastcnn.data import class_names, shards
from fastcnn.data.doubts import check_classes_certain, in_two_ways, may_be_classes, repeated
from fastcnn.data.split_names import SPLITS, words_of
from fastcnn.data.walk import folders_in, is_folder, visible_folders
from fastcnn.errors import DataError, warn
from fastcnn.system.text import printable
from pipelines.meant import meant_as_photo

NO_OPTIONS = LayoutOptions()

MAX_WRAPPERS = 8
"""Folders above the classes that hold nothing else, as archives have them; a circle of links is not followed."""


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

    def places(self, root: Path) -> set[Path]:
        """Return the folders, from the root down, in which classes or splits stand."""
        return {place for path in self.splits.values() for place in (path, *path.parents) if place.is_relative_to(root)}


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
    if len(splits) == 1 and may_be_classes(root, [inner / name for name in ignored]):
        raise in_two_ways(root, inner, splits["train"], left_out)
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
    check_classes_certain(root, inner, left_out)
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
    names = (path.name for place in read.places(root) for path in folders_in(place))
    class_names.warn_of_unused(sorted(read.exclude), names, f"{printable(str(root))} has no class or split folder")


def photos_outside(root: Path, read: Layout) -> list[str]:
    """Return the photos beside class folders, in none of them and so in no index: sorted paths relative to `root`."""
    places = read.places(root)
    sharded = {place for place in places if read.holds_shards(place)}
    return sorted(
        os.path.relpath(entry.path, root).replace(os.sep, "/")
        for place in places
        for entry in os.scandir(place)
        if not (sharded and entry.name in (shards.CLASSES, shards.ORIGINALS))
        if not (place in sharded and entry.name.endswith(".tar"))
        if not entry.name.startswith(".") and not is_folder(entry) and meant_as_photo(entry.path)
    )


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
    return {split: repeated(path, exclude) for split, path in ordered.items()}, others


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


def _holds_classes(folder: Path | None, exclude: frozenset[str]) -> bool:
    return folder is not None and bool(visible_folders(folder, exclude) or shards.archives(folder))


def _without_affix(folders: list[Path]) -> Iterator[tuple[Path, str]]:
    """Yield folders with the word of a split in their names, whose other words are those of the one training folder."""
    words = {path: words_of(path.name) for path in folders}
    found = {path: [word for word in parts if word in SPLITS] for path, parts in words.items()}
    rest = {path: [word for word in parts if word not in SPLITS] for path, parts in words.items()}
    trained = [rest[path] for path, split in found.items() if [SPLITS[word] for word in split] == ["train"]]
    if any(other != trained[0] for other in trained):  # cats_train beside dogs_train
        return
    for path, split in found.items():
        if len(split) == 1 and rest[path] in trained:
            yield path, split[0]


def _unwrapped(root: Path, exclude: frozenset[str]) -> Path:
    """Return a folder, or the one below it that has the classes or splits where only folders of one are above it."""
    folder = root
    for _ in range(MAX_WRAPPERS):
        inside = visible_folders(folder, exclude)
        if len(inside) > 1 or (inside and inside[0].name.casefold() in SPLITS):
            return folder
        if not inside or any(map(_is_photo_or_shard, list(os.scandir(folder)))):
            break
        folder = inside[0]
    return root


def _is_photo_or_shard(entry: os.DirEntry[str]) -> bool:
    extension = Path(entry.name).suffix[1:].lower()
    return (extension in shards.PHOTO_EXTENSIONS or extension == "tar") and not is_folder(entry)
