from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastcnn.storage.paths import user_cache_folder


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
@pytest.mark.parametrize("home", ["", "elsewhere"])
def test_the_cache_folder_is_the_same_without_platformdirs(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare GPU box has no platformdirs: its cold runs would find a warm cache, and tests write into the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home else "")
    with_it = user_cache_folder()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert user_cache_folder() == with_it
    assert with_it == (tmp_path / home if home else Path.home() / ".cache") / "fastcnn"
