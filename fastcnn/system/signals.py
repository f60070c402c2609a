"""SIGINT and SIGTERM: raised as an error wherever they arrive, or noted for a loop that looks between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(KeyboardInterrupt):
    """SIGINT or SIGTERM, where it arrived. Not an Exception, so that `except Exception` does not swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.exit_code = signum, 128 + signum


class StopRequest:
    """The first SIGINT or SIGTERM that arrived."""

    signum = 0
    """0 before one arrives."""


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raise StopSignal at the first SIGINT or SIGTERM; a second SIGINT ends the process at once."""

    def receive(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being put in order stays so
        raise StopSignal(signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def received() -> Iterator[StopRequest]:
    """Yield a request that notes the first SIGINT or SIGTERM; a second SIGINT ends the process at once."""
    request = StopRequest()

    def receive(signum: int, frame: FrameType | None) -> None:
        request.signum = request.signum or signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with _handled(receive):
        yield request


@contextlib.contextmanager
def _handled(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle both signals by `receive` for a while; in any other than the main thread, leave them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, receive) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
