"""Index of a folder of photos, or of shards: path, class and split of each photo. Reads names, never pixels."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastcnn.config import LayoutOptions
from fastcnn.data import class_names, layout, manifest, shards
from fastcnn.data.doubts import sibling, way_deeper
from fastcnn.data.layout import NO_OPTIONS, Layout
from fastcnn.data.listing import Listing, join, list_folders, list_rows
from fastcnn.data.manifest import Manifest
from fastcnn.data.path_list import PathList
from fastcnn.data.shards import Shards
from fastcnn.data.split_names import SPLITS
from fastcnn.data.walk import Stamp, visible_folders
from fastcnn.errors import DataError, UsageError, nearest, warn
from fastcnn.system.text import comparable, first_few, printable
from pipelines.verdict import Member

if TYPE_CHECKING:
    from fastcnn.system.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Index:
    """Every candidate photo below `root`: files sorted by path, then photos in shards, in the order of the archives."""

    root: Path
    classes: tuple[str, ...]
    """Class names, sorted; those of shards by their numbers. A label is a position in it."""
    paths: PathList
    """(N,) paths relative to `root`, with forward slashes; <archive>/<name in it> for a photo in a shard."""
    labels: npt.NDArray[np.int64]
    """(N,) class of each photo."""
    sizes: npt.NDArray[np.int64]
    """(N,) bytes."""
    mtimes: npt.NDArray[np.int64]
    """(N,) modification time in nanoseconds; for a photo in a shard another number that changes with the archive."""
    ctimes: npt.NDArray[np.int64]
    """(N,) time in nanoseconds at which the system last changed the file, or the archive."""
    inodes: npt.NDArray[np.int64]
    """(N,) inode of the file, or of the archive."""
    offsets: npt.NDArray[np.int64]
    """(N,) position of a photo's first byte in its shard, -1 for a file of its own."""
    folders: npt.NDArray[np.str_]
    """(N,) split of the folder that each photo is in: train, val or test; train in a flat layout."""
    num_hidden: int = 0
    """Hidden files that were skipped."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Files that nobody meant as photos, by name and content: number by extension, with its dot."""
    layout: str = ""
    """How the folder was read, in words."""
    outside: Sequence[str] = ()
    """Photos beside the class folders, which are in none."""
    splits_given: bool = False
    """Whether a manifest gives the splits: its val photos then validate, whatever else it holds."""

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, photo: int | np.integer[Any]) -> Path | Member:
        """Return where a photo's bytes are, as decoders take it."""
        path, offset = self.paths[photo], int(self.offsets[photo])
        if offset < 0:
            return self.root / path
        return Member(str(self.root / shards.archive_of(path)), offset, int(self.sizes[photo]))

    def sources(self, photos: Iterable[int | np.integer[Any]] | None = None) -> list[Path | Member]:
        """Return where the bytes of photos are; None stands for all photos."""
        return [self.source(photo) for photo in (range(len(self)) if photos is None else photos)]

    def is_unchanged(self, photo: int | np.integer[Any], info: os.stat_result) -> bool:
        """Return whether the file that holds a photo is, by its facts now, the one that was scanned."""
        offset = int(self.offsets[photo])
        stamp = Stamp.of(info, max(0, offset))
        scanned = (self.mtimes[photo], self.ctimes[photo], self.inodes[photo])
        return stamp == scanned and (offset >= 0 or info.st_size == self.sizes[photo])

    def told_others(self) -> str:
        """Return the number of files that are no photos, and their kinds: 90 other files (45 .json, 45 .xml)."""
        count = sum(self.others.values())
        kinds = sorted(self.others.items(), key=lambda kind: (-kind[1], kind[0]))
        told = first_few([f"{number:,} {name or 'without extension'}" for name, number in kinds])
        return f"{count:,} other file{'s' * (count != 1)} ({told})"

    def warn_of_outside(self) -> None:
        """Warn of photos that are in no class folder."""
        if self.outside:
            many = "photos are" if len(self.outside) > 1 else "photo is"
            where = f"in no class folder of {printable(str(self.root))}"
            warn(f"{len(self.outside):,} {many} {where}, and not used: {first_few(self.outside)}")

    def take(self, photos: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Index:
        """Return the index of photos, given by their positions or by a mask (N,)."""
        columns = {name: column[photos] for name, column in vars(self).items() if isinstance(column, np.ndarray)}
        paths = self.paths.take(np.arange(len(self))[photos])
        return Index(**{**vars(self), "paths": paths, **columns})


def scan(
    root: str | Path,
    memory: Path | None = None,
    options: LayoutOptions = NO_OPTIONS,
    ranks: Ranks | None = None,
) -> Index:
    """Return the index of a folder laid out as root/<class>/... or root/train/<class>/... with val and test beside it.

    `layout` says by which names these go. Shards, see `shards`, may stand in the place of class folders:
    root/000000.tar, or root/train/000000.tar. A table, see `manifest`, may stand in the place of the folder.

    Args:
        root: the folder, or the table.
        memory: a folder for remembered scans of archives.
        options: what is not to be found by names and content.
        ranks: they list a share each, where the first calls this in what it broadcasts.

    Raises UsageError for columns of a folder, DataError for a folder that is missing, empty, has fewer than two
    classes, or whose held-out folders have a class that the training folder lacks.
    """
    root = Path(root)
    if manifest.is_manifest(root):
        index = _of_manifest(manifest.read(root, options))
        if len(index.classes) < 2:
            raise DataError(f"fewer than two classes in {root} ({index.layout}): a classifier needs two or more")
        check_classes(index)
        return index
    _check_folder(root, options)
    read = layout.read(root, options)
    train_folder = read.splits["train"]
    found = _read_shards(root, read, memory)
    if "train" in found:
        classes = found["train"].classes()
    else:
        classes = class_names.distinct(train_folder, read.class_names(train_folder))
    if not classes:
        raise DataError(
            f"no class folders in {train_folder}: expected {train_folder.name}/<class>/<photos>, "
            f"or {root.name}/train/<class>/<photos>, or shards (*.tar) in their place"
        )
    if len(classes) == 1:
        deeper = "" if "train" in found else way_deeper(root, train_folder / classes[0], read.exclude)
        raise DataError(f"only one class, '{classes[0]}', in {train_folder}: a classifier needs two or more{deeper}")
    index = _read(root, read, classes, found, ranks)
    check_classes(index)
    return index


def scan_held_out(
    root: str | Path,
    classes: Sequence[str],
    memory: Path | None = None,
    options: LayoutOptions = NO_OPTIONS,
    ranks: Ranks | None = None,
) -> Index:
    """Return the index of the photos in a folder on which a model of these classes is scored.

    They are the photos of its val and test folders; without those, of its train folder; without that, of root/<class>.
    `folders` says which: val, test, train or all. Labels are positions in `classes`. The other
    arguments are those of `scan`.

    Raises DataError for a folder that is missing or empty, or has a class that is not among `classes`; a class
    without photos is a warning.
    """
    root = Path(root)
    if manifest.is_manifest(root):
        return _held_out_of_manifest(manifest.read(root, options), tuple(classes))
    _check_folder(root, options)
    names = class_names.positions(classes)
    read = _held_out_layout(root, names, options)
    layout.warn_of_unused(root, read)
    known = tuple(classes)
    for place in read.splits.values():
        for name in read.class_names(place):
            _check_known(f"{place / name}", name, known)
    index = _read(root, read, known, _read_shards(root, read, memory), ranks)
    if not len(index):
        raise DataError(
            f"no photos in {root}: expected {root.name}/<class>/<photos>, or a val or test folder with them"
        )
    return index


def _held_out_layout(root: Path, names: Mapping[str, int], options: LayoutOptions) -> Layout:
    """Return the layout of a folder to be scored on: its val and test folders, else train, else root/<class>."""
    exclude = frozenset(options.exclude)
    if chosen := options.folders:
        held_out = {split: folder for split, folder in chosen.items() if split != "train"}
        return layout.as_chosen(root, exclude, held_out or chosen)
    folders = [path for path in visible_folders(root, exclude) if comparable(path.name) not in names]
    found = layout.by_split(root, ((path, path.name.casefold()) for path in folders))
    if not found and not any(comparable(path.name) in names for path in visible_folders(root, exclude)):
        read = layout.by_names(root, exclude)
        found = dict(read.splits) if len(read.splits) > 1 else {"all": read.splits["train"]}
    if len(found) > 1:
        found.pop("train", None)
    return Layout(found or {"all": root}, exclude, ", ".join(found) or "<class>/<photos>")


def scan_loosely(root: str | Path, options: LayoutOptions = NO_OPTIONS) -> tuple[Index, str]:
    """Return the index of all photos in a folder of any layout, and why `scan` refuses it ("" where it does not).

    Without class folders all files below it are of one class without a name. Raises DataError for a folder that is
    missing, and for shards that `scan` refuses: their photos cannot be listed.
    """
    try:
        return scan(root, options=options), ""
    except DataError as error:
        problem = str(error)
    if manifest.is_manifest(root):
        return _of_manifest(manifest.read(Path(root), options)), problem
    root, left_out = Path(root), frozenset(options.exclude)
    _check_folder(root, options)
    folders = visible_folders(root, left_out)
    parts = {SPLITS[path.name.casefold()]: path for path in folders if path.name.casefold() in SPLITS}
    flat = Layout({"train": root}, left_out, "<class>/<photos>" if folders else "no folders, so no classes")
    if any(map(flat.holds_shards, [root, *parts.values()])):
        raise DataError(problem)
    parted = f"{printable(', '.join(path.name for path in folders))}, each with <class>/<photos>"
    read = Layout(parts, left_out, parted) if parts and len(parts) == len(folders) else flat
    names = sorted({name for folder in read.splits.values() for name in read.class_names(folder)})
    return _read(root, read, class_names.distinct(root, names) or ("",), {}), problem


def check_classes(index: Index) -> None:
    """Raise DataError where the training folder has no photo of a class; warn where a held-out folder has none."""
    for split in ("train", "val", "test"):
        here = index.folders == split
        if not here.any() and split != "train":
            continue
        present = np.bincount(index.labels[here], minlength=len(index.classes)) > 0
        missing = [name for name, there in zip(index.classes, present, strict=True) if not there]
        if missing and split == "train":
            what = "photos at all" if len(missing) == len(index.classes) else f"usable photos of class '{missing[0]}'"
            beside = f"; {index.told_others()}: no photos" if index.others else ""
            way_on = "" if len(missing) == len(index.classes) else f", or leave it out with --exclude {missing[0]}"
            raise DataError(f"no {what} in {index.root}: add photos or remove the folder{way_on}{beside}")
        if missing:
            warn(f"the {split} folder of {index.root} has no photos of: {', '.join(missing)}")


def _check_folder(root: Path, options: LayoutOptions) -> None:
    """Raise DataError where there is no such folder, UsageError where options name columns of it."""
    try:
        kind = root.stat().st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        where = "does not exist" if missing else f"cannot be read: {error.strerror}"
        raise DataError(f"the data folder {printable(str(root))} {where}{sibling(root) if missing else ''}") from None
    if not stat.S_ISDIR(kind):
        raise DataError(
            f"the data folder {printable(str(root))} is a file, not a folder: expected a folder with one folder of "
            "photos per class, a .csv or .parquet with path and class of each, on the command line also a .zip or .tar"
        )
    if kinds := [f"--{kind}-column" for kind in options.columns]:
        raise UsageError(
            f"{' and '.join(kinds)}: {printable(str(root))} is a folder, and columns are those of a CSV or Parquet "
            "table: leave it out, or give the table as DATA"
        )


def _of_manifest(table: Manifest, classes: tuple[str, ...] = ()) -> Index:
    """Return the index of a manifest's photos; `classes` are its own where they are not given."""
    classes = classes or table.classes()
    labels = class_names.positions(classes)
    photos = [(row.path, labels[comparable(row.label)], row.size, row.stamp, row.split, -1) for row in table.rows]
    return _index(table.root, classes, list_rows(photos), layout=table.described, splits_given=table.has_splits)


def _held_out_of_manifest(table: Manifest, classes: tuple[str, ...]) -> Index:
    for name in table.classes():
        _check_known(f"'{name}'", name, classes)
    index = _of_manifest(table, classes)
    if not table.has_splits:
        return replace(index, folders=np.full(len(index), "all"))
    held_out = index.folders != "train"
    return index.take(held_out) if held_out.any() else index


def _check_known(shown: str, name: str, classes: Sequence[str]) -> None:
    if comparable(name) not in class_names.positions(classes):
        raise DataError(
            f"{printable(shown)} is a class that the model does not know; "
            f"it knows {first_few(classes, 10)}; leave it out with --exclude"
        )


def _read(
    root: Path, read: Layout, classes: tuple[str, ...], found: Mapping[str, Shards], ranks: Ranks | None = None
) -> Index:
    """Return the index of the class folders in each split folder, or of the shards `found` in their place."""
    places = [
        (split_folder / name, label, split)
        for split, split_folder in read.splits.items()
        if split not in found
        for label, name in ([(0, "")] if classes == ("",) else _labelled(read, split, classes))
    ]
    files, skipped = list_folders(root, places, ranks)
    archives = []
    for split, part in found.items():
        labels = part.labels(root, classes)
        photos = [(each.path, labels[each.label], each.size, each.stamp, split, each.offset) for each in part.photos]
        archives.append(list_rows(photos))
        skipped.hidden += part.num_hidden
    if num := skipped.unreadable:
        warn(f"{num} folder{'s' if num > 1 else ''} below {root} cannot be read: the photos inside are left out")
    outside = [] if classes == ("",) else layout.photos_outside(root, read)
    facts = {"num_hidden": skipped.hidden, "others": skipped.others, "layout": read.described, "outside": outside}
    return _index(root, classes, join([files, *archives]), **facts)


def _index(root: Path, classes: tuple[str, ...], listed: Listing, **facts: Any) -> Index:
    """Return the index of listed photos; `facts` are the fields of no photo."""
    return Index(root=root, classes=classes, paths=listed.paths, **listed.columns, **facts)


def _read_shards(root: Path, read: Layout, memory: Path | None) -> dict[str, Shards]:
    """Return the content of the split folders that hold archives and no folders."""
    return {
        split: shards.read(root, folder, memory) for split, folder in read.splits.items() if read.holds_shards(folder)
    }


def _labelled(read: Layout, split: str, classes: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield label and folder name of each class folder. Raises DataError for a class that is not among `classes`."""
    labels, folder = class_names.positions(classes), read.splits[split]
    for name in read.class_names(folder):
        if comparable(name) not in labels:
            raise DataError(
                f"{folder.name}/{name} is a class that the training folder does not have{nearest(name, classes)}; "
                f"its {split} photos cannot be scored"
            )
        yield labels[comparable(name)], name
