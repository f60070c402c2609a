"""Names as they can be printed."""

from __future__ import annotations


def printable(name: str) -> str:
    """Return a path or class name as any terminal, font or page takes it: a line, bytes that are no UTF-8 escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else " " for letter in text)
