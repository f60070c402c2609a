"""Tables as people keep them: CSV with any usual delimiter, and Parquet where pyarrow is installed."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fastcnn.errors import DataError, FastCNNError, first_line, nearest
from fastcnn.system.text import printable

SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Rows of a table, as text."""

    path: Path
    names: list[str]
    """Columns."""
    rows: list[list[str]]
    first_row: int
    """Number of the first row in the file, counted from 1."""

    def values(self, column: int) -> list[str]:
        """Return the values of a column, without blanks around them."""
        return [row[column].strip() for row in self.rows]

    def position(self, kind: str, name: str | None) -> int | None:
        """Return the position of the column that --path-column or --label-column names; None where it names none."""
        if name is None or name.strip() in self.names:
            return None if name is None else self.names.index(name.strip())
        raise DataError(
            f"--{kind}-column {name}: {printable(self.path.name)} has the columns {self.shown(range(len(self.names)))}"
            f"{nearest(name, self.names)}"
        )

    def shown(self, columns: Iterable[int]) -> str:
        """Return the names of columns, as messages list them."""
        return printable(", ".join(f"'{self.names[column]}'" for column in columns))


def read_table(path: Path) -> Table:
    """Return a table. Raises DataError where it cannot be read, FastCNNError for Parquet without pyarrow."""
    try:
        names, *rows = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read the table {printable(str(path))}: {first_line(error)}") from None
    except ValueError:
        names, rows = [], []
    if not rows:
        raise DataError(f"the table {printable(str(path))} has no rows: expected a header, and a photo a row")
    names = [name.strip() for name in names]
    for line, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise DataError(
                f"{printable(str(path))}, row {line}: {len(row)} values, and the header has {len(names)}: "
                "quote values with commas"
            )
    return Table(path, names, rows, 2)


def _csv(path: Path) -> list[list[str]]:
    with path.open("rb") as content:
        encoding = "utf-16" if content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with path.open(newline="", encoding=encoding, errors="surrogateescape") as file:
        head = re.sub(r'"[^"]*"', "", file.readline())
        file.seek(0)
        delimiter = max(",;\t|", key=head.count)
        return [row for row in csv.reader(file, delimiter=delimiter) if row]


def _parquet(path: Path) -> list[list[str]]:
    """Return the columns of plain values; lists and structures are not read."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise FastCNNError(
            f"{printable(path.name)} is Parquet: pip install 'fastcnn[parquet]', or save it as CSV"
        ) from None
    try:
        plain = [field.name for field in parquet.read_schema(path) if not field.type.num_fields]
        table: Mapping[str, Sequence[Any]] = parquet.read_table(path, columns=plain).to_pydict()
    except Exception as error:  # pyarrow's own errors
        raise DataError(f"cannot read the table {printable(str(path))}: {first_line(error)}") from None
    texts = [[_text(value) for value in column] for column in table.values()]
    return [list(table), *map(list, zip(*texts, strict=True))]


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else "" if value is None else str(value)
