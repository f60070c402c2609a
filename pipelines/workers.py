"""Decoding in processes that may die of a photo: a segmentation fault, or no memory left, costs that photo only.

A server process imports the decoder and does nothing else; it forks a worker whenever one is needed, so that after a
death the next is there in milliseconds. Workers write pixels into the caller's array, in memory that both share. Where
a worker dies, its batch is halved until the guilty photo is alone: that gets a verdict, the others their pixels.

The server is no fork of the caller, who may have threads and a GPU in use, nor one of multiprocessing's, which would
run the caller's script again. When the caller dies, however it dies, the server sees its socket closed and ends them.
"""

from __future__ import annotations

import contextlib
import importlib
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
import traceback
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pipelines
from pipelines.verdict import MAX_PIXELS, Source, Verdict

THREADS = 8  # of one worker: with more, Python's lock would begin to count
MAPPED = 2  # arrays that a worker keeps at hand: mapping and filling them with zeros anew costs 4% of its time
GIVE_UP = 16  # photos that failed when none was decoded: then it may be the decoder


class Unavailable(RuntimeError):
    """No worker can be started here; the message says why."""


class _Died(Exception):
    """The worker died of its batch, or failed in a way that no decoder should; the verdict is for a photo alone."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict)


class _Batch(NamedTuple):
    """What a worker is asked: some rows of an array in shared memory, and what belongs into them."""

    sources: list[Source]
    size: int
    first: int  # the row of the first source


class Workers:
    """A decoder in worker processes, started when they are first needed and ended by `close`.

    Args:
        decoder: a name in `pipelines.BACKENDS`.
        threads: decoding threads over all workers; None is one a core.
        gpu: device on which DALI decodes; None is the CPU.
        max_pixels: as for `pipelines.decode`.
    """

    def __init__(
        self, decoder: str, *, threads: int | None = None, gpu: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        threads = threads or pipelines.num_cores()
        num = 1 if gpu is not None else math.ceil(threads / THREADS)
        self.note = ""
        """Why photos are decoded in this process; "" where they are not."""
        self._decoder = decoder
        self._server: _Server | None = None
        self._options = (math.ceil(threads / num), gpu, max_pixels)
        self._workers: list[_Worker | None] = [None] * num
        self._num_decoded = self._num_failed = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def decode(self, sources: Sequence[Source], size: int, out: np.ndarray) -> list[Verdict]:
        """Write the pixels of each usable source into its row of `out`; return a verdict a source, in their order.

        As `pipelines.decode`, but for `out`, which is an array of `shared` or its first rows. A photo of which the
        decoder dies is "decoder crash", or "decoder killed" where the system ended the worker. Where no worker can be
        started, it is `pipelines.decode` in this process, and `note` says why.

        Raises DecoderUnavailable where the decoder dies of everything.
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
        """End the processes. Whatever they hold on a GPU is free afterwards."""
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
        parts = [_Batch(list(sources[i : i + share]), size, i) for i in range(0, len(sources), share)]
        if len(parts) <= 1:
            verdicts = [self._decode(0, part, out) for part in parts]
        else:
            with ThreadPoolExecutor(len(parts), thread_name_prefix="worker") as pool:
                verdicts = list(pool.map(lambda i: self._decode(i, parts[i], out), range(len(parts))))
        return [verdict for part in verdicts for verdict in part]

    def _decode(self, lane: int, batch: _Batch, out: np.ndarray) -> list[Verdict]:
        """Return the verdicts on a batch; after a death, of its halves."""
        try:
            verdicts = self._ask(lane, batch, out)
        except _Died as death:
            if len(batch.sources) == 1:
                return [self._alone(lane, batch, out, death.verdict)]
            half = len(batch.sources) // 2
            first = batch._replace(sources=batch.sources[:half])
            second = batch._replace(sources=batch.sources[half:], first=batch.first + half)
            return self._decode(lane, first, out) + self._decode(lane, second, out)
        self._num_decoded += len(verdicts)
        return verdicts

    def _alone(self, lane: int, batch: _Batch, out: np.ndarray, verdict: Verdict) -> Verdict:
        """Return the verdict on a photo of which a worker died, after a second try: memory may be free again."""
        try:
            return self._ask(lane, batch, out)[0]
        except _Died:
            out[batch.first] = 0
            self._num_failed += 1
        if self._num_failed >= GIVE_UP and not self._num_decoded:
            self._probe(lane, batch.size, verdict)
        return verdict

    def _probe(self, lane: int, size: int, verdict: Verdict) -> None:
        """Raise DecoderUnavailable where the decoder fails on a photo that is surely good, too."""
        from PIL import Image

        photo = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(photo, "JPEG")
        try:
            self._num_decoded += len(self._ask(lane, _Batch([photo.getvalue()], size, 0), shared((1, size, size, 3))))
        except _Died:
            why = f"it fails on every photo ({verdict.detail}); choose another with --decoder"
            raise pipelines.DecoderUnavailable(self._decoder, why) from None

    def _ask(self, lane: int, batch: _Batch, out: np.ndarray) -> list[Verdict]:
        assert self._server is not None
        worker = self._workers[lane]
        if worker is None:
            worker = self._workers[lane] = self._server.fork()
        answer = worker.ask((batch, self._options), _memory(out).fd)
        if isinstance(answer, list):
            return answer
        if answer is None:
            self._workers[lane] = None
            answer = self._server.autopsy(worker)
        raise _Died(answer)


_early: dict[str, _Server] = {}


def start_early(decoder: str) -> None:
    """Begin to import a decoder in a server process, for the next Workers; `end_early` ends what none has taken."""
    if decoder not in _early:
        with contextlib.suppress(Unavailable):
            _early[decoder] = _Server(pipelines.BACKENDS[decoder], gpu=None)


def end_early() -> None:
    """End the servers that were started early and not used."""
    while _early:
        _early.popitem()[1].close(wait=False)


def shared(shape: tuple[int, ...]) -> np.ndarray:
    """Return zeros, uint8, in memory that worker processes can write into; freed with the array."""
    size = max(1, math.prod(shape))
    if hasattr(os, "memfd_create"):  # not bound by the size of /dev/shm, 64 MiB in many a container
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
    """Shared memory that knows its file."""

    fd: int


class _Worker:
    """A worker as its caller sees it."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self.pid, self._link = pid, link
        self._connection = Connection(os.dup(link.fileno()))

    def ask(self, request: tuple[_Batch, tuple[Any, ...]], memory: int) -> Any:
        """Return the worker's answer, None where it died."""
        try:
            socket.send_fds(self._link, [b"x"], [memory])
            self._connection.send(request)
            return self._connection.recv()
        except (EOFError, OSError):
            self._close()
            return None

    def kill(self) -> None:
        """End the worker, whatever it is doing. Its number is its own until the server has asked for its end."""
        self._close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _close(self) -> None:
        self._connection.close()
        self._link.close()


class _Server:
    """The process that forks workers, as its caller sees it. Started at once; the first `fork` waits for it."""

    def __init__(self, module: str, *, gpu: int | None) -> None:
        # A GPU survives no fork, so there the worker imports the decoder.
        self._module, self._preload = module, gpu is None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # several threads ask for workers
        self._start()

    def _start(self) -> None:
        if not hasattr(os, "fork") or not sys.executable or getattr(sys, "frozen", False):
            raise Unavailable("this system starts no worker processes")
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from pipelines.workers import serve; serve({theirs.fileno()})"
        # Photos are what is decoded side by side: libraries' own threads would only be in their way.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=env,
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            raise Unavailable(f"no worker process can be started ({error.strerror or error})") from error
        finally:
            theirs.close()
        self._link, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._connection.send((self._module, self._preload))
        self._ready = False

    def fork(self) -> _Worker:
        """Return a new worker. A server that died is started anew, once."""
        with self._lock:
            try:
                return self._fork()
            except (EOFError, OSError):
                self.close()
                self._start()
            try:
                return self._fork()
            except (EOFError, OSError) as error:
                raise Unavailable("the process that starts workers ends at once") from error

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
        """Return the verdict on a photo alone with which a worker died."""
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
        """End the process, or without waiting for the end of an import, kill it."""
        if self._process is not None:
            self._connection.close()
            self._link.close()
            if not wait:
                self._process.kill()
            self._process.wait()
            self._process = None


def _working_directory() -> str:
    """Folder that relative paths start from; "" where it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def serve(handle: int) -> None:
    """Import the decoder that the caller names, then fork workers until it is gone. The server's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group: it is the caller who decides
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    link = socket.socket(fileno=handle)
    connection = Connection(os.dup(handle))
    workers: set[int] = set()
    with contextlib.suppress(EOFError, OSError):
        module, preload = connection.recv()
        try:
            if preload:
                importlib.import_module(module)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send("")
        while True:
            request = connection.recv()
            if isinstance(request, str):  # the caller's working directory: fork a worker there
                _, handles, _, _ = socket.recv_fds(link, 1, 1)
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    link.close()
                    _work(module, handles[0], request)
                os.close(handles[0])
                workers.add(pid)
                connection.send(pid)
            else:
                workers.discard(request)
                connection.send(_end_of(request))
    for pid in workers:  # in the middle of a batch they would not notice
        os.kill(pid, signal.SIGKILL)


def _end_of(pid: int) -> int:
    """Return the exit code of a worker that died, the negative signal where it was one."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # a worker of the server before this one, which was killed
        return -signal.SIGKILL


def _work(module: str, handle: int, directory: str) -> None:
    """Decode what the caller asks for until it is gone. A worker's whole life."""
    try:
        with contextlib.suppress(OSError):  # gone, or not to be entered: absolute paths need none
            os.chdir(directory)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")  # where memory ends, this is what the system should end
        link = socket.socket(fileno=handle)
        connection = Connection(os.dup(handle))
        mapped: dict[int, mmap.mmap] = {}
        while True:
            _, handles, _, _ = socket.recv_fds(link, 1, 1)
            if not handles:
                break
            number = os.fstat(handles[0]).st_ino  # no other file's while this one is mapped
            if number not in mapped:
                if len(mapped) == MAPPED:
                    del mapped[next(iter(mapped))]
                mapped[number] = mmap.mmap(handles[0], 0)
            os.close(handles[0])
            (batch, options) = connection.recv()
            connection.send(_answer(module, batch, options, mapped[number]))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _answer(
    module: str, batch: _Batch, options: tuple[int, int | None, int], memory: mmap.mmap
) -> list[Verdict] | Verdict:
    """Return the verdicts on a batch, or one on its photo alone where the decoder raised what no decoder should."""
    shape = len(batch.sources), batch.size, batch.size, 3
    part = np.ndarray(shape, np.uint8, memory, batch.first * batch.size**2 * 3)
    try:
        verdicts: list[Verdict] = importlib.import_module(module).decode(
            batch.sources, batch.size, part, None, *options
        )
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("decoder crash", f"{type(error).__name__}: {error} ({last.name})")
    return verdicts
