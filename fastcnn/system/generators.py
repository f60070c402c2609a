"""Random generators of the process, which are the caller's: seeded for a run, and given back as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

CPU = torch.device("cpu")


@contextlib.contextmanager
def given_back(device: torch.device = CPU) -> Iterator[None]:
    """Give Python's, numpy's and torch's generators, for the CPU and a device, back their state afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the caller's may be this one
    cpu, other = torch.get_rng_state(), _state(device)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if device.type == "cuda" and other is not None:
            torch.cuda.set_rng_state(other, device)
        elif device.type == "mps" and other is not None:
            torch.mps.set_rng_state(other)


def seed(device: torch.device, number: int) -> None:
    """Seed torch's generators for the CPU and a device; those of other devices are left alone."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def _state(device: torch.device) -> torch.Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None
