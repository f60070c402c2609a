"""Run folders: whose they are, and what becomes of one that is not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcnn.errors import FastCNNError
from fastcnn.storage import run_folder


@pytest.mark.parametrize("written", [[], [run_folder.CONFIG]])
def test_a_run_that_is_refused_leaves_the_folder_to_the_one_that_has_it(tmp_path: Path, written: list[str]) -> None:
    """Both were given one folder that was empty when they began."""
    asked = tmp_path / "run"
    with run_folder.folder(asked, "") as folder:
        with pytest.raises(FastCNNError, match="another command is training"), run_folder.folder(asked, ""):
            raise AssertionError("two runs in one folder")
        for name in written:
            (folder / name).touch()
    assert sorted(path.name for path in asked.iterdir()) == written


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with run_folder.folder(tmp_path / "run", "") as folder:
            (folder / run_folder.CONFIG).touch()
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert not list(tmp_path.iterdir())
