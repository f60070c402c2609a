"""Lines and progress: what is printed goes where it was sent."""

from __future__ import annotations

import io

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
