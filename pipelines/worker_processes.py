"""The server process that forks workers, and a worker, as their caller sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipelines.server_process import ForkedProcess, new_process
from pipelines.verdict import Verdict
from pipelines.worker_server import Batch

START = 60.0  # seconds that a worker may take until its first sign of life, at least


class Unavailable(RuntimeError):
    """No worker can be started here; the message says why."""


class Worker:
    """A worker process, as its caller sees it."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self.pid, self._link = pid, link
        self.hung = False
        """Whether it was killed for giving no sign of life."""
        self._connection = Connection(os.dup(link.fileno()))

    def ask(self, request: tuple[Batch, tuple[Any, ...]], memory: int, timeout: float) -> Any:
        """Return the worker's answer, None if it died, or was killed as no photo was begun for `timeout` seconds."""
        limit = max(timeout, START)  # until the first sign of life: it may have to import the decoder
        try:
            socket.send_fds(self._link, [b"x"], [memory])
            self._connection.send(request)
            while self._hears_within(limit):
                answer = self._connection.recv()
                if answer is not None:
                    return answer
                limit = timeout
        except (EOFError, OSError):
            self._close()
            return None
        self.hung = True
        self.kill()
        return None

    def _hears_within(self, seconds: float) -> bool:
        """Return whether there is something to receive within a time, which is cut into slices.

        While both processes are stopped (Ctrl-Z) one slice passes, not all of them.
        """
        return any(self._connection.poll(seconds / 20) for _ in range(20))

    def kill(self) -> None:
        """Kill the worker. Its process number is not reused before the server has waited for it."""
        self._close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _close(self) -> None:
        self._connection.close()
        self._link.close()


class Server:
    """The process that forks workers, as its caller sees it. It starts at once; the first `fork` waits for it."""

    def __init__(self, module: str, *, gpu: int | None, fork: bool = False) -> None:
        self._fork_first = fork
        # A GPU cannot be used after a fork, so there the worker imports the decoder.
        self._module, self._preload = module, gpu is None
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None
        self._lock = threading.Lock()  # several threads ask for workers
        self.given_up = False
        """Whether an interruption ends it: threads that still ask for workers get none, and start it no more."""
        self._start()

    def _start(self) -> None:
        if not hasattr(os, "fork") or not sys.executable or getattr(sys, "frozen", False):
            raise Unavailable("this system starts no worker processes")
        ours, theirs = socket.socketpair()
        try:
            self._process = ForkedProcess(ours, theirs) if self._fork_first else new_process(theirs)
        except OSError as error:
            raise Unavailable(f"no worker process can be started ({error.strerror or error})") from error
        finally:
            theirs.close()
        self._link, self._connection = ours, Connection(os.dup(ours.fileno()))
        # Also at the end of this process, if an interruption comes in the way of `close`.
        self._finish = weakref.finalize(self, _end, self._process, self._connection, self._link)
        self._connection.send((self._module, self._preload))
        self._ready = self._fork_first = False  # started again, it would be a fork of a process with threads

    def fork(self) -> Worker:
        """Return a new worker. A server that died is started again, once, unless it is given up."""
        with self._lock:
            try:
                return self._fork()
            except (EOFError, OSError):
                self._restart()
            try:
                return self._fork()
            except (EOFError, OSError) as error:
                raise Unavailable("the process that starts workers ends at once") from error

    def _restart(self) -> None:
        """Start it again. Raises Unavailable where it is given up, also meanwhile; nothing then runs."""
        self.close()
        if not self.given_up:
            self._start()
        if self.given_up:
            self._finish()
            raise Unavailable("interrupted")

    def _fork(self) -> Worker:
        if not self._ready:
            error = self._connection.recv()
            if error:
                raise Unavailable(f"a worker process cannot import {self._module} ({error})")
            self._ready = True
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._connection.send(_working_directory())
                socket.send_fds(self._link, [b"x"], [theirs.fileno()])
                return Worker(self._connection.recv(), ours)
        except BaseException:
            ours.close()
            raise

    def autopsy(self, worker: Worker) -> Verdict:
        """Return the verdict on the single photo that a worker died with."""
        with self._lock:
            try:
                self._connection.send(worker.pid)
                code = self._connection.recv()
            except (EOFError, OSError):  # the server died, too
                code = -signal.SIGKILL
        if code == -signal.SIGKILL:
            return Verdict("decoder killed", "the system ended the decoder: out of memory?")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Verdict("decoder crash", f"the decoder dies of it ({name})")

    def close(self, *, wait: bool = True) -> None:
        """End the process; without `wait` kill it, even in the middle of an import."""
        if self._process is not None:
            if not wait:
                self._process.kill()
            self._finish()
            self._process = None


def _end(process: subprocess.Popen[bytes] | ForkedProcess, *links: Connection | socket.socket) -> None:
    """Tell a server by closed links that it should end, and wait for it, which an interruption does not cut short."""
    for link in links:
        link.close()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _working_directory() -> str:
    """Return the folder that relative paths start from, "" if it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""
