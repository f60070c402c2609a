"""torch's switches, which a process has once: set for a run, shared by runs in several threads, and given back."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from fastcnn.errors import UsageError, ignoring_warnings
from fastcnn.system.device import keep_freed_memory, num_cores

Compiling = Literal["never", "at the start", "throughout"]
"""When a run compiles, or calls what is compiled."""

compiling = threading.RLock()
"""Held while torch compiles, captures or exports: its tracers keep their state for the whole process."""


_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Switches that a run asks for; None leaves one as it is."""

    deterministic: bool
    threads: int | None
    fixed: bool
    """Whether that number of threads stays; else `ThreadChoice` may change it, which this thread alone feels."""
    tf32: bool | None
    compiles: Compiling

    def conflict(self, other: Asked) -> str:
        """Return what a run in another thread has otherwise; "" where both can be at work."""
        if self.deterministic != other.deterministic:
            return f"--deterministic {'off' if self.deterministic else 'on'}"
        if self.fixed and other.fixed and self.threads != other.threads:
            return f"--threads {other.threads}"
        if None not in (self.tf32, other.tf32) and self.tf32 != other.tf32:
            return "--precision tf32" if other.tf32 else "another precision than tf32"
        return ""

    def may_have_set(self, threads: int) -> bool:
        """Return whether a number of threads may be this run's."""
        return self.threads is not None and (threads == self.threads or not self.fixed)


@dataclass(frozen=True, kw_only=True)
class _Callers:
    """Switches of the caller, to be given back."""

    threads: int
    deterministic: tuple[bool, bool]
    cudnn: tuple[bool, bool]
    tf32: tuple[bool, bool] | None
    workspace: str | None


_lock = threading.Lock()
_at_work: list[tuple[int, Asked]] = []  # by thread
_callers: _Callers | None = None


@contextlib.contextmanager
def torch_settings(
    device: torch.device, *, threads: int | None, deterministic: bool, tf32: bool = False, compiles: Compiling = "never"
) -> Iterator[None]:
    """Set torch's threads, allocator, device and determinism; restore them afterwards.

    Runs in several threads share what the process has once; the last to end gives it back. Raises UsageError where
    a run in another thread is at work with other values.
    """
    on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
    if on_cpu:
        keep_freed_memory()
    asked = Asked(
        deterministic=deterministic,
        threads=(threads or num_cores()) if on_cpu else None,
        fixed=on_cpu and threads is not None,
        tf32=tf32 if on_cuda else None,
        compiles=compiles,
    )
    with _shared(asked), _usual_modes(), torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Hold `compiling` for an export; take out of the environment afterwards where torch writes its cache's place."""
    with compiling:
        given = _CACHE_DIR in os.environ
        try:
            yield
        finally:
            if not given:
                os.environ.pop(_CACHE_DIR, None)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for a while, in which no run begins: a new thread takes the number set last."""
    with _lock:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _usual_modes() -> Iterator[None]:
    """Put this thread's gradients and default device to what torch begins with. Raises UsageError for another dtype."""
    if torch.get_default_dtype() != torch.float32:
        raise UsageError(
            f"torch's default dtype is {torch.get_default_dtype()}, for the whole process: "
            "call torch.set_default_dtype(torch.float32) first; a run's is --precision"
        )
    on_cpu = torch.get_default_device().type == "cpu"
    with torch.inference_mode(False), torch.enable_grad(), contextlib.nullcontext() if on_cpu else torch.device("cpu"):
        yield


@contextlib.contextmanager
def _shared(asked: Asked) -> Iterator[None]:
    """Set the process's switches, unless a run in another thread has them otherwise, and this thread's number."""
    global _callers
    thread = threading.get_ident()
    with _lock:
        others = [other for ident, other in _at_work if ident != thread]
        _check(asked, others)
        threads = torch.get_num_threads()
        if not _at_work:
            _callers = _read(threads)
        elif len(others) == len(_at_work) and any(one.may_have_set(threads) for one in others):
            assert _callers
            threads = _callers.threads  # a new thread begins with the number that a run has set
        _at_work.append((thread, asked))
        _set(asked)
    if asked.threads:
        torch.set_num_threads(asked.threads)  # OpenMP's, which is this thread's
    try:
        yield
    finally:
        with _lock:
            _at_work.remove((thread, asked))
            if _at_work:
                _set(_at_work[-1][1])
            else:
                assert _callers
                _give_back(_callers)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def _check(asked: Asked, others: list[Asked]) -> None:
    """Raise UsageError where runs in other threads leave this one no way to begin."""
    for other in others:
        if conflict := asked.conflict(other):
            raise UsageError(
                f"a run in another thread is at work with {conflict}, which torch has once for the whole process: "
                "give both runs the same, or start one in a process of its own"
            )
        if "throughout" in (asked.compiles, other.compiles) and "never" not in (asked.compiles, other.compiles):
            raise UsageError(
                "a run in another thread is at work with a compiled engine, and torch compiles for one thread of a "
                "process: start this run in a process of its own, or with --engine eager"
            )


def _read(threads: int) -> _Callers:
    return _Callers(
        threads=threads,
        deterministic=_determinism(),
        cudnn=(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        tf32=_tf32_allowed() if torch.cuda.is_available() else None,
        workspace=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def _set(asked: Asked) -> None:
    if asked.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _use_deterministic_algorithms(asked.deterministic, compiles=asked.compiles != "never")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not asked.deterministic, asked.deterministic
    if asked.tf32 is not None:
        _allow_tf32(asked.tf32, asked.tf32)


def _give_back(callers: _Callers) -> None:
    _use_deterministic_algorithms(*callers.deterministic)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = callers.cudnn
    if callers.tf32 is not None:
        _allow_tf32(*callers.tf32)
    if callers.workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _use_deterministic_algorithms(mode: bool, warn_only: bool = False, *, compiles: bool = False) -> None:
    """Do as torch's function of that name, which imports inductor to tell it too, only where something is compiled.

    That import takes 2.5 s of the start of a run.
    """
    changes = (mode, mode and warn_only) != _determinism()
    if changes:
        torch.set_deterministic_debug_mode(("error", "warn")[warn_only] if mode else "default")
    if (mode and compiles) or (changes and "torch._inductor.config" in sys.modules):
        from torch._inductor import config as inductor

        inductor.deterministic = mode


def _tf32_allowed() -> tuple[bool, bool]:
    with ignoring_warnings():  # as below
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _allow_tf32(matmul: bool, cudnn: bool) -> None:
    with ignoring_warnings():  # torch 2.9 and later advise another spelling, which inductor trips over
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
