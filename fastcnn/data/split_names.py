"""Names of split folders, and the words that names of folders are made of."""

from __future__ import annotations

import re

from fastcnn.system.text import comparable

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Name of a folder in small letters -> the split whose photos it holds."""

_SPLIT_NAMES = "|".join(sorted(SPLITS, key=len, reverse=True))
JOINED = re.compile(rf"({_SPLIT_NAMES})(sets?|data|images?|imgs?|photos?|dir|folder)")
"""A split's name with a word written to it: trainset, testdata."""


def words_of(name: str) -> list[str]:
    """Return the words of a name in small letters: apart at signs, digits, capitals and joined words."""
    apart = re.sub(r"([a-z])([A-Z])|([^\W\d_])(\d)|(\d)([^\W\d_])", r"\1\3\5 \2\4\6", comparable(name))
    found: list[str] = []
    for word in re.split(r"[\W_]+", apart.casefold()):
        joined = JOINED.fullmatch(word)
        found += joined.groups() if joined else [word]
    return found


def splits_in(name: str) -> set[str]:
    """Return the splits that words of a name stand for."""
    return {SPLITS[word] for word in words_of(name) if word in SPLITS}
