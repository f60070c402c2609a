"""Photos that the tests of caches decode."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def data(photos: Path, tmp_path: Path) -> Path:
    """A copy of some photos, and a text file that passes for one."""
    folder = tmp_path / "data"
    for source in sorted(photos.iterdir()):
        if source.is_dir():
            (folder / source.name).mkdir(parents=True)
            for photo in sorted(source.glob("*.jpg"))[:5]:
                shutil.copy2(photo, folder / source.name)
    (next(folder.iterdir()) / "page.jpg").write_text("<html>not found</html>")
    return folder
