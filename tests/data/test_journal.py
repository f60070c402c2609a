from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn.data import journal_files
from fastcnn.data.journal import Journal

PATHS = st.text(st.characters(exclude_categories=()), max_size=4)  # lone surrogates as well: names that are no UTF-8
NUMBERS = st.integers(-(2**63), 2**63 - 1)
ENTRIES = st.fixed_dictionaries(
    {
        "path": PATHS,
        **dict.fromkeys(("size", "mtime", "ctime", "inode", "row"), NUMBERS),
        "digest": st.one_of(st.just(""), st.binary(min_size=16, max_size=16).map(bytes.hex)),
        "crc": st.integers(0, 2**32 - 1),
        "reason": st.sampled_from(["", "", "truncated", "decoder hung"]),
    },
    optional={"damage": st.text(min_size=1, max_size=5), "decode_timeout": st.floats(1, 10)},
)


def entries_of(journal: Journal) -> dict[str, dict[str, Any]]:
    return {path: journal.entry(at) for at, path in enumerate(journal.paths)}


def entry(name: str, **values: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("size", "mtime", "ctime", "inode", "row", "crc"), 7)
    return {"path": name, **numbers, "digest": "", "reason": "", **values}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal_files, "FEW_LINES", 1)
    return tmp_path


@settings(max_examples=25)
@given(parts=st.lists(st.lists(ENTRIES, max_size=5), max_size=4))
def test_the_last_entry_of_each_path_with_and_without_index(
    parts: list[list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, expected = tmp_path_factory.mktemp("cache"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_files, "FEW_LINES", 1)
        patch.setattr(journal_files, "_CHUNK", 3)
        for part in parts:
            journal_files.append(folder, part)
            expected |= {one["path"]: one for one in part if any(bytes.fromhex(one["digest"])) or not one["digest"]}
            if len(expected) < len({one["path"] for one in part}):
                return  # a digest of zeros is none
            found = journal_files.read(folder)
            assert entries_of(found) == expected
            journal_files.write_index(folder, found)
            assert entries_of(journal_files.read(folder)) == expected
            assert journal_files.read(folder).num_usable() == sum(not one["reason"] for one in expected.values())


def test_lines_behind_the_index_are_read_and_a_later_index_has_them(folder: Path) -> None:
    for number, names in enumerate((["a", "b", "c"], ["b", "d"], [])):
        journal_files.append(folder, [entry(name, row=number) for name in names])
        found = journal_files.read(folder)
        assert found.num_indexed == [0, 3, 4][number]
        journal_files.write_index(folder, found)
    assert {path: one["row"] for path, one in entries_of(found).items()} == {"a": 0, "b": 1, "c": 0, "d": 1}
    with (folder / "photos.jsonl").open("ab") as file:
        file.write(journal_files.line(entry("e"))[:-5])  # cut short
    assert entries_of(journal_files.read(folder)).keys() == set("abcd")
    journal_files.append(folder, [entry("f")])
    assert entries_of(journal_files.read(folder)).keys() == set("abcdf")


def test_an_index_is_only_written_where_it_saves_time(tmp_path: Path) -> None:
    journal_files.append(tmp_path, [entry("a")])
    journal_files.write_index(tmp_path, journal_files.read(tmp_path))
    assert not (tmp_path / "photos.index").exists()


@pytest.mark.parametrize("name", ["photos.index", "photos.jsonl"])
def test_a_flipped_bit_changes_no_entry(folder: Path, name: str) -> None:
    """In the index, all lines are read instead; in a line, its photo is not known."""
    journal_files.append(
        folder, [entry(f"photo {i}", row=i, reason="corrupt" if i % 7 == 1 else "") for i in range(20)]
    )
    expected = entries_of(journal_files.read(folder))
    journal_files.write_index(folder, journal_files.read(folder))
    whole, draw = (folder / name).read_bytes(), random.Random(0)
    for position in draw.sample(range(len(whole)), 200):
        content = bytearray(whole)
        content[position] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(content)
        found = entries_of(journal_files.read(folder))
        assert found.items() <= expected.items() if name == "photos.jsonl" else found == expected
        assert len(found) >= 18
    for length in range(0, len(whole), 50):
        (folder / name).write_bytes(whole[:length])
        assert entries_of(journal_files.read(folder)).items() <= expected.items()


def test_the_index_of_another_journal_is_not_used(folder: Path) -> None:
    journal_files.append(folder, [entry("a"), entry("b")])
    journal_files.write_index(folder, journal_files.read(folder))
    (folder / "photos.jsonl").unlink()
    assert not len(journal_files.read(folder))
    journal_files.append(folder, [entry("c"), entry("d"), entry("e")])
    assert entries_of(journal_files.read(folder)).keys() == set("cde")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"photos": -1},
        {"photos": 2**70},
        {"letters": 10**30},
        {"photos": 4, "letters": 2 - 2 * 68},
        {"notes": {}},
        {"notes": [[9, {}]]},
        {"notes": [[0, {"reason": 3}]]},
        {"notes": [[0, []]]},
        {"notes": [3]},
        {"crc": None},
    ],
)
def test_a_malicious_index_is_not_used(folder: Path, change: dict[str, Any]) -> None:
    journal_files.append(folder, [entry("a"), entry("b")])
    expected = entries_of(journal_files.read(folder))
    journal_files.write_index(folder, journal_files.read(folder))
    head, _, rest = (folder / "photos.index").read_bytes().partition(b"\n")
    body = head.rpartition(b', "sum": ')[0] + b"}"
    (folder / "photos.index").write_bytes(journal_files.line({**json.loads(body), **change}) + rest)
    assert entries_of(journal_files.read(folder)) == expected
    assert journal_files.read(folder).num_indexed == 0


def test_an_index_that_cannot_be_written_is_left_out(folder: Path) -> None:
    journal_files.append(folder, [entry("a")])
    (folder / "photos.index").mkdir()
    journal_files.write_index(folder, journal_files.read(folder))
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["photos.jsonl"]
    assert len(journal_files.read(folder)) == 1


def test_numbers_that_no_file_has(folder: Path) -> None:
    journal_files.append(folder, [entry("a", row=2**80, size=-(2**70)), entry("b", crc=-1), entry("c", digest="x")])
    found = journal_files.read(folder)
    assert found.rows.tolist() == [2**63 - 1, -2, 7]
    assert list(found.digests) == ["", "", ""]
    assert np.array_equal(found.facts[0], [-(2**63), 7, 7])
