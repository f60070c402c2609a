"""Class folders listed by one process or by several."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastcnn.data import listing_process
from fastcnn.data.listing_process import list_files
from tests.data.test_index import many, touch


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Ten class folders of 3 to 12 photos and other files, of which two are many."""
    monkeypatch.setattr(listing_process, "MANY", 7)
    for number in range(10):
        many(tmp_path, f"class {number}", 3 + number)
        touch(
            tmp_path,
            f"class {number}/.hidden.jpg",
            f"class {number}/notes {number}.txt",
            f"class {number}/in/\u00e9.png",
        )
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("num_processes", [2, 3, 20])
def test_processes_list_what_one_does(folders: list[Path], num_processes: int) -> None:
    root = folders[0].parent
    alone = list_files(root, folders, 1)
    assert alone.counts == [4 + number for number in range(10)]
    assert (alone.skipped.hidden, dict(alone.skipped.others)) == (10, {".txt": 10})
    assert list_files(root, folders, num_processes) == alone
    assert list_files(root, folders[:3], num_processes) == list_files(root, folders[:3], 1)


def test_folders_of_a_process_that_fails_are_listed_here(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be started, it ends at once, or it ends after the first of its folders."""
    root = folders[0].parent
    alone = list_files(root, folders, 1)
    first = "import json, sys; from pathlib import Path; from fastcnn.data.file_columns import FileColumns; "
    first += "root, folder, *_ = map(Path, json.load(sys.stdin)); file = sys.stdout.buffer; "
    first += "FileColumns.of(root, folder).write(file); file.write(b'{')"
    for command in (["./missing"], [sys.executable, "-c", "raise SystemExit(1)"], [sys.executable, "-c", first]):
        monkeypatch.setattr(listing_process.own_module, "command", lambda name, command=command: command)
        assert list_files(root, folders, 2) == alone
