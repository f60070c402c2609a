"""Values of options: coerced to their types and checked."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any, Literal, NewType, Union, get_args, get_origin

from fastcnn.errors import UsageError, nearest

Bytes = NewType("Bytes", int)
"""A number of bytes, given as one, or as 500MB, 2GB, 1.5GiB."""


Interval = NewType("Interval", str)
"""How often, in steps as 200 or in time as 30s, 5m, 1h: see `parse_interval`."""


def option_name(field: str) -> str:
    """Return the option of a field: --batch-size for batch_size."""
    return "--" + field.replace("_", "-")


def check(name: str, value: object, ok: bool, expected: str) -> None:
    """Raise a UsageError that names the option, what it takes and what it got, unless `ok`."""
    if not ok:
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise UsageError(f"{option_name(name)}: expected {expected}, got {shown}")


def coerce(name: str, kind: Any, value: Any) -> Any:
    """Return `value` as `kind`: options and YAML give strings where numbers are meant (PyYAML reads 1e-3 as one)."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None or value in ("", "none", "None"):
            return None
        return coerce(name, next(k for k in get_args(kind) if k is not type(None)), value)
    if origin is Literal:
        choices = get_args(kind)
        _check_scalar(name, value)
        if value not in choices:
            raise UsageError(
                f"{option_name(name)}: expected one of {', '.join(choices)}, "
                f"got '{value}'{nearest(str(value), choices)}"
            )
        return value
    if origin is tuple:
        items = value.strip("[]() ").split(",") if isinstance(value, str) else value
        if items in (["none"], [""], None):
            items = []
        items = items if isinstance(items, list | tuple) else [items]
        return tuple(coerce(name, get_args(kind)[0], item.strip() if isinstance(item, str) else item) for item in items)
    return coerce_scalar(name, kind, value)


def parse_bytes(text: str) -> int | None:
    """Return the bytes that 500MB, 2G, 1.5 GiB or 1000 stand for; None for anything else or less than 1."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d*)?) *([kmgt]?)(i?)b?", text.strip().lower(), re.ASCII)
    if match is None or (match[3] and not match[2]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")) or None


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """Return (steps, None) for 200, (None, seconds) for 30s, 5m or 1.5h, (None, None) for anything else or nothing."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d*)?) *(steps|[smh]?)", text.strip().lower(), re.ASCII)
    if match is None or not float(match[1]):
        return None, None
    if match[2] in ("steps", ""):
        return (None, None) if "." in match[1] else (int(match[1]), None)
    return None, float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def coerce_scalar(name: str, kind: type, value: Any) -> Any:
    """Return one value, not a list, as `kind`."""
    _check_scalar(name, value)
    if kind is Bytes:
        count = parse_bytes(str(value)) if not isinstance(value, bool) else None
        if count is None:
            raise UsageError(f"{option_name(name)}: expected bytes as 2GB, 500MB or 1.5GiB, got '{value}'")
        return count
    if kind is Interval:
        if isinstance(value, bool) or parse_interval(str(value)) == (None, None):
            raise UsageError(f"{option_name(name)}: expected steps as 200, or a time as 30s or 5m, got '{value}'")
        return str(value).strip()
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    text = str(value).strip()
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is str and isinstance(value, str | Path):
            return str(value)
        if kind in (int, float) and not isinstance(value, bool):
            number = float(text)
            if kind is float:
                return number
            if number == int(number):
                return int(text) if text.lstrip("+-").isdigit() else int(number)
    except (ValueError, KeyError, OverflowError):
        pass
    raise UsageError(f"{option_name(name)}: expected {expected}, got '{value}'")


def _check_scalar(name: str, value: object) -> None:
    """Raise UsageError for what YAML has beside scalars. It is not shown: it may print longer than memory is."""
    if not isinstance(value, bool | int | float | str | Path | None):
        raise UsageError(f"{option_name(name)}: expected one value, got a {type(value).__name__}")
    if isinstance(value, int) and abs(value) >= 2**64:  # with more digits than Python prints, perhaps
        raise UsageError(f"{option_name(name)}: expected a smaller number")
