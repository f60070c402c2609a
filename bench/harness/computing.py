"""Processes that compute beside what is measured, as a machine has them that does other work too."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Standard input ends with the process that holds its other end, however that one ends: nothing computes on after it.
MULTIPLY = """
import select, sys
import numpy
a = numpy.random.default_rng(0).normal(size=(512, 512)) / 512**0.5
b = a
print("computing", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    b = numpy.clip(a @ b, -1, 1)
"""


@contextlib.contextmanager
def computing(count: int) -> Iterator[list[int]]:
    """Let so many processes multiply matrices meanwhile, a thread each; give their process ids. They have all begun."""
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", MULTIPLY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **ONE_THREAD},
            )
            stack.enter_context(process)  # waits for it, and closes its pipes
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout
            assert process.stdout.readline(), "a process that computes did not begin"
        yield [process.pid for process in processes]
