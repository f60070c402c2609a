"""Launches of Triton kernels: how many programs, and a record of them instead of running them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

PRETENDED_PROGRAMS = 3
"""Programs that share the work without a GPU: more than one, so that what they do together is tested."""

REGISTERS = 65536
"""Registers of a multiprocessor (sm_80 and sm_90)."""


class Launch(NamedTuple):
    """Kernel with its grid and arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    meets: bool = False
    """Whether its programs wait for each other: all of them must then run at once."""
    alone: bool = False
    """Whether a multiprocessor runs one program at most, and the compiler is told that it may have all registers."""

    def options(self) -> dict[str, Any]:
        """Return the options by which Triton compiles and launches it, and the constant that follows from them."""
        early = starts_early(self)
        options: dict[str, Any] = {"num_warps": self.warps, "EARLY": early}
        if early:
            options["launch_pdl"] = True
        if self.alone:  # else the compiler spills some to make room for a second program
            options["maxnreg"] = min(255, REGISTERS // (32 * self.warps))
        if self.meets:
            options["launch_cooperative_grid"] = True
        return options

    def run(self) -> None:
        """Launch the kernel, or record it: see `recording`."""
        if _records is not None:
            _records.append(self)
        else:
            self.kernel[self.grid](**self.arguments, **self.options())


_records: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Yield a list that collects the launches; nothing is launched."""
    global _records
    _records = []
    try:
        yield _records
    finally:
        _records = None


def num_programs(device: torch.device, num_tiles: int, across: int = 1) -> int:
    """Return the number of programs among which tiles are shared, none of them idle.

    `across` such programs side by side are one a multiprocessor at most, so that all of them run at once.
    """
    if _records is not None:
        most = 132  # recorded launches are those of an H100
    elif device.type == "cuda":
        most = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        most = PRETENDED_PROGRAMS
    return max(1, min(num_tiles, most // across))


def starts_early(launch: Launch) -> bool:
    """Return whether a launch may begin while the one before ends, and wait for its results (sm_90 and later).

    None does: what it saves is not measured (`bench/proof/ideas.py` does so on a GPU).
    """
    return False


def can_meet(device: torch.device) -> bool:
    """Return whether the programs of a launch can wait for each other: the interpreter runs them in turn."""
    return device.type == "cuda" or _records is not None
