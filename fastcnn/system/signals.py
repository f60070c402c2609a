"""SIGINT, SIGTERM and SIGHUP: raised as an error wherever they arrive, or noted for a loop between two steps."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# Windows has no SIGHUP, which a shell sends where its terminal is closed or its connection is cut off.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopSignal(KeyboardInterrupt):
    """One of `SIGNALS`, where it arrived. Not an Exception, so that `except Exception` does not swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.exit_code = signum, 128 + signum


class StopRequest:
    """The first of `SIGNALS` that arrived."""

    signum = 0
    """0 before one arrives."""


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raise StopSignal at the first of `SIGNALS`; a second SIGINT ends the process at once."""

    def receive(signum: int, frame: FrameType | None) -> None:
        for other in SIGNALS:  # what is being put in order stays so
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        silence_lost_outputs()
        raise StopSignal(signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def received() -> Iterator[StopRequest]:
    """Yield a request that notes the first of `SIGNALS`; a second SIGINT ends the process at once."""
    request = StopRequest()

    def receive(signum: int, frame: FrameType | None) -> None:
        request.signum = request.signum or signum
        silence_lost_outputs()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with _handled(receive):
        yield request


def silence_lost_outputs() -> None:
    """Send standard output and error to nowhere where their terminal or the reader of their pipe is gone.

    A run whose terminal was closed has a state to save, and whatever it prints would raise an OSError first.
    """
    if not hasattr(select, "poll"):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or no file behind it
            poll = select.poll()
            poll.register(stream.fileno(), 0)  # errors alone
            if poll.poll(0):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _is_nohup(signum: int) -> bool:
    return signal.Signals(signum).name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN


@contextlib.contextmanager
def _handled(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals by `receive` for a while; in any other than the main thread, leave them alone.

    A SIGHUP that is ignored stays so: `nohup` asked for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, receive) for signum in SIGNALS if not _is_nohup(signum)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
