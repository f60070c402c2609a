"""Python's own generator, `random`: it is the caller's."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def kept(module: str) -> Iterator[None]:
    """Give `random` its state back after the first import of a module that draws from it, as rich.style does.

    For that import alone: what another thread draws meanwhile is drawn again.
    """
    if module in sys.modules:
        yield
        return
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
