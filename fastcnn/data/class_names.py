"""Names of classes, compared whatever their Unicode form: Linux and a Mac write 'Café' differently."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from fastcnn.errors import nearest, warn
from fastcnn.system.text import comparable, printable


def positions(classes: Sequence[str]) -> dict[str, int]:
    """Return `comparable` name -> position of each class."""
    return {comparable(name): position for position, name in enumerate(classes)}


def distinct(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, without those that differ from an earlier one in Unicode form alone, which is a warning."""
    found: dict[str, str] = {}
    for name in names:
        if found.setdefault(comparable(name), name) != name:
            warn(f"{folder} has two folders '{printable(name)}' in different Unicode forms: read as one class")
    return tuple(found.values())


def warn_of_unused(exclude: Collection[str], names: Iterable[str], where: str) -> None:
    """Warn of names to leave out that none of `names` is; `where` says of what there is none."""
    known = {comparable(name): name for name in dict.fromkeys(names)} if exclude else {}
    for name in exclude:
        if comparable(name) not in known:
            close = printable(nearest(name, known.values()))
            warn(f"--exclude {printable(name)}: {where} of that name{close}")


def same(classes: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists name the same classes in the same order."""
    return list(map(comparable, classes)) == list(map(comparable, others))
