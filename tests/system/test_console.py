"""Lines and progress: what is printed goes where it was sent."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console as RichConsole

from fastcnn.system.console import Console


def test_a_bar_on_the_terminal_leaves_the_output_in_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    """As in `fastcnn predict MODEL PHOTOS > answers.txt`: standard error is a terminal, standard output is none."""
    console, terminal = Console(), io.StringIO()
    console._bars = RichConsole(file=terminal, force_terminal=True)
    with console.progress("predicting", "images") as progress:
        progress(1, 2)
        print("photo.jpg  cat 0.9")
        console.line("a line")
    assert capsys.readouterr().out == "photo.jpg  cat 0.9\na line\n"
    assert "predicting" in terminal.getvalue()
    assert "photo.jpg" not in terminal.getvalue()


def test_lines_and_bars_of_several_threads() -> None:
    """Each line is whole, and one bar is drawn at a time."""

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.002)
            return super().write(text)

    terminal, out = io.StringIO(), Slow()
    threads_inside = threading.Barrier(3)

    def one(number: int) -> None:
        console = Console()
        console._bars = RichConsole(file=terminal, force_terminal=True)
        with console.progress(f"run {number}", "photos") as progress:
            threads_inside.wait()
            for k in range(5):
                progress(k, 5)
                console.line(f"line {k} of {number}")

    with contextlib.redirect_stdout(out), ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    assert sorted(out.getvalue().splitlines()) == sorted(f"line {k} of {n}" for k in range(5) for n in range(3))
    assert sum(f"run {number}" in terminal.getvalue() for number in range(3)) == 1


def test_a_bar_on_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write may fail a moment before the signal arrives that a closed terminal sends."""

    class Terminal(io.StringIO):
        gone = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    with console.progress("decoding", "photos") as progress:
        progress(1, 3)
        terminal.gone = True
        progress(2, 3)
    with console.progress("training", "photos") as progress:
        progress(1, 1)
    assert "decoding" in terminal.getvalue()
