"""The command line: `fastcnn` and `python -m fastcnn.cli`."""

from fastcnn.cli.app import command, main

__all__ = ["command", "main"]
