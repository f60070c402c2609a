"""How threads of torch's OpenMP wait for each other: a short while by spinning, then asleep.

By default a thread spins for milliseconds (libgomp) or 200 ms (libomp) when it has nothing to do. On a machine with
other work that time is taken from the very thread that is waited for; docs/notes.md has the figures.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = 1000
"""Rounds of libgomp's loop (Linux) before a thread sleeps, tens of microseconds; its own default is 300,000."""
BLOCK_TIME = 1
"""Milliseconds before a thread of libomp (macOS) or Intel's library sleeps; their own default is 200."""

CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_briefly() -> None:
    """Set the waiting of this process's OpenMP threads, and its children's.

    It is read once, when torch is loaded: nothing is set after that, nor where the user has set one of it.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN_BY_USER):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        os.environ["KMP_BLOCKTIME"] = str(BLOCK_TIME)
