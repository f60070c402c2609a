"""Files of JSON lines, a line a result as it is there: what was cut off when a machine went is no line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file; none where there is no file."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(text)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, on a new one where the last was cut off. What is no JSON is written as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        cut_off = file.read() not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(line, default=str).encode() + b"\n")
