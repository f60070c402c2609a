"""Arrays in memory that worker processes can write into."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref

import numpy as np


class _Memory(mmap.mmap):
    """Shared memory with its file descriptor."""

    fd: int


def shared(shape: tuple[int, ...]) -> np.ndarray:
    """Return zeros (shape) uint8 in memory that worker processes can write into; freed with the array."""
    size = max(1, math.prod(shape))
    if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm, 64 MiB in many containers
        file = os.memfd_create("fastcnn")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.ftruncate(file, size)
    memory = _Memory(file, size)
    memory.fd = file
    weakref.finalize(memory, os.close, file)
    return np.ndarray(shape, np.uint8, memory)


def file_descriptor(array: np.ndarray) -> int:
    """Return the file descriptor of the memory of an array of `shared`, or of its first rows."""
    base = array.base
    while isinstance(base, np.ndarray):  # of a slice
        base = base.base
    assert isinstance(base, _Memory)
    return base.fd
