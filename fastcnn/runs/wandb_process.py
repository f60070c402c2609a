"""wandb in this process: its service, and what it reads of the process, shared by runs in several threads."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from fastcnn.system.text import as_utf8

_DATA_DIR = "WANDB_DATA_DIR"

_lock = threading.RLock()
_num_users = 0
_ours = False
_chosen_by_user = False  # the folder of pending uploads
_changes = contextlib.ExitStack()  # to what wandb reads


@contextlib.contextmanager
def used(data: Path) -> Iterator[bool]:
    """Let this thread use wandb; yield whether its service is ours, not begun by another part of the process.

    The last thread to leave ends a service that is ours: ended earlier, it would take nothing more from the others.
    data: the folder of pending uploads, for a thread that is alone; see `uploads_in`.
    """
    global _num_users, _ours, _chosen_by_user
    with _lock:
        if not _num_users:
            _ours, _chosen_by_user = "WANDB_SERVICE" not in os.environ, _DATA_DIR in os.environ
            _changes.enter_context(_environment(WANDB_ERROR_REPORTING="false", **{_DATA_DIR: str(data)}))
            _changes.enter_context(_command_as_utf8())
        _num_users += 1
    try:
        yield _ours
    finally:
        with _lock:
            end_if_alone()
            _num_users -= 1
            if not _num_users:
                _changes.close()


def end_if_alone() -> bool:
    """End wandb's service if it is ours and no other thread uses it; return whether that is so."""
    with _lock:
        alone = _ours and _num_users == 1
        if alone:
            with contextlib.suppress(BaseException):  # also of a library that calls sys.exit
                import wandb

                if wandb.run is None:  # else the caller has begun a run meanwhile
                    wandb.teardown()  # so that our process does not wait for it on exit
        return alone


@contextlib.contextmanager
def uploads_in(data: Path) -> Iterator[None]:
    """Have what this thread gives to wandb wait in a folder of its own, one thread at a time."""
    with _lock:
        before = os.environ[_DATA_DIR]
        os.environ[_DATA_DIR] = before if _chosen_by_user else str(data)
        try:
            yield
        finally:
            os.environ[_DATA_DIR] = before


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set those environment variables that are unset; unset them afterwards."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _command_as_utf8() -> Iterator[None]:
    """Have program and command line, which wandb records, be text that it can write."""
    arguments = sys.argv
    program = str(Path.cwd() / (getattr(sys.modules["__main__"], "__file__", None) or ""))
    with contextlib.ExitStack() as stack:
        if as_utf8(program) != program:
            stack.enter_context(_environment(WANDB_PROGRAM=as_utf8(program)))
        if list(map(as_utf8, arguments)) != arguments:
            stack.callback(setattr, sys, "argv", arguments)
            sys.argv = list(map(as_utf8, arguments))
        yield
