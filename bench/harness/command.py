"""What the commands of bench have in common: the command as it was typed, and an error as a line and an exit code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from fastcnn.errors import FastCNNError


def typed(program: str, words: Sequence[str] | None) -> str:
    """Return a command as it was typed, paths cut down to their last part. words: None, those of this process."""
    given = sys.argv[1:] if words is None else words
    return " ".join([program, *(re.sub(r"[^\s=]*[/\\]([^/\\]+)[/\\]*", r"\1", word) for word in given)])


def exit_code(program: str, work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Do a command's work and return its exit code; what the user can mend, or has interrupted, is a line."""
    try:
        return work()
    except KeyboardInterrupt:
        message, code = interrupted, 130
    except FastCNNError as error:
        code = error.exit_code
        message = interrupted if code > 128 else str(error)  # a run was ended by a signal
    print(f"{program}: error: {message}", file=sys.stderr)
    return code
