"""Runs, sweeps and caches of ours, told by the files in them: their pictures are no photos of the user."""

from __future__ import annotations

import os
from pathlib import Path

OWN_FILES = [
    ("config.yaml", "split.csv"),
    ("config.yaml", "last.pt"),
    ("config.yaml", ".lock"),
    ("cache.json", "photos.jsonl"),
    ("sweep.csv", "config.yaml"),
    ("sweep.csv", "journal.log"),
]
"""Files by which a folder is told to be a run, a cache or a sweep of ours: two, as a class may hold one of them."""


def is_ours(folder: str | Path) -> bool:
    """Return whether a folder is a run, a cache or a sweep of ours."""
    return any(all(os.path.exists(os.path.join(folder, name)) for name in names) for names in OWN_FILES)  # noqa: PTH110, PTH118
