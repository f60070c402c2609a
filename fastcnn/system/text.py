"""Text for terminals: printable names, and tables."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence


def printable(name: str) -> str:
    """Return a path or class name on one line, for any terminal, font or page; bytes that are not UTF-8 are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else " " for letter in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """Return rows under the titles of their columns, each on one line; the columns named in `right` align there."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in columns:
        grid.add_column(Text(name), justify="right" if name in right else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    file = io.StringIO()
    Console(file=file, width=100_000, color_system=None, legacy_windows=False).print(grid)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
