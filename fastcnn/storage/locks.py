"""Locks: one process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from fastcnn.errors import FastCNNError

LOCK = ".lock"  # of a run folder


@contextlib.contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[bool]:
    """Hold the cache's lock. The system gives it up when its holder dies. Yield False where nothing can be written."""
    import filelock

    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        note("another run is decoding these photos: waiting for it")
        lock.acquire()
    except NotImplementedError:
        raise OSError(errno.ENOSYS, "its file system has no locks") from None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other commands from training in a run's folder. The system gives it free when its holder dies."""
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FastCNNError(f"another command is training in {folder}: wait until it ends, or stop it") from None
    except (OSError, NotImplementedError):  # whatever cannot be written is said by what is written next
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes nothing that is open
            (folder / LOCK).unlink()
        lock.release()
