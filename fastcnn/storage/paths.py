"""Folders of the user."""

from __future__ import annotations

from pathlib import Path


def user_cache_folder() -> Path:
    """Return the folder for what can be made again: decoded photos, built kernels, engines' timings."""
    try:
        import platformdirs
    except ImportError:  # a bare GPU box that only proves the engines
        return Path.home() / ".cache" / "fastcnn"
    return platformdirs.user_cache_path("fastcnn")
