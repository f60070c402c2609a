"""Checkpoints: plain tensors and plain data, written under another name and renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastcnn.errors import FastCNNError, first_line

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` always holds a whole one: the old until the new is on disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise FastCNNError(f"cannot write the checkpoint {path}: {error}; free some space") from None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return a checkpoint's content. Nothing in the file is executed (`weights_only=True`)."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FastCNNError(f"no checkpoint {path}") from None
    except Exception as error:
        raise FastCNNError(f"{path} is not a checkpoint that can be read: {first_line(error)}") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise FastCNNError(f"{path} is not a checkpoint of fastcnn")
    if state["format"] > FORMAT:
        raise FastCNNError(
            f"{path} has format {state['format']}, this fastcnn reads up to {FORMAT}: upgrade fastcnn to read it"
        )
    return state
