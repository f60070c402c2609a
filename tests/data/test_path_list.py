from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.config import LayoutOptions
from fastcnn.data.index import scan
from fastcnn.data.path_list import PathList

ANY = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates as well: names that are no UTF-8


@given(st.lists(ANY, max_size=8), st.lists(ANY, max_size=8), st.data())
def test_it_is_the_sequence_that_it_was_made_of(first: list[str], second: list[str], data: st.DataObject) -> None:
    paths, strings = PathList.joined([PathList.of(first), PathList.of(second)]), (*first, *second)
    assert paths == strings
    assert tuple(paths) == strings
    assert len(paths) == len(strings)
    assert [paths[i] for i in range(-len(strings), len(strings))] == [*strings, *strings]
    assert paths[1:-1] == strings[1:-1]
    assert pickle.loads(pickle.dumps(paths)) == paths
    if strings:
        chosen = data.draw(st.lists(st.integers(0, len(strings) - 1)))
        assert paths.take(np.array(chosen, np.intp)) == [strings[i] for i in chosen]


def test_lists_of_other_paths_are_not_equal() -> None:
    paths = PathList.of(["ab", "c"])
    assert paths != PathList.of(["a", "bc"])
    assert paths != ("ab",)
    assert paths != 3


def test_folders_that_sort_otherwise_than_their_paths_and_one_within_another(tmp_path: Path) -> None:
    """'a b' is behind 'a', and its photos before those of 'a', as a space is before the slash."""
    names = ["a/1.jpg", "a b/1.jpg", "a.b/1.jpg", "c/2.jpg", "held/a/1.jpg", "held/c/1.jpg", "held/held/1.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(scan(tmp_path).paths) == sorted(names)
    index = scan(tmp_path, options=LayoutOptions(("a b", "a.b"), {"train": ".", "test": "held"}))
    assert list(zip(index.paths, index.folders, strict=True)) == [
        ("a/1.jpg", "train"),
        ("c/2.jpg", "train"),
        *((path, split) for path in names[4:] for split in ("train", "test")),
    ]
