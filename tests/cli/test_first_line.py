"""The first line of a command that has to import torch comes before it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMANDS = ("train photos", "sweep photos", "eval runs/x", "export runs/x", "predict x.onnx y.jpg")
NEED_TORCH = ("train", "eval", "export")  # in their own process
SCRIPT = """
import sys
sys.modules["torch"] = None  # importing it is an error
from fastcnn.cli import main
for command in sys.argv[1:]:
    try:
        main(command.split())
    except ImportError:
        print("torch", file=sys.stderr)
"""


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    for folder in ("photos/a", "photos/b", "runs/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "x.onnx").touch()
    command = [sys.executable, "-c", SCRIPT, *COMMANDS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line == "torch" or line.startswith("opening ")]
    for command in COMMANDS:
        name, what, *_ = command.split()
        assert said.pop(0) == f"opening {what}"
        assert name not in NEED_TORCH or said.pop(0) == "torch"
