"""Sizes and intervals that are written with a unit: 2GB, 30s."""

from __future__ import annotations

import re
from typing import NewType

Bytes = NewType("Bytes", int)
"""Number of bytes; written as a number or as 500MB, 2GB, 1.5GiB."""


Interval = NewType("Interval", str)
"""Number of steps, as 200, or a time, as 30s, 5m or 1h: see `parse_interval`."""


def parse_bytes(text: str) -> int | None:
    """Return the number of bytes in 500MB, 2G, 1.5 GiB or 1000; None for anything else or less than 1."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d*)?) *([kmgt]?)(i?)b?", text.strip().lower(), re.ASCII)
    if match is None or (match[3] and not match[2]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")) or None


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """Return (steps, None) for 200, (None, seconds) for 30s, 5m or 1.5h, (None, None) for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d*)?) *(steps|[smh]?)", text.strip().lower(), re.ASCII)
    if match is None or not float(match[1]):
        return None, None
    if match[2] in ("steps", ""):
        return (None, None) if "." in match[1] else (int(match[1]), None)
    return None, float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
