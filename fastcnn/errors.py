"""What can go wrong, as exceptions that carry the command's exit code, and the one way to fall back."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class FastCNNError(Exception):
    """Something that the user can mend. The message says what, expected, got and what to do next."""

    exit_code = 1


class UsageError(FastCNNError):
    """A wrong option name or value."""

    exit_code = 2


class DataError(FastCNNError):
    """The data cannot be used."""

    exit_code = 3


class CheckError(FastCNNError):
    """A parity, verification or regression check failed."""

    exit_code = 4


class FastCNNWarning(UserWarning):
    """A fallback or a peculiarity of the data that the user should know of."""


def warn(message: str) -> None:
    """Warn the user in one line, attributed to the project and not to a line of it."""
    warnings.warn_explicit(message, FastCNNWarning, "fastcnn", 1, registry={})


def fall_back(message: str, *, strict: bool) -> None:
    """Warn that something less than what was asked for is used; under `--strict` raise FastCNNError instead."""
    if strict:
        raise FastCNNError(f"{message} (an error because of --strict)")
    warn(message)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the choice most like `name`, or ""."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
