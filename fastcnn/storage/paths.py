"""Folders of the user."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from pathlib import Path

from fastcnn.errors import fall_back

_KEPT_AT_HOME = {"MPLCONFIGDIR": "matplotlib", "TRITON_HOME": "triton", "WANDB_CACHE_DIR": "wandb-cache"}
"""Variables of libraries that keep files in the home folder, and their folders where that cannot be written."""


def user_cache_folder(*, strict: bool = False) -> Path:
    """Return the folder for what can be made again: decoded photos, built kernels, engines' timings.

    Where the usual one cannot be written (a home folder that is read-only, or none), it is one of this user's among the
    temporary files, which a warning names; if `strict`, FastCNNError is raised instead.
    """
    usual = usual_cache_folder()
    return usual if can_be_written(usual) else _temporary_folder(usual, strict)


def usual_cache_folder() -> Path:
    """Return the folder for what can be made again, whether or not it can be written."""
    try:
        import platformdirs

        return platformdirs.user_cache_path("fastcnn")
    except ImportError:  # a bare GPU box that only proves the engines: what platformdirs says on Linux
        home = os.environ.get("XDG_CACHE_HOME", "").strip()
        return Path(home or os.path.expanduser("~/.cache")) / "fastcnn"  # noqa: PTH111 (Path raises without a home)
    except RuntimeError:  # nobody knows this user's home folder
        return Path("~/.cache/fastcnn")


def can_be_written(folder: Path) -> bool:
    """Return whether files can be made in a folder, which need not be there yet."""
    if not folder.is_absolute():
        return False
    first = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 (Path raises where it may not look)
    return first.is_dir() and os.access(first, os.W_OK | os.X_OK)


@functools.cache
def _temporary_folder(usual: Path, strict: bool) -> Path:
    """Return a folder that only this user can write, the same each time, after a warning that it is used.

    Libraries that would write into the home folder are told to keep their files there, too.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"fastcnn-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            folder = Path(tempfile.mkdtemp(prefix="fastcnn-"))  # another user made that one
    except (OSError, AttributeError):  # no temporary files either, or a system without user numbers
        return usual
    fall_back(
        f"the cache folder {usual} cannot be written: using {folder} instead; name a lasting one with XDG_CACHE_HOME "
        "(for photos alone: --cache-dir)",
        strict=strict,
    )
    for name, place in _KEPT_AT_HOME.items():
        os.environ.setdefault(name, str(folder / place))
    return folder
