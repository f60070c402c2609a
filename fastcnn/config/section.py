"""The base class of the sections: reads values from options, YAML and W&B, and words pydantic's errors in one line."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NewType, Union, get_args, get_origin

from pydantic import ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from fastcnn.config.synonyms import as_choice, propose_option, propose_value
from fastcnn.errors import UsageError

Bytes = NewType("Bytes", int)
"""Number of bytes; written as a number or as 500MB, 2GB, 1.5GiB."""

Interval = NewType("Interval", str)
"""Number of steps, as 200, or a time, as 30s, 5m or 1h: see `parse_interval`."""

_EXPECTED = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "{le:g} or less",
    "finite_number": "a finite number",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "value_error": "{error}",  # a ValueError in a validator says what is expected
}
"""Expected values, by the type of a pydantic error or the first word of that type."""

_NOTHING = ("", "none", "no", "off", "false")
"""Words for an empty list, in small letters; YAML reads a bare no or off as false."""


def option_name(field: str) -> str:
    """Return the option of a field: --batch-size for batch_size."""
    return "--" + field.replace("_", "-")


def base_type(kind: Any) -> Any:
    """Return the type of a field without its limits and without None: int for Annotated[int, Field(ge=1)] | None."""
    while get_origin(kind) in (Annotated, Union, types.UnionType):
        kind = get_args(kind)[0]
    return kind


@dataclass(
    frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
)
class Section:
    """Some of the options of a run. A wrong name or value raises UsageError, in one line."""

    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kind = cls.__pydantic_fields__[info.field_name].annotation
        if type(None) in get_args(kind) and (value is None or str(value).strip().lower() in ("", "none")):
            return None
        kind = base_type(kind)
        if get_origin(kind) is not tuple:
            return _read_scalar(kind, value)
        items = value.strip("[]() ").split(",") if isinstance(value, str) else value
        if items is None or items is False or (isinstance(value, str) and value.strip("[]() ").lower() in _NOTHING):
            return ()
        items = items if isinstance(items, list | tuple) else [items]
        return [_read_scalar(get_args(kind)[0], item) for item in items]

    @model_validator(mode="wrap")
    @classmethod
    def _translate_errors(cls, values: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            raise UsageError(_message(error, cls.__pydantic_fields__)) from None


def _read_scalar(kind: Any, value: Any) -> Any:
    """Return a value that is no list in a form that pydantic reads as `kind`."""
    kind = base_type(kind)
    if not isinstance(value, bool | int | float | str | Path):
        raise ValueError("one value")
    if isinstance(value, int) and abs(value) >= 2**64:  # perhaps with more digits than Python prints
        raise ValueError("a smaller number")
    if isinstance(value, bool) and kind in (int, float):
        raise ValueError("a number")
    if kind is Bytes:
        count = parse_bytes(str(value))
        if count is None:
            raise ValueError("bytes as 2GB, 500MB or 1.5GiB")
        return count
    if kind is Interval:
        if parse_interval(str(value)) == (None, None):
            raise ValueError("steps as 200, or a time as 30s or 5m")
        return str(value).strip()
    if get_origin(kind) is Literal and isinstance(value, str):
        return as_choice(value, get_args(kind))
    if kind is int and isinstance(value, str) and not value.isdecimal():
        with contextlib.suppress(ValueError):  # 1e3 is a whole number, too
            return float(value)
    return str(value).strip() if isinstance(value, str | Path) else value


def _message(error: ValidationError, fields: dict[str, FieldInfo]) -> str:
    """Return the first of pydantic's errors in one line: the option, what it takes and what it got."""
    first = error.errors(include_url=False)[0]
    name, kind, value, context = str(first["loc"][0]), first["type"], first["input"], first.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"no option '{name}'{propose_option(name, fields)}"
    close = ""
    if kind == "literal_error":
        choices = base_type(fields[name].annotation)
        choices = get_args(get_args(choices)[0] if get_origin(choices) is tuple else choices)
        expected, close = f"one of {', '.join(choices)}", propose_value(str(value), choices)
    else:
        template = _EXPECTED.get(kind) or _EXPECTED.get(kind.partition("_")[0])
        expected = template.format(**context) if template else first["msg"].removeprefix("Input should be ")
    shown = str(value) if kind.startswith(("greater", "less")) else _shown(value)
    return f"{option_name(name)}: expected {expected}, got {shown}{close}"


def _shown(value: object) -> str:
    """Return a value for a message; what may print longer than memory is (a nested list, a huge number) by its type."""
    if isinstance(value, str | Path):
        return f"'{value}'"
    if isinstance(value, list | tuple) and len(value) <= 10:
        return ",".join(str(item) if isinstance(item, str | float) else _shown(item) for item in value)
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64):
        return str(value)
    return f"a value of type {type(value).__name__}"


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
