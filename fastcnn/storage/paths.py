"""Folders of the user."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """Return the folder for what can be made again: decoded photos, built kernels, engines' timings."""
    try:
        import platformdirs
    except ImportError:  # a bare GPU box that only proves the engines: what platformdirs says on Linux
        home = os.environ.get("XDG_CACHE_HOME", "").strip()
        return (Path(home) if home else Path.home() / ".cache") / "fastcnn"
    return platformdirs.user_cache_path("fastcnn")
