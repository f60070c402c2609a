"""The files of a revision in a folder of their own, for as long as they are measured."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class CannotCompare(Exception):
    """Comparison that cannot be made; the message says why in one line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def worktree(revision: str | None, folder: Path) -> Iterator[tuple[Path, str]]:
    """Give a folder with a revision's files, gone afterwards, and the revision's name; None is the working tree."""
    if revision is None:
        yield ROOT, "the working tree"
        return
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    if not commit:
        raise CannotCompare(f"no revision '{revision}' here: a branch, a tag or a commit, see git log", 2)
    try:
        git("worktree", "add", "--detach", "--quiet", str(folder), commit)
        if not (folder / "fastcnn").is_dir():
            raise CannotCompare(f"no fastcnn in '{revision}' ({commit[:10]}): it cannot be compared", 1)
        yield folder, f"{revision} ({commit[:10]})" if not commit.startswith(revision) else commit[:10]
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> str:
    """Return the output of git, "" where it fails."""
    command = ["git", "-C", str(ROOT), *arguments]
    # Whole or not at all: a worktree that is half made cannot be removed. Signals are seen to afterwards.
    with signals_held():
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    return done.stdout if done.returncode == 0 else ""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
