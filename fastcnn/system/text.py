"""Text for people and other programs: printable names, names compared, JSON, and tables."""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fastcnn.system import callers_generator


def printable(name: str) -> str:
    """Return a path or class name on one line, for any terminal, font or page; bytes that are not UTF-8 are escaped."""
    return "".join(letter if letter.isprintable() else " " for letter in as_utf8(name))


def first_few(names: Sequence[str], count: int = 3) -> str:
    """Return the first of several names on one line, printable, with an ellipsis where there are more."""
    return printable(", ".join(names[:count])) + (", ..." if len(names) > count else "")


def as_utf8(name: str) -> str:
    """Return a name that any program can read: bytes that are not UTF-8 are written out, as \\xff."""
    return re.sub("[\ud800-\udfff]", lambda found: _byte_written_out(ord(found[0])), name)


def _byte_written_out(surrogate: int) -> str:
    return f"\\x{surrogate - 0xDC00:02x}" if 0xDC80 <= surrogate <= 0xDCFF else f"\\u{surrogate:04x}"


def comparable(name: str) -> str:
    """Return the form in which names are compared: the same for a file name of Linux (NFC) and of a Mac (NFD)."""
    return unicodedata.normalize("NFC", as_utf8(name))


def to_json(value: Any) -> str:
    """Return plain data as JSON for other programs."""
    return json.dumps(texts_as_utf8(value), indent=1)


def texts_as_utf8(value: Any) -> Any:
    """Return plain data with every text in it as `as_utf8` has it."""
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, dict):
        return {texts_as_utf8(key): texts_as_utf8(each) for key, each in value.items()}
    return [texts_as_utf8(each) for each in value] if isinstance(value, list | tuple) else value


def finite_or_none(value: Any) -> Any:
    """Return a figure for JSON, which has no NaN: None for a number that is not finite, anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_any_name() -> None:
    """Have standard output and error write what their encoding lacks, such as bytes that are not UTF-8, as \\xff."""
    codecs.register_error("fastcnn", _written_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastcnn")


def _written_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = as_utf8(error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """Return rows under the titles of their columns, each on one line; the columns named in `right` align there."""
    with callers_generator.kept("rich.style"):
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
