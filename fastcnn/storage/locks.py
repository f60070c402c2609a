"""Lock files: one process at a time."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which deletes no file that is open
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None], *, remove: bool = False) -> Iterator[OSError | None]:
    """Hold the lock file `path`; yield None, or why there can be no lock: a read-only folder, a file system without.

    The system releases the lock when its holder dies, however it dies.

    Args:
        path: the lock file, made where it is missing.
        busy: called once when another process holds the lock; it may raise, otherwise the lock is waited for.
        remove: delete the file afterwards.
    """
    import filelock

    lock, refusal = filelock.FileLock(path), None
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            busy()
            lock.acquire()
    except NotImplementedError:
        refusal = OSError(errno.ENOSYS, "its file system has no locks")
    except OSError as error:
        refusal = error
    try:
        yield refusal
    finally:
        if refusal is None and remove:
            with contextlib.suppress(OSError):  # Windows deletes no file that is open
                path.unlink()
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock of a file."""
    import filelock

    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True


def share(file: int) -> None:
    """Note that this process reads an open file, by a lock that many may have, until its last descriptor is closed."""
    if fcntl:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_shared(path: Path) -> bool:
    """Return whether a process, this one or another, has a file open that it noted by `share`."""
    if not fcntl:
        return False
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False
