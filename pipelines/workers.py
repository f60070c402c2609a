"""Decoding in worker processes: a segmentation fault, or a lack of memory, costs only the photo that causes it.

A server process imports the decoder and does nothing else; it forks a worker whenever one is needed, so that after a
crash the next is there in milliseconds. Workers write pixels into the caller's array, in shared memory. When a worker
dies, its batch is halved until the photo that kills it is alone: it gets a verdict, the others their pixels. Where a
worker begins no photo for as long as one may take, it is killed, and its photos are decoded one by one.

The server is no fork of the caller, which may use threads and a GPU (but see `start_early`), and none of
multiprocessing's, which would run the caller's script again. When the caller dies, however it dies, the server sees its
socket closed and ends the workers.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from pipelines.server_process import ForkedProcess, new_process
from pipelines.verdict import MAX_PIXELS, Source, Verdict
from pipelines.worker_server import Batch

DECODE_TIMEOUT = 60.0  # seconds that one photo may take
START = 60.0  # seconds that a worker may take until its first sign of life, at least
THREADS = 8  # of one worker: more would be slowed down by the interpreter's lock
GIVE_UP = 16  # failed photos, with none decoded, after which the decoder itself is tested


class Unavailable(RuntimeError):
    """No worker can be started here; the message says why."""


class _Died(Exception):
    """The worker died, hung or its decoder raised an exception; the verdict is for a batch of one photo."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict)


class Workers:
    """A decoder in worker processes, started on first use and ended by `close`.

    Args:
        decoder: a name in `pipelines.BACKENDS`.
        threads: decoding threads over all workers; None is one a core.
        gpu: device on which DALI decodes; None is the CPU.
        max_pixels: as for `pipelines.decode`.
        timeout: seconds that one photo may take.
    """

    def __init__(
        self,
        decoder: str,
        *,
        threads: int | None = None,
        gpu: int | None = None,
        max_pixels: int = MAX_PIXELS,
        timeout: float = DECODE_TIMEOUT,
    ) -> None:
        threads = threads or pipelines.num_cores()
        num = 1 if gpu is not None else math.ceil(threads / THREADS)
        self.note = ""
        """Why photos are decoded in this process; "" as long as workers do it."""
        self._decoder, self._timeout = decoder, timeout
        self._server: _Server | None = None
        self._options = (math.ceil(threads / num), gpu, max_pixels)
        self._workers: list[_Worker | None] = [None] * num
        self._num_decoded = self._num_failed = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def decode(self, sources: Sequence[Source], size: int, out: np.ndarray) -> list[Verdict]:
        """Write the pixels of each usable source into its row of `out`; return the verdict on each, in their order.

        As `pipelines.decode`, except that `out` is an array of `shared` or its first rows. A photo that crashes the
        decoder is "decoder crash", or "decoder killed" where the system killed the worker; one that alone takes longer
        than the time limit is "decoder hung". Where no worker can be started, this process decodes, without a time
        limit, and `note` says why.

        Raises DecoderUnavailable where the decoder fails on every photo.
        """
        assert out.shape == (len(sources), size, size, 3)
        if not self.note:
            try:
                return self._decode_all(sources, size, out)
            except Unavailable as error:
                self.note = str(error)
        threads, gpu, max_pixels = self._options
        return pipelines.decode(
            sources, size, out, decoder=self._decoder, workers=threads, gpu=gpu, max_pixels=max_pixels
        )

    def close(self) -> None:
        """End the processes. Their memory on a GPU is free afterwards."""
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._workers = [None] * len(self._workers)
        if self._server is not None:
            self._server.close()

    def _decode_all(self, sources: Sequence[Source], size: int, out: np.ndarray) -> list[Verdict]:
        if self._server is None:
            gpu = self._options[1]
            early = _early.pop(self._decoder, None) if gpu is None else None
            self._server = early or _Server(pipelines.BACKENDS[self._decoder], gpu=gpu)
        share = max(1, math.ceil(len(sources) / len(self._workers)))
        parts = [Batch(list(sources[i : i + share]), size, i) for i in range(0, len(sources), share)]
        if len(parts) <= 1:
            verdicts = [self._decode(0, part, out) for part in parts]
        else:
            with ThreadPoolExecutor(len(parts), thread_name_prefix="worker") as pool:
                try:
                    verdicts = list(pool.map(lambda i: self._decode(i, parts[i], out), range(len(parts))))
                except KeyboardInterrupt:  # else it would wait for the batches
                    self._server.given_up = True
                    self.close()
                    raise
        return [verdict for part in verdicts for verdict in part]

    def _decode(self, lane: int, batch: Batch, out: np.ndarray) -> list[Verdict]:
        """Return the verdicts on a batch: after a crash those on its halves, after a hang those on single photos."""
        try:
            verdicts = self._ask(lane, batch, out)
        except _Died as death:
            if len(batch.sources) == 1:
                return [self._alone(lane, batch, out, death.verdict)]
            # Halves would wait for the one that hangs at every division.
            step = 1 if death.verdict.reason == "decoder hung" else math.ceil(len(batch.sources) / 2)
            starts = range(0, len(batch.sources), step)
            parts = [Batch(batch.sources[i : i + step], batch.size, batch.first + i) for i in starts]
            return [verdict for part in parts for verdict in self._decode(lane, part, out)]
        self._num_decoded += len(verdicts)
        return verdicts

    def _alone(self, lane: int, batch: Batch, out: np.ndarray, verdict: Verdict) -> Verdict:
        """Return the verdict on a photo that killed a worker, after a second try: memory may be free again."""
        try:
            if verdict.reason != "decoder hung":
                return self._ask(lane, batch, out)[0]
        except _Died as death:
            verdict = death.verdict
        out[batch.first] = 0
        self._num_failed += 1
        if self._num_failed >= GIVE_UP and not self._num_decoded:
            self._probe(lane, batch.size, verdict)
        return verdict

    def _probe(self, lane: int, size: int, verdict: Verdict) -> None:
        """Raise DecoderUnavailable where the decoder also fails on a photo that is surely good."""
        from PIL import Image

        photo = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(photo, "JPEG")
        try:
            self._num_decoded += len(self._ask(lane, Batch([photo.getvalue()], size, 0), shared((1, size, size, 3))))
        except _Died:
            why = f"it fails on every photo ({verdict.detail}); choose another with --decoder"
            raise pipelines.DecoderUnavailable(self._decoder, why) from None

    def _ask(self, lane: int, batch: Batch, out: np.ndarray) -> list[Verdict]:
        assert self._server is not None
        worker = self._workers[lane]
        if worker is None:
            worker = self._workers[lane] = self._server.fork()
        answer = worker.ask((batch, self._options), _memory(out).fd, self._timeout)
        if isinstance(answer, list):
            return answer
        if answer is None:
            self._workers[lane] = None
            ended = self._server.autopsy(worker)
            answer = Verdict("decoder hung", f"longer than {self._timeout:g} s") if worker.hung else ended
        raise _Died(answer)


_early: dict[str, _Server] = {}


def start_early(decoder: str, *, fork: bool = False) -> None:
    """Begin to import a decoder in a server process, for the next Workers; `end_early` ends it if none has used it.

    `fork`: import it here and fork, where this process has one thread: for a caller that needs the same libraries.
    """
    if decoder not in _early:
        if fork:
            pipelines.choose(decoder, gpu=False)
            fork = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208
        with contextlib.suppress(Unavailable):
            _early[decoder] = _Server(pipelines.BACKENDS[decoder], gpu=None, fork=fork)


def end_early() -> None:
    """End the servers that were started early and not used."""
    while _early:
        _early.popitem()[1].close(wait=False)


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


def _memory(array: np.ndarray) -> _Memory:
    base = array.base
    while isinstance(base, np.ndarray):  # of a slice
        base = base.base
    assert isinstance(base, _Memory)
    return base


class _Memory(mmap.mmap):
    """Shared memory with its file descriptor."""

    fd: int


class _Worker:
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


class _Server:
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

    def fork(self) -> _Worker:
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

    def _fork(self) -> _Worker:
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
                return _Worker(self._connection.recv(), ours)
        except BaseException:
            ours.close()
            raise

    def autopsy(self, worker: _Worker) -> Verdict:
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
