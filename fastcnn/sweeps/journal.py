"""Storage of a sweep's Optuna study: a journal in its folder, or a database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

JOURNAL = "journal.log"


def open_storage(address: str | None, folder: Path) -> Any:
    """Return Optuna's storage at an SQLAlchemy address; None is the journal in the folder."""
    if address is not None:
        return address
    import filelock
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL

    class Lock:
        """The system's own lock, which a killed process releases; a line that it left unfinished is cut off."""

        def __init__(self) -> None:
            self.lock = filelock.FileLock(f"{path}.lock")

        def acquire(self) -> bool:
            self.lock.acquire()
            _cut_unfinished_line(path)
            return True

        def release(self) -> None:
            self.lock.release()

    return JournalStorage(JournalFileBackend(str(path), lock_obj=Lock()))  # type: ignore[arg-type]


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
