"""Exceptions that carry the exit code of the command, warnings, and the one way to fall back."""

from __future__ import annotations

import contextlib
import difflib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class FastCNNError(Exception):
    """An error that the user can correct. The message says what is wrong and what to do."""

    exit_code = 1


class UsageError(FastCNNError):
    """An option has a wrong name or value."""

    exit_code = 2


class DataError(FastCNNError):
    """The data cannot be used for training or evaluation."""

    exit_code = 3


class CheckError(FastCNNError):
    """A parity, verification or regression check failed."""

    exit_code = 4


class FastCNNWarning(UserWarning):
    """A fallback, or something unusual in the data, that the user should know about."""


def warn(message: str) -> None:
    """Warn the user in one line, without a file name and line number."""
    warnings.warn_explicit(message, FastCNNWarning, "fastcnn", 1, registry={})


@contextlib.contextmanager
def giving_warnings_to(take: Callable[[str], bool | None]) -> Iterator[None]:
    """Give the text of each warning of ours to `take`, in all threads; it is shown as before if that returns True."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, FastCNNWarning) or take(str(message)):
            before(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def ignoring_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """Ignore warnings of a category for a while.

    One thread at a time: the filters are the process's, and two threads that give them back in turn would leave one's.
    """
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


_filters = threading.RLock()


def fall_back(message: str, *, strict: bool) -> None:
    """Warn that a fallback is used; if `strict`, raise FastCNNError instead."""
    if strict:
        raise FastCNNError(f"{message} (an error because of --strict)")
    warn(message)


@contextlib.contextmanager
def os_error_as(problem: str, advice: str = "", kind: type[FastCNNError] = FastCNNError) -> Iterator[None]:
    """Raise an error of our own where the system refuses something inside: the problem, its reason and the advice."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem}: {error.strerror or error}{advice}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the choice most like `name`, or ""."""
    by_letters = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(name.casefold(), list(by_letters), n=1, cutoff=0.5)
    return f"; did you mean '{by_letters[close[0]]}'?" if close else ""
