"""The first line of a command that has to import torch comes before it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import contextlib, sys
sys.modules["torch"] = None  # importing it is an error
from fastcnn.cli import main
with contextlib.suppress(ImportError):
    main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "command",
    [
        ["train", "photos"],
        ["sweep", "photos"],
        ["eval", "runs/x"],
        ["export", "runs/x"],
        ["predict", "x.onnx", "y.jpg"],
    ],
    ids=lambda command: command[0],
)
def test_the_first_line_comes_before_torch(command: list[str], tmp_path: Path) -> None:
    for folder in ("photos/a", "photos/b", "runs/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "x.onnx").touch()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[0] == f"opening {command[1]}"
