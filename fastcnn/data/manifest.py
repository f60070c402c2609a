"""Manifest: a CSV or Parquet table with a photo a row, its class and perhaps its split, in the place of a folder.

Columns are found by what they hold: paths of photos that exist, with or without extension; names of splits; values that
repeat. Kaggle's train.csv beside train/*.jpg is one, and a run's own split.csv.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastcnn.config import LayoutOptions, read_yaml, resolve
from fastcnn.data import class_names
from fastcnn.data.layout import NO_OPTIONS
from fastcnn.data.split_names import SPLITS, splits_in, words_of
from fastcnn.data.tables import SUFFIXES, Table, read_table
from fastcnn.data.walk import Stamp, folders_in, is_folder
from fastcnn.errors import DataError, FastCNNError, UsageError, warn
from fastcnn.system.text import comparable, printable
from pipelines.meant import named_as_photo

LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "category", "target", "species", "breed", "tag")
"""Names of columns, in small letters, that are preferred where several could hold the classes."""

NUM_TRIED = 50  # rows whose paths are looked for in each folder
FEW = 20  # folders beside the manifest that are looked into


@dataclass(frozen=True)
class Row:
    """Photo of a manifest."""

    path: str
    """Relative to `Manifest.root`, with forward slashes."""
    size: int
    """Bytes; 0 for a photo that is not there."""
    stamp: Stamp
    label: str
    split: str
    """train, val or test; train where the manifest has no splits."""


@dataclass(frozen=True)
class Manifest:
    """Photos of a manifest, sorted by path."""

    root: Path
    """Folder below which all of them are."""
    rows: list[Row]
    has_splits: bool
    described: str
    """Its columns in words."""

    def classes(self) -> tuple[str, ...]:
        """Return the labels in order: whole numbers by value, then the others."""
        labels = {comparable(row.label): row.label for row in reversed(self.rows)}.values()
        numbered = {label: label.isascii() and label.isdecimal() for label in labels}
        return tuple(
            sorted(labels, key=lambda label: (not numbered[label], int(label) if numbered[label] else 0, label))
        )


class _Photos:
    """Files by their names, with or without extension and whatever the Unicode form; a folder is read once."""

    def __init__(self) -> None:
        self.listings: dict[str, tuple[dict[str, str], dict[str, str]]] = {}

    def find(self, base: Path, name: str) -> tuple[str, bool]:
        """Return the path of a photo, "" where it is not there, and whether `name` has its extension."""
        found = self._find(base, name)
        return self._find(base, name.replace("\\", "/")) if "\\" in name and not found[0] else found

    def _find(self, base: Path, name: str) -> tuple[str, bool]:
        if not name:
            return "", False
        folder, last = os.path.split(os.path.normpath(os.path.join(base, name)))  # noqa: PTH118
        if folder not in self.listings:
            self.listings[folder] = self._listed(folder)
        names, stems = self.listings[folder]
        in_full = names.get(last) or names.get(comparable(last), "")
        found = in_full or stems.get(comparable(last), "")
        return os.path.join(folder, found) if found else "", bool(in_full)  # noqa: PTH118

    def _listed(self, folder: str) -> tuple[dict[str, str], dict[str, str]]:
        try:
            files = [entry.name for entry in os.scandir(folder) if not is_folder(entry)]
        except (OSError, ValueError):  # a path with a zero byte
            return {}, {}
        names = {comparable(name): name for name in files} | {name: name for name in files}
        photos = [name for name in files if named_as_photo(name)]
        stems = [comparable(name.rpartition(".")[0]) for name in photos]
        counts = Counter(stems)
        return names, {stem: name for stem, name in zip(stems, photos, strict=True) if counts[stem] == 1}


def is_manifest(path: str | Path) -> bool:
    """Return whether a path is a file with the name of a table."""
    return Path(path).suffix.lower() in SUFFIXES and Path(path).is_file()


def read(path: Path, options: LayoutOptions = NO_OPTIONS) -> Manifest:
    """Return the photos of a manifest. Those that are not there are rows all the same, and reported as unreadable.

    Raises DataError where the file is no table, a column is not found or not certain, or a photo has two labels;
    FastCNNError where Parquet cannot be read here.
    """
    path, columns = Path(os.path.abspath(path)), options.columns  # noqa: PTH100
    if set(options.folders) - {"train"}:
        raise UsageError(f"{path.name} names the splits in a column: leave out --val-dir and --test-dir")
    table, photos = read_table(path), _Photos()
    base, paths = _located(table, photos, columns.get("path"), options.folders.get("train"))
    if photos.find(base, table.names[paths].strip())[0]:  # the first line is no header
        names = [str(number) for number in range(1, len(table.names) + 1)]
        table = Table(path, names, [table.names, *table.rows], 1)
    labelled = table.position("label", columns.get("label"))
    split = _split_column(table, {paths, labelled})
    label = _label_column(table, {paths, split}) if labelled is None else labelled
    described = f"{path.name}: paths in '{table.names[paths]}', classes in '{table.names[label]}'"
    if split is not None:
        described += f", splits in '{table.names[split]}'"
    unread = [name for i, name in enumerate(table.names) if name and i not in (paths, label, split)]
    described += f"; not read: {', '.join(unread)}" if unread else ""
    class_names.warn_of_unused(options.exclude, table.values(label), f"{printable(path.name)} has no class")
    rows = _rows(table, photos, base, (paths, label, split), {comparable(name) for name in options.exclude})
    root, rows = _below_one_folder(base, rows)
    return Manifest(root, sorted(rows, key=lambda row: row.path), split is not None, printable(described))


# Columns


def _located(table: Table, photos: _Photos, asked: str | None, folder: str | None) -> tuple[Path, int]:
    """Return the folder that the paths begin in, and their column: that of which the most photos are there."""
    only = table.position("path", asked)
    columns = range(len(table.names)) if only is None else [only]
    tried = table.rows[:: max(1, len(table.rows) // NUM_TRIED)][:NUM_TRIED]
    here = table.path.parent
    scores: dict[tuple[Path, int], tuple[int, int]] = {}
    beside = [[here], _run_folder(table.path), _folders_beside(here)]
    for bases in [[Path(os.path.normpath(here / folder))]] if folder else beside:
        for base, column in itertools.product(bases, columns):
            scores[base, column] = _score(photos, base, [row[column].strip() for row in tried])
        top = max(scores.values())
        if top[0] * 2 >= len(tried):
            break
    best = [place for place, score in scores.items() if score == top and top[0]]
    if not best:
        where = f"in {folder}" if folder else "beside it, or in a folder there"
        raise DataError(
            f"no column of {printable(str(table.path))} ({table.shown(columns)}) has paths of photos that are {where}: "
            "--path-column NAME names it, --train-dir DIR the folder that its paths begin in"
        )
    base = _of_that_name(table.path, list(dict.fromkeys(base for base, _ in best)))
    return base, next(column for place, column in best if place == base)


def _of_that_name(path: Path, bases: list[Path]) -> Path:
    """Return the folder that has the photos of a manifest, of several that have photos of these names."""
    alike = [base for base in bases if {*words_of(base.name)} & {*words_of(path.stem)}]
    alike = alike or [base for base in bases if "train" in splits_in(base.name)]
    if len(bases) > 1 and len(alike) != 1:
        shown = [printable(os.path.relpath(base, path.parent)) for base in bases[:2]]
        raise DataError(
            f"the photos of {printable(path.name)} are in {shown[0]} and in {shown[1]}: "
            f"say which with --train-dir {shown[0]} or --train-dir {shown[1]}"
        )
    return bases[0] if len(bases) == 1 else alike[0]


def _score(photos: _Photos, base: Path, names: list[str]) -> tuple[int, int]:
    found = [photos.find(base, name) for name in names]
    return sum(bool(path) for path, _ in found), sum(exact for _, exact in found)


def _folders_beside(here: Path) -> list[Path]:
    beside = [path for path in folders_in(here) if not path.name.startswith(".")][:FEW]
    return [folder for path in beside for folder in (path, path / path.name) if folder.is_dir()]


def _run_folder(path: Path) -> list[Path]:
    """Return the folder of the photos of the run that a split.csv is in."""
    try:
        config = resolve(read_yaml(path.parent / "config.yaml"))
    except FastCNNError:
        return []
    data = Path(config.data)
    if not is_manifest(data) or data.samefile(path):
        return [data]
    return [read(data, replace(config.layout, exclude=())).root]


def _split_column(table: Table, taken: set[int | None]) -> int | None:
    """Return the column that holds nothing but names of splits, training among them."""
    for column in range(len(table.names)):
        values = {value.casefold() for value in table.values(column)}
        found = {SPLITS.get(value) for value in values}
        if column in taken or "train" not in found:
            continue
        if None not in found:
            return column
        named = table.names[column].casefold() in ("split", "set", "subset", "data set", "partition")
        if named or all(map(splits_in, table.values(column))):
            strange = sorted(value for value in values if value not in SPLITS)[0]
            raise DataError(
                f"{printable(str(table.path))}: '{printable(strange)}' in column '{printable(table.names[column])}' is "
                "no split: expected train, val or test"
            )
    return None


def _label_column(table: Table, taken: set[int | None]) -> int:
    """Return the column of the classes: the one of that name, else the only one whose values repeat."""
    free = [column for column in range(len(table.names)) if column not in taken]
    found = [column for column in free if table.names[column].strip().casefold() in LABEL_COLUMNS]
    found = found or [column for column in free if _repeats(table.values(column))]
    if len(found) > 1 and _agree([table.values(column) for column in found]):
        found = sorted(found, key=lambda column: all(value.isdecimal() for value in table.values(column)))[:1]
    if len(found) == 1:
        return found[0]
    what = f"{table.shown(found)} may each be" if found else "none of its columns seems to be"
    raise DataError(f"{printable(str(table.path))}: {what} the class of a photo: say which with --label-column NAME")


def _agree(columns: Sequence[Sequence[str]]) -> bool:
    """Return whether columns say the same in other words: as the number of a class and its name."""
    together = len(set(zip(*columns, strict=True)))
    return all(len(set(column)) == together for column in columns)


def _repeats(values: list[str]) -> bool:
    """Return whether values may be classes: some repeat, and they are no measurements."""
    distinct = set(values) - {""}
    return 1 < len(distinct) < len(values) and not any("." in value and _is_number(value) for value in distinct)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


# Rows


def _rows(
    table: Table, photos: _Photos, base: Path, columns: tuple[int, int, int | None], exclude: set[str]
) -> list[Row]:
    """Return a row for each photo, by its whole path. Raises DataError for a photo of two labels or splits."""
    paths, label, split = columns
    rows: dict[str, Row] = {}
    num_without = num_twice = 0
    for line, row in enumerate(table.rows, table.first_row):
        name, value = row[paths].strip(), row[label].strip()
        if not name or not value:
            num_without += 1
            continue
        if comparable(value) in exclude:
            continue
        path = photos.find(base, name)[0] or os.path.normpath(os.path.join(base, name))  # noqa: PTH118
        made = Row(path, *_facts(path), value, "train" if split is None else SPLITS[row[split].strip().casefold()])
        if path in rows:
            num_twice += 1
            if (rows[path].label, rows[path].split) != (made.label, made.split):
                raise DataError(
                    f"{printable(str(table.path))}, row {line}: {printable(name)} is listed twice, as "
                    f"'{printable(rows[path].label)}' ({rows[path].split}) and '{printable(made.label)}' "
                    f"({made.split}): keep one"
                )
        rows[path] = made
    for count, one, more in (
        (num_without, "has no path or no class, and is left out", "have no path or no class, and are left out"),
        (num_twice, "is repeated", "are repeated"),
    ):
        if count:
            rows_are = f"1 row {one}" if count == 1 else f"{count:,} rows {more}"
            warn(f"{printable(table.path.name)}: {rows_are}")
    return list(rows.values())


def _facts(path: str) -> tuple[int, Stamp]:
    try:
        info = os.stat(path)  # noqa: PTH116
        return info.st_size, Stamp.of(info)
    except (OSError, ValueError):
        return 0, Stamp(0, 0, 0)


def _below_one_folder(base: Path, rows: list[Row]) -> tuple[Path, list[Row]]:
    """Return the folder that all photos are below, and the rows with paths relative to it."""
    root = str(base)
    if not all(row.path.startswith(os.path.join(root, "")) for row in rows):  # noqa: PTH118
        root = os.path.commonpath([os.path.dirname(row.path) for row in rows])  # noqa: PTH120
    start = len(os.path.join(root, ""))  # noqa: PTH118
    return Path(root), [replace(row, path=row.path[start:].replace(os.sep, "/")) for row in rows]
