"""SIGINT and SIGTERM: an error wherever they come, or something that a loop asks for between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The process was told to stop. No Exception: code that goes on after those must not go on after this."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.exit_code = signum, 128 + signum


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM raise Stopped; a second SIGINT ends the process at once."""

    def receive(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being put in order stays so
        raise Stopped(signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is put into; a second SIGINT ends the process at once."""
    signals: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with _handled(receive):
        yield signals


@contextlib.contextmanager
def _handled(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let signals go to `receive` for a while; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, receive) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
