"""Steps of a proof that go wrong, each run in a process of its own by tests/bench/test_gpu_proof.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from bench.proof.lines import Line, Proof


def value() -> Line:
    return {"answer": 42, "seconds": "a value's own name"}


def good(proof: Proof) -> None:
    proof.measure("good", value)


def failing(proof: Proof) -> None:
    proof.measure("failing", lambda: {"quotient": 1 / 0})
    proof.measure("after the failing one", value)


def exiting(proof: Proof) -> None:
    sys.exit(3)


def dying(proof: Proof) -> None:
    """As the GPU's driver may end a process, and as a kernel may never end."""
    proof.measure("first", value)
    proof.measure("ends the process", lambda: os.kill(os.getpid(), 9) or {})
    proof.measure("never ends", lambda: time.sleep(60) or {}, limit=1)
    proof.measure("last", value)


def illegal() -> Line:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def lost(proof: Proof) -> None:
    """A process whose GPU answers no more."""
    proof.measure("illegal", illegal)
    proof.measure("by another process", lambda: {"pid": os.getpid()})


def slow(proof: Proof) -> None:
    """Leaves a process in a session of its own behind, as torchrun does."""
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    proof.measure("orphan", lambda: {"pid": orphan.pid})
    proof.measure("slow", lambda: time.sleep(60) or {})
