"""Paths of photos, or other strings, as one buffer with offsets: a tuple of strings takes 60 bytes more for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
import numpy.typing as npt

CHUNK = 65536  # paths handled at once, which bounds the memory that takes
LETTERS_CHUNK = 8192  # the same where each letter has a number
_ANY_NAME = "surrogatepass"  # names that are no UTF-8 are strings with lone surrogates


class PathList(Sequence[str]):
    """A sequence of paths that is not changed any more; equal to any sequence of the same strings.

    Args:
        letters: the paths in UTF-8, one behind the other.
        ends: (N,) where each of them ends.
    """

    __slots__ = ("ends", "letters")

    def __init__(self, letters: bytes, ends: npt.NDArray[np.int64]) -> None:
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathList:
        """Return the list of paths given as strings."""
        paths = list(paths)
        if (joined := "".join(paths)).isascii():
            return cls(joined.encode(), np.fromiter(accumulate(map(len, paths)), np.int64, len(paths)))
        encoded = [path.encode(errors=_ANY_NAME) for path in paths]
        return cls(b"".join(encoded), np.fromiter(accumulate(map(len, encoded)), np.int64, len(encoded)))

    @classmethod
    def joined(cls, parts: Sequence[PathList]) -> PathList:
        """Return the paths of several lists, one behind the other."""
        starts = accumulate((len(part.letters) for part in parts), initial=0)
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(b"".join(part.letters for part in parts), np.concatenate([np.empty(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> PathList: ...
    def __getitem__(self, at: int | np.integer[Any] | slice) -> str | PathList:
        """Return a path, or the list of some."""
        if isinstance(at, slice):
            return self.take(np.arange(*at.indices(len(self))))
        i = range(len(self))[at]
        start = int(self.ends[i - 1]) if i else 0
        return self.letters[start : int(self.ends[i])].decode(errors=_ANY_NAME)

    def __iter__(self) -> Iterator[str]:
        for path in self.encoded():
            yield path.decode(errors=_ANY_NAME)

    def encoded(self) -> Iterator[bytes]:
        """Yield the paths in UTF-8."""
        start = 0
        for first in range(0, len(self), CHUNK):
            for end in self.ends[first : first + CHUNK].tolist():
                yield self.letters[start:end]
                start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PathList):
            return self.letters == other.letters and np.array_equal(self.ends, other.ends)
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return the paths as Python writes a tuple of them."""
        return repr(tuple(self))

    def find(self, paths: PathList) -> npt.NDArray[np.intp]:
        """Return (n,) the position here of each of n paths, the last one of a path that is here twice; -1 without.

        By sorted hashes, in a fraction of the memory of a dict.
        """
        if not len(self):
            return np.full(len(paths), -1)
        own, wanted = self._hashes(), paths._hashes()
        order = np.argsort(own, kind="stable")
        at = order[np.searchsorted(own[order], wanted, side="right") - 1]
        at[own[at] != wanted] = -1
        for first in range(0, len(paths), CHUNK):
            known = first + np.flatnonzero(at[first : first + CHUNK] >= 0)
            here, there = self.take(at[known]), paths.take(known)
            if here != there:  # two paths of one hash
                at[known[[a != b for a, b in zip(here.encoded(), there.encoded(), strict=True)]]] = -1
        return at

    def _hashes(self) -> npt.NDArray[np.int64]:
        return np.fromiter(map(hash, self.encoded()), np.int64, len(self))

    def take(self, positions: npt.NDArray[np.integer]) -> PathList:
        """Return the paths at some positions, in that order."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])[positions]
        ends = self.ends[positions]
        letters, parts = np.frombuffer(self.letters, np.uint8), []
        for first in range(0, len(positions), LETTERS_CHUNK):
            part = slice(first, first + LETTERS_CHUNK)
            parts.append(letters[letters_at(starts[part], ends[part] - starts[part])].tobytes())
        return PathList(b"".join(parts), np.cumsum(ends - starts))


def letters_at(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the position of each letter of strings that begin at some positions (N,), one string behind the other."""
    before = np.cumsum(lengths) - lengths
    positions: npt.NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return positions
