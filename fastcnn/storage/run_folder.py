"""Run folders: made, never overwritten, locked while a run trains in them, and found again."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

from fastcnn.errors import FastCNNError, nearest
from fastcnn.storage import files
from fastcnn.storage.locks import locked

RUNS = Path("runs")
CONFIG = "config.yaml"
LOCK = ".lock"


@contextlib.contextmanager
def folder(asked: str | Path | None, name: str) -> Iterator[Path]:
    """Make a run's folder and hold it: the one asked for, which must be empty, or the next free `name` in `runs/`.

    A run that fails before it has written more than its configuration leaves no folder. Raises FastCNNError, also
    where another run holds the folder, which is then left to it.
    """
    made = _make(asked, name)
    with held(made):
        try:
            yield made
        except BaseException:
            with contextlib.suppress(OSError):  # not empty
                if all(path.name == CONFIG or _is_leftover(path) for path in made.iterdir()):
                    for path in list(made.iterdir()):
                        path.unlink()
                made.rmdir()
                if asked is None:
                    RUNS.rmdir()
            raise


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other commands from training in a run's folder; FastCNNError where one does already."""

    def refuse() -> None:
        raise FastCNNError(f"another command is training in {folder}: wait until it ends, or stop it")

    with locked(folder / LOCK, refuse, remove=True):  # without a lock the run goes on: its first write says why
        yield


def find(name: str | Path) -> Path:
    """Return the folder of a run: a path, or a name under `runs/`. Raises FastCNNError where there is none."""
    for folder in (Path(name), RUNS / name):
        if (folder / CONFIG).is_file():
            return folder
    names = [path.parent.name for path in RUNS.glob(f"*/{CONFIG}")]
    raise FastCNNError(f"no run {name}: expected a run folder, or a name under {RUNS}/{nearest(str(name), names)}")


def _make(folder: str | Path | None, name: str) -> Path:
    try:
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not all(map(_is_leftover, folder.iterdir())):
                resume = (
                    f", or continue its run: fastcnn train --resume {shlex.quote(str(folder))}"
                    if (folder / CONFIG).is_file()
                    else ""
                )
                raise FastCNNError(f"the run folder {folder} is not empty: choose another with --run-dir{resume}")
            return folder
        for number in itertools.count(1):
            free = RUNS / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                free.mkdir(parents=True)
                return free
    except OSError as error:
        raise FastCNNError(f"cannot make the run folder: {error}; choose another with --run-dir") from None
    raise AssertionError


def _is_leftover(path: Path) -> bool:
    """Return whether a file was left by a run that was killed before it had written anything."""
    return path.name == LOCK or files.is_partial(path)
