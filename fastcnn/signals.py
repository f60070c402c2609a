"""SIGINT and SIGTERM as something that a loop asks for between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is put into; a second SIGINT ends the process at once."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def receive(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
