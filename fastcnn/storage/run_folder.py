"""Run folders: made, never overwritten, and found again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from fastcnn.errors import FastCNNError, nearest
from fastcnn.storage import files
from fastcnn.storage.locks import LOCK

RUNS = Path("runs")
CONFIG = "config.yaml"


@contextlib.contextmanager
def folder(asked: str | Path | None, name: str) -> Iterator[Path]:
    """Make a run's folder: the one asked for, which must be empty, or the next free `name` under `runs/`.

    A run that fails before it has written more than its configuration leaves no folder.
    """
    made = _make(asked, name)
    try:
        yield made
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            rest = [path for path in made.iterdir() if path.name != CONFIG and not _is_rest(path)]
            for path in [] if rest else list(made.iterdir()):
                path.unlink()
            made.rmdir()
            if asked is None:
                RUNS.rmdir()
        raise


def _make(folder: str | Path | None, name: str) -> Path:
    try:
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not all(map(_is_rest, folder.iterdir())):
                going_on = f", or go on with --resume {folder}" if (folder / CONFIG).is_file() else ""
                raise FastCNNError(f"the run folder {folder} is not empty: choose another with --run-dir{going_on}")
            return folder
        for number in itertools.count(1):
            free = RUNS / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                free.mkdir(parents=True)
                return free
    except OSError as error:
        raise FastCNNError(f"cannot make the run folder: {error}; choose another with --run-dir") from None
    raise AssertionError


def _is_rest(path: Path) -> bool:
    """Return whether a file is what a killed run left before it had written anything."""
    return path.name == LOCK or files.is_partial(path)


def find(name: str | Path) -> Path:
    """Return the folder of a run: a path, or a name under `runs/`."""
    for folder in (Path(name), RUNS / name):
        if (folder / CONFIG).is_file():
            return folder
    names = [path.parent.name for path in RUNS.glob(f"*/{CONFIG}")]
    raise FastCNNError(f"no run {name}: expected a run folder, or a name under {RUNS}/{nearest(str(name), names)}")
