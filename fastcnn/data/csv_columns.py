"""CSV written column by column: a line of four fields in a third of the time that the csv module takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcnn.data.journal import DIGEST_BYTES, Digests
from fastcnn.data.path_list import PathList

_QUOTED = (b",", b'"', b"\r", b"\n", b"\xed")  # in fields that have quotes; 0xED begins the surrogates of a PathList


class Column(NamedTuple):
    """Strings in UTF-8, one behind the other."""

    letters: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.intp]
    """(N,) bytes of each."""

    @classmethod
    def of_paths(cls, paths: PathList) -> Column:
        """Return the column of paths."""
        return cls(np.frombuffer(paths.letters, np.uint8), np.diff(paths.ends, prepend=0))

    @classmethod
    def of_names(cls, names: Sequence[str], numbers: npt.NDArray[np.integer]) -> Column:
        """Return the column of the names at some positions (N,)."""
        encoded = [name.encode(errors="surrogatepass") for name in names]
        lengths = np.array([len(name) for name in encoded], np.intp).take(numbers)
        padded = np.array(encoded, np.bytes_)[numbers].view(np.uint8).reshape(len(numbers), -1)
        return cls(padded[np.arange(padded.shape[1]) < lengths[:, None]], lengths)

    @classmethod
    def of_digests(cls, digests: Digests) -> Column:
        """Return the column of digests."""
        known = digests.packed.any(axis=1)
        digits = digests.packed[known].tobytes().hex().encode()
        return cls(np.frombuffer(digits, np.uint8), np.where(known, 2 * DIGEST_BYTES, 0))

    def is_plain(self) -> bool:
        """Return whether none of the strings needs quotes, nor an encoding of its own."""
        letters = self.letters.tobytes()
        return not any(mark in letters for mark in _QUOTED)


def lines(columns: Sequence[Column]) -> bytes:
    """Return a line of CSV for each row of plain columns."""
    widths = sum(column.lengths for column in columns) + len(columns) + 1
    ends = np.cumsum(widths)
    text = np.full(ends[-1] if len(ends) else 0, ord(","), np.uint8)
    places = ends - widths
    for letters, lengths in columns:
        before = np.cumsum(lengths) - lengths
        text[np.arange(len(letters)) + np.repeat(places - before, lengths)] = letters
        places = places + lengths + 1
    text[places - 1], text[places] = ord("\r"), ord("\n")
    return text.tobytes()
