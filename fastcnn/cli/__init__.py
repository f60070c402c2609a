"""The command line: `fastcnn` and `python -m fastcnn.cli`."""

from fastcnn.cli.app import main

__all__ = ["main"]
