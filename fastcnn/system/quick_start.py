"""Start and end of a process that imports torch, without looking for garbage where there is none."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import in the block without collecting garbage, which takes a tenth of the time that torch does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end(exit_code: int) -> NoReturn:
    """Leave the process without a last look for garbage, which takes half a second where torch is imported."""
    gc.freeze()
    sys.exit(exit_code)
