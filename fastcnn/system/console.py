"""Output for the user: lines on standard output, progress bars on standard error."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from fastcnn.system import callers_generator
from fastcnn.system.signals import silence_lost_outputs

with callers_generator.kept("rich.style"):
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal

_writing = threading.Lock()  # a line at a time, whichever thread writes it
_bar_drawn = threading.Lock()  # a terminal has room for one bar


class Console:
    """Prints lines and shows progress: a bar on a terminal, else a plain line now and then; nothing if quiet.

    Of runs in several threads, the first shows a bar, and the others plain lines.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars = RichConsole(file=cast(TextIO, _Bars()))

    def line(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            _print(text, sys.stdout)

    @contextmanager
    def progress(self, label: str, unit: str, *, start: int = 0) -> Iterator[Callable[..., None]]:
        """Yield a function of (done, total, note="") that shows progress; no note: its rate in `unit` per second.

        start: number done earlier, which does not count in the rate.
        """
        if self.quiet:
            yield lambda done, total, note="": None
        elif self._bars.is_terminal and _bar_drawn.acquire(blocking=False):
            try:
                with self._bar(label, unit, start) as update:
                    yield update
            finally:
                _bar_drawn.release()
        else:
            yield _plain_progress(label, unit, start)

    @contextmanager
    def _bar(self, label: str, unit: str, start: int) -> Iterator[Callable[..., None]]:
        began = time.perf_counter()
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._bars,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # above the bar; what goes to a file or a pipe goes there
        ) as bar:
            task = bar.add_task(label, total=None, completed=start, note="")

            def update(done: int, total: int, note: str = "") -> None:
                rate = (done - start) / (time.perf_counter() - began)
                bar.update(task, completed=done, total=total, note=note or f"{rate:,.0f} {unit}/s")

            yield update


class _Bars(io.TextIOBase):
    """Standard error as bars are drawn on it: where nobody reads it any more, the work goes on."""

    @property
    def _stream(self) -> TextIO:
        stream: TextIO = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # rich's own proxy would call this again
        return stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with _going_on():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _going_on():
            self._stream.flush()


def _plain_progress(label: str, unit: str, start: int) -> Callable[..., None]:
    last = began = time.perf_counter()

    def write(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= PLAIN_INTERVAL and done < total:
            last, rate = now, (done - start) / (now - began)
            left = (total - done) / max(rate, 1e-9)
            note = note or f"{rate:,.0f} {unit}/s"
            _print(f"{label} {done:,}/{total:,}  {note}  {left:.0f} s left", sys.stderr)

    return write


def _print(text: str, file: TextIO) -> None:
    with _going_on(), _writing:
        print(text, file=file, flush=True)


@contextmanager
def _going_on() -> Iterator[None]:
    try:
        yield
    except OSError:  # nobody reads any more; the work goes on
        silence_lost_outputs()
