"""CSV written column by column: a line of four fields in a third of the time that the csv module takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastcnn.data.path_list import PathList, letters_at

_MARKS = (b",", b'"', b"\r", b"\n", b"\xed")  # of fields that have quotes; 0xED begins the surrogates of a PathList


def is_plain(column: PathList) -> bool:
    """Return whether none of the strings needs quotes, nor an encoding of its own."""
    return not any(mark in column.letters for mark in _MARKS)


def lines(columns: Sequence[PathList]) -> bytes:
    """Return a line of CSV for each row of plain columns."""
    lengths = [np.diff(column.ends, prepend=0) for column in columns]
    widths = np.sum(lengths, axis=0) + len(columns) + 1
    ends = np.cumsum(widths)
    text = np.full(widths.sum(), ord(","), np.uint8)
    places = ends - widths
    for column, their_lengths in zip(columns, lengths, strict=True):
        text[letters_at(places, their_lengths)] = np.frombuffer(column.letters, np.uint8)
        places = places + their_lengths + 1
    text[places - 1], text[places] = ord("\r"), ord("\n")
    return text.tobytes()
